"""Triton kernels of the ops of language models, for a CUDA device.

    with ops.backend("triton"):
        y = sparse_linear(x, weight)

`auto` does not choose them: they have never been timed, and no table of GPU times is shipped. Without a GPU
they are tested in two ways: with TRITON_INTERPRET=1 in the environment before Triton is first imported they
run on CPU tensors in Triton's interpreter, and they are compiled for a GPU without being run. The modules in
this package import Triton and are themselves imported when first used.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def offered(x: torch.Tensor) -> tuple[str, ...]:
    """("triton",) where the kernels can run on x, () elsewhere."""
    if x.dtype is torch.float64 or not _installed():
        return ()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return ("triton",) if x.device.type == ("cpu" if interpreted else "cuda") else ()
