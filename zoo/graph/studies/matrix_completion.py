"""`zoo reproduce matrix-completion`: rough least squares beside exact ones, SoftImpute and biases."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor

from zoo.graph.methods.matrix_completion import Completion, Observed, observed, predicted
from zoo.shared.ops.csr import entry_rows
from zoo.studies.cells import CellCache
from zoo.studies.figures import Curves, Grid
from zoo.studies.options import StudyOptions
from zoo.studies.study import BAR, Arm, Claim, Study, Tuned, above
from zoo.studies.view import Row, Rows, Value
from zoo.tables import filmtrust

SKETCHED, WARM, EXACT = "sketched", "diagonal", "exact ALS"
SOFT, BIAS = "SoftImpute", "biases"
FRESH = 1000  # the first seed of splits: smaller ones were in view when SoftImpute's grid was set


@dataclass(frozen=True)
class CompletionOptions(StudyOptions):
    """Options of the experiment.

    Args:
        parts: ratings, noisy (a matrix of rank 5), entries and ranks (times over a decade of each).
        seeds: how many, from 0.
        samples: entries a degree of freedom of the noisy matrix.
        entries: sizes that are timed.
        ranks: that are timed.
    """

    parts: tuple[str, ...] = ("ratings", "noisy", "entries", "ranks")
    seeds: int = 3
    samples: tuple[float, ...] = (2.0, 4.0)
    entries: tuple[int, ...] = (100_000, 316_000, 1_000_000)
    ranks: tuple[int, ...] = (6, 12, 24, 48)


class Split(NamedTuple):
    """Entries to fit, entries that choose, and entries that judge: rows, columns, values, each part's order;
    what is subtracted before completing, and added again."""

    rows: Tensor
    cols: Tensor
    values: Tensor
    base: Tensor
    fit: Tensor
    choose: Tensor
    judge: Tensor
    shape: tuple[int, int]

    def of(self, part: Tensor) -> tuple[Observed, Observed]:
        """What is observed of a part."""
        left = (self.values - self.base)[part]
        return observed(self.rows[part], self.cols[part], left, self.shape)

    def error(self, predict: Callable[[Tensor, Tensor], Tensor], part: Tensor) -> float:
        """Root of the mean squared error of a part's entries."""
        found = self.base[part] + predict(self.rows[part], self.cols[part])
        return float((found - self.values[part]).square().mean().sqrt())


