"""Statistics of a comparison: intervals, exact tests, and what the test could have seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from zoo.errors import DataError

Values = Sequence[float | int] | np.ndarray

# Elements drawn at once by the bootstrap: 4 million indices are 32 MB.
CHUNK = 4_000_000


@dataclass(frozen=True)
class Difference:
    """The mean paired difference a - b.

    Attributes:
        value: mean of a_i - b_i.
        low, high: interval at `confidence`.
        p_value: of the hypothesis of no difference (exact McNemar for 0/1 samples, else paired t).
        detectable: smallest true difference that this test would have found with 80 % power.
        confidence: level of the interval.
        n: number of pairs.
    """

    value: float
    low: float
    high: float
    p_value: float
    detectable: float
    confidence: float
    n: int

    @property
    def seen(self) -> bool:
        """Whether both the interval and the test say that there is a difference."""
        return (self.low > 0 or self.high < 0) and self.p_value < 1 - self.confidence


def paired_difference(
    a: Values,
    b: Values,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    power: float = 0.8,
) -> Difference:
    """Compare two models on the same samples.

    The interval is the percentile bootstrap of mean(a - b) over samples (Efron and Tibshirani 1993, ch. 13).

    Args:
        a, b: per-sample values in the same order, at least two.
        confidence: level of the interval; the tests' level is 1 - confidence.
        resamples: bootstrap resamples.
        seed: of the resampling; equal seeds give equal intervals.
        power: chance of being found, to which `detectable` refers.

    Raises:
        DataError: different lengths, fewer than two samples, or values that are not finite.
    """
    left, right = _checked(a, b)
    delta = left - right
    low, high = bootstrap_interval(delta, confidence=confidence, resamples=resamples, seed=seed)
    binary = bool(np.isin(np.concatenate([left, right]), (0.0, 1.0)).all())
    p_value = mcnemar_exact(left, right) if binary else _paired_t(delta)
    return Difference(
        value=float(delta.mean()),
        low=low,
        high=high,
        p_value=p_value,
        detectable=detectable_difference(delta, alpha=1 - confidence, power=power, binary=binary),
        confidence=confidence,
        n=len(delta),
    )


def seed_difference(a: Values, b: Values, *, confidence: float = 0.95, power: float = 0.8) -> Difference:
    """Compare two methods over the same few seeds: the t interval and test of the paired differences.

    With five seeds a bootstrap would be too narrow; Student's t is not, if the differences are roughly
    normal. One seed says nothing of the spread: its interval is the whole line.

    Raises:
        DataError: different lengths, no values, or values that are not finite.
    """
    from scipy.stats import t

    left, right = _checked(a, b, fewest=1)
    delta = left - right
    n = len(delta)
    if n == 1:
        return Difference(float(delta[0]), -math.inf, math.inf, 1.0, math.inf, confidence, 1)
    mean, error = float(delta.mean()), float(delta.std(ddof=1)) / math.sqrt(n)
    half = float(t.ppf(0.5 + confidence / 2, n - 1)) * error
    reach = (float(t.ppf(0.5 + confidence / 2, n - 1)) + float(t.ppf(power, n - 1))) * error
    return Difference(mean, mean - half, mean + half, _paired_t(delta), reach, confidence, n)


def bootstrap_interval(
    values: np.ndarray, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values`."""
    n = len(values)
    rng = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= 16:
        # Resampling n items with few distinct values is a multinomial draw of their counts.
        means = rng.multinomial(n, counts / n, size=resamples) @ distinct / n
    else:
        rows = max(1, CHUNK // n)
        parts = [
            values[rng.integers(0, n, size=(min(rows, resamples - start), n))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
        means = np.concatenate(parts)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def mcnemar_exact(a: Values, b: Values) -> float:
    """Two-sided exact McNemar test for 0/1 samples: a binomial test on the discordant pairs (McNemar
    1947)."""
    from scipy.stats import binomtest

    left, right = np.asarray(a, float), np.asarray(b, float)
    gained, lost = int((left > right).sum()), int((left < right).sum())
    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def detectable_difference(
    delta: np.ndarray, *, alpha: float = 0.05, power: float = 0.8, binary: bool = False
) -> float:
    """The smallest true mean difference that a two-sided paired test finds with the given power.

    (z_{1 - alpha/2} + z_{power}) s / sqrt(n), with s the standard deviation of the differences. For 0/1
    samples never less than k / n, where k is the fewest one-sided discordant pairs that the exact test calls
    significant.
    """
    n = len(delta)
    normal = NormalDist()
    reach = (normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)) * float(delta.std(ddof=1)) / math.sqrt(n)
    if not binary:
        return reach
    fewest = math.ceil(1 - math.log2(alpha))  # 2 * 0.5**k <= alpha
    return max(reach, fewest / n)


def _paired_t(delta: np.ndarray) -> float:
    """Two-sided p of the paired t test; 1 where all differences are zero, 0 where they are equal and not
    zero."""
    from scipy.stats import t

    error = float(delta.std(ddof=1)) / math.sqrt(len(delta))
    if error == 0:
        return 0.0 if delta[0] != 0 else 1.0
    return float(2 * t.sf(abs(float(delta.mean())) / error, len(delta) - 1))


def _checked(a: Values, b: Values, fewest: int = 2) -> tuple[np.ndarray, np.ndarray]:
    left, right = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if left.shape != right.shape or left.ndim != 1:
        raise DataError(
            f"a paired comparison needs the same samples; received {left.shape} and {right.shape} values"
        )
    if len(left) < fewest:
        raise DataError(f"a paired comparison needs at least {fewest} samples; received {len(left)}")
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise DataError("per-sample values contain NaN or infinity; look at the model's outputs first")
    return left, right
