"""Policies: each decides the mixing weights ``g`` in its own way. One file a method."""

from loraweave.policies.linear import Linear
from loraweave.policies.mole import MoLE
from loraweave.policies.sum import Sum

__all__ = ["Linear", "MoLE", "Sum"]
