"""CATS: one threshold per FFN on the magnitude of the activated gate (Lee, Lee, Zhang, Tiwari, Mirhoseini,
2024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from zoo.llm.data.calibration import Calibrated, extras_of
from zoo.llm.gate_statistics import GateStatistics, gate_statistics
from zoo.llm.models.thresholds import attach, to_extras
from zoo.methods.contract import Sparsified
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.measure.activations import check_share
from zoo.shared.measure.modes import float32
from zoo.shared.train import Job


def cats_thresholds(statistics: Sequence[GateStatistics], sparsity: float) -> dict[str, Tensor]:
    """tau = the k-th smallest |SiLU(W_gate x)| of each block, k = int(count * sparsity)."""
    return {f"{one.mlp}.act_fn": torch.tensor(one.gates[sparsity]) for one in statistics}


@dataclasses.dataclass
class Cats(Calibrated):
    """Close the FFN gates whose magnitude is below one threshold per layer; training-free."""

    sparsity: float = 0.5
    """Share of the gates to close, strictly between 0 and 1."""

    chunk: int = 4
    """Windows whose k-th value is taken together."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """Calibrate and put the thresholds on `model`, in place.

        Raises:
            BudgetError: a sparsity outside (0, 1).
            ConfigError, DataError: see `gate_statistics` and `Calibrated.batches`.
            ActivationError: NaN or infinite activations.
        """
        check_share(self.sparsity)
        with float32(model):
            statistics = gate_statistics(model, self.tokens(model, job), (), (self.sparsity,), self.chunk)
        found = cats_thresholds(statistics, self.sparsity)
        attach(model, found)
        extras = extras_of(model) | to_extras(found)
        return Sparsified(model, masks_of(model) or MaskSet({}), extras, dataclasses.asdict(self))
