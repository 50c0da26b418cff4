"""Depthwise convolution on channel-major maps, which is what stands between two sparse 1x1 convolutions.

torch's own kernel is fast on channels-last maps only, and those are slow for `sparse_conv1x1`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import OpError
from . import _native, dispatch


def depthwise_conv(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "channels 1 size size"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    relu: int = 0,
) -> Float[Tensor, "batch channels out_height out_width"]:
    """y[b, c] = bias[c] + x[b, c] * W[c], a correlation per channel; with `relu` 1 its positive part, with
    6 that up to 6
    (ReLU6).

    The native kernel runs where nothing is differentiated or traced, on contiguous fp32 maps; sums are in
    fp32 and do not depend on the number of threads. All else is torch's convolution.

    Raises:
        OpError: a weight that is not [channels, 1, size, size], or a map that is smaller than the kernel.
    """
    check(x, weight, bias, stride, padding)
    if x.numel() and dispatch.direct(x, weight, bias) and plan(x, weight).backend == "native":
        return _native_forward(x, weight, bias, stride, padding, relu)
    return reference(x, weight, bias, stride=stride, padding=padding, relu=relu)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> None:
    """Raise OpError where `depthwise_conv` refuses these."""
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
        raise OpError(f"the weight must be [channels, 1, size, size], received {tuple(weight.shape)}")
    if x.dim() != 4 or x.shape[1] != weight.shape[0]:
        raise OpError(f"x {tuple(x.shape)} is not [batch, {weight.shape[0]}, height, width]")
    if stride < 1 or padding < 0:
        raise OpError(f"stride must be positive and padding not negative, received {stride} and {padding}")
    size = weight.shape[2]
    if min(x.shape[2:]) + 2 * padding < size:
        raise OpError(f"a kernel of {size} does not fit into a map of {tuple(x.shape[2:])}")
    if bias is not None and bias.shape != (len(weight),):
        raise OpError(f"bias must be [{len(weight)}], received {tuple(bias.shape)}")


@dispatch.in_own_precision
def reference(
    x: Float[Tensor, "batch channels height width"],
    weight: Float[Tensor, "channels 1 size size"],
    bias: Float[Tensor, " channels"] | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    relu: int = 0,
) -> Float[Tensor, "batch channels out_height out_width"]:
    """The definition: torch's convolution with a group per channel."""
    y = torch.nn.functional.conv2d(x, weight, bias, stride, padding, groups=x.shape[1])
    return y if not relu else y.relu() if relu == 1 else torch.nn.functional.relu6(y)


def plan(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> dispatch.Plan:
    """The backend that `depthwise_conv` would run these arguments on."""
    offered: tuple[str, ...] = ("reference", "dense")  # which are the same: there are no zeros to skip
    if x.dtype == weight.dtype == torch.float32:  # other maps are copied first
        offered = ("native", *offered) if x.is_contiguous() else (*offered, "native")
    return dispatch.choose("depthwise_conv", x.device, offered, "float32", (1.0,))


def _native_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, relu: int
) -> Tensor:
    x, size = x.contiguous(), weight.shape[2]
    height, width = ((n + 2 * padding - size) // stride + 1 for n in x.shape[2:])
    y = x.new_empty(*x.shape[:2], height, width)
    kernels, wide_bias = _native.plain(weight), None if bias is None else _native.plain(bias)
    _native.function("zoo_depthwise_conv", "ppppiiiiiiiiiii")(
        x.data_ptr(),
        kernels.data_ptr(),
        None if wide_bias is None else wide_bias.data_ptr(),
        y.data_ptr(),
        *x.shape,
        height,
        width,
        size,
        stride,
        padding,
        relu,
        _native.threads(),
    )
    return y


def _examples() -> Iterator[dispatch.Example]:
    for size, stride in ((3, 1), (3, 2), (5, 1)):
        call = functools.partial(depthwise_conv, stride=stride, padding=1)
        yield dispatch.Example(call, (torch.randn(2, 4, 9, 11), torch.randn(4, 1, size, size)))


dispatch.register("depthwise_conv", plan=plan, examples=_examples)
