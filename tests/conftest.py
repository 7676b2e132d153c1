"""What all tests share."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hypothesis import settings
from transformers.utils import logging

# The same examples in every run, however slow the machine is.
settings.register_profile("loraweave", deadline=None, derandomize=True, database=None)
settings.load_profile("loraweave")

torch.set_num_threads(1)
logging.set_verbosity_error()
logging.disable_progress_bar()
