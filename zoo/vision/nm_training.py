"""N:M training: progressive gradient flow (Bambhaniya et al., 2024), SR-STE (Zhou et al., ICLR 2021), plain
straight-through, and BDWP, which is sparse in both directions (Zhang et al., 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from torch import nn
from torch.nn.utils import parametrize

from zoo.errors import ConfigError
from zoo.shared.errors import BudgetError
from zoo.shared.learned.constraints import (
    SRSTE,
    DecayingSTE,
    PatternSTE,
    finish_bidirectional,
    make_bidirectional,
)
from zoo.shared.learned.gates import harden
from zoo.shared.masks import MaskSet, set_masks
from zoo.shared.masks.patterns import NM, parse_pattern
from zoo.shared.pruning.choose import resolve_patterns, select_parameters
from zoo.vision.base import Pruned, VisionMethod, inner_weights
from zoo.vision.models import Classifier, reinitialised
from zoo.vision.train import Trainer, step_macs

Flow = Literal["ste", "sr-ste", "decay-linear", "decay-exp", "stepwise", "geometric"]


def parsed_nm(pattern: str) -> NM:
    """The N:M pattern of that name.

    Raises:
        ConfigError: another kind of pattern.
    """
    found = parse_pattern(pattern)
    if not isinstance(found, NM):
        raise ConfigError(f"this method trains n:m patterns such as 2:8; received {pattern!r}")
    return found


def frame_patterns(pattern: NM, flow: str) -> list[tuple[int, int]]:
    """The (n, m) of each frame: (m-1):m, m/2:m, m/4:m ... n:m, or 8n:8m, 4n:4m, 2n:2m, n:m."""
    n, m = pattern.n, pattern.m
    if flow == "geometric":
        return [(k * n, k * m) for k in (8, 4, 2, 1)]
    halves = [m >> k for k in range(1, m.bit_length()) if m >> k > n]
    return [(m - 1, m), *((kept, m) for kept in halves), (n, m)]


@dataclass
class NMMethod(VisionMethod):
    """Base of the methods that train fresh weights to an n:m pattern along the inputs."""

    sparsity: float | None = None  # type: ignore[assignment]
    """The pattern fixes it: leave it out, or give the share that belongs to the pattern."""

    pattern: str = "2:8"
    """n:m, n kept of every m inputs."""

    names: tuple[str, ...] = ()
    """Which weights, as names or globs (`*.fc?.weight`); by default all but the first and last layer's."""

    lr: float = 0.1
    """Peak of the learning rate of SGD."""

    def __post_init__(self) -> None:
        fixed = float(1 - (parsed_nm(self.pattern).fixed_density or Fraction(0)))
        if self.sparsity is not None and abs(self.sparsity - fixed) > 1e-9:
            raise BudgetError(f"{self.pattern} fixes the sparsity at {fixed:g}; received {self.sparsity}")
        self.sparsity = fixed

    def chosen(self, model: nn.Module) -> list[str]:
        """The weights that get the pattern, checked against it."""
        names = list(select_parameters(model, self.names or inner_weights(model)))
        resolve_patterns(model, select_parameters(model, names), self.pattern)
        return names

    def macs(self, model: Classifier, trainer: Trainer, names: list[str], products: int) -> float:
        """Multiply-accumulates of a step on one sample where `products` of each layer's three are sparse."""
        example = trainer.fit(model).batches.example()
        dense = step_macs(model, example) / 3
        found = parsed_nm(self.pattern)
        masks = {n: NM(found.n, found.m, 1).keep(model.get_parameter(n).detach().abs(), 0) for n in names}
        set_masks(model, MaskSet(masks))
        sparse = step_macs(model, example) / 3
        set_masks(model, None)
        return products * sparse + (3 - products) * dense


