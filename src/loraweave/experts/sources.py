"""Where an expert's files are: a local PEFT folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from loraweave.errors import LoraweaveError
from loraweave.experts.config import CONFIG_NAME
from loraweave.experts.weightfile import PICKLES, pickle_refused

WEIGHTS_NAME = "adapter_model.safetensors"

_HUB_ID = re.compile(
    r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?P<subfolder>(?:/[\w-][\w.-]*)*)(?:@(?P<revision>[\w-][\w./-]*))?", re.ASCII
)


@dataclass(frozen=True)
class Location:
    """The two files of an expert on this machine.

    Attributes:
        source: as the user wrote it.
        config, weights: the files; both exist and lie in the expert's folder (or its hub cache).
        name: the name the source suggests: its folder or repository.
        revision: the hub commit, if it came from the hub.
    """

    source: str
    config: Path
    weights: Path
    name: str
    revision: str | None = None


def locate(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Location:
    """Find the files of an expert, fetching them from the hub where the source is no local folder.

    Args:
        source: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``; or a hub id, ``owner/name``,
            ``owner/name/subfolder`` or either with ``@revision``. A local folder wins over a hub id of that name.
        revision: a hub branch, tag or commit.
        cache_dir: the hub cache; by default the one of ``huggingface_hub``.
        local_files_only: look in the hub cache only, as with the environment variable ``HF_HUB_OFFLINE=1``.

    Raises:
        LoraweaveError: nothing is there, a file is missing or leads outside its folder, or the weights are pickled.
    """
    text = str(source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise LoraweaveError(f"{text}: is a local folder and has no revisions, but revision={revision!r} was given")
        name, commit = folder.resolve().name, _cached_commit(folder)
    elif folder.exists():
        raise _is_a_file(folder)
    elif isinstance(source, str) and (match := _HUB_ID.fullmatch(text)):
        folder, commit = _fetch(text, match, revision, cache_dir, local_files_only)
        name = (match["subfolder"] or match["repo"]).rpartition("/")[2]
    else:
        raise LoraweaveError(
            f"{text}: no such folder; expected a PEFT folder with {CONFIG_NAME}, or a hub id 'owner/name'"
        )
    return Location(text, _inside(folder, CONFIG_NAME), _inside(folder, WEIGHTS_NAME), name, commit)


def _inside(folder: Path, name: str) -> Path:
    """The path of a file in an expert's folder; it exists and does not lead elsewhere."""
    path = folder / name
    if not path.is_file():
        raise _missing(folder, name)
    resolved, root = path.resolve(), _root(folder)
    if not resolved.is_relative_to(root):
        raise LoraweaveError(f"{path}: leads outside its folder, to {resolved}; put the file itself there")
    return path


def _root(folder: Path) -> Path:
    """Where links may lead: the folder itself, or its repository in a hub cache, whose snapshots link to its blobs."""
    folder = folder.resolve()
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent
    return folder


def _cached_commit(folder: Path) -> str | None:
    """The commit of a folder that lies in a hub cache: ``models--owner--name/snapshots/<commit>/...``."""
    folder = folder.resolve()
    for path in (folder, *folder.parents):
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
            return path.name
    return None


def _fetch(
    source: str, match: re.Match[str], revision: str | None, cache_dir: str | Path | None, local_files_only: bool
) -> tuple[Path, str]:
    """Bring an expert's two files into the hub cache; returns their folder and the commit."""
    from huggingface_hub import snapshot_download

    if revision is not None and match["revision"] not in (None, revision):
        raise LoraweaveError(
            f"{source}: names revision {match['revision']!r}, but revision={revision!r} was given; keep one"
        )
    revision = revision or match["revision"]
    subfolder = match["subfolder"].removeprefix("/")
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        snapshot = snapshot_download(
            match["repo"],
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=[prefix + CONFIG_NAME, prefix + WEIGHTS_NAME],
        )
    except Exception as error:  # whatever the network, the cache or the hub's client raises means the same to the user
        reason = " ".join(str(error).split()).split(". ")[0]
        raise LoraweaveError(
            f"{source}: no such folder here, and it could not be had from the hub "
            f"({type(error).__name__}: {reason}); check the name, or the connection and HF_HUB_OFFLINE"
        ) from error
    folder = Path(snapshot) / subfolder
    if not (folder / WEIGHTS_NAME).exists() and not local_files_only:
        _refuse_pickles_on_hub(source, match["repo"], prefix, revision)
    return folder, Path(snapshot).name


def _refuse_pickles_on_hub(source: str, repo: str, prefix: str, revision: str | None) -> None:
    """Say so where a repository has pickled weights only; stay quiet offline, where nobody can tell."""
    from huggingface_hub import HfApi

    name = "adapter_model.bin"
    try:
        pickled = HfApi().file_exists(repo, prefix + name, revision=revision)
    except Exception:  # noqa: BLE001  # only a better message was at stake; the caller reports the missing file
        return
    if pickled:
        raise pickle_refused(Path(source) / name, f"hf download {repo} --local-dir {repo.rpartition('/')[2]}")


def _missing(folder: Path, name: str) -> LoraweaveError:
    path = folder / name
    if path.is_symlink():
        return LoraweaveError(f"{path}: is a link to nothing ({path.resolve()}); fetch the expert again")
    if name == WEIGHTS_NAME:
        pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES) if folder.is_dir() else []
        if pickles:
            return pickle_refused(next((file for file in pickles if file.stem == "adapter_model"), pickles[0]))
    below = sorted(file.parent.name for file in folder.glob(f"*/{name}"))
    hint = f"; its subfolders {', '.join(below[:5])} have one: name one of them" if below else ""
    return LoraweaveError(
        f"{path}: file is missing; expected a PEFT folder with {CONFIG_NAME} and {WEIGHTS_NAME}{hint}"
    )


def _is_a_file(path: Path) -> LoraweaveError:
    if path.suffix in PICKLES:
        return pickle_refused(path)
    return LoraweaveError(f"{path}: is a file; expected the folder that holds {CONFIG_NAME} and {WEIGHTS_NAME}")
