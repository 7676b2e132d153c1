"""What the engine needs to know of transformers models; the only place that knows their insides."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from loraweave.mixing.anatomy import Anatomy, find_blocks, named_blocks
from loraweave.mixing.stream import StreamSpec

# Keys and values of cross-attention read the encoder's tokens, although they stand in the decoder.
_CROSS = re.compile(
    r"\.(EncDecAttention|encoder_attn|crossattention|cross_attn|cross_attention)\.(\w+\.)*"
    r"(k|v|key|value|k_proj|v_proj|key_proj|value_proj|c_attn|kv_proj)$"
)


def anatomy(model: nn.Module, blocks: Iterable[str] | None = None) -> Anatomy:
    """Streams and blocks of any transformers model, or of any other module.

    Args:
        model: the host model.
        blocks: class names or module paths to take as blocks; default: the classes that transformers itself will not
            split over devices (``_no_split_modules``), or else the entries of the outermost module lists.
    """
    found = find_blocks(model, _block_classes(model)) if blocks is None else named_blocks(model, blocks)
    streams = _encoder_decoder(model) if _is_encoder_decoder(model) else _single(model)
    by_length = sorted((s for s in streams if s.name != "cross"), key=lambda s: -len(s.door))

    def stream_of(path: str) -> str:
        if any(s.name == "cross" for s in streams) and _CROSS.search(f".{path}"):
            return "cross"
        return next((s.name for s in by_length if path.startswith(f"{s.door}.") or not s.door), by_length[-1].name)

    width = getattr(_config(model), "hidden_size", None)
    return Anatomy(streams, stream_of, found, width if isinstance(width, int) else None)


def _block_classes(model: nn.Module) -> list[str]:
    classes: set[str] = set()
    for module in model.modules():
        classes.update(getattr(module, "_no_split_modules", None) or ())
    return sorted(classes)


def _config(model: nn.Module) -> Any:
    return getattr(model, "config", None)


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(_config(model), "is_encoder_decoder", False)) and _stacks(model) is not None


def _stacks(model: nn.Module) -> tuple[str, str] | None:
    """Paths of encoder and decoder."""
    paths = {id(module): name for name, module in reversed(list(model.named_modules()))}
    found = []
    for getter in ("get_encoder", "get_decoder"):
        stack = getattr(model, getter)() if hasattr(model, getter) else None
        if not isinstance(stack, nn.Module) or not paths.get(id(stack)):
            return None
        found.append(paths[id(stack)])
    return found[0], found[1]


def _encoder_decoder(model: nn.Module) -> tuple[StreamSpec, ...]:
    stacks = _stacks(model)
    assert stacks is not None
    encoder, decoder = stacks
    # Speech encoders shorten their input and see all of it, so their mask does not describe their tokens.
    reads_text = _takes(model.get_submodule(encoder), "input_ids")
    mask = "attention_mask" if reads_text else None
    return (
        StreamSpec("encoder", encoder, mask),
        StreamSpec("decoder", decoder, causal=True),
        StreamSpec(
            "cross",
            decoder,
            "encoder_attention_mask" if reads_text else None,
            states="encoder_hidden_states",
            within="decoder",
        ),
    )


def _single(model: nn.Module) -> tuple[StreamSpec, ...]:
    if not _takes(model, "attention_mask"):
        return (StreamSpec("model", mask=None, causal=_is_causal(model)),)
    causal = _is_causal(model)
    return (StreamSpec("model", causal=causal, prompted=causal, body=_body(model)),)


def _body(model: nn.Module) -> str:
    """Path of the model without its head."""
    name = getattr(model, "base_model_prefix", "")
    body = getattr(model, name, None) if name else None
    return name if isinstance(body, nn.Module) and _takes(body, "attention_mask") else ""


def _is_causal(model: nn.Module) -> bool:
    """Whether attention looks back only, as the attention modules themselves say."""
    said = [bool(m.is_causal) for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    if said:
        return any(said)
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate()) if callable(can_generate) else False


def _takes(module: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(type(module).forward).parameters
