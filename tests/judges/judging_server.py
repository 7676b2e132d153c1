"""A real HTTP server in a thread, which answers as a test says."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from loraweave.evaluation.judges.server import Patience

COLOURS = {"switch": (200, 0, 0), "merge": (0, 200, 0), "composite": (0, 0, 200)}
KEY = "sk-very-secret-1234567890"
DRIP = 0.1
"""Seconds between the bytes of a server that drips: less than any time-out, and an answer has hundreds."""
QUICK = Patience(timeout=0.3, tries=3, first_wait=0.01, longest_wait=0.02)


def scores(first: tuple[float, float], second: tuple[float, float]) -> str:
    """An answer as it should be."""
    both = {
        place: dict(zip(("composition", "quality"), values, strict=True))
        for place, values in (("first", first), ("second", second))
    }
    return f"I see two pictures.\nSCORES: {json.dumps(both)}"


def completion(text: Any) -> dict[str, Any]:
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
    }


class Judge:
    """The server's side: ``replies`` are used up in turn, then ``usual`` answers.

    A reply is a text, ``(status, headers, body)``, ``"HANG"``, ``"CLOSE"``, ``"DRIP"`` (a good answer of which a byte
    comes now and then) or ``"DRIP HEAD"`` (not even its head comes); ``usual`` takes the request's content.
    """

    def __init__(self) -> None:
        self.replies: list[Any] = []
        self.usual: Callable[[dict[str, Any]], Any] = lambda request: scores((5, 5), (5, 5))
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        self.released = threading.Event()
        self.url = ""

    def colours(self, request: dict[str, Any]) -> list[tuple[int, int, int]]:
        """The colour of the pictures in a request, in their order."""
        parts = request["messages"][0]["content"]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        pictures = [Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))) for url in urls]
        return [picture.convert("RGB").getpixel((0, 0)) for picture in pictures]


def _handler(judge: Judge) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with judge.lock:
                judge.requests.append(request)
                judge.keys.append(self.headers["authorization"])
                reply = judge.replies.pop(0) if judge.replies else judge.usual(request)
            assert self.path == "/v1/chat/completions"
            if reply == "HANG":
                judge.released.wait(20)
                return
            if reply == "CLOSE":
                self.connection.close()
                return
            if reply in ("DRIP", "DRIP HEAD"):
                self.drip(reply == "DRIP HEAD")
                return
            status, headers, body = reply if isinstance(reply, tuple) else (200, {}, json.dumps(completion(reply)))
            self.send_response(status)
            for name, value in {"content-type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def drip(self, head: bool) -> None:
            body = json.dumps(completion("fine"))
            start = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            at_once, slowly = ("", start + body) if head else (start, body)
            self.connection.sendall(at_once.encode())
            for letter in slowly:
                if judge.released.wait(DRIP):
                    return
                self.connection.sendall(letter.encode())

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextmanager
def serving() -> Iterator[Judge]:
    """A judge that listens."""
    judge = Judge()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(judge))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that went away is no news
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        judge.released.set()
        server.shutdown()
        server.server_close()
