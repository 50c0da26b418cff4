"""Statistics of activations that arrive in pieces, in memory that does not grow with their number.

Every accumulator takes rows of features, [rows, features], of any floating-point dtype, and sums in float64.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import BudgetError


@runtime_checkable
class Accumulator(Protocol):
    """What a calibration tap feeds."""

    def update(self, rows: Float[Tensor, "rows features"]) -> None:
        """Take in more rows."""


class Moments:
    """Mean, variance, second moment, largest magnitude and norm of each feature.

    Means and squared deviations of the pieces are joined by the formula of Chan, Golub and LeVeque (1979),
    so that a large mean does not cancel a small variance.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._deviation = self._maximum = torch.zeros(0, dtype=torch.float64)

    def update(self, rows: Float[Tensor, "rows features"]) -> None:
        if rows.shape[0] == 0:
            return
        x = rows.detach().double()
        mean = x.mean(0)
        deviation = (x - mean).square().sum(0)
        maximum = x.abs().amax(0)
        n = rows.shape[0]
        if self.count == 0:
            self.count, self._mean, self._deviation, self._maximum = n, mean, deviation, maximum
            return
        total = self.count + n
        shift = mean - self._mean
        self._deviation = self._deviation + deviation + shift.square() * (self.count * n / total)
        self._mean = self._mean + shift * (n / total)
        self._maximum = torch.maximum(self._maximum, maximum)
        self.count = total

    def _filled(self, value: Tensor) -> Tensor:
        if self.count == 0:
            raise BudgetError("Moments: no rows have arrived; run the calibration first.")
        return value

    def mean(self) -> Float[Tensor, " features"]:
        """E[x] per feature, float64."""
        return self._filled(self._mean)

    def variance(self) -> Float[Tensor, " features"]:
        """E[(x - E[x])^2] per feature (divided by the number of rows), float64."""
        return self._filled(self._deviation) / self.count

    def second_moment(self) -> Float[Tensor, " features"]:
        """E[x^2] per feature, float64."""
        return self.variance() + self.mean().square()

    def norm(self) -> Float[Tensor, " features"]:
        """sqrt(sum x^2) per feature, float64."""
        return (self.second_moment() * self.count).sqrt()

    def maximum(self) -> Float[Tensor, " features"]:
        """max |x| per feature, float64."""
        return self._filled(self._maximum)


class Gram:
    """X^T X and its mean over rows, the Hessian of a least-squares layer up to a factor (SparseGPT, OBS).

    Products of a piece are made in float32, of float64 rows in float64, and summed in float64. Memory: 8
    features^2.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, rows: Float[Tensor, "rows features"]) -> None:
        x = rows.detach()
        if x.dtype != torch.float64:
            x = x.float()
        product = (x.T @ x).double()
        self._sum = product if self.count == 0 else self._sum.add_(product)
        self.count += rows.shape[0]

    def sum(self) -> Float[Tensor, "features features"]:
        """X^T X over all rows, float64."""
        if self.count == 0:
            raise BudgetError("Gram: no rows have arrived; run the calibration first.")
        return self._sum

    def mean(self) -> Float[Tensor, "features features"]:
        """X^T X / rows, float64."""
        return self.sum() / self.count


# The bits of a non-negative float32 order like the numbers. The upper 21 of its 31 bits (8 of exponent, 13 of
# fraction) make 2^21 bins of relative width 2^-13: 16 MiB of counts.
_LOW_BITS = 10
_BINS = 1 << (31 - _LOW_BITS)


class MagnitudeHistogram:
    """The k-th smallest |x| over all rows and features, from a stream.

    One sweep gives it between two float32 numbers whose ratio is at most 1 + 2^-13 (for normal numbers). A
    second sweep over the same data, into what `narrow` returns, gives it exactly. Values are compared as
    float32; bfloat16 and float16 are held exactly.
    """

    def __init__(self) -> None:
        self.count = 0
        self._bins = torch.zeros(_BINS, dtype=torch.int64)
        self._ends: Tensor | None = None  # cumulated bins, since the last update

    def update(self, rows: Float[Tensor, "rows features"]) -> None:
        keys = rows.detach().float().abs().reshape(-1).view(torch.int32) >> _LOW_BITS
        self._ends = None
        self._bins += torch.bincount(keys, minlength=_BINS).cpu()
        self.count += keys.numel()

    def _locate(self, k: int) -> tuple[int, int]:
        """The bin of the k-th smallest, and how many values lie below that bin."""
        if not 1 <= k <= self.count:
            raise BudgetError(
                f"MagnitudeHistogram: k must lie in [1, {self.count}], the count; received {k}."
            )
        if self._ends is None:
            self._ends = self._bins.cumsum(0)
        found = int(torch.searchsorted(self._ends, k))
        return found, int(self._ends[found]) - int(self._bins[found])

    def bounds(self, k: int) -> tuple[float, float]:
        """Two float32 numbers that enclose the k-th smallest magnitude (1-based).

        Raises:
            BudgetError: k outside [1, count].
        """
        found, _ = self._locate(k)
        edges = torch.tensor(
            [found << _LOW_BITS, (found << _LOW_BITS) | ((1 << _LOW_BITS) - 1)], dtype=torch.int32
        )
        low, high = edges.view(torch.float32).tolist()
        return low, high

    def kth(self, k: int) -> float:
        """The middle of `bounds(k)`: the k-th smallest magnitude within a relative error of 2^-14."""
        low, high = self.bounds(k)
        return (low + high) / 2

    def narrow(self, k: int) -> ExactKth:
        """An accumulator for a second sweep over the same data that finds the k-th smallest exactly."""
        found, below = self._locate(k)
        return ExactKth(found, k - below, self.count)


class ExactKth:
    """Second sweep of `MagnitudeHistogram`: counts only values of one bin, by their lowest bits."""

    def __init__(self, prefix: int, rank: int, expected: int) -> None:
        self.count = 0
        self._prefix, self._rank, self._expected = prefix, rank, expected
        self._bins = torch.zeros(1 << _LOW_BITS, dtype=torch.int64)

    def update(self, rows: Float[Tensor, "rows features"]) -> None:
        keys = rows.detach().float().abs().reshape(-1).view(torch.int32)
        self.count += keys.numel()
        inside = keys[(keys >> _LOW_BITS) == self._prefix] & ((1 << _LOW_BITS) - 1)
        self._bins += torch.bincount(inside, minlength=1 << _LOW_BITS).cpu()

    def value(self) -> float:
        """The k-th smallest magnitude, exactly.

        Raises:
            BudgetError: the second sweep did not see the same data.
        """
        if self.count != self._expected or int(self._bins.sum()) < self._rank:
            raise BudgetError(
                f"ExactKth: the second sweep saw {self.count} values, not {self._expected}; repeat the data."
            )
        low = int(torch.searchsorted(self._bins.cumsum(0), self._rank))
        bits = torch.tensor([(self._prefix << _LOW_BITS) | low], dtype=torch.int32)
        return float(bits.view(torch.float32))
