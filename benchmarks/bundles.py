"""Sparse bundles of the zoo as they are loaded: packed against masked execution and the dense twin.

A forward pass over the bundle's own data, on inputs that `model.prepare` has converted once. Sparse bundles
use the edges that their ticket keeps, in both executions; the dense twin uses all. `products` is the share
of the masked time that the products with masked weights take, and so all that packing can save: where it is
small, the rest (the sums over the edges, the calls) says why a packed model is not faster still.
"""

from __future__ import annotations

import functools
import sys
import time
import unittest.mock
from collections.abc import Callable, Iterator

import torch

from shared.bench import Cell, Goal, Later, main
from zoo.bundles import load
from zoo.catalog import find, list_models
from zoo.errors import DataError
from zoo.graph import models
from zoo.graph.data import load_graph

Call = Callable[[], object]
FASTER = Goal(1.0, over=("dense twin",))  # a sparse bundle as it is served, against the dense one


def forward(name: str, execution: str, data) -> Call:
    model = load(name, execution=execution)
    inputs = model.prepare(data.x, data.edge_index)
    return lambda: model(*inputs)


def product_share(name: str, data) -> float:
    """Share of the masked forward pass spent in the products with masked weights."""
    spent = {"products": 0.0, "all": 0.0}

    def timed(function, key: str):
        def run(*args):
            start = time.perf_counter()
            result = function(*args)
            spent[key] += time.perf_counter() - start
            return result

        return run

    call = timed(forward(name, "masked", data), "all")
    call()
    spent["all"] = 0.0
    with unittest.mock.patch.object(models, "project", timed(models.project, "products")):
        for _ in range(30):
            call()
    return spent["products"] / spent["all"]


def cells(quick: bool, threads: int) -> Iterator[Later]:
    def build(labels: dict[str, object], name: str, twin: str, data) -> Cell:
        packed, masked = forward(name, "packed", data), forward(name, "masked", data)
        torch.testing.assert_close(packed(), masked(), atol=1e-3, rtol=1e-3)
        labels["products"] = f"{product_share(name, data):.0%}"
        peers = {"masked": masked, "dense twin": forward(twin, "masked", data)}
        return Cell(labels, packed, peers, goal=FASTER)

    for name in list_models("graph/teddy-*-w95" if quick else "graph/teddy-*"):
        card = find(name).card
        try:
            data = load_graph(card.metrics[0].task.removeprefix("graph/"))
        except (DataError, OSError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        labels: dict[str, object] = {"bundle": name, "zeros": f"{card.sparsity.overall:.0%}"}
        yield Later(labels, functools.partial(build, dict(labels), name, card.dense_twin, data))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main("bundles of the zoo run faster packed", cells))
