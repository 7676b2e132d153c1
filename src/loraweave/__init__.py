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
    from loraweave.errors import LoraweaveError, LoraweaveWarning
    from loraweave.experts.inspection import ExpertReport, inspect
    from loraweave.experts.reader import read_expert
    from loraweave.experts.types import Expert, LoraFactors
    from loraweave.experts.writer import write_expert
    from loraweave.mixture import Mixture, attach
    from loraweave.persistence import load
    from loraweave.policies import Composite, Linear, MoLE, Regional, Sum, Switch
    from loraweave.training.train import TrainingResult, train
    from loraweave.training.trainer import GateTrainer

_HOME = {
    "Composite": "policies",
    "Expert": "experts.types",
    "ExpertReport": "experts.inspection",
    "GateTrainer": "training.trainer",
    "Linear": "policies",
    "LoraFactors": "experts.types",
    "LoraweaveError": "errors",
    "LoraweaveWarning": "errors",
    "MoLE": "policies",
    "Mixture": "mixture",
    "Regional": "policies",
    "Sum": "policies",
    "Switch": "policies",
    "TrainingResult": "training.train",
    "attach": "mixture",
    "inspect": "experts.inspection",
    "load": "persistence",
    "read_expert": "experts.reader",
    "train": "training.train",
    "write_expert": "experts.writer",
}

__all__ = [
    "Composite",
    "Expert",
    "ExpertReport",
    "GateTrainer",
    "Linear",
    "LoraFactors",
    "LoraweaveError",
    "LoraweaveWarning",
    "Mixture",
    "MoLE",
    "Regional",
    "Sum",
    "Switch",
    "TrainingResult",
    "__version__",
    "attach",
    "inspect",
    "load",
    "read_expert",
    "train",
    "write_expert",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'loraweave' has no attribute {name!r}")
    return getattr(importlib.import_module(f"loraweave.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
