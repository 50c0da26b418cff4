"""Matrix completion by alternating minimisation whose least squares are solved only roughly.

Gu, Song, Yin, Zhang, "Low Rank Matrix Completion via Robust Alternating Minimization in Nearly Linear Time",
ICLR 2024: M = U V^T of rank k is seen on a set Omega. Alternately V and U are the solution of one least
squares problem of k unknowns for each column (row); each is solved by a few iterations, preconditioned by a
sketch of its matrix, which takes O(|Omega| k) in place of the O(|Omega| k^2) of an exact solution.

The iterations of all columns together are sparse products (`sddmm`, then `spmm`), and start from the last
round's solution in the new basis. Differs from the paper: all entries in every round (the paper's proof takes
fresh ones), conjugate gradients in place of plain steps, which diverge where a sketch has few rows, a ridge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from scipy.sparse.linalg import svds
from torch import Tensor

from zoo.errors import ConfigError, DataError
from zoo.shared.ops.csr import csr_from_edges, entry_rows
from zoo.shared.ops.spmm import sddmm, spmm


class Observed(NamedTuple):
    """Entries of a matrix by row: `crow` [m + 1], `col` [e] (int32), `value` [e] (float32 or float64), and
    the number of columns."""

    crow: Tensor
    col: Tensor
    value: Tensor
    cols: int

    @property
    def rows(self) -> int:
        """Rows of the matrix."""
        return self.crow.numel() - 1


def observed(
    rows: Int[Tensor, " e"], cols: Int[Tensor, " e"], values: Float[Tensor, " e"], shape: tuple[int, int]
) -> tuple[Observed, Observed]:
    """The seen entries of a matrix, by row and by column.

    Raises:
        DataError: no entry, a pair that is given twice, a value that is not finite, an index out of range.
    """
    pair = rows.long() * shape[1] + cols.long()
    if not len(pair) or len(pair.unique()) != len(pair):
        raise DataError(f"each entry must be given once, and one at least; received {len(pair)} entries")
    if not bool(values.isfinite().all()):
        raise DataError("an observed value is not finite")
    if (
        min(int(rows.min()), int(cols.min())) < 0
        or int(rows.max()) >= shape[0]
        or int(cols.max()) >= shape[1]
    ):
        raise DataError(f"an index lies outside the matrix of shape {tuple(shape)}")

    def compressed(edges: Tensor, count: int, other: int) -> Observed:
        crow, col, order = csr_from_edges(edges.int(), count)
        return Observed(crow, col, values[order], other)

    edges = torch.stack([rows, cols])
    return compressed(edges, *shape), compressed(edges.flip(0), shape[1], shape[0])


@dataclass(frozen=True)
class Completion:
    """How a matrix is completed.

    Attributes:
        rank: k.
        rounds: of both updates.
        inner: iterations of a least squares problem in a round; 0 solves exactly.
        ridge: on the squared entries of both factors.
        sketch: rows of the sketch over k; 0 preconditions by the diagonal.
        clip: mu, entries of the first factor above 2 mu sqrt(k / m) become 0.
        seed: of sketches and the first factor.
    """

    rank: int = 5
    rounds: int = 20
    inner: int = 2
    ridge: float = 0.0
    sketch: int = 0
    clip: float = 5.0
    seed: int = 0

    def fit(self, by_row: Observed, by_column: Observed) -> tuple[Float[Tensor, "m k"], Float[Tensor, "n k"]]:
        """Factors U, V with U V^T near the matrix where it was seen.

        Raises:
            ConfigError: a rank outside [1, min(m, n)), no round, or a negative ridge, sketch or inner count.
        """
        least = min(by_row.rows, by_row.cols)
        if not 1 <= self.rank < least:
            raise ConfigError(f"the rank must be at least 1 and below {least}; received {self.rank}")
        if self.rounds < 1 or min(self.inner, self.ridge, self.sketch) < 0:
            raise ConfigError(
                "matrix completion needs a round, and no negative inner count, ridge or sketch; received "
                f"rounds {self.rounds}, inner {self.inner}, ridge {self.ridge}, sketch {self.sketch}"
            )
        generator = torch.Generator().manual_seed(self.seed)
        u = first_factor(by_row, self.rank, self.clip, self.seed)
        v = u.new_zeros(by_row.cols, self.rank)
        for _ in range(self.rounds):
            u, v = balanced(u, self._solved(by_column, u, v, generator))
            u, v = balanced(self._solved(by_row, v, u, generator), v)
        return u, v

    def _solved(self, entries: Observed, design: Tensor, start: Tensor, generator: torch.Generator) -> Tensor:
        """One factor, given the other."""
        if not self.inner:
            return exact(entries, design, self.ridge)
        factors = normal_factors(entries, design, self.sketch * self.rank, self.ridge, generator)
        return conjugate_gradients(entries, design, start, factors, self.ridge, self.inner)


def balanced(u: Float[Tensor, "m k"], v: Float[Tensor, "n k"]) -> tuple[Tensor, Tensor]:
    """Factors with the same product whose columns are orthogonal, and of the same norms in both: what was
    found of one factor stays a good start in the other's new basis."""
    (p, r), (q, s) = torch.linalg.qr(u), torch.linalg.qr(v)
    left, values, right = torch.linalg.svd(r @ s.T)
    return p @ left * values.sqrt(), q @ right.T * values.sqrt()


