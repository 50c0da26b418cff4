"""Pixels that QuickSelection chooses: the autoencoder that they come from as a model, its maker, its task."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.errors import ConfigError
from zoo.harness.network_task import NetworkTask
from zoo.harness.tasks import Progress, TaskResult
from zoo.methods.contract import Sparsified, stated_options
from zoo.methods.quick_selection import QuickSelection, SparseLinear, strongest
from zoo.methods.studies.quick_selection import DenseLinear, dense_layers, varied
from zoo.shared.masks import MaskSet, set_masks
from zoo.vision.data import load_images

CHOSEN = 20  # features that the task's classifier sees


class FeatureAutoencoder(nn.Module):
    """Rows of a table to themselves, through sigmoid units; with the strength of each feature.

    Args:
        features: of a row that vary.
        hidden: units.

    Attributes:
        columns: [features], where these lie in a whole row.
        strength: [features], by which they are chosen.
        full_precision: that it computes in float32, also on weights stored in float16.

    Raises:
        ConfigError: a size below 1.
    """

    full_precision: ClassVar[bool] = True
    columns: Tensor
    strength: Tensor

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        if min(features, hidden) < 1:
            raise ConfigError(f"an autoencoder needs sizes of at least 1; received {features} and {hidden}")
        self.encoder, self.decoder = nn.Linear(features, hidden), nn.Linear(hidden, features)
        self.register_buffer("columns", torch.arange(features))
        self.register_buffer("strength", torch.zeros(features))

    def forward(self, x: Float[Tensor, "b features"]) -> Float[Tensor, "b features"]:
        out: Tensor = self.decoder(self.encoder(x).sigmoid())
        return out

    def chosen(self, count: int) -> Int[Tensor, " count"]:
        """Columns of the strongest features, rising."""
        return self.columns[strongest(self.strength, count)]


def pixels(part: str) -> tuple[Float[Tensor, "n 64"], Int[Tensor, " n"]]:
    """Digits as rows of a table, and their classes."""
    split = getattr(load_images("digits"), part)
    return split.images.flatten(1).float(), split.labels


def placed(layer: SparseLinear | DenseLinear, into: nn.Linear) -> Bool[Tensor, "outputs inputs"]:
    """Copy a layer's weights and biases, absent connections as zeros; returns where connections are."""
    keep = torch.ones(into.weight.shape, dtype=torch.bool)
    with torch.no_grad():
        into.bias.copy_(layer.bias[:, 0])
        if isinstance(layer, SparseLinear):
            keep.zero_().view(-1)[layer.flat] = True
            into.weight.zero_().view(-1)[layer.flat] = layer.values
        else:
            into.weight.copy_(layer.values)
    return keep


def autoencoder(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """Maker: QuickSelection on the pixels of digits; for a dense row an autoencoder with all connections."""
    x, _ = pixels("train")
    columns = varied(x).nonzero()[:, 0]
    method = QuickSelection(**row.options, **row.recipe, seed=seed)
    model = FeatureAutoencoder(len(columns), method.hidden)
    if row.method == "dense":
        layers: Any = dense_layers(x[:, columns], method)
        strength = layers[0].values.detach().abs().sum(0)
    else:
        found = method.fit(x[:, columns])
        layers, strength = found.layers, found.strength
    keep = {
        f"{name}.weight": placed(layer, getattr(model, name))
        for name, layer in zip(("encoder", "decoder"), layers, strict=True)
    }
    model.columns.copy_(columns)
    model.strength.copy_(strength)
    masks = MaskSet(keep if row.method != "dense" else {})
    set_masks(model, masks)
    arguments = {"features": len(columns), "hidden": method.hidden}
    return Sparsified(model.eval(), masks, hyperparameters=stated_options(method), arguments=arguments)


class ChosenPixels(NetworkTask):
    """Accuracy on digits of 50 extremely randomised trees that see the 20 strongest pixels only."""

    name, domain, primary = "vision/digits-pixels", "vision", "accuracy"
    network = FeatureAutoencoder

    def measured_on(self) -> Any:
        return [*pixels("train"), *pixels("test")]

    def example(self, model: FeatureAutoencoder) -> tuple[Any, ...]:
        """A row of the features that vary."""
        return (torch.zeros(1, len(model.columns)),)

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Train the trees on the training images, and measure them on the test images."""
        from sklearn.ensemble import ExtraTreesClassifier

        own = self.fitting(model).chosen(CHOSEN)
        (x, y), (x2, y2) = pixels("train"), pixels("test")
        trees = ExtraTreesClassifier(50, random_state=0).fit(x[:, own].numpy(), y.numpy())
        right = trees.predict(x2[:, own].numpy()) == y2.numpy()
        return TaskResult.from_samples({"accuracy": right.astype(float).tolist()}, f"digits:{len(y2)}")
