"""The k-th smallest magnitude of a stream that arrives in chunks, taken per chunk and averaged (CHESS)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import BudgetError
from .statistics import MagnitudeHistogram


def check_share(share: float, what: str = "sparsity") -> float:
    """A share strictly between 0 and 1.

    Raises:
        BudgetError: it is not; `what` names it.
    """
    if not 0 < share < 1:
        raise BudgetError(f"{what} must lie strictly between 0 and 1; received {share:g}.")
    return float(share)


class ChunkedKth:
    """For each share s the k-th smallest |x|, k = int(count * s), of every chunk of pieces, averaged.

    The mean of k-th values of chunks is what the released CHESS code calls a threshold; it needs the memory
    of one chunk only. A chunk of at most `exact` values is held and gives exact order statistics; a larger
    one goes into a histogram, whose k-th value is right within a relative error of 2^-14.

    Args:
        shares: each strictly between 0 and 1.
        pieces: updates that make a chunk; a last chunk of fewer pieces counts like the others.
        exact: values of a chunk that are held.

    Raises:
        BudgetError: a share outside (0, 1), or no pieces.
    """

    def __init__(self, shares: Sequence[float], pieces: int = 1, exact: int = 1 << 22) -> None:
        self.shares = tuple(check_share(share) for share in shares)
        if not self.shares or pieces < 1:
            raise BudgetError(f"ChunkedKth needs shares and at least 1 piece per chunk; received {pieces}.")
        self.pieces, self.exact = pieces, exact
        self._held: list[Tensor] = []
        self._count = self._arrived = 0
        self._histogram: MagnitudeHistogram | None = None
        self._found: list[list[float]] = []

    def update(self, rows: Float[Tensor, "rows features"]) -> None:
        """Take in a piece."""
        piece = rows.detach().float().abs()
        self._arrived += 1
        self._count += piece.numel()
        if self._histogram is None and self._count > self.exact:
            self._histogram = MagnitudeHistogram()
            for held in self._held:
                self._histogram.update(held)
            self._held = []
        if self._histogram is not None:
            self._histogram.update(piece)
        else:
            self._held.append(piece.reshape(-1, piece.shape[-1]))
        if self._arrived == self.pieces:
            self._close()

    def values(self) -> list[float]:
        """The threshold of each share, in the order given.

        Raises:
            BudgetError: nothing has arrived, or so little that k would be 0.
        """
        if self._arrived:
            self._close()
        if not self._found:
            raise BudgetError("ChunkedKth: no rows have arrived; run the calibration first.")
        return [math.fsum(chunk) / len(chunk) for chunk in zip(*self._found, strict=True)]

    def _close(self) -> None:
        ks = [int(self._count * share) for share in self.shares]
        if min(ks) < 1:
            raise BudgetError(
                f"a chunk of {self._count} values has none below its share of {min(self.shares):g}: "
                "calibrate on more or longer windows"
            )
        if self._histogram is not None:
            found = [self._histogram.kth(k) for k in ks]
        else:
            ordered = torch.cat([held.flatten() for held in self._held]).sort().values
            found = [float(ordered[k - 1]) for k in ks]
        self._found.append(found)
        self._held, self._histogram, self._count, self._arrived = [], None, 0, 0
