"""Policies: each decides the mixing weights ``g`` in its own way. One file a method."""

from loraweave.policies.composite import Composite
from loraweave.policies.linear import Linear
from loraweave.policies.mole import MoLE
from loraweave.policies.regional import Regional
from loraweave.policies.sum import Sum
from loraweave.policies.switch import Switch

__all__ = ["Composite", "Linear", "MoLE", "Regional", "Sum", "Switch"]
