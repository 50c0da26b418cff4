"""Progressive gradient flow for N:M training (Bambhaniya et al., 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from zoo.errors import ConfigError
from zoo.methods.nm import NMMethod, parsed_nm
from zoo.methods.training import Pruned
from zoo.shared.learned.constraints import DecayingSTE, PatternSTE
from zoo.shared.masks.patterns import NM
from zoo.shared.train import Job


def frame_patterns(pattern: NM, flow: str) -> list[tuple[int, int]]:
    """The (n, m) of each frame: (m-1):m, m/2:m, m/4:m ... n:m, or 8n:8m, 4n:4m, 2n:2m, n:m."""
    n, m = pattern.n, pattern.m
    if flow == "geometric":
        return [(k * n, k * m) for k in (8, 4, 2, 1)]
    halves = [m >> k for k in range(1, m.bit_length()) if m >> k > n]
    return [(m - 1, m), *((kept, m) for kept in halves), (n, m)]


@dataclass
class ProgressiveFlow(NMMethod):
    """Train to N:M while what flows to masked weights fades (MdGf), or while the pattern tightens (SdGf).

    `decay-linear` and `decay-exp` let masked weights act with a factor beta that falls from 1 to 0 over
    `decay_share` of the steps; `stepwise` and `geometric` go through looser patterns in equal frames. The
    last steps, and every evaluation, run with the final binary mask.
    """

    flow: Literal["decay-linear", "decay-exp", "stepwise", "geometric"] = "decay-exp"
    """How gradients reach masked weights."""

    decay_share: float = 0.7
    """Share of the steps over which the flow fades or the pattern tightens."""

    restrict: bool = True
    """Whether the gradient of a fading weight fades as well (the paper's argument) or not (its code)."""

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        if not 0 < self.decay_share <= 1:
            raise ConfigError(f"decay_share must lie in (0, 1]; received {self.decay_share}")
        return super().prune(model, job)

    def gate(self, pattern: NM) -> PatternSTE:
        return DecayingSTE(pattern, restrict=self.restrict) if self._fades else PatternSTE(pattern)

    @property
    def _fades(self) -> bool:
        return self.flow.startswith("decay")

    def needed(self, axis: int) -> list[NM]:
        frames = [] if self._fades else frame_patterns(parsed_nm(self.pattern), self.flow)
        return [*super().needed(axis), *(NM(n, m, axis) for n, m in frames)]

    def progress(self, gates: list[PatternSTE], step: int, steps: int) -> None:
        """Set beta or the pattern for the step that follows."""
        end = max(1, int(self.decay_share * steps))
        if not self._fades:
            frames = frame_patterns(parsed_nm(self.pattern), self.flow)
            n, m = frames[min(len(frames) - 1, step * len(frames) // end)]
            for gate in gates:
                gate.pattern = NM(n, m, gate.pattern.dim)  # type: ignore[attr-defined]
            return
        if self.flow == "decay-linear":
            beta = max(0.0, 1 - step / end)
        else:
            # Falls to 1 % over the share, and is cut to 0 there, so that the last steps train the final mask.
            beta = math.exp(math.log(0.01) * step / end) if step < end else 0.0
        for gate in gates:
            gate.beta = beta  # type: ignore[assignment]
