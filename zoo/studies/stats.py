"""Statistics of a comparison: intervals, exact tests, corrections, and what could have been seen."""

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
RESAMPLES = 4000
#: Below so many pairs an interval rests on its assumptions more than on the data.
FEW = 5
#: A difference this small beside the values themselves is rounding and counts as none.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Difference:
    """The mean paired difference a - b.

    Attributes:
        value: mean of a_i - b_i.
        low, high: interval at `confidence`.
        p_value: of the hypothesis of no difference (exact McNemar for 0/1 samples, else by Student's t).
        detectable: smallest true difference that this test would have found with 80 % power.
        confidence: level of the interval.
        n: number of pairs.
        error: standard error of the mean.
        warning: what a reader should know of the interval; empty for nothing.
    """

    value: float
    low: float
    high: float
    p_value: float
    detectable: float
    confidence: float
    n: int
    error: float = 0.0
    warning: str = ""

    @property
    def seen(self) -> bool:
        """Whether both the interval and the test say that there is a difference."""
        return (self.low > 0 or self.high < 0) and self.p_value < 1 - self.confidence

    def p_against(self, bar: float) -> float:
        """Two-sided p of the hypothesis that the true difference is `bar` (Student's t; 1 for one pair)."""
        from scipy.stats import t

        if self.n < 2:
            return 1.0
        gap = abs(self.value - bar)
        if self.error == 0:
            return 0.0 if gap > ROUNDING * max(1.0, abs(bar)) else 1.0
        return float(2 * t.sf(gap / self.error, self.n - 1))


def paired_difference(
    a: Values,
    b: Values,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    power: float = 0.8,
) -> Difference:
    """Compare two models on the same samples.

    The interval is Bonett and Price's for 0/1 samples (2012, adjusted Wald), the studentised bootstrap
    (Efron and Tibshirani 1993, ch. 12.5) for samples that are skewed beyond chance, and Student's otherwise;
    `tests/zoo/studies/test_stats.py` simulates their coverage.

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
    binary = bool(np.isin(np.concatenate([left, right]), (0.0, 1.0)).all())
    delta = _rounded(left - right, left, right)
    n = len(delta)
    mean, error = float(delta.mean()), _error(delta)
    if binary:
        low, high = adjusted_wald(delta, confidence)
        p_value = mcnemar_exact(left, right)
    else:
        low, high, p_value = mean_interval(delta, confidence=confidence, resamples=resamples, seed=seed)
    reach = detectable_difference(delta, alpha=1 - confidence, power=power, binary=binary)
    return Difference(mean, low, high, p_value, reach, confidence, n, error, _warning(n))


def seed_difference(a: Values, b: Values, *, confidence: float = 0.95, power: float = 0.8) -> Difference:
    """Compare two methods over the same few seeds: the t interval and test of the paired differences.

    One seed says nothing of the spread: its interval is the whole line.

    Raises:
        DataError: different lengths, no values, or values that are not finite.
    """
    left, right = _checked(a, b, fewest=1)
    delta = _rounded(left - right, left, right)
    n = len(delta)
    if n == 1:
        alone = "one seed: nothing is known of the spread"
        return Difference(float(delta[0]), -math.inf, math.inf, 1.0, math.inf, confidence, 1, 0.0, alone)
    low, high, p_value = _student(delta, confidence)
    reach = detectable_difference(delta, alpha=1 - confidence, power=power)
    return Difference(
        float(delta.mean()),
        low,
        high,
        p_value,
        reach,
        confidence,
        n,
        _error(delta),
        _warning(n, "seeds") if n == 2 else "",
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979): a family's chance of one false find stays the level.

    The i-th smallest of m is multiplied by m - i + 1; none ends below a smaller one's, none above 1.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, reached = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        reached = max(reached, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = reached
    return corrected


def mean_interval(
    values: np.ndarray, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Interval of the mean of `values`, and p of the hypothesis that it is zero.

    Student's, or the studentised bootstrap where ten values or more are skewed beyond chance (sample skewness
    above twice its standard error under a normal law, sqrt(6 / n), and above 0.5).
    """
    n = len(values)
    low, high, p_value = _student(values, confidence)
    if n < 10 or _error(values) == 0 or abs(_skewness(values)) <= max(2 * math.sqrt(6 / n), 0.5):
        return low, high, p_value
    mean, error = float(values.mean()), _error(values)
    ratios = _studentised(values, resamples, seed)
    below, above = np.quantile(ratios, [0.5 - confidence / 2, 0.5 + confidence / 2])
    share = float((np.abs(ratios) >= abs(mean) / error).mean())
    return mean - float(above) * error, mean - float(below) * error, max(share, 1 / (len(ratios) + 1))


