"""Lottery tickets by iterative magnitude pruning with rewinding (Frankle et al., ICML 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from zoo.errors import ConfigError
from zoo.shared.pruning.schedules import Exponential
from zoo.shared.pruning.sparsifier import sparsify
from zoo.vision.base import Pruned, VisionMethod
from zoo.vision.models import Classifier, reinitialised
from zoo.vision.train import Trainer


@dataclass
class LotteryTicket(VisionMethod):
    """Train fresh weights, cut the smallest, put the rest back to where they were early on, and again.

    The dense model that is given lends its shape only. `epochs` are those of each of the rounds + 1
    trainings.
    """

    rounds: int = 3
    """Trainings after the dense one; each cuts the same share of what is left."""

    rewind: int = 1
    """Epoch of the dense training whose weights come back; 0 is initialisation."""

    def prune(self, model: Classifier, trainer: Trainer) -> Pruned:
        if self.rounds < 1 or not 0 <= self.rewind < self.epochs:
            raise ConfigError(
                f"tickets need at least 1 round and 0 <= rewind < epochs; received {self.rounds} and "
                f"{self.rewind} of {self.epochs}"
            )
        ticket = reinitialised(model, self.seed)
        dense = trainer.fit(ticket).run(until=self.rewind)
        early = {name: value.clone() for name, value in ticket.state_dict().items()}
        dense.run()
        level = Exponential(self.sparsity, self.rounds) if self.sparsity else (lambda step: 0.0)
        for cut in range(1, self.rounds + 1):
            masks = sparsify(ticket, sparsity=level(cut))
            ticket.load_state_dict(early)
            fit = trainer.fit(ticket)
            fit.epoch = self.rewind
            with masks.attach(ticket, fit.optimizer):
                fit.run()
        return Pruned(ticket)
