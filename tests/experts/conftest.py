"""Adapters that peft itself saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny_adapters import TARGETS, tiny


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """A function that has peft save an adapter with random factors: ``(kind, name, **LoraConfig)``."""

    def make(kind: str = "llama", name: str = "adapter", *, dtype: torch.dtype | None = None, **options: Any) -> Path:
        settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind], "init_lora_weights": False} | options
        model = peft.get_peft_model(tiny(kind), peft.LoraConfig(**settings))
        if dtype is not None:
            model = model.to(dtype)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make
