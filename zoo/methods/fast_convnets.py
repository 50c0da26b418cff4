"""Fast Sparse ConvNets (Elsen et al., CVPR 2020): pointwise convolutions pruned and run sparse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from zoo.methods.training import Pruned, TrainingMethod, train_gradually
from zoo.shared.pruning.inventory import pointwise_weights
from zoo.shared.train import Job


@dataclass
class FastConvNet(TrainingMethod):
    """Prune the 1x1 convolutions of a trained network gradually; everything else stays dense.

    With packed execution (`zoo.load(name, execution="packed")`) those layers run through
    `zoo.shared.ops.sparse_conv1x1`.
    """

    pattern: Literal["unstructured", "block4x1", "block2x1"] = "unstructured"
    """Single weights, or blocks of output channels that share an input channel."""

    allocation: Literal["uniform", "global", "erk"] = "uniform"
    """How much is cut in which layer."""

    def prune(self, model: nn.Module, job: Job) -> Pruned:
        names = pointwise_weights(model)
        train_gradually(model, job, self.sparsity, pattern=self.pattern, budget=self.allocation, names=names)
        return Pruned(model)
