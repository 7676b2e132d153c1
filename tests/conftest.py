"""What all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import settings
from transformers.utils import logging

# The same examples in every run, however slow the machine is.
settings.register_profile("loraweave", deadline=None, derandomize=True, database=None)
settings.load_profile("loraweave")

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C interrupts, even where the tests themselves were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
