"""Masks that are learned: gates on weights, channels and tokens, and `harden`, which ends them in a
MaskSet.
"""

from shared.gates.base import WeightGate, harden
from shared.gates.functions import (
    gumbel_categorical,
    gumbel_top_k,
    hard_concrete,
    hard_step,
    polarization,
    top_k_gate,
)
from shared.gates.modules import (
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
