"""Turbo-VBI (Xia, Tsang and Lau, 2023): Bayesian compression whose support is clustered by a Markov prior.

A weight is active or not (s); active ones have a wide Gaussian prior, the others a narrow one, by a Gamma
prior on the precision rho. Module A, variational, gives the mean and variance of each weight and the belief
that it is active; Module B passes messages over the rows and columns of each matrix, where neighbours are
likely alike, and hands back what each weight's neighbours say of it. Only extrinsic messages go to and fro.
Forms for real weights; a first author's follow-up code (cxiaab/D-turbo-vbi-FL) has those of complex ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from zoo.errors import ConfigError
from zoo.methods.training import Pruned, TrainingMethod
from zoo.shared.pruning.choose import magnitude_masks
from zoo.shared.pruning.inventory import prunable_parameters
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.train import Job

SWEEPS, FAR = 2, 6.0  # rounds over rows and columns; largest log-odds of a message


def along(odds: Float[Tensor, " n"], p01: float, p11: float) -> Float[Tensor, " n"]:
    """Log-odds of the neighbour behind, given those of a weight: active by p11 after an active one, else by
    p01."""
    active = odds.sigmoid()
    one = active * p11 + (1 - active) * p01
    return (one / (1 - one)).log()


def against(odds: Float[Tensor, " n"], p01: float, p11: float) -> Float[Tensor, " n"]:
    """Log-odds of the neighbour before, given those of a weight."""
    active = odds.sigmoid()
    one = p11 * active + (1 - p11) * (1 - active)
    zero = p01 * active + (1 - p01) * (1 - active)
    return (one / zero).log()


def messages(unary: Float[Tensor, "rows n"], p01: float, p11: float) -> Float[Tensor, "rows n"]:
    """What the neighbours in its row say of each entry: both directions of the sum-product algorithm."""
    right, left = torch.zeros_like(unary), torch.zeros_like(unary)
    for i in range(1, unary.shape[1]):
        right[:, i] = along(unary[:, i - 1] + right[:, i - 1], p01, p11)
        back = unary.shape[1] - i
        left[:, back - 1] = against(unary[:, back] + left[:, back], p01, p11)
    return right + left


def from_neighbours(extrinsic: Float[Tensor, "rows n"], p01: float, p11: float) -> Float[Tensor, "rows n"]:
    """Module B: log-odds of each entry from all others of the grid, its own message left out."""
    rows = columns = torch.zeros_like(extrinsic)
    for _ in range(SWEEPS):
        rows = messages((extrinsic + columns).clamp(-FAR, FAR), p01, p11)
        columns = messages((extrinsic + rows).clamp(-FAR, FAR).T, p01, p11).T
    return (rows + columns).clamp(-FAR, FAR)


@dataclass
class Belief:
    """Module A's state of one weight: the log-odds of its prior and of its belief, and E[rho]."""

    prior: Tensor
    belief: Tensor
    precision: Tensor

    def update(self, second: Tensor, active: tuple[float, float], idle: tuple[float, float]) -> None:
        """Three rounds of the closed forms of rho and s, given E[w^2] = mu^2 + sigma^2.

        Args:
            second: E[w^2].
            active, idle: shape and rate of the Gamma priors.
        """
        (a, b), (abar, bbar) = active, idle
        for _ in range(3):
            share = self.belief.sigmoid()
            shape = share * a + (1 - share) * abar + 0.5
            rate = second / 2 + share * b + (1 - share) * bbar
            self.precision = shape / rate
            log = torch.digamma(shape) - rate.log()
            own = _log_gamma(a, b, log, self.precision) - _log_gamma(abar, bbar, log, self.precision)
            self.belief = (self.prior + own).clamp(-2 * FAR, 2 * FAR)


def _log_gamma(a: float, b: float, log: Tensor, mean: Tensor) -> Tensor:
    """E[ln Gamma(rho; a, b)]."""
    return a * math.log(b) - math.lgamma(a) + (a - 1) * log - b * mean


