"""loraweave: compose trained LoRAs into one model that keeps what each could do.

```python
import loraweave as lw

mixture = lw.attach(model, {"qa": "loras/qa", "nli": "someone/flan-nli-lora"}, lw.MoLE(granularity="block"))
lw.train(mixture, "train.jsonl", steps=200)
model.generate(**inputs)
```
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from loraweave.errors import LoraweaveError, LoraweaveWarning, TriggerWarning
    from loraweave.experts.inspection import ExpertReport, inspect
    from loraweave.experts.reader import read_expert
    from loraweave.experts.types import Expert, LoraFactors
    from loraweave.experts.writer import write_expert
    from loraweave.mixture import Mixture, attach
    from loraweave.persistence import load
    from loraweave.policies import CAT, Arrow, Composite, Linear, LoGo, LoRAFlow, LoRAHub, MoLE, Regional, Sum, Switch
    from loraweave.training.fuse import GradientFusion, fuse
    from loraweave.training.images.objectives import ClipGuidance, Denoising
    from loraweave.training.images.train import train_images
    from loraweave.training.search import SearchResult, search
    from loraweave.training.train import TrainingResult, train
    from loraweave.training.trainer import GateTrainer
    from loraweave.transforms.merge import arithmetic, merge

_HOME = {
    "Arrow": "policies",
    "CAT": "policies",
    "ClipGuidance": "training.images.objectives",
    "Composite": "policies",
    "Denoising": "training.images.objectives",
    "Expert": "experts.types",
    "ExpertReport": "experts.inspection",
    "GateTrainer": "training.trainer",
    "GradientFusion": "training.fuse",
    "Linear": "policies",
    "LoGo": "policies",
    "LoRAFlow": "policies",
    "LoRAHub": "policies",
    "LoraFactors": "experts.types",
    "LoraweaveError": "errors",
    "LoraweaveWarning": "errors",
    "MoLE": "policies",
    "Mixture": "mixture",
    "Regional": "policies",
    "SearchResult": "training.search",
    "Sum": "policies",
    "Switch": "policies",
    "TrainingResult": "training.train",
    "TriggerWarning": "errors",
    "arithmetic": "transforms.merge",
    "attach": "mixture",
    "fuse": "training.fuse",
    "inspect": "experts.inspection",
    "load": "persistence",
    "merge": "transforms.merge",
    "read_expert": "experts.reader",
    "search": "training.search",
    "train": "training.train",
    "train_images": "training.images.train",
    "write_expert": "experts.writer",
}

__all__ = [
    "CAT",
    "Arrow",
    "ClipGuidance",
    "Composite",
    "Denoising",
    "Expert",
    "ExpertReport",
    "GateTrainer",
    "GradientFusion",
    "Linear",
    "LoGo",
    "LoRAFlow",
    "LoRAHub",
    "LoraFactors",
    "LoraweaveError",
    "LoraweaveWarning",
    "Mixture",
    "MoLE",
    "Regional",
    "SearchResult",
    "Sum",
    "Switch",
    "TrainingResult",
    "TriggerWarning",
    "__version__",
    "arithmetic",
    "attach",
    "fuse",
    "inspect",
    "load",
    "merge",
    "read_expert",
    "search",
    "train",
    "train_images",
    "write_expert",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'loraweave' has no attribute {name!r}")
    return getattr(importlib.import_module(f"loraweave.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
