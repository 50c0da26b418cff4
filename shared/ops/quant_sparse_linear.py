"""y = x W^T + b with W in four-bit groups of which only some are kept: the layout of GQSA (1 x G groups).

    weight = quantise_groups(linear.weight, keep, group=16)
    y = quant_sparse_linear(x, weight, linear.bias)

Each row is cut into groups of G consecutive inputs. A kept group is stored as G four-bit codes, an fp16
scale and a zero point: w = scale * (q - zero). At G = 16 a kept weight takes 6.5 bits with its column
number.

This is the form that is stored; decoding takes less time by `quant_panel_linear`, with x in eight bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from ..errors import OpError
from . import _native, dispatch, triton
from .cache import Calls, Derived, Run, dense_run, native_run
from .dense_linear import fastest_product, prepack, prepacks

__all__ = ["QuantGroups", "plan", "quant_sparse_linear", "quantise_groups", "reference"]

_dense = Derived[Tensor](1024)
_REFERENCE_PRODUCTS = 1 << 24  # that the reference holds at a time


@dataclass(frozen=True, eq=False)
class QuantGroups:
    """A weight W [out, in] of kept four-bit groups.

    Attributes:
        codes: uint8 [groups, G / 2], two values per byte, the first in the low half.
        scales: fp16 [groups].
        zeros: uint8 [groups], 0 to 15.
        columns: int16 [groups], the group's number along its row, ascending in a row.
        pointer: int32 [out + 1], the first group of each row.
        shape: (out, in).
        group: G, a multiple of 16 that divides `in`.
        calls: how calls seen before ran, see `cache.py`.
    """

    codes: Integer[Tensor, "groups bytes"]
    scales: Float[Tensor, " groups"]
    zeros: Integer[Tensor, " groups"]
    columns: Integer[Tensor, " groups"]
    pointer: Integer[Tensor, " rows_and_end"]
    shape: tuple[int, int]
    group: int
    calls: Calls = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "calls", Calls())  # not by a default factory, which dynamo cannot trace
        self.check()

    def check(self) -> None:
        """Raise OpError if the parts do not fit; their content is read in every call."""
        rows, cols = self.shape
        if self.group < 16 or self.group % 16 or cols % self.group or cols // self.group > 2**15:
            raise OpError(
                f"group must be a multiple of 16 that divides the {cols} inputs, received {self.group}"
            )
        groups = self.columns.numel()
        expected = {
            "codes": (torch.uint8, (groups, self.group // 2)),
            "scales": (torch.float16, (groups,)),
            "zeros": (torch.uint8, (groups,)),
            "columns": (torch.int16, (groups,)),
            "pointer": (torch.int32, (rows + 1,)),
        }
        for name, (dtype, shape) in expected.items():
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
                raise OpError(
                    f"{name} must be contiguous {dtype} {shape}, not {tensor.dtype} {tuple(tensor.shape)}"
                )
            if tensor.device != self.codes.device:
                raise OpError(
                    f"{name} is on {tensor.device}, codes on {self.codes.device}: move them together"
                )
        if torch.compiler.is_compiling() or type(self.pointer) is not Tensor or self.pointer.is_meta:
            return  # tracing: there is no content to look at; the op checks again when it runs
        if self.pointer.device.type == "cpu" and _native.available():
            places = (self.zeros.data_ptr(), self.columns.data_ptr(), self.pointer.data_ptr())
            if not _native.value("zoo_groups_check", "pppiiii")(*places, groups, *self.shape, self.group):
                return
        self._check_ranges()

    def _check_ranges(self) -> None:
        if int(self.pointer[0]) != 0 or bool((self.pointer[1:] < self.pointer[:-1]).any()):
            raise OpError("the pointer of grouped weights must start at 0 and never fall")
        if int(self.pointer[-1]) != self.columns.numel():
            raise OpError(
                f"the pointer ends at {int(self.pointer[-1])}, there are {self.columns.numel()} groups"
            )
        if bool(((self.columns < 0) | (self.columns >= self.shape[1] // self.group)).any()):
            raise OpError(f"a group number lies outside the {self.shape[1] // self.group} groups of a row")
        row_of = self.pointer.diff().long()
        row = torch.repeat_interleave(torch.arange(self.shape[0], device=row_of.device), row_of)
        if bool(((self.columns[1:] <= self.columns[:-1]) & (row[1:] == row[:-1])).any()):
            raise OpError("the group numbers of a row must rise: none may be there twice")
        if bool((self.zeros > 15).any()):
            raise OpError("a zero point lies outside 0..15")

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The stored tensors, in the order of the constructor."""
        return self.codes, self.scales, self.zeros, self.columns, self.pointer

    @property
    def density(self) -> float:
        """Kept groups over all groups."""
        return self.columns.numel() * self.group / max(1, self.shape[0] * self.shape[1])

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts)

    def to_dense(self) -> Float[Tensor, "out in"]:
        """The weight in fp32, with zeros where no group is kept.

        Raises:
            OpError: the parts do not fit (any more).
        """
        self.check()
        values = self.dequantised()
        dense = values.new_zeros(self.shape[0], self.shape[1] // self.group, self.group)
        return dense.index_put((self.group_rows(), self.columns.long()), values).flatten(1)

    def dequantised(self) -> Float[Tensor, "groups group"]:
        """The kept groups in fp32."""
        q = torch.stack([self.codes & 15, self.codes >> 4], -1).flatten(1).float()
        return (q - self.zeros.float().unsqueeze(1)) * self.scales.float().unsqueeze(1)

    def group_rows(self) -> Integer[Tensor, " groups"]:
        """The row of each kept group."""
        rows = torch.arange(self.shape[0], device=self.codes.device)
        return torch.repeat_interleave(rows, self.pointer.diff().long())


def quantise_groups(
    weight: Float[Tensor, "out in"], keep: Bool[Tensor, "out groups"], group: int = 16
) -> QuantGroups:
    """Round the kept groups of a weight to four bits, each with its own range.

    scale = (max - min) / 15 over the group and zero, zero = round(-min / scale), q = round(w / scale) +
    zero, kept in 0..15. The range includes 0, so that the zero point is one of the sixteen codes; a group
    of zeros has scale 1.

    Args:
        keep: True for the groups to store, [out, in / group].

    Raises:
        OpError: shapes that do not fit, or a group that is no multiple of 16.
    """
    rows, cols = weight.shape
    if group < 16 or group % 16 or cols % group or keep.shape != (rows, cols // group):
        raise OpError(
            f"groups of {group} (a multiple of 16) over a weight {tuple(weight.shape)} need a mask "
            f"[{rows}, {cols // max(1, group)}], received {tuple(keep.shape)}"
        )
    groups = weight.detach().float().reshape(rows, cols // group, group)[keep]
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((high - low) / 15).half()
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))
    wide = scales.float()
    zeros = (-low / wide).round().clamp(0, 15)
    q = ((groups / wide.unsqueeze(1)).round() + zeros.unsqueeze(1)).clamp(0, 15).to(torch.uint8)
    pointer = torch.zeros(rows + 1, dtype=torch.int32, device=weight.device)
    pointer[1:] = keep.sum(-1).cumsum(0)
    columns = keep.nonzero()[:, 1].to(torch.int16)
    codes = (q[:, 0::2] | (q[:, 1::2] << 4)).contiguous()
    return QuantGroups(codes, scales, zeros.to(torch.uint8), columns, pointer, (rows, cols), group)


def quant_sparse_linear(
    x: Float[Tensor, "*batch in"],
    weight: QuantGroups,
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """y = x W^T + bias; the groups that are not kept are not read. Sums are in fp32.

    Gradients reach x and the bias (codes, scales and zero points are constants here).

    Raises:
        OpError: shapes, dtypes or devices that do not fit.
    """
    if dispatch.direct(x, weight.codes, bias):
        run = weight.calls.find(x, bias, weight.shape[0])
        if run is not None:
            return run(x, bias)
        weight.check()
        return _forward(x, weight, bias)
    return _quant_sparse_linear(x, *weight.parts, bias, weight.shape[1], weight.group)


def reference(
    x: Float[Tensor, "*batch in"],
    weight: QuantGroups,
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """The definition: each kept group, dequantised, times its x, in fp32 (fp64 for fp64)."""
    dtype = x.dtype
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    values, rows = weight.dequantised().to(wide), weight.group_rows()
    flat = x.reshape(-1, weight.shape[1] // weight.group, weight.group).to(wide)
    y = flat.new_zeros(flat.shape[0], weight.shape[0])
    step = max(1, _REFERENCE_PRODUCTS // max(1, values.numel()))
    for some, at in zip(flat.split(step), y.split(step), strict=True):
        at.index_add_(1, rows, (some[:, weight.columns.long()] * values).sum(-1))
    y = y if bias is None else y + bias.to(wide)
    return y.to(dtype).reshape(*x.shape[:-1], weight.shape[0])


def plan(
    x: Float[Tensor, "*batch in"],
    weight: QuantGroups,
    bias: Float[Tensor, " out"] | None = None,
) -> dispatch.Plan:
    """The backend that `quant_sparse_linear` would run these arguments on."""
    check_operands(x, weight.shape, weight.codes, bias)
    return dispatch.choose("quant_sparse_linear", x.device, *case(x, weight))


def check_operands(x: Tensor, shape: tuple[int, int], codes: Tensor, bias: Tensor | None) -> None:
    """Raise OpError if x or the bias does not fit a weight of this shape whose codes are given."""
    rows, cols = shape
    if x.dim() == 0 or x.shape[-1] != cols:
        raise OpError(f"x {tuple(x.shape)} does not end in the {cols} inputs of the weight {shape}")
    if not x.dtype.is_floating_point:
        raise OpError(f"x must be floating point, received {x.dtype}")
    if x.device != codes.device:
        raise OpError(f"x is on {x.device}, the weight on {codes.device}: move one of them")
    if bias is not None and (bias.shape != (rows,) or bias.device != x.device):
        raise OpError(f"bias must be [{rows}] on {x.device}, received {tuple(bias.shape)} on {bias.device}")


def case(x: Tensor, weight: QuantGroups) -> tuple[tuple[str, ...], str, tuple[float, ...], int]:
    """Backends offered, the kind and sizes by which measured cases are looked up (weights, batch, density),
    and the bytes that a copy is looked up by."""
    rows, cols = weight.shape
    offered = ("dense", "reference") if x.dtype == torch.float64 else ("native", "dense", "reference")
    sizes = (float(max(1, rows * cols)), float(max(1, x.numel() // max(1, cols))), max(weight.density, 1e-4))
    return (*offered, *triton.offered(x)), f"int4 g{weight.group}", sizes, weight.nbytes


def _forward(x: Tensor, weight: QuantGroups, bias: Tensor | None) -> Tensor:
    backend = plan(x, weight, bias).backend
    if backend == "native" and x.numel() and weight.shape[0]:
        y_shape = (*x.shape[:-1], weight.shape[0])
        sizes = (math.prod(y_shape[:-1]), weight.columns.numel(), *weight.shape, weight.group)
        run = native_run("zoo_quant_sparse_linear", weight.parts, y_shape, sizes)
        weight.calls.keep(x, run, weight.parts)
        return run(x, bias)
    if backend == "dense":
        rows, dtype = x.numel() // max(1, x.shape[-1]), x.dtype
        ahead = prepacks(rows, weight.shape, dtype, x.device)

        def dense_of(held: QuantGroups) -> Tensor:
            dense = held.to_dense().to(dtype)
            return prepack(dense) if ahead else dense

        run = _dense.run(weight, weight.parts, dense_of, _dense_run, (weight.shape, dtype, ahead))
        weight.calls.keep(x, run, weight.parts)
        return run(x, bias)
    if backend == "triton":
        from .triton import quant

        return quant.quant_sparse_linear(x, weight, bias)
    return reference(x, weight, bias)


def _dense_run(weight: QuantGroups, dense: Tensor) -> Run:
    # A group that is not kept, and met an infinite x, is not in the sum.
    return dense_run(weight, dense, reference)


@torch.library.custom_op(
    "zoo::quant_sparse_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor columns, Tensor pointer, "
    "Tensor? bias, int cols, int group) -> Tensor",
)
def _quant_sparse_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    columns: Tensor,
    pointer: Tensor,
    bias: Tensor | None,
    cols: int,
    group: int,
) -> Tensor:
    weight = QuantGroups(codes, scales, zeros, columns, pointer, (pointer.numel() - 1, cols), group)
    return _forward(x, weight, bias)


@_quant_sparse_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    columns: Tensor,
    pointer: Tensor,
    bias: Tensor | None,
    cols: int,
    group: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], pointer.numel() - 1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *parts, bias, cols, group = inputs
    ctx.save_for_backward(*parts)
    ctx.cols, ctx.group, ctx.bias_dtype = cols, group, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        *parts, pointer = ctx.saved_tensors
        codes, scales, zeros, columns = parts
        shape = (pointer.numel() - 1, ctx.cols)
        dense = QuantGroups(codes, scales, zeros, columns, pointer, shape, ctx.group).to_dense()
        grad_x = grad @ dense.to(grad.dtype)
    if ctx.needs_input_grad[6]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, *[None] * 5, grad_bias, None, None


_quant_sparse_linear.register_autograd(_backward, setup_context=_setup_context)


def calibrate(quick: bool) -> list[dispatch.Entry]:
    """Measure sizes x densities x batches on this machine, for `dispatch.calibrate`."""
    entries = []
    for group in (16, 64):
        for side in (1024,) if quick else (256, 1024, 4096):
            for density in (0.5,) if quick else (0.25, 0.5, 1.0):
                weight = quantise_groups(
                    torch.randn(side, side), torch.rand(side, side // group) < density, group
                )
                dense = weight.to_dense()
                for batch in (1, 64) if quick else (1, 4, 8, 64, 512):
                    x = torch.randn(batch, side)
                    plain = fastest_product(x, dense)
                    run, args = functools.partial(quant_sparse_linear, x, weight), case(x, weight)
                    entries.append(
                        dispatch.measure("quant_sparse_linear", run, *args, quick=quick, plain=plain)
                    )
    return entries


def _examples() -> Iterator[dispatch.Example]:
    for group in (16, 32):
        weight = quantise_groups(torch.randn(9, 96), torch.rand(9, 96 // group) < 0.5, group)
        for batch in (1, 3, 9, 0):
            call = functools.partial(quant_sparse_linear, weight=weight)
            yield dispatch.Example(call, (torch.randn(batch, 96),))


dispatch.register("quant_sparse_linear", plan=plan, calibrate=calibrate, examples=_examples)
