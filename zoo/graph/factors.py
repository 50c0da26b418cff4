"""A completed matrix of ratings as a model: biases and two thin factors, its maker and its task."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.errors import ConfigError
from zoo.graph.methods.matrix_completion import Completion, predicted
from zoo.graph.studies.matrix_completion import bias_parts, ratings
from zoo.harness.network_task import NetworkTask
from zoo.harness.tasks import Flops, Measure, Progress, TaskResult, register_task
from zoo.methods.contract import Sparsified
from zoo.shared.masks import MaskSet
from zoo.tables import filmtrust


class Factors(nn.Module):
    """Ratings as mean + bias of the user + bias of the item + u . v.

    Args:
        users, items: how many.
        rank: of the product.

    Attributes:
        full_precision: that it computes in float32, also on weights stored in float16.

    Raises:
        ConfigError: a size below 1.
    """

    full_precision: ClassVar[bool] = True

    def __init__(self, users: int, items: int, rank: int) -> None:
        super().__init__()
        if min(users, items, rank) < 1:
            raise ConfigError(f"factors need sizes of at least 1; received {users}, {items} and {rank}")
        self.mean = nn.Parameter(torch.zeros(()))
        self.by_user, self.by_item = nn.Parameter(torch.zeros(users)), nn.Parameter(torch.zeros(items))
        self.u, self.v = nn.Parameter(torch.zeros(users, rank)), nn.Parameter(torch.zeros(items, rank))

    def forward(self, users: Int[Tensor, " e"], items: Int[Tensor, " e"]) -> Float[Tensor, " e"]:
        """The ratings of some pairs."""
        return self.mean + self.by_user[users] + self.by_item[items] + predicted(self.u, self.v, users, items)


def factors(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """Maker: FilmTrust completed as the row's options say, with the one of its `ridges` that entries held
    back choose."""
    options: dict[str, Any] = dict(row.options)
    split, found = ratings(0), []
    for ridge in options.pop("ridges"):
        u, v = Completion(**options, ridge=ridge, seed=seed).fit(*split.of(split.fit))
        error = split.error(partial(predicted, u, v), split.choose)
        found.append((error, ridge, u, v))
    _, ridge, u, v = min(found, key=lambda one: one[0])
    table = filmtrust()
    mean, by_user, by_item = bias_parts(table.users, table.items, table.values, split.fit.numpy())
    model = Factors(len(u), len(v), u.shape[1])
    values = (torch.tensor(mean), torch.from_numpy(by_user), torch.from_numpy(by_item), u, v)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)
    arguments = {"users": len(u), "items": len(v), "rank": u.shape[1]}
    stated = {**dataclasses.asdict(Completion(**options, ridge=ridge)), "seed": seed}
    return Sparsified(model.eval(), MaskSet({}), hyperparameters=stated, arguments=arguments)


@register_task
class FilmTrust(NetworkTask):
    """A fifth of FilmTrust's ratings that were neither fitted nor chosen by: errors in stars."""

    name, domain, primary, higher_is_better = "graph/filmtrust", "graph", "rmse", False
    network = Factors

    def measured_on(self) -> Any:
        """The pairs and their ratings."""
        split = ratings(0)
        return [split.rows[split.judge], split.cols[split.judge], split.values[split.judge]]

    def example(self, model: Factors) -> tuple[Any, ...]:
        """One pair."""
        return (torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))

    def flops(self, model: nn.Module) -> Flops:
        """Of a pair: a product of two rows and three sums."""
        count = 2 * int(self.fitting(model).u.shape[1]) + 3
        return Flops(count, count)

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Root of the mean squared error, which is no mean; mean absolute error with that of every pair."""
        rows, cols, values = self.measured_on()
        with torch.no_grad():
            left = self.fitting(model)(rows.long(), cols.long()).double() - values.double()
        found = TaskResult.from_samples({"mae": left.abs().tolist()}, f"filmtrust:{len(left)}")
        metrics = {"rmse": Measure(math.sqrt(float(left.square().mean()))), **found.metrics}
        return TaskResult(metrics, found.samples, found.n, found.sample_set)
