"""SR-STE (Zhou et al., ICLR 2021): N:M weights trained straight through, masked ones pulled to zero."""

from __future__ import annotations

from dataclasses import dataclass

from zoo.methods.nm import NMMethod
from zoo.shared.learned.constraints import SRSTE, PatternSTE
from zoo.shared.masks.patterns import NM


@dataclass
class SparseRefined(NMMethod):
    """Train to N:M with the gradient g + decay (1 - m) w (paper, equation 9) for the dense weights w."""

    decay: float = 2e-4
    """Pull of masked weights to zero; 0 is the plain straight-through estimator."""

    def gate(self, pattern: NM) -> PatternSTE:
        return SRSTE(pattern, decay=self.decay)