class Noisy(nn.Module):
    """A weight with Gaussian noise of a learned deviation while training, its mean else."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.full_like(weight, -6.0))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.deviation * torch.randn_like(weight) if self.training else weight

    @property
    def deviation(self) -> Tensor:
        """Sigma."""
        return functional.softplus(self.raw)


def divergence(mean: Tensor, deviation: Tensor, precision: Tensor) -> Float[Tensor, ""]:
    """Sum of KL(N(mu, sigma^2) || N(0, 1 / E[rho]))."""
    second = mean.square() + deviation.square()
    return 0.5 * (precision * second - 1 - 2 * deviation.log() - precision.log()).sum()


@dataclass
class TurboVBI(TrainingMethod):
    """Train fresh weights in rounds of both modules, cut the smallest means, train on with the masks.

    The dense model that is given lends its shape only. Two thirds of the recipe's epochs are the rounds'.
    """

    recipe: ClassVar[Mapping[str, Any]] = {
        **TrainingMethod.recipe,
        **{"epochs": 30, "lr": 3e-3, "weight_decay": 0.0, "optimizer": "adam", "decay": "constant"},
    }

    clustered: bool = True
    """Let neighbours speak (Module B); without it the support is independent."""

    start: float = 0.2
    """Belief and prior of the start. From a half nothing is ever pruned."""

    p01: float = 0.1
    """Chance that a weight is active after one that is not."""

    p11: float = 0.8
    """Chance that a weight is active after an active one."""

    variance: float = 0.1
    """Of active weights a priori (b of shape 1)."""

    idle: float = 1e-4
    """Of the others."""

    rounds: int = 6
    """Rounds of Module A and Module B."""

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        self._check()
        learner = reinitialised(model, job.seed).to(job.device)
        names = prunable_parameters(learner)
        logit = math.log(self.start / (1 - self.start))
        beliefs: dict[str, Belief] = {}
        noises: dict[str, Noisy] = {}
        for name in names:
            path, _, attribute = name.rpartition(".")
            weight = learner.get_parameter(name).detach()
            same = torch.full_like(weight, logit)
            beliefs[name] = Belief(same, same.clone(), torch.full_like(weight, 1.0))
            beliefs[name].update(weight.square(), (1.0, self.variance), (1.0, self.idle))
            noises[name] = Noisy(weight)
            parametrize.register_parametrization(learner.get_submodule(path), attribute, noises[name])
        samples = max(1, len(job.batches) * job.recipe.batch)

        def penalty() -> Tensor:
            terms = [divergence(_mean(learner, n), noises[n].deviation, beliefs[n].precision) for n in names]
            return torch.stack(terms).sum() / samples

        fit = job.fit(learner, penalty=penalty)
        for number in range(1, self.rounds + 1):
            fit.run(until_step=max(1, fit.steps * 2 * number // (3 * self.rounds)))
            with torch.no_grad():
                for name in names:
                    self._round(beliefs[name], _mean(learner, name), noises[name].deviation)
        for name in names:
            path, _, attribute = name.rpartition(".")
            parametrize.remove_parametrizations(
                learner.get_submodule(path), attribute, leave_parametrized=False
            )
        last = job.fit(learner)
        last.step = last.steps * 2 // 3
        with magnitude_masks(learner, self.sparsity).attach(learner, last.optimizer):
            last.run()
        return Pruned(learner)

    def _round(self, belief: Belief, mean: Tensor, deviation: Tensor) -> None:
        belief.update(mean.square() + deviation.square(), (1.0, self.variance), (1.0, self.idle))
        if self.clustered:
            own = (belief.belief - belief.prior).flatten(1)
            belief.prior = from_neighbours(own, self.p01, self.p11).view_as(mean)

    def _check(self) -> None:
        if not 0 < self.start < 1 or not 0 < self.p01 < 1 or not 0 < self.p11 < 1:
            raise ConfigError(
                "start, p01 and p11 are chances between 0 and 1; received "
                f"{self.start}, {self.p01} and {self.p11}"
            )
        if not 0 < self.idle < self.variance:
            raise ConfigError(
                "idle weights must be a priori smaller than active ones; received variances of "
                f"{self.idle} and {self.variance}"
            )


def _mean(model: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    return model.get_parameter(f"{path}.parametrizations.{attribute}.original".lstrip("."))
