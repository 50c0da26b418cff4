"""BDWP (Zhang et al., 2023): N:M training that is sparse in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from zoo.methods.nm import NMMethod, parsed_nm
from zoo.methods.training import Pruned, train_held
from zoo.shared.learned.constraints import finish_bidirectional, make_bidirectional
from zoo.shared.masks.patterns import NM
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.train import Job


@dataclass
class BDWP(NMMethod):
    """Train to N:M with sparse weights going forward (along inputs) and backward (along outputs).

    Weight gradients stay dense and go to all weights, without SR-STE's decay. Of the three products of a
    layer two are sparse: 2:8 costs half of dense training. The saving is counted; a processor without N:M
    units saves no time.
    """

    sparse_products: ClassVar[int] = 2

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        fresh = reinitialised(model, job.seed)
        names = self.chosen(fresh)
        macs = self.macs(fresh, job, names)
        found = parsed_nm(self.pattern)
        fit = job.fit(fresh, macs=lambda: macs)
        make_bidirectional(fresh, names, found.n, found.m)
        train_held(fit)
        finish_bidirectional(fresh)
        return Pruned(fresh)

    def needed(self, axis: int) -> list[NM]:
        found = parsed_nm(self.pattern)
        return [*super().needed(axis), NM(found.n, found.m, 0)]