def adjusted_wald(delta: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a difference of paired proportions (Bonett and Price 2012): one sample more in each
    discordant cell, then Wald's.

    Args:
        delta: -1, 0 or 1 for each pair.
        confidence: level of the interval.
    """
    n = len(delta) + 2
    gained, lost = (float((delta > 0).sum()) + 1) / n, (float((delta < 0).sum()) + 1) / n
    centre = gained - lost
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * math.sqrt((gained + lost - centre**2) / n)
    return max(-1.0, centre - half), min(1.0, centre + half)


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

    (t_{1 - alpha/2} + t_{power}) s / sqrt(n), with s the standard deviation of the differences and n - 1
    degrees of freedom. For 0/1 samples never less than k / n, where k is the fewest one-sided discordant
    pairs that the exact test calls significant.
    """
    from scipy.stats import t

    n = len(delta)
    reach = float(t.ppf(1 - alpha / 2, n - 1) + t.ppf(power, n - 1)) * _error(delta)
    if not binary:
        return reach
    fewest = math.ceil(1 - math.log2(alpha))  # 2 * 0.5**k <= alpha
    return max(reach, fewest / n)


def _student(delta: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """Interval and two-sided p of the mean; p is 1 where all are zero, 0 where all are equal otherwise."""
    from scipy.stats import t

    n, mean, error = len(delta), float(delta.mean()), _error(delta)
    half = float(t.ppf(0.5 + confidence / 2, n - 1)) * error
    if error == 0:
        return mean, mean, 0.0 if mean != 0 else 1.0
    return mean - half, mean + half, float(2 * t.sf(abs(mean) / error, n - 1))


def _studentised(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(mean* - mean) / error* of resamples; those without spread are left out."""
    rng, n, parts = np.random.default_rng(seed), len(values), []
    rows = max(1, CHUNK // n)
    for start in range(0, resamples, rows):
        drawn = values[rng.integers(0, n, size=(min(rows, resamples - start), n))]
        errors = drawn.std(axis=1, ddof=1) / math.sqrt(n)
        some = errors > 0
        parts.append((drawn.mean(axis=1)[some] - values.mean()) / errors[some])
    return np.concatenate(parts)


def _error(delta: np.ndarray) -> float:
    return float(delta.std(ddof=1)) / math.sqrt(len(delta)) if np.ptp(delta) else 0.0


def _skewness(values: np.ndarray) -> float:
    centred = values - values.mean()
    return float((centred**3).mean() / (centred**2).mean() ** 1.5)


def _rounded(delta: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Differences with those of rounding set to zero, and those that differ by rounding only made equal."""
    unit = ROUNDING * max(float(np.abs(left).max()), float(np.abs(right).max()), 1e-300)
    delta = np.where(np.abs(delta) <= unit, 0.0, delta)
    return np.full_like(delta, float(np.median(delta))) if float(np.ptp(delta)) <= unit else delta


def _warning(n: int, what: str = "samples") -> str:
    return f"only {n} {what}: the interval rests on a normal law" if n < FEW else ""


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
