"""y = x W^T + b with W of an N:M pattern along its inputs: n kept of every m consecutive weights.

    weight = pack_nm(linear.weight, mask, 2, 4)
    y = nm_linear(x, weight, linear.bias)

On a CPU the weight is the bitmask layout of `sparse_linear` whose counts the pattern fixes (2:4, 1:4, 2:8
and 4:8: two or four kept values in each eight columns). On a GPU 2:4 in fp16 or bf16 goes to cuSPARSELt
through torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import OpError
from . import dispatch
from .cache import Derived
from .sparse_linear import plan as sparse_plan
from .sparse_linear import reference as sparse_reference
from .sparse_linear import sparse_linear
from .weights import SparseWeight, pack

__all__ = ["NMWeight", "nm_linear", "pack_nm", "plan", "reference"]

PATTERNS = ((2, 4), (1, 4), (2, 8), (4, 8))
_semi_structured = Derived[Tensor]()


@dataclass(frozen=True, eq=False)
class NMWeight:
    """A packed weight W [out, in] that keeps exactly n of every m consecutive inputs.

    Attributes:
        packed: its values and bits, in the bitmask layout with the pattern's count as `width`.
        n, m: the pattern, one of 2:4, 1:4, 2:8, 4:8.
    """

    packed: SparseWeight
    n: int
    m: int

    def __post_init__(self) -> None:
        rows, cols = self.packed.shape
        if (self.n, self.m) not in PATTERNS:
            names = ", ".join(f"{n}:{m}" for n, m in PATTERNS)
            raise OpError(
                f"no kernel layout for {self.n}:{self.m}: patterns are {names} (others: use sparse_linear)"
            )
        if self.packed.layout != "bitmask" or self.packed.width != 8 * self.n // self.m:
            raise OpError("the packed part of an N:M weight comes from pack_nm, received another layout")
        if self.packed.kept != rows * cols * self.n // self.m:
            raise OpError(f"{self.packed.kept} weights are kept, not {self.n}:{self.m} of {rows * cols}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape

    def to_dense(self) -> Float[Tensor, "out in"]:
        """The weight with its zeros; differentiable in `packed.values`."""
        return self.packed.to_dense()


def pack_nm(weight: Float[Tensor, "out in"], mask: Bool[Tensor, "out in"], n: int, m: int) -> NMWeight:
    """Pack the kept entries of a weight.

    Args:
        mask: True at exactly n of every m consecutive inputs (a kept weight may be zero).

    Raises:
        OpError: a group with another count (the first one is named), inputs that m does not divide, or a
        pattern
            without a layout.
    """
    if weight.dim() != 2 or mask.shape != weight.shape:
        raise OpError(
            f"the mask is {tuple(mask.shape)}, the weight {tuple(weight.shape)}: both must be [out, in]"
        )
    if (n, m) not in PATTERNS or weight.shape[1] % m:
        names = ", ".join(f"{a}:{b}" for a, b in PATTERNS)
        raise OpError(
            f"{n}:{m} over {weight.shape[1]} inputs: patterns are {names}, and m must divide the inputs"
        )
    counts = mask.reshape(weight.shape[0], weight.shape[1] // m, m).sum(-1)
    if bool((counts != n).any()):
        row, group = (counts != n).nonzero()[0].tolist()
        raise OpError(
            f"row {row} keeps {int(counts[row, group])} of inputs {group * m}..{group * m + m - 1}, not {n}"
        )
    return NMWeight(replace(pack(weight, mask, "bitmask"), width=8 * n // m), n, m)


def nm_linear(
    x: Float[Tensor, "*batch in"], weight: NMWeight, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """y = x W^T + bias; sums in fp32; gradients for x, `weight.packed.values` and the bias.

    Raises:
        OpError: shapes, dtypes or devices that do not fit.
    """
    if x.is_cuda and _vendor_takes(x, weight) and dispatch.requested() in ("auto", "vendor"):
        return torch.nn.functional.linear(x, _semi(weight, x.dtype), bias)
    return sparse_linear(x, weight.packed, bias)


def reference(
    x: Float[Tensor, "*batch in"], weight: NMWeight, bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*batch out"]:
    """The definition: that of `sparse_linear` on the same kept weights."""
    return sparse_reference(x, weight.packed, bias)


def plan(
    x: Float[Tensor, "*batch in"], weight: NMWeight, bias: Float[Tensor, " out"] | None = None
) -> dispatch.Plan:
    """The backend that `nm_linear` would run these arguments on."""
    if x.is_cuda and _vendor_takes(x, weight) and dispatch.requested() in ("auto", "vendor"):
        return dispatch.Plan("nm_linear", "vendor", "2:4 on a GPU runs on cuSPARSELt")
    return replace(sparse_plan(x, weight.packed, bias), op="nm_linear")


def _vendor_takes(x: Tensor, weight: NMWeight) -> bool:
    """cuSPARSELt multiplies 2:4 in half precision, in tiles of 64, and torch gives it no gradient."""
    rows, cols = weight.shape
    trains = torch.is_grad_enabled() and (x.requires_grad or weight.packed.values.requires_grad)
    sizes = rows % 64 == 0 and cols % 64 == 0 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return (
        (weight.n, weight.m) == (2, 4) and x.dtype in (torch.float16, torch.bfloat16) and sizes and not trains
    )


def _semi(weight: NMWeight, dtype: torch.dtype) -> Tensor:
    return _semi_structured.get(
        weight.packed.content,
        lambda: torch.sparse.to_sparse_semi_structured(weight.to_dense().detach().to(dtype)),
        dtype,
    )


def _examples() -> Iterator[dispatch.Example]:
    for n, m in PATTERNS:
        mask = (torch.rand(6, 64 // m, m).argsort(-1) < n).reshape(6, 64)
        weight = pack_nm(torch.randn(6, 64), mask, n, m)
        for batch in (1, 9):
            yield dispatch.Example(lambda x, weight=weight: nm_linear(x, weight), (torch.randn(batch, 64),))


dispatch.register("nm_linear", plan=plan, examples=_examples)