def first_factor(by_row: Observed, rank: int, clip: float, seed: int) -> Float[Tensor, "m k"]:
    """Left singular vectors of P_Omega(M) / p, large entries cut, orthonormal again."""
    share = len(by_row.col) / (by_row.rows * by_row.cols)
    parts = by_row.value.double().numpy() / share, by_row.col.numpy(), by_row.crow.numpy()
    matrix = sparse.csr_matrix(parts, shape=(by_row.rows, by_row.cols))
    start = np.random.default_rng(seed).standard_normal(min(matrix.shape))
    u = torch.from_numpy(svds(matrix, rank, v0=start, return_singular_vectors="u")[0].copy())
    u[u.abs() > 2 * clip * (rank / by_row.rows) ** 0.5] = 0
    return torch.linalg.qr(u)[0].to(by_row.value.dtype)


def normal_factors(
    entries: Observed, design: Tensor, buckets: int, ridge: float, generator: torch.Generator
) -> Float[Tensor, "n k k"]:
    """Cholesky factors of (S A)^T (S A) + ridge for each problem's A, S a count sketch; without buckets of
    the diagonal of A^T A.

    Args:
        entries: of which a row is a problem.
        design: [m, k], whose rows at a problem's entries are A.
        buckets: rows of the sketch.
        ridge: on the diagonal.
        generator: of the sketch.
    """
    rank = design.shape[1]
    eye = torch.eye(rank, dtype=design.dtype)
    if not buckets:
        diagonal = spmm(entries.crow, entries.col, design.square()) + ridge
        return torch.diag_embed(diagonal.clamp(min=1e-12).sqrt())
    bucket = torch.randint(buckets, (len(design),), generator=generator)
    sign = torch.randint(2, (len(design),), generator=generator).to(design) * 2 - 1
    place = entry_rows(entries.crow) * buckets + bucket[entries.col.long()]
    signed = (design * sign[:, None])[entries.col.long()]
    sketched = design.new_zeros(entries.rows * buckets, rank).index_add_(0, place, signed)
    sketched = sketched.reshape(entries.rows, buckets, rank)
    square = sketched.mT @ sketched
    jitter = ridge + 1e-6 * square.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-12
    return torch.linalg.cholesky(square + jitter * eye)


def conjugate_gradients(
    entries: Observed, design: Tensor, start: Tensor, factors: Tensor, ridge: float, steps: int
) -> Float[Tensor, "n k"]:
    """Preconditioned conjugate gradients on A^T A x = A^T b of all problems at once, from `start`."""

    def precondition(x: Tensor) -> Tensor:
        return torch.cholesky_solve(x[..., None], factors)[..., 0]

    x = start.clone()
    residual = spmm(entries.crow, entries.col, design, entries.value - sddmm(*entries[:2], x, design))
    residual -= ridge * x
    z = precondition(residual)
    direction, now = z, (residual * z).sum(1, keepdim=True)
    for step in range(steps):
        image = spmm(entries.crow, entries.col, design, sddmm(*entries[:2], direction, design))
        image += ridge * direction
        curvature = (direction * image).sum(1, keepdim=True)
        length = torch.where(curvature > 0, now / curvature.clamp(min=1e-30), 0.0)
        x += length * direction
        if step + 1 < steps:
            residual -= length * image
            z = precondition(residual)
            before, now = now, (residual * z).sum(1, keepdim=True)
            direction = z + torch.where(before > 0, now / before.clamp(min=1e-30), 0.0) * direction
    return x


def exact(entries: Observed, design: Tensor, ridge: float) -> Float[Tensor, "n k"]:
    """The solutions by their normal equations, k^2 operations an entry."""
    rank = design.shape[1]
    row, column = torch.triu_indices(rank, rank)
    upper = spmm(entries.crow, entries.col, design[:, row] * design[:, column])
    square = design.new_zeros(entries.rows, rank, rank)
    square[:, row, column] = upper
    square[:, column, row] = upper
    square += (ridge + 1e-9) * torch.eye(rank, dtype=design.dtype)
    right = spmm(entries.crow, entries.col, design, entries.value)
    return torch.linalg.solve(square, right[..., None])[..., 0]


def predicted(
    u: Float[Tensor, "m k"], v: Float[Tensor, "n k"], rows: Int[Tensor, " e"], cols: Int[Tensor, " e"]
) -> Float[Tensor, " e"]:
    """U V^T at some entries."""
    return (u[rows.long()] * v[cols.long()]).sum(1)