@dataclass
class ProgressiveFlow(NMMethod):
    """Train to N:M while what flows to masked weights fades (MdGf), or while the pattern tightens (SdGf).

    `decay-linear` and `decay-exp` let masked weights act with a factor beta that falls from 1 to 0 over
    `decay_share` of the steps; `stepwise` and `geometric` go through looser patterns in equal frames. `ste`
    and `sr-ste` are what they are compared with. Masks follow the magnitudes at every step, and the last
    steps, and every evaluation, run with the final binary mask.
    """

    flow: Flow = "decay-exp"
    """How gradients reach masked weights."""

    decay_share: float = 0.7
    """Share of the steps over which the flow fades or the pattern tightens."""

    restrict: bool = True
    """Whether the gradient of a fading weight fades as well (the paper's argument) or not (its code)."""

    decay: float = 2e-4
    """SR-STE's pull of masked weights to zero."""

    def prune(self, model: Classifier, trainer: Trainer) -> Pruned:
        if not 0 < self.decay_share <= 1:
            raise ConfigError(f"decay_share must lie in (0, 1]; received {self.decay_share}")
        fresh = reinitialised(model, self.seed)
        names = self.chosen(fresh)
        macs = self.macs(fresh, trainer, names, products=1)
        parameters = list(fresh.parameters())
        gates = []
        for name in names:
            path, _, attribute = name.rpartition(".")
            for n, m in self._frames():  # looser than the final pattern, they must suit the shape too
                NM(n, m, 1).check_shape(tuple(fresh.get_parameter(name).shape))
            gates.append(self._gate())
            parametrize.register_parametrization(fresh.get_submodule(path), attribute, gates[-1])
        fit = trainer.fit(fresh, parameters=parameters, macs=lambda: macs)
        self._progress(fresh, gates, 0, fit.steps)
        fit.run(lambda: self._progress(fresh, gates, fit.step, fit.steps))
        harden(fresh)
        return Pruned(fresh)

    def _frames(self) -> list[tuple[int, int]]:
        pattern = parsed_nm(self.pattern)
        return frame_patterns(pattern, self.flow) if self.flow in ("stepwise", "geometric") else []

    def _gate(self) -> PatternSTE:
        found = parsed_nm(self.pattern)
        pattern = NM(found.n, found.m, 1)
        if self.flow == "sr-ste":
            return SRSTE(pattern, decay=self.decay)
        if self.flow.startswith("decay"):
            return DecayingSTE(pattern, restrict=self.restrict)
        return PatternSTE(pattern)

    def _progress(self, model: nn.Module, gates: list[PatternSTE], step: int, steps: int) -> None:
        """Set beta or the pattern for the step that follows."""
        end = max(1, int(self.decay_share * steps))
        if self.flow == "decay-linear":
            DecayingSTE.set_beta(model, max(0.0, 1 - step / end))
        elif self.flow == "decay-exp":
            # Falls to 1 % over the share, and is cut to 0 there, so that the last steps train the final mask.
            DecayingSTE.set_beta(model, math.exp(math.log(0.01) * step / end) if step < end else 0.0)
        elif patterns := self._frames():
            now = patterns[min(len(patterns) - 1, step * len(patterns) // end)]
            for gate in gates:
                gate.pattern = NM(*now, 1)


@dataclass
class BDWP(NMMethod):
    """Train to N:M with sparse weights going forward (along inputs) and backward (along outputs).

    Weight gradients stay dense and go to all weights, without SR-STE's decay. Of the three products of a
    layer two are sparse: 2:8 costs half of dense training. The saving is counted; a processor without N:M
    units saves no time.
    """

    def prune(self, model: Classifier, trainer: Trainer) -> Pruned:
        fresh = reinitialised(model, self.seed)
        names = self.chosen(fresh)
        macs = self.macs(fresh, trainer, names, products=2)
        found = parsed_nm(self.pattern)
        make_bidirectional(fresh, names, found.n, found.m)
        trainer.fit(fresh, macs=lambda: macs).run()
        finish_bidirectional(fresh)
        return Pruned(fresh)
