"""Which backend runs: the table of measured times, its margin, and measuring it anew."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from zoo.cli import main
from zoo.shared import ops
from zoo.shared.errors import OpError
from zoo.shared.ops import _native, dispatch

CPU = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch):
    """`measured(times, ...)` makes a table of the op "toy" with these cases; nothing else is measured."""
    monkeypatch.setattr(_native, "missing", lambda: None)

    def install(*cases: tuple[int, tuple[float, ...], dict[str, float]]) -> None:
        entries = [dispatch.Entry("toy", "kind", threads, sizes, times) for threads, sizes, times in cases]
        monkeypatch.setattr(dispatch, "table", lambda: {("toy", "kind"): entries})
        dispatch._auto.cache_clear()

    yield install
    dispatch._auto.cache_clear()


def choice(
    sizes: tuple[float, ...], offered=("native", "dense", "reference"), copied: int = 0
) -> dispatch.Plan:
    return dispatch.choose("toy", CPU, offered, "kind", sizes, copied)


def test_the_nearest_case_decides(measured) -> None:
    measured(
        (1, (100.0, 1.0), {"native": 1.0, "dense": 3.0}),
        (1, (100.0, 64.0), {"native": 9.0, "dense": 3.0}),
    )
    assert choice((100.0, 2.0)).backend == "native"
    assert choice((100.0, 48.0)).backend == "dense"
    assert "3e+03 ms" in str(choice((100.0, 48.0)))


def test_a_narrow_lead_over_dense_is_not_enough(measured) -> None:
    measured((1, (1.0,), {"native": 0.9 * dispatch.MARGIN, "dense": 1.0}))
    assert choice((1.0,)).backend == "native"
    measured((1, (1.0,), {"native": 1.01 * dispatch.MARGIN, "dense": 1.0}))
    assert choice((1.0,)).backend == "dense"


def test_what_looking_a_copy_up_costs_counts_for_dense(measured, monkeypatch) -> None:
    """A call by a copy reads the weight's bytes, and a kernel that reads the weight itself need not."""
    look = dispatch.looking(4_000_000)
    assert look == pytest.approx(108e-6)
    measured((1, (1.0,), {"native": 1.2e-4, "dense": 1e-4}), (1, (64.0,), {"native": 9e-3, "dense": 5e-3}))
    assert choice((1.0,)).backend == choice((64.0,)).backend == "dense"
    plan = choice((1.0,), copied=4_000_000)
    assert plan.backend == "native"
    assert dict(plan.measured) == {"native": 1.2e-4, "dense": pytest.approx(1e-4 + look)}
    assert choice((64.0,), copied=4_000_000).backend == "dense"
    # A table measured here holds the product alone, of "dense" a plain layer's: nothing is counted twice.
    ran = []

    def compare(runs, **_):
        return {name: SimpleNamespace(p10=1e-3 if run() is None else 0) for name, run in runs.items()}

    monkeypatch.setattr(dispatch, "compare", compare)
    backends = ("native", "dense", "vendor")
    runs = {"run": lambda: ran.append(dispatch.requested()), "plain": lambda: ran.append("plain")}
    entry = dispatch.measure(
        "toy", runs["run"], backends, "kind", (1.0,), 4_000_000, quick=True, plain=runs["plain"]
    )
    assert ran == ["native", "plain", "vendor"]
    assert entry.times == {"native": 1e-3, "dense": 1e-3, "vendor": pytest.approx(1e-3 - look)}


def test_the_number_of_threads_comes_first(measured, monkeypatch) -> None:
    measured((1, (8.0,), {"native": 1.0, "dense": 9.0}), (2, (64.0,), {"native": 9.0, "dense": 1.0}))
    assert choice((8.0,)).backend == "native"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert choice((8.0,)).backend == "dense"


def test_without_the_library_the_next_one_runs(measured, monkeypatch) -> None:
    measured((1, (1.0,), {"native": 1.0, "dense": 9.0}))
    monkeypatch.setattr(_native, "missing", lambda: "it was not built")
    plan = choice((1.0,))
    assert plan.backend == "dense" and "it was not built" in plan.reason
    with ops.backend("native"), pytest.raises(OpError, match="native backend was asked for, but it was not"):
        choice((1.0,))


def test_unknown_and_unoffered_backends_are_refused() -> None:
    with pytest.raises(OpError, match="unknown backend 'fast'"), ops.backend("fast"):
        pass
    with ops.backend("vendor"), pytest.raises(OpError, match="has no backend 'vendor' for this call"):
        choice((1.0,))
    with pytest.raises(OpError, match="unknown op 'sparse_liner'"):
        ops.explain("sparse_liner")


@pytest.fixture
def one_op(monkeypatch, tmp_path):
    """Only the op "toy" can be measured, and this machine has no table of its own yet."""
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path))

    def calibrate(quick: bool) -> list[dispatch.Entry]:
        kinds = ("dense", "native") if _native.available() else ("dense",)
        run = torch.ones(2).sum
        return [dispatch.measure("toy", run, (*kinds, "reference"), "kind", (4.0, 2.0), quick=quick)]

    monkeypatch.setattr(dispatch, "_calibrators", {"toy": calibrate})
    dispatch.table.cache_clear()
    dispatch._auto.cache_clear()
    yield dispatch.calibration_file
    dispatch.table.cache_clear()
    dispatch._auto.cache_clear()


def test_measuring_this_machine_from_the_command_line(one_op, capsys) -> None:
    assert main(["bench", "--calibrate", "--quick", "--threads", "1"]) == 0
    assert str(one_op()) in "".join(capsys.readouterr())
    held = json.loads(one_op().read_text())
    (row,) = held["entries"]
    assert row["op"] == "toy" and row["threads"] == 1 and row["sizes"] == [4.0, 2.0]
    assert all(time > 0 for time in row["times"].values()) and "reference" not in row["times"]
    assert held["machine"]["torch"] == torch.__version__
    assert dispatch.choose("toy", CPU, tuple(row["times"]), "kind", (4.0, 2.0)).measured == row["times"]

    assert main(["bench", "--calibrate", "--quick", "--threads", "2"]) == 0
    assert [row["threads"] for row in json.loads(one_op().read_text())["entries"]] == [1, 2]
    assert main(["bench", "spmm", "--calibrate"]) == 2


@pytest.mark.parametrize("text", ["{", '{"entries": [{"op": "toy"}]}', "[]"])
def test_a_broken_table_is_named(one_op, text: str) -> None:
    one_op().write_text(text)
    dispatch.table.cache_clear()
    with pytest.raises(OpError, match="delete it, or run `zoo bench --calibrate`"):
        dispatch.table()


def test_the_shipped_table_can_be_read() -> None:
    table = dispatch._read(_native.FOLDER / "calibration.json")
    entries = [entry for group in table.values() for entry in group]
    assert {entry.threads for entry in entries} == {1, 2}
    assert all(time > 0 for entry in entries for time in entry.times.values())
