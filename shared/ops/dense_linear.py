"""Dense products x W^T, the fastest at hand: torch's own, another order of it, or another precision."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import OpError
from . import _native
from .dispatch import runs_natively
from .layout import VALUE_TYPES

Size = tuple[int, int] | torch.Size
_MANY = 128  # rows of x from which the transposed product is the faster one (Zen 3, two threads)
# Rows of x from which widening a weight costs less than it saves: 2048 x 2048 on two threads takes 1.3 times
# the time at 8 rows, 0.7 at 16 and 0.3 at 64 (Zen 3).
WIDENED = 16


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has a fast product of many rows of this dtype. Where it has none for halves,
    torch takes eight times as long for them as for fp32."""
    supported = torch.ops.mkldnn
    if dtype == torch.bfloat16:
        return bool(supported._is_mkldnn_bf16_supported())
    return dtype != torch.float16 or bool(supported._is_mkldnn_fp16_supported())


def row_linear(
    x: Float[Tensor, " in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, " out"]:
    """weight x + bias for one x in the weight's dtype (fp32, bf16, fp16) by a native kernel, sums in fp32;
    bit by bit the same for any number of threads.

    Raises:
        OpError: shapes or dtypes that do not fit, or a weight whose rows do not lie one after another.
    """
    rows, cols = weight.shape
    if x.shape != (cols,) or (bias is not None and bias.shape != (rows,)):
        raise OpError(
            f"x must be [{cols}] and a bias [{rows}] for a weight {tuple(weight.shape)}, received "
            f"{tuple(x.shape)} and {None if bias is None else tuple(bias.shape)}"
        )
    if x.dtype is not weight.dtype or x.dtype not in VALUE_TYPES or not weight.is_contiguous():
        raise OpError(
            f"x and a contiguous weight must be both fp32, bf16 or fp16, not {x.dtype}, {weight.dtype}"
        )
    wide, y = _native.plain(x), torch.empty(rows)
    added = None if bias is None else _native.plain(bias)
    _native.function("zoo_dense_row", "ppppiiii")(
        wide.data_ptr(),
        weight.data_ptr(),
        None if added is None else added.data_ptr(),
        y.data_ptr(),
        rows,
        cols,
        VALUE_TYPES.index(weight.dtype),
        _native.threads(),
    )
    return y.to(x.dtype)


def _is_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `row_linear` is the better way for x: one row of halves, which torch multiplies slowly, and by
    all threads even where that is microseconds of work."""
    return (
        x.numel() == weight.shape[1] == x.shape[-1]
        and x.dtype is weight.dtype
        and x.dtype != torch.float32
        and not multiplies(x.dtype)
        and weight.is_contiguous()
        and (bias is None or bias.shape == weight.shape[:1])
        and runs_natively(x, weight, bias, asked=("auto", "native", "dense"))
    )


def widened_linear(
    x: Float[Tensor, "*batch in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """x weight^T + bias; of halves on a processor that does not multiply halves one row by `row_linear`, many
    by way of fp32."""
    if _is_row(x, weight, bias):
        return row_linear(x.reshape(-1), weight, bias).view(*x.shape[:-1], weight.shape[0])
    if (
        multiplies(x.dtype)
        or x.numel() < WIDENED * x.shape[-1]
        or x.dtype != weight.dtype
        or x.device.type != "cpu"
        or weight.numel() == 0
    ):
        return torch.nn.functional.linear(x, weight, bias)
    y = weight.float() @ x.reshape(-1, x.shape[-1]).float().t()
    if bias is not None:
        y += bias.float().unsqueeze(1)
    return y.t().to(x.dtype, memory_format=torch.contiguous_format).reshape(*x.shape[:-1], weight.shape[0])


# A weight of so many entries, prepacked, multiplies some to many rows of x in 0.4 to 0.9 times the time of
# torch's own product (Zen 3, one and two threads); smaller ones and other numbers of rows gain nothing.
PREPACKED = 1 << 20
_PREPACKED_ROWS = range(2, 129)


def prepacks(rows: int, weight: Size, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a weight of this size is best multiplied in oneDNN's own layout by so many rows."""
    return (
        rows in _PREPACKED_ROWS
        and weight[0] * weight[1] >= PREPACKED
        and dtype == torch.float32
        and device.type == "cpu"
        and torch.backends.mkldnn.is_available()
    )


def prepack(weight: Float[Tensor, "out in"]) -> Tensor:
    """A copy of an fp32 weight in oneDNN's own layout, for `dense_product`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
    return packed


def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias with a weight as it is or from `prepack`."""
    if not weight.is_mkldnn:
        return widened_linear(x, weight, bias)
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def fastest_product(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """The call x weight^T, with the weight brought into the layout that is best for x beforehand."""
    rows = x.numel() // max(1, x.shape[-1])
    best = prepack(weight) if prepacks(rows, weight.shape, x.dtype, x.device) else weight
    return functools.partial(dense_product, x, best)


def linear(
    x: Float[Tensor, "*batch in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """x weight^T + bias; in single precision as (weight x^T)^T, which torch does faster for the tens of rows
    of a prompt."""
    if x.dtype != torch.float32:
        return widened_linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    y = (weight @ flat.t()).t().reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def product(
    x: Float[Tensor, "*batch rows"], matrix: Float[Tensor, "rows cols"]
) -> Float[Tensor, "*batch cols"]:
    """x @ matrix; in single precision and for many rows as (matrix^T x^T)^T, which torch does faster then."""
    if x.dtype != torch.float32:
        return widened_linear(x, matrix.t())
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) < _MANY:
        return x @ matrix
    return (matrix.t() @ flat.t()).t().reshape(*x.shape[:-1], matrix.shape[1])
