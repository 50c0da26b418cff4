"""Which execution of an encoder is the fastest here: measured, for each convolution and for the whole."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.vision.spark.masking import Choice, Mode, Visible
from zoo.vision.spark.modules import VisibleConv2d

if TYPE_CHECKING:
    from zoo.vision.spark.encoder import SparKEncoder

TRIES = 3


def fastest_choice(encoder: SparKEncoder, images: Tensor, cells: Tensor) -> Choice:
    """The fastest way of computing a forward and a backward pass.

    Args:
        encoder: one that may be changed (its norms' statistics are).
        images, cells: of the shape in question.
    """
    choices = [Choice("masked"), Choice("grid")]
    if not images.is_cuda:  # on a GPU the convolutions over pairs are the plain reference
        choices += [Choice("pairs"), Choice("mixed", _faster_over_pairs(encoder, images, cells))]
    times = {
        choice: _seconds(lambda c=choice: _step(encoder, images, cells, c), images.device)  # type: ignore[misc]
        for choice in choices
    }
    return min(choices, key=times.__getitem__)


def _step(encoder: SparKEncoder, images: Tensor, cells: Tensor, choice: Choice) -> None:
    with torch.enable_grad():
        maps = encoder.stage_rows(images, Visible(cells, *choice))
        torch.autograd.backward([one.float().mean() for one in maps])


def _faster_over_pairs(encoder: SparKEncoder, images: Tensor, cells: Tensor) -> frozenset[str]:
    """The convolutions that are faster over pairs of sites than on the grid, each by itself."""
    from zoo.vision.spark.encoder import inputs_of

    layers = {
        name: layer
        for name, layer in encoder.model.named_modules()
        if isinstance(layer, VisibleConv2d) and layer.has_pairs and not layer.is_pointwise
    }
    visible = {mode: Visible(cells, mode) for mode in _ROW_MODES}
    with torch.no_grad(), inputs_of(encoder.model, layers) as inputs:
        encoder.stage_rows(images, visible["grid"])
    found = set()
    for name, layer in layers.items():
        if name not in inputs:
            continue
        rows = inputs[name].detach().requires_grad_()

        def run(mode: Mode, layer: VisibleConv2d = layer, rows: Tensor = rows) -> None:
            with torch.enable_grad(), encoder.context.looking_at(visible[mode]):
                out = layer(rows)
                torch.autograd.grad(out, (rows, layer.weight), torch.ones_like(out))

        times = {mode: _seconds(lambda m=mode: run(m), images.device) for mode in _ROW_MODES}  # type: ignore[misc]
        if times["pairs"] < times["grid"]:
            found.add(layer.site_name)
    return frozenset(found)


_ROW_MODES: tuple[Mode, ...] = ("pairs", "grid")


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """The least time of a few runs after one that warms up."""
    run()
    times = []
    for _ in range(TRIES):
        start = _now(device)
        run()
        times.append(_now(device) - start)
    return min(times)


def _now(device: torch.device) -> float:
    """Seconds of the processor where one thread works, which other programs disturb least; else of the
    wall."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()
