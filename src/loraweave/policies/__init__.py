"""Policies: each decides the mixing weights ``g`` in its own way. One file a method."""

from loraweave.policies.arrow import Arrow
from loraweave.policies.cat import CAT
from loraweave.policies.linear import Linear
from loraweave.policies.logo import LoGo
from loraweave.policies.lora_flow import LoRAFlow
from loraweave.policies.lorahub import LoRAHub
from loraweave.policies.mole import MoLE
from loraweave.policies.sum import Sum

__all__ = ["CAT", "Arrow", "Linear", "LoGo", "LoRAFlow", "LoRAHub", "MoLE", "Sum"]
