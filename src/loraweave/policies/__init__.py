"""Policies: each decides the mixing weights ``g`` in its own way. One file a method."""

from loraweave.policies.arrow import Arrow
from loraweave.policies.cat import CAT
from loraweave.policies.composite import Composite
from loraweave.policies.linear import Linear
from loraweave.policies.logo import LoGo
from loraweave.policies.lora_flow import LoRAFlow
from loraweave.policies.lorahub import LoRAHub
from loraweave.policies.mole import MoLE
from loraweave.policies.regional import Regional
from loraweave.policies.sum import Sum
from loraweave.policies.switch import Switch

__all__ = [
    "CAT",
    "Arrow",
    "Composite",
    "Linear",
    "LoGo",
    "LoRAFlow",
    "LoRAHub",
    "MoLE",
    "Regional",
    "Sum",
    "Switch",
]