def bias_parts(
    users: np.ndarray, items: np.ndarray, values: np.ndarray, fit: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Mean, and what each user and each item add to it (5 virtual ratings at the mean)."""
    mean = float(values[fit].mean())
    found = {id(users): np.zeros(users.max() + 1), id(items): np.zeros(items.max() + 1)}
    for _ in range(10):
        for own, other in ((items, users), (users, items)):
            left = values[fit] - mean - found[id(other)][other[fit]]
            size = len(found[id(own)])
            found[id(own)] = np.bincount(own[fit], left, size) / (5 + np.bincount(own[fit], minlength=size))
    return mean, found[id(users)], found[id(items)]


def biases(users: np.ndarray, items: np.ndarray, values: np.ndarray, fit: np.ndarray) -> np.ndarray:
    """Mean, and what user and item add to it, for every pair."""
    mean, by_user, by_item = bias_parts(users, items, values, fit)
    return mean + by_user[users] + by_item[items]


def ratings(seed: int) -> Split:
    """FilmTrust: 70 % to fit, 10 % to choose, 20 % to judge."""
    users, items, values = filmtrust()
    order = np.random.default_rng(seed).permutation(len(values))
    first, second = int(0.7 * len(order)), int(0.8 * len(order))
    base = biases(users, items, values, order[:first])
    parts = (users, items, values, base, order[:first], order[first:second], order[second:])
    rows, cols, stars, mean, fit, choose, judge = (torch.from_numpy(part) for part in parts)
    return Split(rows, cols, stars, mean, fit, choose, judge, filmtrust().shape)


def low_rank(size: tuple[int, int], rank: int, count: int, noise: float, seed: int) -> Split:
    """A Gaussian matrix of low rank with noise on the seen entries; what judges has none."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in size)
    need, cells = count + count // 5 + 20_000, size[0] * size[1]
    if cells < 4_000_000:
        pairs = torch.randperm(cells, generator=generator)[:need]
    else:
        pairs = torch.randint(cells, (2 * need,), generator=generator).unique()
        pairs = pairs[torch.randperm(len(pairs), generator=generator)][:need]
    rows, cols = pairs // size[1], pairs % size[1]
    values = predicted(u, v, rows, cols)
    seen = count + count // 5
    values[:seen] += noise * torch.randn(seen, generator=generator, dtype=torch.float64)
    order = torch.arange(len(pairs))
    return Split(
        rows, cols, values, torch.zeros_like(values), order[:count], order[count:seen], order[seen:], size
    )


def soft_impute(
    entries: Observed, penalties: tuple[float, ...], most: int, rounds: int, seed: int
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """SoftImpute (Mazumder, Hastie, Tibshirani 2010) from the largest penalty to the least, each from the one
    before: singular values of the matrix, filled where it was not seen, less the penalty, until the seen
    entries change by less than a ten-thousandth."""
    rows, cols = entry_rows(entries.crow), entries.col
    shape = (entries.rows, entries.cols)
    u, v = (torch.zeros(n, 1, dtype=torch.float64) for n in shape)
    start = np.random.default_rng(seed).standard_normal(min(shape))
    for penalty in sorted(penalties, reverse=True):
        before = np.inf
        for _ in range(rounds):
            left = (entries.value - predicted(u, v, rows, cols)).numpy()
            seen = sparse.csr_matrix((left, cols.numpy(), entries.crow.numpy()), shape=shape)
            p, values, q = svds(_filled(seen, u.numpy(), v.numpy()), min(most, min(shape) - 1), v0=start)
            kept = torch.from_numpy(np.maximum(values - penalty, 0.0)).sqrt()
            u, v = torch.from_numpy(p.copy()) * kept, torch.from_numpy(q.T.copy()) * kept
            if abs(before - (now := float(np.linalg.norm(left)))) < 1e-4 * now:
                break
            before = now
        yield penalty, u, v


def _filled(left: sparse.csr_matrix, u: np.ndarray, v: np.ndarray) -> LinearOperator:
    """A sparse matrix plus one of low rank."""
    turned = left.T.tocsr()
    return LinearOperator(
        left.shape,
        matvec=lambda x: left @ x + u @ (v.T @ x),
        rmatvec=lambda x: turned @ x + v @ (u.T @ x),
        dtype=np.float64,
    )


def completed(make: Any, split: Split, ranks: tuple[int, ...], ridges: tuple[float, ...], seed: int) -> Row:
    """The error of an arm, with what the entries that choose chose."""
    if make is None:
        return {"rmse": split.error(lambda rows, cols: torch.zeros(len(rows)), split.judge)}
    by_row, by_column = split.of(split.fit)
    found: list[tuple[float, str, Tensor, Tensor]] = []

    def keep(name: str, u: Tensor, v: Tensor) -> None:
        error = split.error(lambda rows, cols: predicted(u, v, rows, cols), split.choose)
        found.append((error, name, u, v))

    if make == SOFT:
        for penalty, *factors in soft_impute(by_row, ridges, max(ranks) + 10, 200, seed):
            keep(f"{penalty:g}", *factors)
    else:
        for rank in ranks:
            for ridge in ridges:
                chosen = dataclasses.replace(make, rank=rank, ridge=ridge, seed=seed)
                keep(f"{rank}, {ridge:g}", *chosen.fit(by_row, by_column))
    _, name, u, v = min(found, key=lambda one: one[0])
    return {"rmse": split.error(lambda r, c: predicted(u, v, r, c), split.judge), "chosen": name}


def timed(make: Completion, side: int, size: int, rank: int, seed: int) -> Row:
    """Seconds of four rounds on so many entries of a square matrix, and the error."""
    split = low_rank((side, side), rank, size, 0.1, seed)
    entries = split.of(split.fit)
    start = time.process_time()
    u, v = dataclasses.replace(make, rank=rank, rounds=4, seed=seed).fit(*entries)
    spent = time.process_time() - start
    return {"seconds": spent, "rmse": split.error(lambda r, c: predicted(u, v, r, c), split.judge)}


def measure(make: Any, options: CompletionOptions, case: Row, cells: CellCache) -> Row | list[Row]:
    """The error on entries that were not seen; of times, all of the decade and the exponent."""
    part, seed = case["part"], case["seed"]
    if part == "ratings":
        return completed(make, ratings(FRESH + seed), (2, 5, 10), (6.0, 10.0, 15.0, 20.0), seed)
    if part == "noisy":
        split = low_rank((400, 300), 5, round(case["level"] * 5 * 695), 0.5, FRESH + seed)
        penalties = (1.0, 2.0, 4.0, 8.0) if make == SOFT else (0.01, 0.1, 0.3, 1.0)
        return completed(make, split, (4, 5, 7), penalties, seed)
    sizes = options.entries if part == "entries" else options.ranks
    found = []
    for size in sizes:
        # Three entries a degree of freedom; or as many as there are 570 of in each row.
        of = (size // 60, size, 10) if part == "entries" else (700, 400_000, size)
        found.append({**timed(make, *of, seed), "level": size})
    slope = np.polyfit(np.log(sizes), np.log([row["seconds"] for row in found]), 1)[0]
    return [*found, {"level": "exponent", "exponent": float(slope)}]


def cases(options: CompletionOptions) -> Iterator[Row]:
    """All arms of a seed before the next seed."""
    for part in options.parts:
        arms = list(ARMS) if part in ("ratings", "noisy") else [SKETCHED, WARM, EXACT]
        for level in options.samples if part == "noisy" else (part,):
            for seed in range(options.seeds):
                yield from ({"part": part, "arm": arm, "level": level, "seed": seed} for arm in arms)


_GRID = Tuned("rank, ridge", "entries held back", ("3 ranks", "4 ridges"))
ARMS = {
    SKETCHED: Arm(Completion(sketch=4), tuned=_GRID),
    WARM: Arm(Completion(), tuned=_GRID),
    EXACT: Arm(Completion(inner=0), control=BIAS, tuned=_GRID),
    SOFT: Arm(SOFT, control=BIAS, tuned=Tuned("penalty", "entries held back", ("4 penalties",))),
    BIAS: Arm(None),
}
RMSE = Value("rmse", 1.0, 4, "RMSE", 4, lower=True)
SECONDS = Value("seconds", 1.0, 3, "s", 3, lower=True)
EXPONENT = Value("exponent", 1.0, 2, "", 2, lower=True)
RATINGS, NOISY, SIZES, RANKS = ({"part": d} for d in ("ratings", "noisy", "entries", "ranks"))
EQUAL = "approximate updates lose nothing"


def named(rows: Rows, options: Any) -> Rows:
    """Rows whose level says what it counts."""
    words = "{:g} entries a degree of freedom"
    return [{**row, "level": words.format(row["level"])} if row["part"] == "noisy" else row for row in rows]


def _log(level: Any) -> float:
    return math.log10(level)


STUDY = Study(
    "matrix-completion",
    "Matrix completion by alternating minimisation with rough least squares",
    "Yuzhou Gu, Zhao Song, Junze Yin, Lichen Zhang: Low Rank Matrix Completion via Robust Alternating "
    "Minimization in Nearly Linear Time, ICLR 2024",
    CompletionOptions,
    ARMS,
    cases,
    measure,
    papers=(47,),
    claims=[
        above(SKETCHED, EXACT, -0.002, EQUAL, only=RATINGS),
        above(SKETCHED, BIAS, only=RATINGS),
        above(SKETCHED, SOFT, only=RATINGS),
        above(SKETCHED, EXACT, -0.002, EQUAL, only=NOISY),
        above(SKETCHED, SOFT, only=NOISY, mean=True),
        Claim(
            "time grows with the entries by an exponent below 1.2",
            "nearly linear",
            SKETCHED,
            bar=-1.2,
            at=("exponent",),
            value=EXPONENT,
            only=SIZES,
        ),
        Claim(
            "time grows with the rank by an exponent below 1.2",
            "linear in the rank",
            SKETCHED,
            bar=-1.2,
            at=("exponent",),
            value=EXPONENT,
            only=RANKS,
        ),
        Claim(
            "time grows with the rank by a smaller exponent than that of exact least squares",
            "k in place of k^2",
            SKETCHED,
            EXACT,
            at=("exponent",),
            value=EXPONENT,
            only=RANKS,
        ),
        Claim(
            "without the sketch, by the diagonal, it does so too",
            BAR,
            WARM,
            EXACT,
            at=("exponent",),
            value=EXPONENT,
            only=RANKS,
        ),
    ],
    value=RMSE,
    varies=("seeds", "parts", "samples"),
    prepare=named,
    data=lambda options, case: filmtrust() if case["part"] == "ratings" else (),
    by=("part",),
    titles={
        "ratings": "FilmTrust",
        "noisy": "rank 5, 400 x 300, noise 0.5",
        "entries": "entries, rank 10, 3 a degree of freedom",
        "ranks": "ranks, 400,000 entries of 700 x 700",
    },
    tables=[
        Grid("{where}: RMSE of entries that were not seen"),
        Grid(
            "{where}: seconds, and exponent",
            value=lambda view, arm, level: view.cell(
                arm, level, EXPONENT if level == "exponent" else SECONDS
            ),
        ),
    ],
    plots=[
        Curves(
            "times-{slug}",
            "{where}: seconds of four rounds",
            "logarithm (base 10)",
            "seconds, logarithm (base 10)",
            x=_log,
            value=SECONDS,
            log10=True,
        ),
    ],
    notes=lambda options: [
        "RMSE in stars for ratings; against the matrix without noise otherwise, whose entries have a "
        "deviation of 2.2. All arms complete what the biases leave of the ratings.",
        "ALS with exact least squares and SoftImpute are written here: no maintained package has them. The "
        "one that did, fancyimpute 0.7.0 (2021), calls scikit-learn with an argument that is gone since 1.8.",
        "SoftImpute's grid and stopping rule were set with errors of other splits in view than those "
        "that are reported here. Sizes of the timed parts were changed after first times.",
        "Seconds of processor time on one thread.",
    ],
)
