"""Masks that are learned: gates on weights, channels and tokens, and `harden`, which ends them in a
MaskSet.
"""

from .base import WeightGate, harden
from .functions import (
    gumbel_categorical,
    gumbel_top_k,
    hard_concrete,
    hard_step,
    polarization,
    top_k_gate,
)
from .modules import (
    Gate,
    GatedWeight,
    GumbelCategorical,
    GumbelTopK,
    HardConcrete,
    HardGate,
    SigmoidPolar,
    TokenGate,
    TopKGate,
    UnitGate,
    gate_weight,
)

__all__ = [
    "Gate",
    "GatedWeight",
    "GumbelCategorical",
    "GumbelTopK",
    "HardConcrete",
    "HardGate",
    "SigmoidPolar",
    "TokenGate",
    "TopKGate",
    "UnitGate",
    "WeightGate",
    "gate_weight",
    "gumbel_categorical",
    "gumbel_top_k",
    "hard_concrete",
    "hard_step",
    "harden",
    "polarization",
    "top_k_gate",
]
