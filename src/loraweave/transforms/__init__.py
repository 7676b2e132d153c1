"""Transforms: bank -> bank, bank -> one expert, or bank -> plain weights. One file a method."""

from loraweave.transforms.concat import Concat
from loraweave.transforms.core_space import CoreSpace
from loraweave.transforms.dare_linear import DareLinear
from loraweave.transforms.dare_ties import DareTies
from loraweave.transforms.knots import Knots
from loraweave.transforms.linear import Linear
from loraweave.transforms.magnitude_prune import MagnitudePrune
from loraweave.transforms.svd import SVD
from loraweave.transforms.ties import Ties

__all__ = ["SVD", "Concat", "CoreSpace", "DareLinear", "DareTies", "Knots", "Linear", "MagnitudePrune", "Ties"]
