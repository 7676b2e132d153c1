"""What loraweave is measured against: the bare model, the floor, and peft."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, XLoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from speed.models import Bench


@dataclass(frozen=True)
class Contender:
    """One way to run the model.

    Attributes:
        name: as shown in tables.
        what: one line that says what it is.
        build: makes it, ready to be called and to ``generate``.
        slow: so slow that it takes part in the first rounds only.
    """

    name: str
    what: str
    build: Callable[[Bench], nn.Module]
    slow: bool = False


class FloorLinear(nn.Module):
    """The least a dense mixture can do at one module: the base product and two stacked GEMMs, no weights, no checks.

    The experts' scales are multiplied into ``Bt`` beforehand. Inference only.
    """

    def __init__(self, base: nn.Linear, A: Tensor, Bt: Tensor) -> None:
        super().__init__()
        self.base = base
        self.register_buffer("At", A.T)
        self.register_buffer("Bt", Bt)
        self.At: Tensor
        self.Bt: Tensor

    @property
    def weight(self) -> Tensor:
        """T5 looks at the type of its last projection's weight."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ self.At, self.Bt)
        return y


def bare(bench: Bench) -> nn.Module:
    return bench.model()


def floor(bench: Bench) -> nn.Module:
    model = bench.model()
    scale = bench.size.scale
    files = [bench.place.take(load_file(folder / "adapter_model.safetensors")) for folder in bench.experts.values()]
    for path in [path for path, _ in model.named_modules() if path.rpartition(".")[2] in bench.size.targets]:
        key = f"base_model.model.{path}"
        A = torch.cat([file[f"{key}.lora_A.weight"] for file in files])
        Bt = torch.cat([file[f"{key}.lora_B.weight"].T * scale for file in files])
        base = model.get_submodule(path)
        assert isinstance(base, nn.Linear)
        model.set_submodule(path, FloorLinear(base, A, Bt.contiguous()))
    return model


def peft_with(bench: Bench, names: Iterable[str], trainable: bool = False) -> nn.Module:
    """The model in peft with the named experts loaded from their folders, all of them active.

    They compute in the model's number format; one that is to be trained, as peft has it, in single precision.
    """
    first, *others = names
    model = PeftModel.from_pretrained(
        bench.model(),
        str(bench.experts[first]),
        adapter_name=first,
        is_trainable=trainable,
        autocast_adapter_dtype=trainable,
    )
    for name in others:
        model.load_adapter(str(bench.experts[name]), adapter_name=name, autocast_adapter_dtype=trainable)
    if others:
        model.base_model.set_adapter([first, *others])
    wrapped: nn.Module = model
    return wrapped if trainable else wrapped.eval()


def peft_one(bench: Bench) -> nn.Module:
    return peft_with(bench, bench.size.names[:1])


def peft_all(bench: Bench) -> nn.Module:
    return peft_with(bench, bench.size.names)


def peft_xlora(bench: Bench) -> nn.Module:
    """X-LoRA with its default classifier, randomly initialised (seeded)."""
    model = bench.model()
    settings: Any = model.config
    settings.use_cache = False  # X-LoRA refuses anything else
    # It names the experts "0", "1", ... whatever their keys are, and skips in silence those it does not find.
    folders = {str(i): str(bench.experts[name]) for i, name in enumerate(bench.size.names)}
    torch.manual_seed(3)
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=bench.size.width, adapters=folders)
    wrapped: nn.Module = get_peft_model(model, config)
    return wrapped.to(bench.place.format).eval()


PEERS = (
    Contender("bare", "the model without any LoRA", bare),
    Contender("floor", "bare and two stacked GEMMs a module, nothing else", floor),
    Contender("peft 1", "peft, one adapter", peft_one),
    Contender("peft all", "peft, all adapters active, added up", peft_all),
    Contender("peft X-LoRA", "peft's X-LoRA: per-token weights, two passes, no cache", peft_xlora, slow=True),
)
