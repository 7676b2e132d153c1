"""The invariants must run over every policy there is."""

from __future__ import annotations

from loraweave.policies import registry
from methods import METHODS, PICTURES


def test_every_registered_policy_is_tested() -> None:
    assert {policy.name for policy in METHODS.values()} | PICTURES == set(registry.names())
