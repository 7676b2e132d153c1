"""One attached mixture per architecture; tests set its policy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

import tiny
from loraweave.mixture import Mixture


@pytest.fixture(scope="session")
def hosts() -> Callable[[str], Mixture]:
    """``hosts("t5")``: three experts on a tiny T5 in double precision, always the same object."""

    @cache
    def host(architecture: str) -> Mixture:
        return tiny.attached(architecture, dtype=torch.float64)

    return host


@pytest.fixture
def mixed(hosts: Callable[[str], Mixture]) -> Callable[[str, Any], Mixture]:
    """``mixed("t5", policy)``: that mixture under a policy, its gates random."""

    def make(architecture: str, policy: Any) -> Mixture:
        mixture = hosts(architecture)
        mixture.policy = policy
        return tiny.randomize(mixture)

    return make
