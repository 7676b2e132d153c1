"""Saving and loading mixtures: ``mixture.json``, ``gates.safetensors``, optional copies of the experts, a card.

Only safetensors and JSON are written or read, and a folder appears whole or not at all.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loraweave.errors import LoraweaveError, unknown
from loraweave.experts.paging import ExpertMemory
from loraweave.experts.resolve import Reader, in_threads, resolve_expert
from loraweave.experts.types import Expert
from loraweave.files import atomic_path, replace_folder_atomic, write_json_atomic, write_text_atomic
from loraweave.integrations.host import open_host
from loraweave.modelcard import card
from loraweave.policies import registry

if TYPE_CHECKING:
    from loraweave.mixture import Mixture

FORMAT = 1
MIXTURE, GATES, CARD, EXPERTS = "mixture.json", "gates.safetensors", "README.md", "experts"
_LARGEST_JSON = 10_000_000


def save(
    mixture: Mixture,
    folder: str | Path,
    *,
    copy_experts: bool = False,
    results: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    into: bool = False,
) -> Path:
    """Write a mixture to ``folder``, whole or not at all.

    Args:
        mixture: what to save.
        folder: replaced if it holds a saved mixture and nothing else.
        copy_experts: also write the experts, so that the folder needs nothing else but the base model.
        results: a comparison's ``results.json``; its table goes on the card.
        recipe: what the mixture was made from; kept in ``mixture.json`` for people to read.
        into: write into an existing folder beside other files (a trainer's checkpoint).

    Raises:
        LoraweaveError: the folder holds other files, or cannot be written to.
    """
    from safetensors.torch import save_file

    target = Path(folder)
    if into:
        target.mkdir(parents=True, exist_ok=True)
    place = nullcontext(target) if into else replace_folder_atomic(target, ours=[MIXTURE, GATES, CARD, EXPERTS])
    with place as out:
        sources = _copy_experts(mixture, out) if copy_experts else [_source(expert) for expert in mixture.sources]
        gates = {name: p.detach().contiguous().cpu() for name, p in mixture.gate_parameters()}
        if gates:
            with atomic_path(out / GATES) as path:
                save_file(gates, path, metadata={"format": "pt"})
        described = _writable(describe(mixture) | {"experts": sources, "recipe": recipe})
        write_text_atomic(out / CARD, card(mixture, results))
        write_json_atomic(out / MIXTURE, described)
    return target


def describe(mixture: Mixture) -> dict[str, Any]:
    """What ``mixture.json`` says, without the experts' places."""
    from loraweave import __version__, zoo

    model = mixture.model
    name = getattr(model, "name_or_path", "") or None
    return {
        "format": FORMAT,
        "loraweave": __version__,
        "base": {"id": zoo.name_of(name), "class": type(mixture.pipeline or model).__name__},
        "method": registry.to_dict(mixture.policy),
        "blocks": None if mixture.blocks is None else list(mixture.blocks),
        "experts": [],
    }


def _writable(described: dict[str, Any]) -> dict[str, Any]:
    """What ``mixture.json`` shall say, or an error if some option of the method cannot be written there."""
    for option, value in described["method"].items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise LoraweaveError(
                f"method {described['method']['name']!r}: option {option!r} cannot be saved ({error}); give numbers, "
                "texts, boxes or paths of pictures instead of arrays"
            ) from error
    return described


def load(
    folder: str | Path,
    model: Any = None,
    *,
    allow_changed: bool = False,
    revision: str | None = None,
    expert_memory: int | str | None = None,
) -> Mixture:
    """Load a saved mixture and attach it.

    Args:
        folder: a folder written by :meth:`Mixture.save_pretrained`, or a hub id.
        model: the base model or pipeline; default: loaded from where it came from when the mixture was saved.
        allow_changed: load although an expert's file is not the one the gates were trained with.
        revision: of a hub id.
        expert_memory: as of :func:`attach`.

    Raises:
        LoraweaveError: not a saved mixture, of another format, its gates do not fit, an expert is missing or changed.
    """
    from loraweave.mixture import attach_read

    place = _local(folder, revision)
    saved = _read_json(place / MIXTURE)
    policy = registry.from_dict(_field(saved, "method", dict, place))
    base = model if model is not None else _load_base(_field(saved, "base", dict, place), place)
    blocks = None if saved.get("blocks") is None else tuple(_field(saved, "blocks", list, place))
    host = open_host(base, blocks)
    entries = _field(saved, "experts", list, place)
    experts = in_threads(lambda entry: _load_expert(entry, place, allow_changed, host.read), entries)
    if not experts or len({expert.name for expert in experts}) < len(experts):
        raise LoraweaveError(f"{place / MIXTURE}: experts: expected at least one, each name once")
    memory = None if expert_memory is None else ExpertMemory(expert_memory)
    mixture = attach_read(host, experts, policy, blocks, memory)
    try:
        load_gates(mixture, place)
    except LoraweaveError:
        mixture.detach()
        raise
    return mixture


def saved_policy(folder: str | Path) -> Any:
    """The method of a saved mixture, without its gates.

    Raises:
        LoraweaveError: not a saved mixture, or of another format.
    """
    place = Path(folder)
    return registry.from_dict(_field(_read_json(place / MIXTURE), "method", dict, place))


def saved_experts(folder: str | Path) -> list[str]:
    """The names of a saved mixture's experts, in its order.

    Raises:
        LoraweaveError: not a saved mixture, or of another format.
    """
    place = Path(folder)
    entries = _field(_read_json(place / MIXTURE), "experts", list, place)
    return [str(entry.get("name") if isinstance(entry, Mapping) else None) for entry in entries]


def adopt(mixture: Mixture, folder: str | Path) -> None:
    """Give an attached mixture the method and the gates of a saved one of the same experts.

    Experts that were copied into the folder are compared by name alone.

    Raises:
        LoraweaveError: not a saved mixture, of other experts, or its gates do not fit; the method stays as it was.
    """
    place, before = Path(folder), mixture.policy
    names = saved_experts(place)
    entries = _field(_read_json(place / MIXTURE), "experts", list, place)
    if names != list(mixture.experts):
        raise LoraweaveError(
            f"{place}: it mixes the experts {', '.join(names)}, these are {', '.join(mixture.experts)}; "
            "name the same in the same order"
        )
    for entry, expert in zip(entries, mixture.sources, strict=True):
        copied = str(entry.get("source")).startswith(f"{EXPERTS}/")
        if not copied and entry.get("sha256") != expert.sha256:
            raise LoraweaveError(
                f"{place}: its gates were trained with another file of the expert {expert.name!r} than "
                f"{expert.source!r}; use that one, or train again"
            )
    mixture.policy = saved_policy(place)
    try:
        load_gates(mixture, place)
    except LoraweaveError:
        mixture.policy = before
        raise


def load_gates(mixture: Mixture, folder: str | Path) -> None:
    """Put saved gate parameters into an attached mixture.

    Raises:
        LoraweaveError: the file is missing or damaged, or its gates are not those of this mixture.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    wanted = dict(mixture.gate_parameters())
    path = Path(folder) / GATES
    if not wanted:
        return
    if not path.is_file():
        raise LoraweaveError(f"{path}: missing; this mixture has gates, so its folder must hold {GATES}")
    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise LoraweaveError(f"{path}: damaged or not a safetensors file ({error})") from error
    if set(saved) != set(wanted):
        odd = sorted(set(saved) ^ set(wanted))
        raise LoraweaveError(
            f"{path}: these gates are not for this mixture; it has {len(wanted)} parameters, the file {len(saved)}, "
            f"and {odd[0]!r} is in one of them alone"
        )
    for name, tensor in saved.items():
        if tensor.shape != wanted[name].shape:
            raise LoraweaveError(
                f"{path}: {name!r} has the shape {list(tensor.shape)}, this mixture needs {list(wanted[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise LoraweaveError(f"{path}: {name!r} has values that are not finite")
    with torch.no_grad():
        for name, tensor in saved.items():
            wanted[name].copy_(tensor)


def push(mixture: Mixture, repo_id: str, *, copy_experts: bool, private: bool, api: Any = None) -> str:
    """Upload a saved mixture to the hub; returns its address."""
    from huggingface_hub import HfApi

    hub = api or HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        place = save(mixture, Path(scratch) / "mixture", copy_experts=copy_experts)
        said = dict(_read_json(place / MIXTURE))
        if Path(said["base"]["id"] or "").is_absolute():  # a folder of this machine, which nobody else has
            write_json_atomic(place / MIXTURE, said | {"base": said["base"] | {"id": None}})
        url = hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repo_id, folder_path=str(place), commit_message="Upload loraweave mixture")
    return str(url)


# ---------------------------------------------------------------- experts


def _source(expert: Expert) -> dict[str, Any]:
    source = str(Path(expert.source).resolve()) if expert.source and Path(expert.source).exists() else expert.source
    return {
        "name": expert.name,
        "source": source,
        "sha256": expert.sha256,
        "revision": expert.revision,
        "base": expert.base,
    }


def _copy_experts(mixture: Mixture, out: Path) -> list[dict[str, Any]]:
    from loraweave.experts.reader import fingerprint
    from loraweave.experts.writer import write_expert

    entries = []
    for number, source in enumerate(mixture.sources):
        factors = {path: layer.bank.factors(number) for path, layer in mixture.layers.items()}
        present = {path: f for path, f in factors.items() if f is not None}
        folder = out / EXPERTS / source.name
        write_expert(Expert(source.name, present), folder, base=source.base)
        entries.append(_source(source) | {"source": f"{EXPERTS}/{source.name}", "sha256": fingerprint(folder)})
    return entries


def _load_expert(entry: Any, place: Path, allow_changed: bool, read: Reader | None) -> Expert:
    path = place / MIXTURE
    if not isinstance(entry, Mapping) or not all(isinstance(entry.get(k), str) for k in ("name", "source", "sha256")):
        raise LoraweaveError(f"{path}: experts: expected objects with the texts name, source and sha256, got {entry!r}")
    name, source = entry["name"], entry["source"]
    if not source:
        raise LoraweaveError(
            f"{path}: expert {name!r} was attached from memory and not saved; save with copy_experts=True"
        )
    if source.startswith(f"{EXPERTS}/"):
        inside = (place / source).resolve()
        if place.resolve() not in inside.parents:
            raise LoraweaveError(f"{path}: expert {name!r} names a folder outside of the mixture's own: {source!r}")
        source = str(inside)
    elif entry.get("revision") and not Path(source).exists() and "@" not in source:
        source = f"{source}@{entry['revision']}"
    expert = resolve_expert(source, name, read)
    if expert.sha256 != entry["sha256"] and not allow_changed:
        raise LoraweaveError(
            f"expert {name!r} ({entry['source']}) has changed since the mixture was saved: its sha256 starts with "
            f"{expert.sha256[:12]}, expected {entry['sha256'][:12]}; restore it, or load with allow_changed=True and "
            "check the results"
        )
    return expert


# ---------------------------------------------------------------- reading


def _local(folder: str | Path, revision: str | None) -> Path:
    place = Path(folder)
    if place.is_dir():
        return place
    if isinstance(folder, str) and folder.count("/") == 1 and not folder.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        wanted = [MIXTURE, GATES, CARD, f"{EXPERTS}/*"]
        try:
            return Path(snapshot_download(folder, revision=revision, allow_patterns=wanted))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise LoraweaveError(
                f"no mixture {folder!r}: no such folder here, and the hub gave none ({error})"
            ) from error
    raise LoraweaveError(f"no mixture at {str(folder)!r}: expected a folder that holds {MIXTURE}")


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise LoraweaveError(f"{path.parent}: not a saved mixture, it holds no {MIXTURE}")
    if path.stat().st_size > _LARGEST_JSON:
        raise LoraweaveError(f"{path}: larger than any mixture's description, {path.stat().st_size} bytes")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LoraweaveError(f"{path}: not JSON ({error})") from error
    if not isinstance(saved, dict):
        raise LoraweaveError(f"{path}: expected a JSON object, got {type(saved).__name__}")
    if saved.get("format") != FORMAT:
        raise LoraweaveError(
            f"{path}: format {saved.get('format')!r}, this version reads {FORMAT}; it was written by loraweave "
            f"{saved.get('loraweave', 'of another version')}"
        )
    return saved


def _field(saved: Mapping[str, Any], name: str, kind: type, place: Path) -> Any:
    value = saved.get(name)
    if not isinstance(value, kind):
        raise LoraweaveError(f"{place / MIXTURE}: {name}: expected {kind.__name__}, got {type(value).__name__}")
    return value


def _load_base(base: Mapping[str, Any], place: Path) -> Any:
    import transformers

    name, kind = base.get("id"), base.get("class")
    if not isinstance(name, str) or not name:
        raise LoraweaveError(f"{place / MIXTURE}: it does not say where its base model is; pass model=")
    if isinstance(kind, str) and kind.endswith("Pipeline"):
        from loraweave.integrations.diffusers import load_pipeline

        return load_pipeline(name, kind)
    found = getattr(transformers, kind, None) if isinstance(kind, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        known: Sequence[str] = [n for n in dir(transformers) if n.startswith(("AutoModel", "T5For", "LlamaFor"))]
        raise unknown("model class", str(kind), known)
    return load_model(name, found)


def load_model(name: str, kind: Any) -> nn.Module:
    """A base model by folder, hub id or ``zoo``; ``kind`` is a transformers class with ``from_pretrained``."""
    from loraweave import zoo

    try:
        model: nn.Module = kind.from_pretrained(zoo.local(name))
        if not torch.cuda.is_available() and model.dtype == torch.float16:
            # Half precision is for storage here: processors compute in it many times more slowly than in fp32.
            model = model.float()
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise LoraweaveError(f"base model {name!r}: cannot be loaded ({first})") from error
    return model.eval()
