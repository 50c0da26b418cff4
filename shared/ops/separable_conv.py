"""A sparse 1x1 convolution, a depthwise one and a sparse 1x1 one in one pass: the blocks of MobileNets.

    y = separable_conv(x, expand, (kernels, bias), project, stride=1, padding=1)

is `sparse_conv1x1` of `depthwise_conv` of `sparse_conv1x1`, whose wide maps between stay in a near cache; the
first may be missing, as in MobileNet-v1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from . import _native, dispatch
from .cache import Run
from .depthwise_conv import check as check_depthwise
from .depthwise_conv import depthwise_conv
from .depthwise_conv import plan as plan_depthwise
from .layout import LAYOUTS, VALUE_TYPES
from .sparse_conv1x1 import NARROW_PIXELS, check_residual, in_form, sparse_conv1x1
from .sparse_conv1x1 import plan as plan_pointwise
from .sparse_linear import Parts, entries_of
from .weights import SparseWeight, pack

__all__ = ["Depthwise", "Pointwise", "plan", "reference", "separable_conv"]


@dataclass(frozen=True)
class Pointwise:
    """A 1x1 convolution: its packed weight, its bias, and 1 or 6 for the ReLU or ReLU6 of its result."""

    weight: SparseWeight
    bias: Float[Tensor, " out"] | None = None
    relu: int = 0

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The convolution by itself."""
        return sparse_conv1x1(x, self.weight, self.bias, relu=self.relu, residual=residual)


@dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution, see `depthwise_conv`."""

    weight: Float[Tensor, "channels 1 size size"]
    bias: Float[Tensor, " channels"] | None = None
    stride: int = 1
    padding: int = 0
    relu: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """The convolution by itself."""
        return depthwise_conv(
            x, self.weight, self.bias, stride=self.stride, padding=self.padding, relu=self.relu
        )

    def sizes(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of the result."""
        size = self.weight.shape[2]
        height, width = ((n + 2 * self.padding - size) // self.stride + 1 for n in x.shape[2:])
        return height, width


def separable_conv(
    x: Float[Tensor, "batch in height width"],
    expand: Pointwise | None,
    between: Depthwise,
    project: Pointwise,
    residual: Float[Tensor, "batch out out_height out_width"] | None = None,
) -> Float[Tensor, "batch out out_height out_width"]:
    """y = project(between(expand(x)), residual).

    The native kernel, which runs all three in one pass, takes eager calls on contiguous fp32 maps where each
    of the three would run natively; its bits are those of the three kernels one after the other, for any
    number of threads. Everywhere else the three are called.

    Raises:
        OpError: what one of the three refuses.
    """
    run = _run(x, expand, between, project, residual)
    return reference(x, expand, between, project, residual) if run is None else run(x, residual)


def reference(
    x: Float[Tensor, "batch in height width"],
    expand: Pointwise | None,
    between: Depthwise,
    project: Pointwise,
    residual: Float[Tensor, "batch out out_height out_width"] | None = None,
) -> Float[Tensor, "batch out out_height out_width"]:
    """The definition: one after the other, each by the backend that is asked for."""
    return project(between(x if expand is None else expand(x)), residual)


def plan(
    x: Float[Tensor, "batch in height width"],
    expand: Pointwise | None,
    between: Depthwise,
    project: Pointwise,
    residual: Tensor | None = None,
) -> dispatch.Plan:
    """The backend that `separable_conv` would run these arguments on: "native" for one pass."""
    offered: tuple[str, ...] = ("reference", "dense", "native")  # which all call the three
    if _fits(x, expand, between, project):
        with dispatch.backend("auto"):
            results = torch.empty(len(x), len(between.weight), *between.sizes(x))
            plans = [plan_depthwise(x, between.weight), plan_pointwise(results, project.weight)]
            if expand is not None:
                plans.append(plan_pointwise(x, expand.weight))
        if all(each.backend == "native" for each in plans):
            offered = ("native", "reference", "dense")
    return dispatch.choose("separable_conv", x.device, offered, "float32", (1.0,))


def _fits(x: Tensor, expand: Pointwise | None, between: Depthwise, project: Pointwise) -> bool:
    """Whether the kernel can compute this: plain fp32 maps on a CPU, weights of one dtype in its layouts."""
    kernels, weights = between.weight, [each.weight for each in (expand, project) if each is not None]
    if x.dim() != 4 or not x.numel() or x.device.type != "cpu" or kernels.dim() != 4 or between.padding < 0:
        return False
    if between.stride < 1:
        return False
    biases = (None if expand is None else expand.bias, between.bias, project.bias)
    for each in (x, kernels, *(bias for bias in biases if bias is not None)):
        if each.dtype != torch.float32 or each.device != x.device or not each.is_contiguous():
            return False
    if (
        kernels.shape[1] != 1
        or kernels.shape[2] != kernels.shape[3]
        or 2 * between.padding >= kernels.shape[2]
    ):
        return False
    if any(w.layout == "columns" or not w.kept or w.values.requires_grad for w in weights):
        return False
    if len({w.values.dtype for w in weights}) > 1 or weights[0].values.dtype not in VALUE_TYPES:
        return False
    channels = x.shape[1] if expand is None else expand.weight.shape[0]
    if project.weight.shape[1] != len(kernels) or channels != len(kernels):
        return False
    height, width = between.sizes(x)
    return min(height, width) > 0 and height * width >= NARROW_PIXELS


def _run(
    x: Tensor, expand: Pointwise | None, between: Depthwise, project: Pointwise, residual: Tensor | None
) -> Run | None:
    """The pass of the native kernel; None where the three are to be called."""
    first = (None, None) if expand is None else (expand.weight.values, expand.bias)
    last = (project.weight.values, project.bias)
    if not dispatch.direct(x, *first, between.weight, between.bias, *last, residual) or not x.is_contiguous():
        return None
    weight, added = project.weight, None if residual is None else (residual.shape, residual.device)
    relus = (0 if expand is None else expand.relu, between.relu, project.relu)
    kind = ("separable", between.stride, between.padding, relus, added, expand is None)
    run = weight.calls.find(x, None, 0, kind)
    if run is None:
        if not _fits(x, expand, between, project):
            return None
        _check(x, expand, between, project, residual)
        if plan(x, expand, between, project).backend != "native":
            return None
        run = _native_run(x.shape, expand, between, project)
        parts = [*weight.parts, between.weight]
        parts += [each for each in (between.bias, project.bias) if each is not None]
        if expand is not None:
            parts += [*expand.weight.parts, *([] if expand.bias is None else [expand.bias])]
        weight.calls.keep(x, run, parts, kind)
    return run


def _check(
    x: Tensor, expand: Pointwise | None, between: Depthwise, project: Pointwise, residual: Tensor | None
) -> None:
    """Refuse what the three would refuse."""
    wide, height, width = x, *between.sizes(x)
    if expand is not None:
        expand.weight.check()
        plan_pointwise(x, expand.weight, expand.bias)
        wide = torch.empty(len(x), expand.weight.shape[0], *x.shape[2:])
    check_depthwise(wide, between.weight, between.bias, between.stride, between.padding)
    project.weight.check()
    results = torch.empty(len(x), len(between.weight), height, width)
    plan_pointwise(results, project.weight, project.bias)
    check_residual(residual, (len(x), project.weight.shape[0], height, width), x)


def _native_run(shape: torch.Size, expand: Pointwise | None, between: Depthwise, project: Pointwise) -> Run:
    """One pass over maps of this shape; the run reads the weights where they lie."""
    height, width = between.sizes(torch.empty(shape, device="meta"))
    kernels, first = between.weight, expand
    sizes = (*shape[2:], len(kernels), height, width, kernels.shape[2], between.stride, between.padding)
    numbers = (shape[0], *sizes, between.relu, VALUE_TYPES.index(project.weight.values.dtype))
    out_shape = (shape[0], project.weight.shape[0], height, width)
    bias, relu = project.bias, project.relu  # not the weight, which keeps the run

    def ending(weight: SparseWeight, layout: str, parts: Parts, panel: int) -> Run:
        last = _layer(weight, layout, parts, panel, bias, relu)

        def beginning(weight: SparseWeight, layout: str, parts: Parts, panel: int) -> Run:
            assert first is not None
            layers = (_layer(weight, layout, parts, panel, first.bias, first.relu), last)
            return _pass(layers, kernels, between.bias, numbers, out_shape)

        if first is None:
            return _pass((None, last), kernels, between.bias, numbers, out_shape)
        return in_form(first.weight, shape[2] * shape[3], beginning)

    return in_form(project.weight, height * width, ending)


Layer = tuple[Tensor, tuple[Tensor | None, ...]]  # its numbers, and what is to be kept alive for them


def _layer(
    weight: SparseWeight, layout: str, parts: Parts, panel: int, bias: Tensor | None, relu: int
) -> Layer:
    """A weight and its bias as native/src/separable_conv.cpp takes them."""
    places = [0 if each is None else each.data_ptr() for each in (*parts, bias)]
    sizes = [entries_of(weight), *weight.shape, panel, LAYOUTS.index(layout), relu]
    return torch.tensor([*places, *sizes]), (*parts, bias)


def _pass(
    layers: tuple[Layer | None, Layer],
    kernels: Tensor,
    bias: Tensor | None,
    numbers: tuple[int, ...],
    out_shape: tuple[int, ...],
) -> Run:
    call = _native.function("zoo_separable_conv", "ppppppp" + "i" * 12)
    threads = _native.threads()
    first, last = (None if each is None else each[0].data_ptr() for each in layers)
    middle = (kernels.data_ptr(), None if bias is None else bias.data_ptr(), last)
    held = (layers, kernels, bias)

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        y = torch.empty(out_shape)
        added = None if residual is None else _native.plain(residual)
        at = None if added is None else added.data_ptr()
        call(x.data_ptr(), first, *middle, at, y.data_ptr(), *numbers, threads)
        return y

    run.__dict__["held"] = held  # the addresses are those of these
    return run


def _examples() -> Iterator[dispatch.Example]:
    for layout, stride, size in (("csr", 1, 9), ("rows4", 2, 16), ("bitmask", 1, 4)):
        weights = [pack(torch.randn(n, m), torch.rand(n, m) < 0.5, layout) for n, m in ((12, 5), (7, 12))]

        def call(
            x: Tensor, kernels: Tensor, one: Tensor, two: Tensor, *, weights=weights, stride=stride
        ) -> Tensor:
            expand, project = Pointwise(weights[0], one, 6), Pointwise(weights[1], two)
            return separable_conv(x, expand, Depthwise(kernels, None, stride, 1, 1), project)

        inputs = (torch.randn(2, 5, size, size + 1), torch.randn(12, 1, 3, 3), torch.randn(12))
        yield dispatch.Example(call, (*inputs, torch.randn(7)))


dispatch.register("separable_conv", plan=plan, examples=_examples)
