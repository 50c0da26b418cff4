"""Fast Sparse ConvNets (Elsen et al., CVPR 2020): pointwise convolutions pruned and run sparse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zoo.shared.pruning.inventory import pointwise_weights
from zoo.shared.pruning.schedules import Cubic
from zoo.shared.pruning.sparsifier import Sparsifier
from zoo.vision.base import Pruned, VisionMethod
from zoo.vision.magnitude import UPDATES
from zoo.vision.models import Classifier
from zoo.vision.train import Trainer


@dataclass
class FastConvNet(VisionMethod):
    """Prune the 1x1 convolutions of a trained network gradually; everything else stays dense.

    With packed execution (`zoo.load(name, execution="packed")`) those layers run through
    `zoo.shared.ops.sparse_conv1x1`.
    """

    pattern: Literal["unstructured", "block4x1", "block2x1"] = "unstructured"
    """Single weights, or blocks of output channels that share an input channel."""

    allocation: Literal["uniform", "global", "erk"] = "uniform"
    """How much is cut in which layer."""

    def prune(self, model: Classifier, trainer: Trainer) -> Pruned:
        fit = trainer.fit(model)
        end = max(1, int(0.6 * fit.steps))
        with Sparsifier(
            model,
            fit.optimizer,
            schedule=Cubic(self.sparsity, end),
            pattern=self.pattern,
            budget=self.allocation,
            names=pointwise_weights(model),
            every=max(1, end // UPDATES),
        ) as sparsifier:
            fit.run(sparsifier.step)
        return Pruned(model)
