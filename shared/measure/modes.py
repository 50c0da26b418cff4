"""Contexts in which a model is in eval mode, or computes in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch a model to eval mode inside the context and restore the mode of every submodule afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def float32(model: nn.Module) -> Iterator[nn.Module]:
    """Compute in float32 inside the context, with weights that are stored in half precision on the CPU.

    CPUs multiply half slowly and round every sum. Going up and back changes no weight. Models that are in
    single precision or on a GPU are left as they are.
    """
    halves = [
        (tensor, tensor.dtype)
        for tensor in (*model.parameters(), *model.buffers())
        if tensor.dtype in (torch.float16, torch.bfloat16) and tensor.device.type == "cpu"
    ]
    for tensor, _ in halves:
        tensor.data = tensor.data.float()
    try:
        yield model
    finally:
        for tensor, dtype in halves:
            tensor.data = tensor.data.to(dtype)
