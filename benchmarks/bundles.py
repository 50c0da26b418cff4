"""Sparse bundles of the zoo as they are loaded: packed against masked execution and the dense twin.

A forward pass over the bundle's own data, on inputs that are converted once: the whole graph, 64 test images,
one token of text and a prompt of 64. Sparse graphs keep the edges of their ticket, in both executions; the
dense twin uses all. Packing folds the batch norms of a convnet, so its dense twin runs with folded norms,
too.

`products` is the share of the masked time that the layers with masked weights take, and so all that packing
can save: where it is small, the rest (the sums over the edges, attention, the calls) says why a packed model
is not faster still.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from zoo.bundles.catalog import find, list_models
from zoo.bundles.store import load
from zoo.errors import DataError
from zoo.graph import models
from zoo.graph.data import load_graph
from zoo.shared.bench import Cell, Goal, Later, main
from zoo.shared.masks import masks_of
from zoo.vision.data import load_images
from zoo.vision.mobilenet import norms_folded

Call = Callable[[], object]
Inputs = Callable[[nn.Module], tuple[Any, ...]]
FASTER = Goal(1.0, over=("dense twin",))  # a sparse bundle as it is served, against the dense one
IMAGES = PROMPT = 64
# Bundles whose layers have sparse kernels: convolutions of 3x3 run dense.
BUNDLES = ("graph/teddy-*", "vision/fast-convnet-*", "llm/wanda-*", "llm/gqsa-*")
QUICK = ("graph/teddy-*-w95", "vision/fast-convnet-*", "llm/wanda-50-stories")


def inputs_of(domain: str, task: str) -> dict[str, Inputs]:
    """What a bundle is run on, from its first task."""
    if domain == "graph":
        data = load_graph(task)
        return {"graph": lambda model: model.prepare(data.x, data.edge_index)}
    if domain == "vision":
        images = load_images(task)
        return {f"{IMAGES} images": lambda model: (images.normalised(images.test.images[:IMAGES]),)}
    prompt = torch.arange(1, PROMPT + 1)[None]
    return {"1 token": lambda _: (prompt[:, :1],), f"{PROMPT} tokens": lambda _: (prompt,)}


def call_of(model: nn.Module, inputs: Inputs) -> Call:
    arguments = inputs(model)
    return lambda: model(*arguments)


def product_share(model: nn.Module, inputs: Inputs) -> float:
    """Share of the forward pass of a masked model that is spent in the products with its masked weights."""
    masks, spent, started = masks_of(model) or {}, {"products": 0.0}, []
    owners = {name.rpartition(".")[0] for name in masks}
    call, project = call_of(model, inputs), models.project

    def projected(*args: Any) -> Any:  # graph models multiply in a function, not in modules of their own
        start = time.perf_counter()
        result = project(*args)
        spent["products"] += time.perf_counter() - start
        return result

    def leave(*_: Any) -> None:
        spent["products"] += time.perf_counter() - started.pop()

    for name, module in model.named_modules():
        if name in owners and isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter()))
            module.register_forward_hook(leave)
    models.project = projected
    try:
        call()
        spent["products"], start = 0.0, time.perf_counter()
        for _ in range(30):
            call()
        return spent["products"] / (time.perf_counter() - start)
    finally:
        models.project = project


def first_output(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def cells(quick: bool, threads: int) -> Iterator[Later]:
    def build(labels: dict[str, object], name: str, twin: str, inputs: Inputs) -> Cell:
        packed, masked = (call_of(load(name, execution=kind), inputs) for kind in ("packed", "masked"))
        expected = first_output(masked())  # in halves; a gate at its threshold may open in one of the two
        close = {"atol": 1e-2 * max(1.0, float(expected.abs().max())), "rtol": 1e-2}
        torch.testing.assert_close(first_output(packed()), expected, **close)
        labels["products"] = f"{product_share(load(name), inputs):.0%}"
        dense = load(twin)
        if name.startswith("vision/"):
            dense = norms_folded(dense)
        peers = {"masked": masked, "dense twin": call_of(dense, inputs)}
        if next(dense.parameters()).dtype != torch.float32:  # which a processor without halves is faster with
            peers["dense twin fp32"] = call_of(load(twin).float(), inputs)
        return Cell(labels, packed, peers, goal=FASTER)

    for name in (name for glob in (QUICK if quick else BUNDLES) for name in list_models(glob)):
        card = find(name).card
        try:
            inputs = inputs_of(card.domain, card.metrics[0].task.partition("/")[2])
        except (DataError, OSError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        for kind, given in inputs.items():
            zeros = f"{card.sparsity.overall:.0%}"
            labels: dict[str, object] = {"bundle": name, "zeros": zeros, "input": kind}
            yield Later(labels, functools.partial(build, dict(labels), name, card.dense_twin, given))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main("packed bundles against their dense twins", cells))
