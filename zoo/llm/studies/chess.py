"""`zoo reproduce chess`: CHESS beside CATS, TEAL and the per-token oracle, and what decoding gains."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.llm.data import corpus
from zoo.llm.data.tokenization import token_stream, tokenizer_of
from zoo.llm.gate_statistics import GateStatistics, channel_spread, gate_statistics
from zoo.llm.methods.cats import cats_thresholds
from zoo.llm.methods.chess import chess_thresholds
from zoo.llm.methods.teal import greedy_thresholds, input_histograms, uniform_thresholds
from zoo.llm.models.blocks import find_blocks
from zoo.llm.models.thresholds import attach, detach, held_out_shares, skipped_share
from zoo.llm.oracle import attach_oracle, detach_oracle
from zoo.llm.studies import common
from zoo.shared.measure.activations import Tap, calibrate, check_share
from zoo.shared.store.io import read_json
from zoo.studies.study import BAR, Arm, Claim, Study, grid, shown
from zoo.studies.tables import Outcome, Plot, Series, Table, Verdict
from zoo.studies.view import Row, Rows, Value, View

GATES = ("CATS", "CHESS")  # thresholds on gates only; their errors are compared block by block
WITH_ATTENTION = ("CHESS + q, o at half", "CHESS + q, o")
ALL_INPUTS = ("TEAL, uniform", "TEAL")
THRESHOLDS = (*GATES, *WITH_ATTENTION, *ALL_INPUTS)
ORACLE, BELOW, LEAST = "per-token oracle", "CHESS below CATS, %", "least saving of CHESS over CATS"
_HELD_OUT = 8  # windows of held-out text for errors and shares


@dataclass(frozen=True)
class ChessOptions(common.Protocol):
    """Options.

    Args:
        sparsities: shares of the gates (TEAL: of the weights) to skip.
        step: of TEAL's greedy search.
        speed: folder with the results of `benchmarks/llm_decode.py` (llm_decode-*.json).
    """

    sparsities: tuple[float, ...] = (0.3, 0.5, 0.7, 0.8, 0.9)
    step: float = 0.1
    speed: Path = Path("benchmarks/results")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sparsities:
            raise ConfigError("give at least one sparsity")
        for share in self.sparsities:
            check_share(share)

    @property
    def shares(self) -> tuple[float, ...]:
        """Those at which statistics are taken: the sparsities, and their halves for the attention."""
        return tuple(dict.fromkeys(share for s in self.sparsities for share in (s, s / 2)))


class _Calibrations:
    """What a seed measures on a subject, once for all sparsities."""

    def __init__(self, config: ChessOptions) -> None:
        self.config = config
        self.statistics = functools.lru_cache(2)(self._statistics)
        self.histograms = functools.lru_cache(2)(self._histograms)
        self.greedy = functools.lru_cache(2)(self._greedy)

    def windows(self, subject: str, seed: int) -> list[Tensor]:
        """Twice as many windows as the protocol says: half for each of CHESS's sweeps."""
        return common.windows(subject, 2 * self.config.windows, self.config.length, seed, batch=1)

    def _statistics(self, subject: str, seed: int) -> list[GateStatistics]:
        found = self.windows(subject, seed)
        half = self.config.windows
        return gate_statistics(common.dense_model(subject), found[:half], found[half:], self.config.shares)

    def _histograms(self, subject: str, seed: int) -> Any:
        return input_histograms(
            common.dense_model(subject), self.windows(subject, seed)[: self.config.windows]
        )

    def _greedy(self, subject: str, seed: int) -> dict[float, dict[str, Tensor]]:
        search = torch.cat(self.windows(subject, seed)[:4])
        return greedy_thresholds(
            common.dense_model(subject),
            [search],
            self.histograms(subject, seed),
            self.config.sparsities,
            self.config.step,
        )

    def thresholds(self, subject: str, arm: str, share: float, seed: int) -> dict[str, Tensor]:
        """The thresholds of an arm."""
        if arm == "CATS":
            return cats_thresholds(self.statistics(subject, seed), share)
        if arm == "CHESS":
            return chess_thresholds(self.statistics(subject, seed), share, "none")
        if arm in WITH_ATTENTION:
            own = share / 2 if arm.endswith("half") else share
            return chess_thresholds(self.statistics(subject, seed), share, "selective", own)
        if arm == "TEAL":
            return self.greedy(subject, seed)[share]
        return uniform_thresholds(self.histograms(subject, seed), share)

    def held_out(self, subject: str) -> Tensor:
        """Windows of test text, one after the other."""
        tokens = token_stream(corpus(common.text_of(subject)).test, tokenizer_of(common.dense_model(subject)))
        length = self.config.length
        return tokens[: _HELD_OUT * length].view(_HELD_OUT, length)


