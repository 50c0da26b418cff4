"""Timing with clocks that are told what to say, goals, tables, and one real run."""

from __future__ import annotations

import json
import time

import pytest
import torch

from zoo.shared.bench import (
    Bound,
    Cell,
    Goal,
    Later,
    Limits,
    Rotation,
    Timing,
    bandwidth,
    compare,
    machine,
    main,
    peak_flops,
    report,
)
from zoo.shared.bench.machine import _caches, last_level_cache
from zoo.shared.bench.runner import Row, Table
from zoo.shared.bench.timing import ratio, threads


class FakeClock:
    """Time that passes only where a function says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def job(self, name: str, *seconds: float):
        """A function that takes these times in turn."""
        turn = iter(range(10**9))

        def run() -> None:
            self.calls.append(name)
            self.now += seconds[next(turn) % len(seconds)]

        return run


def test_medians_and_ratio() -> None:
    clock = FakeClock()
    timings = compare({"a": clock.job("a", 0.01), "b": clock.job("b", 0.04)}, clock=clock, block_seconds=0.2)
    assert timings["a"].median == pytest.approx(0.01) and timings["b"].median == pytest.approx(0.04)
    speed = ratio(timings["b"], timings["a"])
    assert (speed.value, speed.low, speed.high) == pytest.approx((4, 4, 4)) and str(
        speed
    ) == "4.00x [4.00-4.00]"
    assert len(timings["a"].samples) == 5 * 20 and len(timings["b"].samples) == 5 * 5


def test_blocks_alternate_and_swap() -> None:
    clock = FakeClock()
    compare({"a": clock.job("a", 0.1), "b": clock.job("b", 0.1)}, rounds=4, clock=clock, block_seconds=0.2)
    # Two calls each to warm up and to plan, then blocks of two calls: ab ba ab ba.
    assert "".join(clock.calls) == "aabb" + "aabb" + "bbaa" + "aabb" + "bbaa"


def test_a_turn_may_begin_with_a_rest_and_a_call_that_is_not_timed() -> None:
    clock, seen = FakeClock(), {"b": 0}

    def after_a() -> None:  # which is slow after the other's turn
        seen["b"] += 1
        clock.now += 0.3 if clock.calls[-1] == "a" else 0.1
        clock.calls.append("b")

    options = {"rounds": 4, "clock": clock, "block_seconds": 0.2, "settle": 1e-3}
    timings = compare({"a": clock.job("a", 0.1), "b": after_a}, **options)
    assert timings["b"].samples == pytest.approx([0.1] * len(timings["b"].samples))
    assert seen["b"] == 2 + 4 + len(timings["b"].samples)


def test_a_slow_phase_of_the_machine_hits_both() -> None:
    """The machine slows down by 3x from the third round on: the ratio does not move, the spread shows it."""
    clock = FakeClock()
    rounds = {"a": 0, "b": 0}

    def job(name: str, seconds: float):
        def run() -> None:
            rounds[name] += 1
            clock.now += seconds * (3 if rounds[name] > 2 + 2 * 10 else 1)

        return run

    timings = compare({"a": job("a", 0.01), "b": job("b", 0.01)}, rounds=6, clock=clock, block_seconds=0.1)
    assert ratio(timings["a"], timings["b"]).value == pytest.approx(1, rel=0.01)
    assert timings["a"].p90 == pytest.approx(0.03) and timings["a"].p10 == pytest.approx(0.01)


def test_outliers_do_not_move_the_median() -> None:
    clock = FakeClock()
    timings = compare({"a": clock.job("a", *[0.01] * 9, 1.0)}, clock=clock, block_seconds=0.3)
    assert timings["a"].median == pytest.approx(0.01)


def test_short_calls_are_taken_together() -> None:
    clock = FakeClock()
    timings = compare({"a": clock.job("a", 1e-6)}, rounds=2, clock=clock, block_seconds=1e-3)
    assert timings["a"].median == pytest.approx(1e-6) and len(timings["a"].samples) == 2 * 20
    assert len(clock.calls) == pytest.approx(2 + 2 * 20 * 50, rel=0.03)


def test_quantiles_by_hand() -> None:
    timing = Timing(((5.0, 1.0, 3.0), (2.0, 4.0)))
    assert (timing.p10, timing.median, timing.p90) == (1.0, 3.0, 5.0) and timing.quantile(0.4) == 2.0


def test_compare_refuses() -> None:
    with pytest.raises(ValueError, match="received 0 and 5"):
        compare({})
    with pytest.raises(ValueError, match="received 1 and 1"):
        compare({"a": int}, rounds=1)


def test_long_calls_get_fewer_rounds() -> None:
    clock = FakeClock()
    jobs = {"short": clock.job("short", 0.001), "long": clock.job("long", 0.05)}
    timings = compare(jobs, rounds=30, clock=clock, block_seconds=0.02)
    assert [len(block) for block in timings["long"].rounds] == [1] * 12
    assert [len(block) for block in timings["short"].rounds] == [20] * 12
    timings = compare({"a": clock.job("a", 1.0)}, rounds=30, clock=clock, block_seconds=0.02)
    assert len(timings["a"].rounds) == 6


def test_threads_are_restored() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(2):
        assert torch.get_num_threads() == 2
        raise KeyError
    assert torch.get_num_threads() == before


def test_rotation_is_larger_than_the_cache() -> None:
    rotation = Rotation(lambda i: i, nbytes=100, beyond=1000)
    assert len(rotation.items) == 11
    assert sorted(rotation.next() for _ in range(11)) == list(range(11))
    assert rotation.next() == 1
    assert len(Rotation(lambda i: i, nbytes=5000, beyond=1000).items) == 1


# -- machine


def test_machine_describes_itself() -> None:
    description = machine()
    assert json.loads(json.dumps(description)) == description
    assert description["torch"] == torch.__version__ and description["cores"] >= 1 and description["cpu"]
    assert len(description["load_average"]) == 3


def test_caches(tmp_path) -> None:
    for i, (kind, level, size) in enumerate(
        [("Data", 1, "32K"), ("Instruction", 1, "64K"), ("Unified", 3, "16M")]
    ):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, value in (("type", kind), ("level", level), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    assert _caches(tmp_path) == {"L1": 32 << 10, "L3": 16 << 20}
    assert _caches(tmp_path / "absent") == {} and last_level_cache() > 0


def test_measured_limits_are_of_this_world() -> None:
    read = bandwidth(megabytes=64, clock=time.process_time, seconds=0.1)
    peak = peak_flops(size=512, clock=time.process_time, seconds=0.1)
    assert 2e8 < read < 5e12 and 2e8 < peak < 1e14


def test_limits_count_bytes_and_flops() -> None:
    """A clock that says one second per call."""
    ticks = iter(range(10**6))
    assert bandwidth(megabytes=1, clock=lambda: float(next(ticks)), seconds=2) == 1 << 20
    assert peak_flops(size=8, clock=lambda: float(next(ticks)), seconds=2) == 2 * 8**3


def test_bound_by_hand() -> None:
    of = Limits(bytes_per_second=100, flops_per_second=1000)
    assert Bound(200, 500).seconds(of) == 2 and Bound(200, 500).kind(of) == "memory"
    assert Bound(200, 5000).seconds(of) == 5 and Bound(200, 5000).kind(of) == "compute"
    assert Bound(0, 10).kind(of) == "compute"


# -- goals and tables


def row(
    ours: float, peers: dict[str, float], goal: Goal | None = None, group: str | None = None, **labels
) -> Row:
    cell = Cell(labels, int, dict.fromkeys(peers, int), Bound(10), goal, group)
    return Row(
        cell, {name: Timing(((s,), (s,))) for name, s in {"ours": ours, **peers}.items()}, Limits(1000, 1)
    )


def test_goal_over_named_peers() -> None:
    peers = {"torch": 0.04, "onnx": 0.03, "mkl": 0.01}
    assert row(0.02, peers).best() == "mkl" and row(0.02, peers).met is None
    dense = row(0.02, peers, Goal(1.5, over=("torch", "onnx")))
    assert dense.best(("torch", "onnx")) == "onnx" and dense.met is True
    assert row(0.02, peers, Goal(1.51, over=("torch", "onnx"))).met is False
    assert row(0.02, peers, Goal(1)).met is False  # mkl is faster


def test_table_marks_what_is_missed() -> None:
    table = Table("fast enough", {"high": Goal(2.0), "other": Goal(9.0)})
    table.rows = [
        row(0.02, {"torch": 0.04}, Goal(1.5), "high", zeros="90%"),
        row(0.02, {"torch": 0.16}, Goal(9), "high", zeros="95%"),
        row(0.02, {"mkl": 0.04}, zeros="50%"),
    ]
    text = str(table)
    assert table.group_results() == {
        "high": (pytest.approx(4.0), True)
    }  # sqrt(2 x 8); no cell of the other group
    assert table.missed == 1 and text.count("MISSED") == 1
    lines = text.splitlines()
    assert lines[2].split() == [
        "90%",
        "20.000",
        "40.000",
        "10.000",
        "50%",
        "2.00x",
        "[2.00-2.00]",
        "torch",
        ">=",
        "1.5x",
        "met",
    ]
    assert lines[-1] == "geometric mean, high: 4.00x, goal >= 2x met"
    table.group_goals = {"high": Goal(4.5)}
    assert table.missed == 2 and "goal >= 4.5x MISSED" in str(table)


def test_cells_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="needs peers"):
        Cell({}, int, {})
    with pytest.raises(ValueError, match="none of them named 'ours'"):
        Cell({}, int, {"ours": int})
    with pytest.raises(ValueError, match=r"the goal names \['onnx'\], the peers are \['torch'\]"):
        Cell({"zeros": "50%"}, int, {"torch": int}, goal=Goal(1, over=("onnx",)))


# -- scripts


def script(clock: FakeClock, goal: float):
    def cells(quick: bool, count: int):
        for size in (1,) if quick else (1, 2):
            yield Cell(
                {"size": size, "threads": count},
                clock.job("ours", 0.01),
                {"torch": clock.job("torch", 0.02)},
                Bound(1e6),
                Goal(goal),
            )

    return cells


@pytest.fixture
def known_limits(monkeypatch):
    monkeypatch.setattr("zoo.shared.bench.runner.limits", lambda *_, **__: Limits(1e9, 1e9))


def test_script_that_meets_its_goals(tmp_path, capsys, known_limits) -> None:
    clock, file = FakeClock(), tmp_path / "out.json"
    assert main("twice as fast", script(clock, 1.9), argv=["--json", str(file)], clock=clock) == 0
    output = capsys.readouterr()
    assert "2.00x" in output.out and "MISSED" not in output.out and "size 2" in output.err
    record = json.loads(file.read_text())
    assert record["subject"] == "twice as fast" and record["missed"] == 0 and len(record["rows"]) == 2
    first = record["rows"][0]
    assert first["labels"] == {"size": 1, "threads": 1} and first["goal"]["met"] is True
    assert first["seconds"]["ours"]["median"] == pytest.approx(0.01)
    assert first["bound"]["share"] == pytest.approx(0.1) and first["bound"]["kind"] == "memory"
    assert record["machine"]["torch"] == torch.__version__


def test_script_that_misses_exits_with_one(capsys, known_limits) -> None:
    clock = FakeClock()
    assert main("thrice as fast", script(clock, 3), argv=["--quick", "--threads", "2"], clock=clock) == 1
    output = capsys.readouterr()
    assert output.out.count("MISSED") == 1 and "1 goal(s) missed" in output.err and "threads 2" in output.err
    assert main("mean", script(clock, 1), group_goals={"none": Goal(5)}, argv=["--quick"], clock=clock) == 0


def test_script_goes_on_where_it_stopped(tmp_path, capsys, known_limits) -> None:
    clock, file = FakeClock(), str(tmp_path / "out.json")
    argv = ["--json", file, "--resume"]
    assert main("in slices", script(clock, 1.9), argv=[*argv, "--only", "size 2"], clock=clock) == 0
    once = len(clock.calls)
    assert main("in slices", script(clock, 1.9), argv=argv, clock=clock) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["labels"]["size"] for row in rows] == [2, 1]
    assert len(clock.calls) == 2 * once and capsys.readouterr().out.count("2.00x [") == 1 + 2
    with pytest.raises(SystemExit):
        main("in slices", script(clock, 1.9), argv=["--resume"], clock=clock)
    assert "--resume needs the --json FILE" in capsys.readouterr().err


def test_time_limit_leaves_cells_unbuilt(tmp_path, capsys, known_limits) -> None:
    def cells(quick: bool, count: int):
        for size in (1, 2):
            yield Later({"size": size}, lambda: pytest.fail("built"))

    file = str(tmp_path / "out.json")
    ticks = iter(range(0, 10**9, 100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.shared.bench.runner.time.perf_counter", lambda: float(next(ticks)))
        assert main("later", cells, argv=["--seconds", "50", "--json", file]) == 1
    assert json.loads((tmp_path / "out.json").read_text())["left"] == 2
    assert "2 cells left for --resume" in capsys.readouterr().out


def test_goal_beyond_the_bound_is_marked_and_not_missed() -> None:
    table = Table("bound", {}, [row(0.02, {"torch": 0.03}, Goal(4))])  # the bound is 0.01 s: 3x at most
    assert table.missed == 0 and ">= 4x bounded: the bound allows 3.00x" in str(table)
    assert table.heading == "Bound: 1.50x, 0 of 1 goals met", "a bound excuses a goal, and does not meet it"
    again = Table("bound", {}, table.records)
    assert str(again) == str(table) and again.records == table.records


def test_a_heading_says_what_came_of_it() -> None:
    two = [row(0.02, {"torch": 0.03}, Goal(1.2)), row(0.02, {"torch": 0.05}, None)]
    assert Table("a against b", {}, two).heading == "A against b: 1.50 to 2.50x, 1 of 1 goals met"
    assert Table("a", {}, two[1:]).heading == "A: 2.50x" and Table("none", {}).heading == "None"


@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_threads_flag_is_checked(value, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main("claim", script(FakeClock(), 1), argv=["--threads", value])
    assert stop.value.code == 2 and "is not a positive number" in capsys.readouterr().err


def test_a_real_run(capsys) -> None:
    """Half the rows take less time than all of them, on any machine and under any load."""
    full, half = torch.randn(1024, 1024), torch.randn(128, 1024)
    x = torch.randn(1024, 64)

    def cells(quick: bool, count: int):
        yield Cell(
            {"rows": 128},
            lambda: half @ x,
            {"1024 rows": lambda: full @ x},
            Bound(half.numel() * 4),
            Goal(1.5),
        )

    assert main("fewer rows take less time", cells, argv=["--quick"]) == 0
    assert "GB/s" in capsys.readouterr().out


def test_results_as_markdown(tmp_path, capsys, known_limits) -> None:
    clock, file = FakeClock(), tmp_path / "out.json"
    goals = {"all": Goal(9)}
    assert main("twice as fast", script(clock, 3), group_goals=goals, argv=["--json", str(file)], clock=clock)
    capsys.readouterr()
    report.main([str(file)])
    text = capsys.readouterr().out
    assert "## Twice as fast: 2.00x, 0 of 2 goals met" in text and f"report {file}`" in text
    assert "1.0 GB/s and 1 GFLOP/s" in text
    assert "| 1 | 1 | 10.000 | torch | 20.000 | 2.00x | 1.000 | 10% | >= 3x MISSED |" in text
