"""A hub of data sets on this machine: serves folders as huggingface.co serves repositories, as far as reading goes.

``ROOT/OWNER/NAME/REVISION/...`` are the files of a repository at a revision, whose slashes are underscores.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


def commit(revision: str) -> str:
    """The commit that a revision stands for."""
    return hashlib.sha1(revision.encode()).hexdigest()


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(unquote(self.path))
        path = urlsplit(self.path)
        for pattern, answer in (
            (r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._about),
            (r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self._tree),
            (r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
        ):
            if match := re.fullmatch(pattern, path.path):
                repo, revision, *inside = (unquote(part or "") for part in match.groups())
                folder = self._folder(repo, revision or "main")
                if folder is None:
                    return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return answer(folder, *inside)
        return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _folder(self, repo: str, revision: str) -> Path | None:
        for folder in self.root.glob(f"{repo}/*"):
            if revision.replace("/", "_") in (folder.name, commit(folder.name)):
                return folder
        return None

    def _about(self, folder: Path) -> None:
        files = [{"rfilename": path.relative_to(folder).as_posix()} for path in folder.rglob("*") if path.is_file()]
        repo = "/".join(folder.parts[-3:-1])
        self._json({"_id": "1", "id": repo, "sha": commit(folder.name), "private": False, "siblings": files})

    def _tree(self, folder: Path, inside: str = "") -> None:
        if not (folder / inside).is_dir():
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        deep = parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]
        found = sorted((folder / inside).rglob("*") if deep else (folder / inside).iterdir())
        return self._json([self._entry(path, folder) for path in found])

    def _entry(self, path: Path, folder: Path) -> dict[str, Any]:
        name, oid = path.relative_to(folder).as_posix(), hashlib.sha1(str(path).encode()).hexdigest()
        if path.is_dir():
            return {"type": "directory", "oid": oid, "size": 0, "path": name}
        return {"type": "file", "oid": oid, "size": path.stat().st_size, "path": name}

    def _file(self, folder: Path, name: str) -> None:
        if not (folder / name).is_file():
            return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        content = (folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit(folder.name)}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self._send(206, content[first : last + 1], headers)
        return self._send(200, content, headers)

    def _json(self, answer: Any) -> None:
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextmanager
def hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the paths it was asked for so far."""
    asked: list[str] = []
    handler = type("Hub", (_Hub,), {"root": root, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()
