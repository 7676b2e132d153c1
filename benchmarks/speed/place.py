"""Where the models run and in which precision: on the processor in fp32, unless it is said otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Place:
    """A device such as ``cpu`` or ``cuda``, and a number format of ``DTYPES``."""

    device: str = "cpu"
    dtype: str = "float32"

    @property
    def format(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def on_cpu(self) -> bool:
        return torch.device(self.device).type == "cpu"

    def take(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors here; numbers with a fraction in this format."""
        return {
            name: value.to(self.device, self.format if value.is_floating_point() else None)
            for name, value in values.items()
        }

    def moved(self, model: nn.Module) -> nn.Module:
        return model.to(self.device, self.format)

    def wait(self) -> None:
        """Until all that was asked for is computed."""
        if not self.on_cpu:
            torch.accelerator.synchronize(torch.device(self.device))

    def facts(self) -> dict[str, Any]:
        """What a report says of it; nothing of the processor in fp32."""
        if self == Place():
            return {}
        name = torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else self.device
        return {"device": name, "dtype": self.dtype}


HERE = Place()
