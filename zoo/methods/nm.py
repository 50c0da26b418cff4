"""Base of the methods that train fresh weights to an N:M pattern."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from torch import nn
from torch.nn.utils import parametrize

from zoo.errors import ConfigError
from zoo.methods.training import Pruned, TrainingMethod, cost_of_step, train_held
from zoo.shared.errors import BudgetError, PatternError
from zoo.shared.learned.constraints import PatternSTE
from zoo.shared.learned.gates import harden
from zoo.shared.masks import MaskSet
from zoo.shared.masks.patterns import NM, parse_pattern
from zoo.shared.pruning.choose import select_parameters
from zoo.shared.pruning.inventory import inner_weights, inventory
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.train import Job

_log = logging.getLogger("zoo")


def parsed_nm(pattern: str) -> NM:
    """The N:M pattern of that name.

    Raises:
        ConfigError: another kind of pattern.
    """
    found = parse_pattern(pattern)
    if not isinstance(found, NM):
        raise ConfigError(f"this method trains n:m patterns such as 2:8; received {pattern!r}")
    return found


@dataclass
class NMMethod(TrainingMethod):
    """Train fresh weights to an n:m pattern along the inputs, by gates that a subclass chooses.

    Masks follow the magnitudes at every step.
    """

    recipe: ClassVar[Mapping[str, Any]] = {**TrainingMethod.recipe, "lr": 0.1}
    sparse_products: ClassVar[int] = 1
    """Of the three products of a layer in a training step, how many are with sparse weights."""

    sparsity: float | None = None  # type: ignore[assignment]
    """The pattern fixes it: leave it out, or give the share that belongs to the pattern."""

    pattern: str = "2:8"
    """n:m, n kept of every m inputs."""

    names: tuple[str, ...] = ()
    """Which weights, as names or globs (`*.fc?.weight`); by default those that the pattern fits, without the
    first and last layer's."""

    def __post_init__(self) -> None:
        fixed = float(1 - (parsed_nm(self.pattern).fixed_density or Fraction(0)))
        if self.sparsity is not None and not abs(self.sparsity - fixed) <= 1e-9:
            raise BudgetError(f"{self.pattern} fixes the sparsity at {fixed:g}; received {self.sparsity}")
        self.sparsity = fixed

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        fresh = reinitialised(model, job.seed)
        names = self.chosen(fresh)
        macs = self.macs(fresh, job, names)
        parameters = list(fresh.parameters())
        gates = []
        for name, pattern in self.patterns(fresh, names).items():
            path, _, attribute = name.rpartition(".")
            gates.append(self.gate(pattern))
            parametrize.register_parametrization(fresh.get_submodule(path), attribute, gates[-1])
        fit = job.fit(fresh, parameters=parameters, macs=lambda: macs)
        self.progress(gates, 0, fit.steps)
        train_held(fit, lambda: self.progress(gates, fit.step, fit.steps))
        harden(fresh)
        return Pruned(fresh)

    def gate(self, pattern: NM) -> PatternSTE:
        """What masks a weight while it is trained."""
        raise NotImplementedError

    def progress(self, gates: list[PatternSTE], step: int, steps: int) -> None:
        """Bring the gates to where they are for the step that follows."""

    def needed(self, axis: int) -> list[NM]:
        """The patterns that a weight with this input axis must suit."""
        found = parsed_nm(self.pattern)
        return [NM(found.n, found.m, axis)]

    def patterns(self, model: nn.Module, names: list[str]) -> dict[str, NM]:
        """The pattern of each of these weights, along its inputs."""
        axes = inventory(model).axes
        found = parsed_nm(self.pattern)
        # -1 and 1 are one axis of a matrix; the cards of these methods say 1.
        return {
            n: NM(found.n, found.m, 1 if axes[n] < 0 and model.get_parameter(n).dim() == 2 else axes[n])
            for n in names
        }

    def chosen(self, model: nn.Module) -> list[str]:
        """The weights that get the pattern. What it does not fit is left out, and said, unless it was named.

        Raises:
            PatternError: it fits none, or not one that was named.
        """
        names = list(select_parameters(model, self.names or inner_weights(model)))
        fitting, refusals = [], {}
        for name, pattern in self.patterns(model, names).items():
            try:
                for needed in self.needed(pattern.dim):
                    needed.check_shape(tuple(model.get_parameter(name).shape))
                fitting.append(name)
            except PatternError as error:
                refusals[name] = PatternError(f"{name!r}: {error}")
        if refusals and (self.names or not fitting):
            raise next(iter(refusals.values()))
        if refusals:
            _log.warning(
                "%s leaves out, as it does not fit their shapes: %s", self.pattern, ", ".join(refusals)
            )
        return fitting

    def macs(self, model: nn.Module, job: Job, names: list[str]) -> float:
        """Multiply-accumulates of a step on one sample where `sparse_products` of each layer's three are
        sparse."""
        dense = cost_of_step(model, job, MaskSet({})) / 3
        masks = {
            n: p.keep(model.get_parameter(n).detach().abs(), 0)
            for n, p in self.patterns(model, names).items()
        }
        sparse = cost_of_step(model, job, MaskSet(masks)) / 3
        return self.sparse_products * sparse + (3 - self.sparse_products) * dense
