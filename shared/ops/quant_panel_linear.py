"""y = x W^T + b with W in four-bit groups of which only some are kept, in panels of rows, x in eight bits.

    weight = QuantPanels.of(quantise_groups(linear.weight, keep, group=16))
    y = quant_panel_linear(x, weight, linear.bias)

The weight is that of `QuantGroups`, laid out for decoding: codes of eight rows that keep the same group of
inputs stand side by side, and a mask says which rows those are. At G = 16 and half of the groups kept, a kept
weight takes 5.5 bits. Each unit of x, 16 or 32 inputs, is rounded to eight bits with a step of its own
(`round_units`); products and sums of a unit are then exact in integers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from ..errors import OpError
from . import _native, dispatch, quant_sparse_linear
from .cache import Calls, Derived, Run, dense_run, native_run
from .dense_linear import fastest_product, prepack, prepacks
from .quant_sparse_linear import QuantGroups, quantise_groups

__all__ = ["QuantPanels", "plan", "quant_panel_linear", "reference", "round_units"]

_ROWS = 256  # of a panel
_LANES = 8  # groups in a block
_MOST = 127  # in eight bits
_TOGETHER = 16  # panels that are packed at a time, so that the numbers beside the codes stay few
_dense = Derived[Tensor](1024)


@dataclass(frozen=True, eq=False)
class QuantPanels:
    """A weight W [out, in] of kept four-bit groups, in panels of 256 rows.

    In a panel, by groups of columns one after another, stand the groups that its rows keep, in blocks of
    eight; the last block of a column of groups may be partly unused.

    Attributes:
        codes: uint8 [blocks, G / 8, 8, 4]; byte k of row r in piece i has code 8 i + k in its lower half and
            code 8 i + 4 + k in its upper one.
        scales: fp16 [blocks, 8].
        zeros: uint8 [blocks, 4], two zero points in a byte, the first in its lower half.
        masks: uint8 [panels, in / G, 32], a bit for each row that keeps the group, the lowest first.
        pointer: int32 [panels + 1], the first block of each panel.
        shape: (out, in).
        group: G, a multiple of 16 that divides `in`.
        calls: how calls seen before ran, see `cache.py`.
    """

    codes: Integer[Tensor, "blocks pieces 8 4"]
    scales: Float[Tensor, "blocks 8"]
    zeros: Integer[Tensor, "blocks 4"]
    masks: Integer[Tensor, "panels columns 32"]
    pointer: Integer[Tensor, " panels_and_end"]
    shape: tuple[int, int]
    group: int
    calls: Calls = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "calls", Calls())  # not by a default factory, which dynamo cannot trace
        self.check()

    @classmethod
    def of(cls, weight: QuantGroups) -> QuantPanels:
        """The same weight in panels.

        Raises:
            OpError: the parts of the weight do not fit.
        """
        weight.check()
        panels = -(-weight.shape[0] // _ROWS)
        found = [
            _panels_of(weight, first, min(first + _TOGETHER, panels)) for first in range(0, panels, _TOGETHER)
        ]
        found = found or [_panels_of(weight, 0, 0)]
        codes, scales, zeros, masks, counts = (torch.cat(parts) for parts in zip(*found, strict=True))
        pointer = torch.zeros(panels + 1, dtype=torch.int32, device=codes.device)
        pointer[1:] = counts.cumsum(0)
        return cls(codes, scales, zeros, masks, pointer, weight.shape, weight.group)

    def groups(self) -> QuantGroups:
        """The same weight row by row.

        Raises:
            OpError: the parts do not fit (any more).
        """
        self.check()
        kept = self._bits().transpose(1, 2).reshape(-1, self.masks.shape[1])[: self.shape[0]]
        rows, columns = kept.nonzero(as_tuple=True)
        # Where a group stands: the blocks before its column, and the rows before it there.
        bits = self._bits().flatten(0, 1)
        blocks = (bits.sum(-1) + _LANES - 1) // _LANES
        place = (blocks.cumsum(0) - blocks)[:, None] * _LANES + bits.cumsum(-1) - 1
        at = place[rows // _ROWS * self.masks.shape[1] + columns, rows % _ROWS]
        both = self.codes.transpose(1, 2).reshape(-1, self.group // 8, 4)[at]
        q = torch.stack([both & 15, both >> 4], 2).flatten(1)
        pointer = torch.zeros(self.shape[0] + 1, dtype=torch.int32, device=self.codes.device)
        pointer[1:] = kept.sum(-1).cumsum(0)
        return QuantGroups(
            q[:, 0::2] | (q[:, 1::2] << 4),
            self.scales.flatten()[at],
            torch.stack([self.zeros & 15, self.zeros >> 4], -1).flatten()[at],
            columns.to(torch.int16),
            pointer,
            self.shape,
            self.group,
        )

    def check(self) -> None:
        """Raise OpError if the parts do not fit; their content is read in every call."""
        rows, cols = self.shape
        if self.group < 16 or self.group % 16 or cols % self.group:
            raise OpError(
                f"group must be a multiple of 16 that divides the {cols} inputs, received {self.group}"
            )
        blocks, panels = self.scales.shape[0], -(-rows // _ROWS)
        expected = {
            "codes": (torch.uint8, (blocks, self.group // 8, _LANES, 4)),
            "scales": (torch.float16, (blocks, _LANES)),
            "zeros": (torch.uint8, (blocks, _LANES // 2)),
            "masks": (torch.uint8, (panels, cols // self.group, _ROWS // 8)),
            "pointer": (torch.int32, (panels + 1,)),
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
            places = (self.masks.data_ptr(), self.pointer.data_ptr())
            if not _native.value("zoo_panels_check", "ppiiii")(*places, blocks, *self.shape, self.group):
                return
        self._check_content()

    def _check_content(self) -> None:
        bits = self._bits()
        if bool(bits[-1:, :, self.shape[0] - (len(bits) - 1) * _ROWS :].any()):
            raise OpError(f"a mask keeps groups beyond the {self.shape[0]} rows of the weight")
        counts = ((bits.sum(-1) + _LANES - 1) // _LANES).sum(-1)
        if int(self.pointer[0]) != 0 or bool((self.pointer.diff() != counts).any()):
            raise OpError("the pointer of panels must start at 0 and count the blocks that the masks name")
        if int(self.pointer[-1]) != self.scales.shape[0]:
            raise OpError(f"the pointer ends at {int(self.pointer[-1])}, there are {len(self.scales)} blocks")

    def _bits(self) -> Integer[Tensor, "panels columns rows"]:
        """The masks, a number for each row: 1 where it keeps the group."""
        places = torch.arange(8, dtype=torch.uint8, device=self.masks.device)
        return (self.masks.unsqueeze(-1) >> places & 1).flatten(2).long()

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The stored tensors, in the order of the constructor."""
        return self.codes, self.scales, self.zeros, self.masks, self.pointer

    @property
    def density(self) -> float:
        """Groups that are stored over all groups; unused places of the last blocks count."""
        return self.scales.numel() * self.group / max(1, self.shape[0] * self.shape[1])

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts)

    @property
    def unit(self) -> int:
        """Inputs that have one step: 32 where the group is a multiple of that, else 16."""
        return 16 if self.group % 32 else 32


