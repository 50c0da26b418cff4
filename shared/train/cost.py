"""What trainings cost: operations as counted, and seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..measure.account import count


@dataclass
class Cost:
    """FLOPs as counted (NaN where they could not be) and seconds (see `clock`), summed over trainings."""

    flops: float = 0.0
    seconds: float = 0.0


def clock(device: torch.device) -> float:
    """Processor seconds of this process, or on a GPU wall-clock seconds after its work is done."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def step_macs(model: nn.Module, example: tuple[Any, ...], dense_gradients: bool = False) -> float:
    """Multiply-accumulates of one training step on one sample: the forward product, and in the backward pass
    the products with the weights and for the weights.

    Products with masked weights are counted for the kept entries only, and so are weight gradients unless
    `dense_gradients` says that the method needs all of them. Weights that gates compute count as dense.

    Args:
        model: whose masks (`zoo.shared.masks.masks_of`) say what is kept.
        example: one sample, as the model takes it.
        dense_gradients: whether the gradients of dropped weights are computed, too.
    """
    total = count(model, example).total
    return float(2 * total.macs_kept + (total.macs if dense_gradients else total.macs_kept))
