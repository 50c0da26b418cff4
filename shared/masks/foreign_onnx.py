"""Masks of sparse ONNX files (SparseZoo's, for one): initialisers as a state dict, and where their zeros are.

    state, masks = onnx_state("model.onnx")
    model.load_state_dict(state, strict=False)             # what was folded into a weight is missing
    set_masks(model, masks)

Exporters transpose the weights of linear layers and give them numbers for names; their place is then in
the name
of the product, `/layers/0/fc/MatMul`. Initialisers that hold only their values (`sparse_initializer`) are
filled
up with zeros. Needs the package `onnx`, which is no dependency.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MaskError
from .foreign import masked
from .mask import Mask, MaskSet

_NUMBERED = re.compile(r"^(onnx::.*|val_\d+|\d+)$")


def onnx_state(path: Path | str, at_least: float = 0.05) -> tuple[dict[str, Tensor], MaskSet]:
    """The weights of an ONNX file by the names of the network that it was made from, and their masks.

    Args:
        path: of the file; external data are read from its folder.
        at_least: the share of zeros from which on a weight of two or more dimensions is taken for pruned.

    Raises:
        MaskError: `onnx` is not installed, the file is none, its weights are quantised, or none is pruned.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ModuleNotFoundError as error:
        raise MaskError("reading ONNX needs the package onnx: pip install onnx") from error
    try:
        graph: Any = onnx.load(str(path)).graph
    except FileNotFoundError:
        raise MaskError(f"{path}: there is no such file") from None
    except Exception as error:  # protobuf's own, of a file that is none
        raise MaskError(f"{path} is no ONNX file: {type(error).__name__}") from error
    arrays = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    arrays |= {one.values.name: _filled(one, numpy_helper) for one in graph.sparse_initializer}
    if any(array.dtype in (np.int8, np.uint8) and array.ndim > 1 for array in arrays.values()):
        raise MaskError(f"{path} has quantised weights: take the file before its quantisation")
    names = _names(graph, arrays)
    state: dict[str, Tensor] = {}
    masks: dict[str, Mask] = {}
    for own, array in arrays.items():
        name, transposed = names.get(own, (own, False))
        if _NUMBERED.match(name) or not np.issubdtype(array.dtype, np.floating):
            continue  # a constant of the graph
        tensor = torch.from_numpy(np.array(array.T if transposed else array))
        state[name] = tensor
        if tensor.dim() > 1 and float((tensor == 0).double().mean()) >= at_least:
            masks[name] = masked(tensor != 0)
    if not masks:
        raise MaskError(f"{path}: no weight has {at_least:.0%} zeros or more; lower at_least to take fewer")
    return state, MaskSet(masks)


def _names(graph: Any, arrays: dict[str, np.ndarray]) -> dict[str, tuple[str, bool]]:
    """Initialiser -> name of the parameter, and whether it is stored transposed, where a product says so."""
    found: dict[str, tuple[str, bool]] = {}
    for node in graph.node:
        inputs = [one for one in node.input if one in arrays]
        if node.op_type not in ("MatMul", "Gemm") or not inputs or inputs[0] not in node.input[1:2]:
            continue
        if not _NUMBERED.match(inputs[0]):
            continue
        place = ".".join(part for part in node.name.split("/")[:-1] if part)
        straight = any(one.name == "transB" and one.i for one in node.attribute)
        if place:
            found[inputs[0]] = (f"{place}.weight", not straight)
    return found


def _filled(sparse: Any, helper: Any) -> np.ndarray:
    """A sparse tensor as a dense one."""
    dense = np.zeros(tuple(sparse.dims), dtype=(values := helper.to_array(sparse.values)).dtype)
    index = helper.to_array(sparse.indices)
    flat = index if index.ndim == 1 else np.ravel_multi_index(tuple(index.T), dense.shape)
    if len(flat) != len(values) or (len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < dense.size):
        raise MaskError(
            f"{sparse.values.name!r} has {len(values)} values at {len(flat)} places of {dense.shape}"
        )
    dense.reshape(-1)[flat] = values
    return dense