def _panels_of(weight: QuantGroups, first: int, end: int) -> tuple[Tensor, ...]:
    """Codes, scales, zeros and masks of some panels, and the blocks of each."""
    rows = range(first * _ROWS, min(end * _ROWS, weight.shape[0]))
    pointer = weight.pointer[rows.start : rows.stop + 1].long()
    some = slice(int(pointer[0]), int(pointer[-1]))
    columns, device = weight.shape[1] // weight.group, pointer.device
    row = torch.repeat_interleave(torch.arange(len(rows), device=device), pointer.diff())
    kept = torch.zeros(end - first, columns, _ROWS, dtype=torch.uint8, device=device)
    kept[row // _ROWS, weight.columns[some].long(), row % _ROWS] = 1
    per_column = kept.sum(-1)
    blocks = (per_column + _LANES - 1) // _LANES
    # By panel, column and row; then the place of each among the lanes of its column's blocks.
    list_of = row // _ROWS * columns + weight.columns[some]
    order = (list_of * _ROWS + row % _ROWS).argsort()
    starts = _LANES * (blocks.flatten().cumsum(0) - blocks.flatten())
    before = per_column.flatten().cumsum(0) - per_column.flatten()
    place = (starts - before)[list_of[order]] + torch.arange(len(order), device=device)
    lanes = int(blocks.sum()) * _LANES

    def placed(values: Tensor) -> Tensor:
        out = values.new_zeros(lanes, *values.shape[1:])
        out[place] = values[order]
        return out

    codes = weight.codes[some]
    q = placed(torch.stack([codes & 15, codes >> 4], -1).view(-1, weight.group // 8, 2, 4))
    both = (
        (q[:, :, 0] | (q[:, :, 1] << 4)).view(-1, _LANES, weight.group // 8, 4).transpose(1, 2).contiguous()
    )
    scales, zeros = (placed(each[some]).view(-1, _LANES) for each in (weight.scales, weight.zeros))
    zeros = zeros[:, 0::2] | (zeros[:, 1::2] << 4)
    powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)
    masks = (kept.unflatten(-1, (-1, 8)) * powers).sum(-1, dtype=torch.uint8)
    return both, scales, zeros, masks, blocks.sum(-1)


def quant_panel_linear(
    x: Float[Tensor, "*batch in"], weight: QuantPanels, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """y = x W^T + bias with `round_units(x, weight.unit)` for x; groups that are not kept are not read. Sums
    of units are in fp32.

    The dense product gains nothing by rounding and takes x. Gradients reach x, that of x itself, and the bias
    (codes, scales and zero points are constants here).

    Raises:
        OpError: shapes, dtypes or devices that do not fit.
    """
    if dispatch.direct(x, weight.codes, bias):
        run = weight.calls.find(x, bias, weight.shape[0])
        if run is not None:
            return run(x, bias)
        weight.check()
        return _forward(x, weight, bias)
    return _quant_panel_linear(x, *weight.parts, bias, *weight.shape, weight.group)


def round_units(x: Float[Tensor, "*batch in"], unit: int) -> Float[Tensor, "*batch in"]:
    """x with each `unit` inputs rounded to multiples of their step, their greatest magnitude / 127; in fp32
    (fp64 for fp64).

    A unit without a step stays as it is: one that holds an infinity or a NaN, or nothing above 4e-37.
    """
    wide = (x if x.dtype == torch.float64 else x.float()).unflatten(-1, (-1, unit))
    most = wide.abs().amax(-1, keepdim=True)
    factor = torch.full_like(most, _MOST) / most  # a number / a tensor would multiply by a reciprocal
    steps = factor.isfinite() & (factor > 0)
    return torch.where(steps, (wide * factor).round() * (most / _MOST), wide).flatten(-2)


def reference(
    x: Float[Tensor, "*batch in"], weight: QuantPanels, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """The definition: the product of the groups with the rounded x, in fp32 (fp64 for fp64)."""
    rounded = round_units(x, weight.unit)
    return quant_sparse_linear.reference(rounded, weight.groups(), bias).to(x.dtype)


def plan(
    x: Float[Tensor, "*batch in"], weight: QuantPanels, bias: Float[Tensor, " out"] | None = None
) -> dispatch.Plan:
    """The backend that `quant_panel_linear` would run these arguments on."""
    quant_sparse_linear.check_operands(x, weight.shape, weight.codes, bias)
    return dispatch.choose("quant_panel_linear", x.device, *case(x, weight))


def case(x: Tensor, weight: QuantPanels) -> tuple[tuple[str, ...], str, tuple[float, ...], int]:
    """Backends offered, the kind and sizes by which measured cases are looked up (weights, batch, density),
    and the bytes that a copy is looked up by."""
    rows, cols = weight.shape
    offered = ("dense", "reference") if x.dtype == torch.float64 else ("native", "dense", "reference")
    sizes = (float(max(1, rows * cols)), float(max(1, x.numel() // max(1, cols))), max(weight.density, 1e-4))
    return offered, f"int4 g{weight.group}", sizes, weight.nbytes


def _forward(x: Tensor, weight: QuantPanels, bias: Tensor | None) -> Tensor:
    backend = plan(x, weight, bias).backend
    if backend == "native" and x.numel() and weight.shape[0]:
        y_shape = (*x.shape[:-1], weight.shape[0])
        sizes = (math.prod(y_shape[:-1]), weight.scales.shape[0], *weight.shape, weight.group)
        run = native_run("zoo_quant_panel_linear", weight.parts, y_shape, sizes)
        weight.calls.keep(x, run, weight.parts)
        return run(x, bias)
    if backend == "dense":
        rows, dtype = x.numel() // max(1, x.shape[-1]), x.dtype
        ahead = prepacks(rows, weight.shape, dtype, x.device)

        def dense_of(held: QuantPanels) -> Tensor:
            dense = held.groups().to_dense().to(dtype)
            return prepack(dense) if ahead else dense

        run = _dense.run(weight, weight.parts, dense_of, _dense_run, (weight.shape, dtype, ahead))
        weight.calls.keep(x, run, weight.parts)
        return run(x, bias)
    return reference(x, weight, bias)


def _dense_run(weight: QuantPanels, dense: Tensor) -> Run:
    # A group that is not kept, and met an infinite x, is not in the sum.
    return dense_run(weight, dense, reference)


@torch.library.custom_op(
    "zoo::quant_panel_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor codes, Tensor scales, Tensor zeros, Tensor masks, Tensor pointer, "
    "Tensor? bias, int rows, int cols, int group) -> Tensor",
)
def _quant_panel_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    masks: Tensor,
    pointer: Tensor,
    bias: Tensor | None,
    rows: int,
    cols: int,
    group: int,
) -> Tensor:
    return _forward(x, QuantPanels(codes, scales, zeros, masks, pointer, (rows, cols), group), bias)


@_quant_panel_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    masks: Tensor,
    pointer: Tensor,
    bias: Tensor | None,
    rows: int,
    cols: int,
    group: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, *parts, bias, rows, cols, group = inputs
    ctx.save_for_backward(*parts)
    ctx.shape, ctx.group, ctx.bias_dtype = (rows, cols), group, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        codes, scales, zeros, masks, pointer = ctx.saved_tensors
        panels = QuantPanels(codes, scales, zeros, masks, pointer, ctx.shape, ctx.group)
        dense = panels.groups().to_dense()
        grad_x = grad @ dense.to(grad.dtype)
    if ctx.needs_input_grad[6]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, *[None] * 5, grad_bias, None, None, None


_quant_panel_linear.register_autograd(_backward, setup_context=_setup_context)


def calibrate(quick: bool) -> list[dispatch.Entry]:
    """Measure sizes x densities x batches on this machine, for `dispatch.calibrate`."""
    entries = []
    for group in (16, 32):
        for side in (1024,) if quick else (256, 1024, 4096):
            for density in (0.5,) if quick else (0.25, 0.5, 1.0):
                groups = quantise_groups(
                    torch.randn(side, side), torch.rand(side, side // group) < density, group
                )
                weight, dense = QuantPanels.of(groups), groups.to_dense()
                for batch in (1, 64) if quick else (1, 4, 8, 64, 512):
                    x = torch.randn(batch, side)
                    run, plain = functools.partial(quant_panel_linear, x, weight), fastest_product(x, dense)
                    args = case(x, weight)
                    entries.append(
                        dispatch.measure("quant_panel_linear", run, *args, quick=quick, plain=plain)
                    )
    return entries


def _examples() -> Iterator[dispatch.Example]:
    for group in (16, 32):
        groups = quantise_groups(torch.randn(9, 96), torch.rand(9, 96 // group) < 0.5, group)
        for batch in (1, 3, 9, 0):
            call = functools.partial(quant_panel_linear, weight=QuantPanels.of(groups))
            yield dispatch.Example(call, (round_units(torch.randn(batch, 96), 16 if group % 32 else 32),))


dispatch.register("quant_panel_linear", plan=plan, calibrate=calibrate, examples=_examples)
