"""Click-through rate: DeepFM on fields of categories, its training and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from zoo.graph.methods.low_rank import factor
from zoo.shared.measure.modes import eval_mode
from zoo.shared.train import Job, Recipe
from zoo.tables import Clicks

RECIPE: Mapping[str, Any] = {
    **{"epochs": 6, "lr": 1e-3, "batch": 256, "optimizer": "adam"},
    **{"weight_decay": 1e-5, "select": "best"},
}


class DeepFM(nn.Module):
    """Guo et al., IJCAI 2017: a weight for each category, products of all pairs of their embeddings, and a
    perceptron on all embeddings, summed.

    Args:
        sizes: categories of each field.
        width: of an embedding.
        hidden: widths of the perceptron.
        ranks: of modules that are products of two thin ones, by name, see `zoo.graph.methods.low_rank`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        width: int = 16,
        hidden: Sequence[int] = (128, 128, 128),
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.arguments = {"sizes": list(sizes), "width": width, "hidden": list(hidden)}
        self.first = nn.ModuleList(nn.Embedding(size, 1) for size in sizes)
        self.tables = nn.ModuleList(nn.Embedding(size, width) for size in sizes)
        for table in (*self.first, *self.tables):
            nn.init.normal_(table.weight, std=0.05)
        widths = [len(sizes) * width, *hidden]
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.deep = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        factor(self, ranks or {})

    def forward(self, fields: Int[Tensor, "batch fields"]) -> Float[Tensor, " batch"]:
        """Logits of a click."""
        embedded = torch.stack([t(fields[:, i]) for i, t in enumerate(self.tables)], 1)
        first = torch.stack([t(fields[:, i])[:, 0] for i, t in enumerate(self.first)], 1).sum(1)
        pairs = 0.5 * (embedded.sum(1).square() - embedded.square().sum(1)).sum(1)
        deep: Tensor = self.deep(embedded.flatten(1))[:, 0]
        return first + pairs + deep

    def current_arguments(self) -> dict[str, Any]:
        """Arguments that make a module of these shapes."""
        ranks = {
            name: module[1].in_features
            for name, module in self.named_modules()
            if name != "deep" and isinstance(module, nn.Sequential)
        }
        return {**self.arguments, **({"ranks": ranks} if ranks else {})}


def click_loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """Binary cross-entropy of the logits."""
    return functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1].float())


def logits_of(model: nn.Module, fields: Int[Tensor, "n fields"]) -> Float[Tensor, " n"]:
    """Logits of all rows."""
    with torch.no_grad(), eval_mode(model):
        return torch.cat([model(part) for part in fields.split(4096)])


def area(logits: Float[Tensor, " n"], labels: Int[Tensor, " n"]) -> float:
    """Area under the curve of true against false positives."""
    return float(roc_auc_score(labels.numpy(), logits.numpy()))


def parts_of(clicks: Clicks) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Fields and labels to train on, to choose by (a tenth of the training rows, drawn once), and to test."""
    fields, labels = torch.from_numpy(clicks.fields), torch.from_numpy(clicks.labels)
    train = torch.from_numpy(clicks.train).nonzero().flatten()
    order = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    held, rest, test = order[: len(order) // 10], order[len(order) // 10 :], torch.from_numpy(~clicks.train)
    return (fields[rest], labels[rest]), (fields[held], labels[held]), (fields[test], labels[test])


def click_job(clicks: Clicks, recipe: Recipe | None = None, seed: int = 0) -> Job:
    """Training on the table's training rows, scored by the area on those held back."""
    train, held, _ = parts_of(clicks)
    recipe = recipe or Recipe(**RECIPE)
    loader = DataLoader(TensorDataset(*train), recipe.batch, shuffle=True)
    return Job(
        loader, click_loss, lambda model: area(logits_of(model, held[0]), held[1]), recipe, seed, "cpu"
    )
