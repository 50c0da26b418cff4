"""Unit labels of tensor axes, and how reshaping carries them along.

While a model is traced, each axis of a tensor may carry labels: an integer per position, and positions with
equal labels (directly or by a union) belong to one unit. FIXED marks positions that must stay; an axis
without labels (batch, height, time) is absent from the mapping.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

FIXED = -1

Labels = dict[int, np.ndarray]  # axis -> labels, one per position


class Unions:
    """Labels that were found to be one unit, labels that must stay, and labels under a norm's statistics."""

    def __init__(self) -> None:
        self.count = 0
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self._fixed: list[tuple[np.ndarray, str]] = []
        self._inexact: list[np.ndarray] = []

    def fresh(self, size: int) -> np.ndarray:
        """New labels, all different."""
        self.count += size
        return np.arange(self.count - size, self.count)

    def join(self, a: np.ndarray, b: np.ndarray, why: str) -> None:
        """Position by position, a and b are one unit; what meets FIXED is fixed."""
        both = (a != FIXED) & (b != FIXED)
        self._pairs.append((a[both], b[both]))
        self.fix(a[~both], why)
        self.fix(b[~both], why)

    def join_rows(self, rows: np.ndarray, why: str) -> np.ndarray:
        """Each row of a matrix of labels is one unit; returns one label per row (FIXED if the row has
        one)."""
        fixed = (rows == FIXED).any(axis=1)
        self.fix(rows[fixed].reshape(-1), why)
        free = rows[~fixed]
        self._pairs.append((free[:, :-1].reshape(-1), free[:, 1:].reshape(-1)))
        return np.where(fixed, FIXED, rows[:, 0])

    def fix(self, labels: np.ndarray, why: str) -> None:
        """These units must stay, because of `why`."""
        labels = labels[labels != FIXED]
        if labels.size:
            self._fixed.append((labels, why))

    def mark_inexact(self, labels: np.ndarray) -> None:
        """Statistics are taken over these units, so that cutting one changes the others."""
        self._inexact.append(labels[labels != FIXED])

    def resolve(self) -> tuple[np.ndarray, dict[int, str], set[int]]:
        """The unit of every label, the units that must stay with the reason, and the inexact units."""
        if not self.count:
            return np.zeros(0, dtype=np.int64), {}, set()
        a = np.concatenate([pair[0] for pair in self._pairs] or [np.zeros(0, dtype=np.int64)])
        b = np.concatenate([pair[1] for pair in self._pairs] or [np.zeros(0, dtype=np.int64)])
        graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(self.count, self.count))
        _, unit = connected_components(graph, directed=False)
        fixed: dict[int, str] = {}
        for labels, why in self._fixed:
            for u in np.unique(unit[labels]):
                fixed.setdefault(int(u), why)
        inexact = {int(u) for labels in self._inexact for u in np.unique(unit[labels])}
        return unit, fixed, inexact


def factor_shapes(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The blocks of a reshape: lists of old and new axes whose sizes have the same product, in order."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [], []
        p = q = 1
        if i < len(before):
            p, old, i = before[i], [i], i + 1
        if j < len(after):
            q, new, j = after[j], [j], j + 1
        while p != q:
            if p < q:
                p, i = p * before[i], i + 1
                old.append(i - 1)
            else:
                q, j = q * after[j], j + 1
                new.append(j - 1)
        blocks.append((old, new))
    return blocks


def reshape_labels(
    labels: Labels, before: tuple[int, ...], after: tuple[int, ...], unions: Unions, why: str
) -> Labels:
    """Labels after `reshape`; splitting an axis joins entries to one unit per head.

    A split (heads * width) -> (heads, width) makes each head one unit; a merge (channels, height, width) ->
    features gives each feature its channel's label. What cannot be followed is fixed.
    """
    result: Labels = {}
    for old, new in factor_shapes(before, after):
        wide = [axis for axis in old if before[axis] > 1]
        labelled = [axis for axis in wide if axis in labels]
        if not labelled:
            continue
        targets = [axis for axis in new if after[axis] > 1]
        if len(labelled) > 1:
            for axis in labelled:
                unions.fix(labels[axis], why)
            continue
        (axis,) = labelled
        # Labels of every position of the block, in row-major order of the old axes.
        shape = [before[a] for a in wide]
        view = [-1 if a == axis else 1 for a in wide]
        flat = np.broadcast_to(labels[axis].reshape(view), shape).reshape(-1)
        if len(targets) == 1:
            result[targets[0]] = flat
            continue
        grid = flat.reshape([after[a] for a in targets])
        for position, target in enumerate(targets):
            moved = np.moveaxis(grid, position, 0).reshape(after[target], -1)
            if (moved == moved[:, :1]).all():  # this axis alone decides the label
                result[target] = moved[:, 0]
                break
        else:
            # (heads, width): each head is one unit. (3, heads, width), a fused projection: likewise.
            head = max(len(targets) - 2, 0)
            rows = np.moveaxis(grid, head, 0).reshape(after[targets[head]], -1)
            result[targets[head]] = unions.join_rows(rows, why)
    return result