def ffn_errors(
    model: nn.Module, ids: Tensor, change: Callable[[], object], undo: Callable[[], object]
) -> list[float]:
    """||y_s - y||^2 / ||y||^2 of each FFN on the dense model's own inputs, y_s after `change`."""
    inputs: dict[str, list[Tensor]] = {block.mlp_name: [] for block in find_blocks(model)}

    class Keep:
        def __init__(self, held: list[Tensor]) -> None:
            self.held = held

        def update(self, rows: Tensor) -> None:
            self.held.append(rows.clone())

    taps = [Tap(name, [Keep(held)]) for name, held in inputs.items()]
    calibrate(model, [ids], taps, lambda m, batch: m(input_ids=batch, use_cache=False))

    def outputs() -> list[Tensor]:
        with torch.no_grad():
            return [model.get_submodule(name)(torch.cat(held)) for name, held in inputs.items()]

    dense = outputs()
    change()
    sparse = outputs()
    undo()
    return [float((s - d).square().sum() / d.square().sum()) for s, d in zip(sparse, dense, strict=True)]


@functools.lru_cache(1)
def _calibrations(options: ChessOptions) -> _Calibrations:
    return _Calibrations(options)


def sparsify(arm: str, model: nn.Module, batches: list[Tensor], case: Row, options: ChessOptions) -> Row:
    """Change a model to an arm at a sparsity; tells what that spares and how far the FFNs are off."""
    calibrations, subject, share, seed = _calibrations(options), case["subject"], case["level"], case["seed"]
    held = calibrations.held_out(subject)
    facts: Row = {}
    if arm == ORACLE:
        errors = ffn_errors(model, held, lambda: attach_oracle(model, share), lambda: detach_oracle(model))
        attach_oracle(model, share)
        return {"errors": errors}
    found = calibrations.thresholds(subject, arm, share, seed)
    if arm in GATES:
        facts["errors"] = ffn_errors(model, held, lambda: attach(model, found), lambda: detach(model))
    if arm == "CHESS":
        spread = [channel_spread(one.mean_square) for one in calibrations.statistics(subject, seed)]
        facts["channel_spread"] = spread
    attach(model, found)
    report = held_out_shares(model, [held])
    return {**facts, "report": report, "skipped": skipped_share(report)}


def cases(options: ChessOptions) -> Iterator[Row]:
    """The dense model and the oracle once, then every arm of a seed, so that its statistics are taken "
    "once."""
    for subject in options.subjects:
        yield {"subject": subject, "arm": common.DENSE, "level": 0.0, "seed": 0}
        yield from grid(ARMS, options.sparsities, 1, [ORACLE], subject=subject)
        for seed in range(options.seeds):
            for arm in THRESHOLDS:
                for share in options.sparsities:
                    yield {"subject": subject, "arm": arm, "level": share, "seed": seed}


