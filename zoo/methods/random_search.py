"""Random search as the neutral baseline of sparse architecture search (Oldewage et al., 2024): whole units
are chosen at random, from one initialisation.

Of several random choices the one with the lowest loss of the untrained network is trained, or the one that is
best after a short training.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.methods.channels import kept_channels
from zoo.methods.training import Pruned, TrainingMethod, example_of
from zoo.shared.errors import GroupError
from zoo.shared.measure.modes import eval_mode
from zoo.shared.structure.groups import GroupMap, trace_groups
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.structure.surgery import cut
from zoo.shared.train import Job

Keep = dict[str, Bool[Tensor, " units"]]


def drawn(groups: GroupMap, kept: int, generator: torch.Generator) -> Keep:
    """So many units at random, of each family its share, at least one.

    Raises:
        GroupError: fewer units than families.
    """
    units = {name: family.units for name, family in groups.items()}
    if kept < len(units):
        raise GroupError(f"{kept} units cannot be kept in {len(units)} families with at least one each")
    exact = {name: kept * n / sum(units.values()) for name, n in units.items()}
    counts = {name: max(1, math.floor(share)) for name, share in exact.items()}
    while (missing := kept - sum(counts.values())) != 0:
        step = 1 if missing > 0 else -1
        movable = [n for n in units if 1 <= counts[n] + step <= units[n]]
        name = max(movable, key=lambda n: step * (exact[n] - counts[n]))
        counts[name] += step
    found = {}
    for name, n in units.items():
        order = torch.randperm(n, generator=generator)
        found[name] = torch.zeros(n, dtype=torch.bool).index_fill_(0, order[: counts[name]], True)
    return found


@dataclass
class RandomSearch(TrainingMethod):
    """Draw choices of units of fresh weights, keep the best, cut the others, and train what is left.

    The dense model that is given lends its shape only.
    """

    sparsity: float = 0.5
    """Share of the units to remove, over all families that can be cut."""

    candidates: int = 10
    """Random choices; of one nothing is evaluated."""

    short: int = 0
    """Epochs after which a candidate is judged by the job's score; 0 judges by the loss before training."""

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        if self.candidates < 1 or self.short < 0:
            raise ConfigError(
                "a search needs at least one candidate and no negative epochs; received "
                f"{self.candidates} and {self.short}"
            )
        if self.short and job.score is None:
            raise ConfigError("short trainings are judged by the job's score: give Job(score=...)")
        learner = reinitialised(model, job.seed).to(job.device)
        groups = trace_groups(learner, example_of(job))
        kept = kept_channels(learner, groups, self.sparsity)
        generator = torch.Generator().manual_seed(job.seed)
        choices = [drawn(groups, kept, generator) for _ in range(self.candidates)]
        keep = choices[0]
        # Refuses a network that does not run when it is cut.
        cut(copy.deepcopy(learner), groups, keep, check=example_of(job))
        if self.candidates > 1:
            worth = [self._worth(learner, groups, one, job) for one in choices]
            keep = choices[max(range(len(choices)), key=worth.__getitem__)]
        cut(learner, groups, keep)
        job.fit(learner).run()
        return Pruned(learner, {"channels/keep": torch.cat([keep[name] for name in groups])})

    def _worth(self, model: nn.Module, groups: GroupMap, keep: Keep, job: Job) -> float:
        """Of a choice, larger is better."""
        tried = copy.deepcopy(model)
        cut(tried, groups, keep)
        if self.short:
            job.fit(tried, epochs=self.short).run()
            assert job.score is not None
            with eval_mode(tried), torch.no_grad():
                return job.score(tried)
        with eval_mode(tried), torch.no_grad():
            return -float(torch.stack([job.loss(tried, batch) for batch in job.sample(4)]).mean())
