"""Cells: finished pieces of a study on disk, checked, shared among processes, so that a kill costs one of
them.

A cell is one checked file (`zoo.shared.store.checked`): its key, its value, the tensors that were asked for
with it (a trained network's weights), and where and in what time it was computed. A damaged file is named and
computed again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from zoo.shared.errors import FormatError, IdentityError, StorageError
from zoo.shared.store.checked import identity_of, read_checked, write_checked
from zoo.shared.store.io import require_writable
from zoo.shared.store.kept import keep_in_mind
from zoo.studies.digests import commit

try:
    import fcntl
except ModuleNotFoundError:  # Windows: there one process computes all cells
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
Key = Mapping[str, Any]
WAIT = 0.5  # seconds until work that other processes are doing is asked for again
log = logging.getLogger(__name__)


class CellBusy(Exception):
    """Another process is computing the cell at this moment; see `share`."""


class CellCache:
    """Results of finished pieces of work, one file per key, so that an interrupted run can go on.

    A key is a flat description of everything that decides the value: method, data set, level, seed, and the
    digests of the code and of the data (`zoo.studies.digests`).

    Attributes:
        sharing: whether other processes may be working on the same folder, so that a cell is claimed before
            it is computed.
        used: provenance of every cell that was asked for, by file stem: commit, machine, seconds.
        hits, misses: how many were there, and how many were computed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.sharing = False
        self.used: dict[str, dict[str, Any]] = {}
        self.hits = 0
        self.misses = 0

    def path(self, key: Key) -> Path:
        """The file of a key."""
        return self.folder / f"{identity_of(key)[:32]}.safetensors"

    def get(self, key: Key) -> Any | None:
        """The stored value, or None; a damaged file is named in the log and counts as missing."""
        found = self._read(key)
        return found[0] if found else None

    def put(
        self, key: Key, value: Any, seconds: float = 0.0, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Store a JSON value, and tensors with it, with their provenance."""
        made = {"seconds": round(seconds, 3), "commit": commit(), "machine": machine()}
        facts = {"key": dict(key), "value": value, "made": made}
        write_checked(self.path(key), tensors or {}, facts, identity=identity_of(key))
        self.used[self.path(key).stem] = {"key": dict(key), **made}
        keep_in_mind()

    def cell(self, key: Key, compute: Callable[[], Any]) -> Any:
        """The value of a key: from the disk, or computed, stored and returned.

        The value passes through JSON in both cases, so that a resumed run sees exactly what a fresh one does.

        Raises:
            CellBusy: while sharing, another process computes it.
        """
        return self.tensors(key, lambda: (compute(), {}))[0]

    def tensors(
        self, key: Key, compute: Callable[[], tuple[Any, Mapping[str, Tensor]]]
    ) -> tuple[Any, dict[str, Tensor]]:
        """Like `cell`, for work that makes tensors as well."""
        if (found := self._read(key)) is not None:
            self.hits += 1
            return found
        if not self.misses:
            require_writable(self.folder, "set ZOO_CACHE or --cells to a folder that can be written")
        with self._claim(key):
            if self.sharing and (found := self._read(key)) is not None:  # finished a moment ago
                self.hits += 1
                return found
            start = time.perf_counter()
            value, tensors = compute()
            self.put(key, value, time.perf_counter() - start, tensors)
            self.misses += 1
        found = self._read(key)
        if found is None:
            raise StorageError(f"{self.path(key)} cannot be read although it was just written")
        return found

    def _read(self, key: Key) -> tuple[Any, dict[str, Tensor]] | None:
        path = self.path(key)
        try:
            tensors, facts = read_checked(path, identity=identity_of(key))
            value, made = facts["value"], facts["made"]
        except FileNotFoundError:
            return None
        except (FormatError, IdentityError, KeyError) as error:
            log.warning("%s is damaged and is computed again: %s", path, error)
            return None
        self.used[path.stem] = {"key": dict(key), **made}
        keep_in_mind()
        return value, tensors

    @contextmanager
    def _claim(self, key: Key) -> Iterator[None]:
        """Keeps other processes off a cell; the system ends the claim of a process that dies."""
        if not self.sharing or fcntl is None:
            yield
            return
        folder = self.folder / "claims"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / self.path(key).stem).open("w") as claim:
            try:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CellBusy(str(dict(key))) from None
            yield


def share(
    work: Sequence[tuple[str, Callable[[], T]]],
    cells: CellCache,
    progress: Callable[..., None] | None = None,
) -> list[T]:
    """The results of pieces of work, in their order.

    Several processes that run the same work on the same folder of cells divide it among themselves: what
    another is computing is put off until it is there.

    Args:
        work: a note for the progress, and what makes the result through `cells`.
        cells: the cells that the work asks.
        progress: called as the pieces finish.
    """
    cells.sharing = True
    found: dict[int, T] = {}
    waiting = list(range(len(work)))
    while waiting:
        busy = []
        for index in waiting:
            note, make = work[index]
            try:
                found[index] = make()
            except CellBusy:
                busy.append(index)
                continue
            if progress is not None:
                progress(len(found), len(work), note)
        if len(busy) == len(waiting):
            time.sleep(WAIT)
        waiting = busy
    return [found[index] for index in range(len(work))]


def machine() -> str:
    """Processor, threads and torch of this process, in a line."""
    from zoo.harness.records import Environment

    here = Environment.here()
    return f"{here.cpu}, {here.cpus} CPUs, {here.threads} threads, torch {here.torch}"
