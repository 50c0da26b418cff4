"""Which parameters a model multiplies activations by, and with what: seen at the products themselves.

A hook on `nn.Linear` knows one class. Transformers' Conv1D keeps its weight (in, out), subclasses multiply in
their own way, mixtures of experts keep a stack [expert, ., .] and multiply by a slice of it. All of them end
in a matrix product of which one operand is a view of a parameter; its strides tell which axis is summed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
# The products and where their two operands stand among the arguments.
_OPERANDS: dict[Any, tuple[int, int]] = {
    _ATEN.mm.default: (0, 1),
    _ATEN.bmm.default: (0, 1),
    _ATEN.matmul.default: (0, 1),
    _ATEN.addmm.default: (1, 2),
    _ATEN.baddbmm.default: (1, 2),
    _ATEN.mv.default: (0, 1),
    _ATEN.addmv.default: (1, 2),
}
# Rows [n, k], matrices [groups, k, m], and where each group's rows end: torch's, and transformers' where that
# does not run.
_GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")


@dataclass(frozen=True)
class Product:
    """One product of activations with a parameter, or with one matrix of a stack of them.

    Attributes:
        name: of the parameter.
        axis: axis of the parameter that is summed over: its inputs.
        index: which matrix of the stack [matrices, ., .]; None for a parameter of two dimensions.
        rows: the activations, [rows, inputs].
    """

    name: str
    axis: int
    index: int | None
    rows: Float[Tensor, "rows inputs"]


class _Observer(TorchDispatchMode):
    """Calls `see` with each product of a parameter of two or three dimensions."""

    def __init__(self, parameters: Mapping[str, Tensor], see: Callable[[Product], None]) -> None:
        super().__init__()
        self.see = see
        self.known: dict[int, list[tuple[str, Tensor]]] = {}
        for name, parameter in parameters.items():
            if parameter.dim() in (2, 3) and parameter.device.type != "meta":
                self.known.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, parameter))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is _ATEN.linear.default:  # whole only in inference mode
            self._offer(args[0], args[1].transpose(-1, -2))
        elif (places := _OPERANDS.get(func)) is not None:
            left, right = (args[place] for place in places)
            self._offer(left, right)
            if left.dim() > 1 and right.dim() > 1:
                self._offer(right.transpose(-1, -2), left.transpose(-1, -2))
        elif func._schema.name in _GROUPED:
            rows, matrices = args[:2]
            ends = args[2] if len(args) > 2 else (kwargs or {}).get("offs")
            if rows.dim() == 2 and matrices.dim() == 3 and ends is not None:
                starts = [0, *ends.tolist()[:-1]]
                self._offer([rows[a:b] for a, b in zip(starts, ends.tolist(), strict=True)], matrices)
        return output

    def _offer(self, rows: Tensor | list[Tensor], matrix: Tensor) -> None:
        """Report rows [..., n, k] times matrix [..., k, m] if the matrix is a parameter's; a list has the
        rows of each matrix."""
        if matrix.dim() < 2 or not (found := self._owner(matrix)):
            return
        name, parameter = found
        axis = _axis(parameter, matrix)
        if axis is None:
            return
        first = matrix.storage_offset() - parameter.storage_offset()
        if isinstance(rows, Tensor) and (parameter.dim() == 2 or matrix.dim() == 2):
            index = first // parameter.stride(0) if parameter.dim() == 3 else None
            self.see(Product(name, axis, index, rows.reshape(-1, rows.shape[-1])))
        else:  # a batch of matrices, each with its rows
            step = matrix.stride(0)
            for number, part in enumerate(rows):
                self.see(Product(name, axis, (first + number * step) // parameter.stride(0), part))

    def _owner(self, matrix: Tensor) -> tuple[str, Tensor] | None:
        for name, parameter in self.known.get(matrix.untyped_storage().data_ptr(), ()):
            first = matrix.storage_offset() - parameter.storage_offset()
            if 0 <= first < parameter.numel():
                return name, parameter
        return None


def _axis(parameter: Tensor, matrix: Tensor) -> int | None:
    """The axis of a parameter that the rows of a view of it, [..., k, m], run along."""
    stride, size = matrix.stride(-2), matrix.shape[-2]
    for axis in range(parameter.dim() - 2, parameter.dim()):
        if parameter.stride(axis) == stride and parameter.shape[axis] >= size:
            return axis
    return None


@contextmanager
def observe_products(parameters: Mapping[str, Tensor], see: Callable[[Product], None]) -> Iterator[None]:
    """Report every product with one of the parameters while the context lasts.

    What multiplies by a copy of a parameter (a cast weight, a parametrisation) is not seen.

    Args:
        parameters: by name; those of two dimensions, or stacks of matrices of three, are looked for.
        see: called with each product, after it was computed.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one call of it would hide four products
    try:
        with _Observer(parameters, see):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@dataclass(frozen=True)
class Matrices:
    """A parameter as the matrices [outputs, inputs] that a model multiplies by.

    Attributes:
        name: of the parameter.
        parameter: of two dimensions, or a stack of matrices of three.
        axis: its axis of inputs.
    """

    name: str
    parameter: Tensor
    axis: int

    def views(self, tensor: Tensor | None = None) -> list[Tensor]:
        """Views [out, in] of the parameter or of another tensor of its shape; writes go through."""
        tensor = self.parameter.detach() if tensor is None else tensor
        stack = tensor.unsqueeze(0) if tensor.dim() == 2 else tensor
        return [one if self.axis == self.parameter.dim() - 1 else one.T for one in stack]

    def joined(self, parts: list[Tensor]) -> Tensor:
        """Tensors [out, in], one for each view, as one tensor of the parameter's shape."""
        whole = torch.empty(self.parameter.shape, dtype=parts[0].dtype, device=parts[0].device)
        for view, part in zip(self.views(whole), parts, strict=True):
            view.copy_(part)
        return whole


def product_matrices(model: nn.Module, run: Callable[[], Any]) -> dict[str, Matrices]:
    """The parameters that `run` multiplies by, in the order in which it first does; of `model`."""
    parameters = dict(model.named_parameters())
    found: dict[str, Matrices] = {}

    def see(product: Product) -> None:
        if product.name not in found:
            found[product.name] = Matrices(product.name, parameters[product.name], product.axis)

    with torch.no_grad(), observe_products(parameters, see):
        run()
    return found