def with_savings(rows: Rows, options: ChessOptions) -> Rows:
    """The rows, with how much smaller the FFN error of CHESS is than that of CATS, and the least over
    levels."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        if row["arm"] in GATES:
            place = (row["subject"], row["seed"], row["level"])
            found.setdefault(place, {})[row["arm"]] = statistics.fmean(row["errors"])
    saved = {place: 1 - own["CHESS"] / own["CATS"] for place, own in found.items() if len(own) == 2}
    more = [
        {"subject": subject, "arm": BELOW, "level": level, "seed": seed, "saved": value}
        for (subject, seed, level), value in saved.items()
    ]
    for subject, seed in dict.fromkeys(place[:2] for place in saved):
        least = min(value for place, value in saved.items() if place[:2] == (subject, seed))
        more.append({"subject": subject, "arm": LEAST, "level": "all", "seed": seed, "saved": least})
    return [*rows, *more]


def errors(view: View) -> Table:
    """Error of the FFN by arm and sparsity."""
    levels = view.options.sparsities
    body = [[arm, *(view.cell(arm, level, ERROR) for level in levels)] for arm in (*GATES, ORACLE)]
    body.append([BELOW, *(view.cell(BELOW, level, SAVED) for level in levels)])
    spreads = [value for row in view.rows for value in row.get("channel_spread", [])]
    note = (
        "Squared error of the FFN's output over its square, %, mean over blocks, on held-out text. The 90/10 "
        f"percentile ratio of sqrt(E[u^2]) over channels is {min(spreads):.2f} to {max(spreads):.2f}."
    )
    return Table(f"{view.title}: error of the FFN", ["arm", *map(shown, levels)], body, note)


def realised(view: View) -> Table:
    """What was asked for and what held-out text shows, layer by layer for CHESS."""
    body: list[list[Any]] = []
    for arm in view.arms(THRESHOLDS):
        cells = []
        for share in view.options.sparsities:
            own = view.chosen(arm, share)
            gates = [float(block["ffn"]) for r in own for block in r["report"] if "ffn" in block]
            text = f"{100 * min(gates):.1f}-{100 * max(gates):.1f}; " if gates else ""
            cells.append(f"{text}{100 * statistics.fmean(r['skipped'] for r in own):.1f}")
        body.append([arm, *cells])
    note = "In %: closed gates, lowest to highest over blocks and seeds; the blocks' weights not read."
    columns = ["arm", *map(shown, view.options.sparsities)]
    return Table(f"{view.title}: realised on held-out text", columns, body, note)


def weights_plot(view: View) -> Plot:
    """Perplexity against what is not read: the only axis on which all arms are alike."""
    dense, series = view.values(common.DENSE)[0], []
    for arm in view.arms(THRESHOLDS):
        levels = sorted(view.levels(arm))
        x = [100 * statistics.fmean(r["skipped"] for r in view.chosen(arm, level)) for level in levels]
        y = [statistics.fmean(view.values(arm, level)) for level in levels]
        kept = [(a, b / dense) for a, b in zip(x, y, strict=True) if b < 2 * dense]
        if kept:
            series.append(Series(arm, [a for a, _ in kept], [b for _, b in kept]))
    return Plot(
        f"weights-{view.where['subject'].rpartition('/')[2]}",
        f"{view.title}: perplexity against weights not read",
        "weights of the blocks not read, %",
        "word perplexity over dense",
        series,
        f"Word perplexity of each arm on {view.title} over the dense one, against the weights it spares.",
    )


def facts(view: View) -> list[Verdict]:
    """Whether closed gates are as many as asked for; after the last subject, what decoding gains."""
    own = [row for row in view.rows if row["arm"] == "CHESS"]
    off = max(abs(float(block["ffn"]) - row["level"]) for row in own for block in row["report"])
    claim = f"{view.title}: closed gates on held-out text are within 2 points of the target in every block"
    held: Outcome = "holds" if off <= 0.02 else "does not hold"
    found = [Verdict(claim, BAR, f"at most {100 * off:.1f} points off", held, paper=(15,))]
    if view.where["subject"] == view.options.subjects[-1]:
        found += _speed_verdicts(view)
    return found


def _speed(view: View) -> list[dict[str, Any]]:
    """The rows of the decoding benchmark, if its results are there."""
    files = sorted(view.options.speed.glob("llm_decode-*.json"))
    return [row for file in files for row in read_json(file)["rows"]]


def speed_table(view: View) -> Table | None:
    """Decoding, end to end."""
    body = []
    for row in _speed(view):
        labels, seconds = row["labels"], row["seconds"]
        ours, dense = seconds["ours"]["median"], seconds["dense"]["median"]
        body.append(
            [
                *(labels[name] for name in ("shape", "weights", "batch", "ours", "skips")),
                f"{1 / dense:.2f}",
                f"{1 / ours:.2f}",
                f"{dense / ours:.2f}x",
                f"{1e3 * ours:.0f}",
                f"{1e3 * row['bound']['seconds']:.0f}" if "bound" in row else "",
                f">= {row['goal']['ratio']:g}x" if "goal" in row else "",
            ]
        )
    columns = ["shape", "weights", "batch", "model", "weights skipped", "dense calls/s", "calls/s", "ratio"]
    columns += ["ms", "bytes bound ms", "goal"]
    note = "A call is one token (or one prompt)."
    return Table("Decoding, end to end, two threads", columns, body, note) if body else None


def speed_plot(view: View) -> Plot | None:
    """Tokens per second against gates closed, batch 1."""
    series, rows = [], [row for row in _speed(view) if row["labels"]["batch"] == 1]
    for key in dict.fromkeys((row["labels"]["shape"], row["labels"]["weights"]) for row in rows):
        own = [row for row in rows if (row["labels"]["shape"], row["labels"]["weights"]) == key]
        chess = [row for row in own if row["labels"]["ours"].startswith("CHESS")]
        if chess:
            dense = statistics.fmean(row["seconds"]["dense"]["median"] for row in chess)
            x = [0, *(int(row["labels"]["ours"].split()[1].rstrip("%")) for row in chess)]
            y = [1 / dense, *(1 / row["seconds"]["ours"]["median"] for row in chess)]
            series.append(Series(f"{key[0]}, {key[1]}", x, y))
    plot = Plot(
        "speed",
        "Tokens per second against sparsity, batch 1, two threads",
        "gates closed, % (0: dense)",
        "tokens/s",
        series,
        "Tokens per second rise with the share of closed gates for every shape.",
    )
    return plot if series else None


def _speed_verdicts(view: View) -> list[Verdict]:
    published = "up to 1.27x end to end on a CPU"
    rows = [row for row in _speed(view) if "goal" in row]
    if not rows:
        note = "run benchmarks/llm_decode.py --threads 2 --json"
        claim = "decoding with CHESS is faster than dense"
        return [Verdict(claim, published, "", "not measured", note=note, paper=(15,))]
    found = []
    for row in rows:
        labels, goal = row["labels"], row["goal"]
        claim = (
            f"{labels['shape']} {labels['weights']}, batch {labels['batch']}: {labels['ours']} runs at "
            f"{goal['ratio']:g} times {goal['over']} or more"
        )
        source = published if labels["ours"].startswith("CHESS") and labels["batch"] == 1 else BAR
        paper = (22,) if labels["ours"].startswith("GQSA") else (15,)
        held: Outcome = "holds" if goal["met"] else "does not hold"
        found.append(Verdict(claim, source, f"{goal['reached']:.2f}x", held, paper=paper))
    return found


ERROR = Value("errors", 100.0, 3, lower=True)
SAVED = Value("saved", 100.0, 1, "% of the error", 1)
ARMS = {
    common.DENSE: Arm(once=True, flat=True),
    **{arm: Arm(functools.partial(sparsify, arm)) for arm in THRESHOLDS},
    ORACLE: Arm(functools.partial(sparsify, ORACLE), once=True),
}
STUDY = Study(
    "chess",
    "CHESS: thresholds per channel, beside CATS, TEAL and the oracle",
    "Junhui He, Shangyu Wu, Weidong Wen, Chun Jason Xue, Qingan Li: CHESS: Optimizing LLM Inference via "
    "Channel-Wise Thresholding and Selective Sparsification, EMNLP 2024",
    ChessOptions,
    ARMS,
    cases,
    common.measure,
    papers=(15,),
    claims=lambda options: [
        Claim(
            "{where}: the FFN error of CHESS is about 10 % below that of CATS at every sparsity (at the "
            "sparsity where it gains least: 8 % or more)",
            BAR,
            LEAST,
            bar=8.0,
            value=SAVED,
        ),
        *(
            Claim(
                "{where}, {level}: " + text,
                published,
                *pair,
                at=tuple(filter((0.5).__le__, options.sparsities)),
            )
            for pair, text, published in (
                (("CHESS", "CATS"), "perplexity of CHESS is below that of CATS", "CHESS degrades less"),
                ((ORACLE, "CHESS"), "the oracle is below CHESS", BAR),
                (WITH_ATTENTION, "attention thresholds at half the share cost this small model less", BAR),
            )
        ),
    ],
    value=common.PERPLEXITY,
    varies=(*common.VARIES, "speed"),
    data=common.data,
    by=("subject",),
    prepare=with_savings,
    facts=facts,
    tables=[
        common.table(
            "word perplexity by sparsity",
            "Shares of gates; TEAL: of all weights in the blocks.",
            lambda view: view.options.sparsities,
        ),
        errors,
        realised,
    ],
    plots=[common.plot("sparsity, %", lambda view: view.options.sparsities), weights_plot],
    overall=[speed_table, speed_plot],
    notes=lambda options: [
        "Thresholds come from training text, perplexity from test documents. The oracle keeps each token's "
        "largest |g u| and needs no calibration.",
        "The published tables of accuracy could not be had; the paper's end-to-end figure is up to 1.27x.",
        "Speed is that of random weights of the real shapes; it is re-measured by benchmarks/llm_decode.py.",
    ],
)
