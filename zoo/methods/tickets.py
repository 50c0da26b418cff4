"""Lottery tickets by iterative magnitude pruning with rewinding (Frankle et al., ICML 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from zoo.errors import ConfigError
from zoo.methods.training import Pruned, TrainingMethod, train_held
from zoo.shared.pruning.schedules import Exponential
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.train import Job


@dataclass
class LotteryTicket(TrainingMethod):
    """Train fresh weights, cut the smallest, put the rest back to where they were early on, and again.

    The dense model that is given lends its shape only. The recipe's epochs are those of each of the
    rounds + 1 trainings.
    """

    rounds: int = 3
    """Trainings after the dense one; each cuts the same share of what is left."""

    rewind: int = 1
    """Epoch of the dense training whose weights come back; 0 is initialisation."""

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        ticket = reinitialised(model, job.seed)
        dense = job.fit(ticket)
        start = self.rewind * dense.steps_per_epoch
        if self.rounds < 1 or not 0 <= start < dense.steps:
            raise ConfigError(
                f"tickets need at least 1 round and 0 <= rewind < epochs; received {self.rounds} and "
                f"{self.rewind} of {dense.steps / dense.steps_per_epoch:g}"
            )
        train_held(dense, until=self.rewind)
        early = {name: value.clone() for name, value in ticket.state_dict().items()}
        train_held(dense)
        level = Exponential(self.sparsity, self.rounds) if self.sparsity else (lambda step: 0.0)
        for cut in range(1, self.rounds + 1):
            masks = sparsify(ticket, sparsity=level(cut))
            ticket.load_state_dict(early)
            fit = job.fit(ticket)
            fit.step = start
            with masks.attach(ticket, fit.optimizer):
                fit.run()
        return Pruned(ticket)
