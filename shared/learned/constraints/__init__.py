"""Sparsity as optimisation: projections, proximal operators, splitting methods, shrinkage, straight-through
forms.

Operators work on plain tensors, in place where a name ends in an underscore, and are not recorded by
autograd: a projection or proximal step comes after the optimiser's step, on the weights themselves.
"""

from .bidirectional import (
    Bidirectional,
    finish_bidirectional,
    make_bidirectional,
    two_weights,
)
from .projections import project_l0_, project_l1_, project_pattern_
from .proximal import (
    envelope_factors,
    group_envelope,
    group_soft_factors,
    prox_group_,
    prox_l0_,
    prox_l1_,
    prox_nonnegative_,
)
from .shrinkage import SoftShrinkage, soft_shrink_
from .splitting import ADMM, AugmentedLagrangian
from .straight_through import (
    SRSTE,
    DecayingSTE,
    PatternSTE,
    decaying_ste,
    sr_ste,
    straight_through,
)

__all__ = [
    "ADMM",
    "AugmentedLagrangian",
    "Bidirectional",
    "DecayingSTE",
    "PatternSTE",
    "SRSTE",
    "SoftShrinkage",
    "decaying_ste",
    "envelope_factors",
    "finish_bidirectional",
    "group_envelope",
    "group_soft_factors",
    "make_bidirectional",
    "project_l0_",
    "project_l1_",
    "project_pattern_",
    "prox_group_",
    "prox_l0_",
    "prox_l1_",
    "prox_nonnegative_",
    "soft_shrink_",
    "sr_ste",
    "straight_through",
    "two_weights",
]
