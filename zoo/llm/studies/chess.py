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
from zoo.studies.figures import Curves, Grid
from zoo.studies.study import BAR, Arm, Claim, Study, grid
from zoo.studies.tables import Table, Verdict
from zoo.studies.view import Row, Rows, Value, View

GATES = ("CATS", "CHESS")  # thresholds on gates only; their errors are compared block by block
WITH_ATTENTION = ("CHESS + q, o at half", "CHESS + q, o")
ALL_INPUTS = ("TEAL, uniform", "TEAL")
THRESHOLDS = (*GATES, *WITH_ATTENTION, *ALL_INPUTS)
ORACLE, LEAST = "per-token oracle", "least saving of CHESS over CATS"
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
        for share in self.sparsities:
            check_share(share)

    @property
    def shares(self) -> tuple[float, ...]:
        """Those at which statistics are taken: the sparsities, and their halves for the attention."""
        return tuple(dict.fromkeys(share for s in self.sparsities for share in (s, s / 2)))


def _windows(options: ChessOptions, subject: str, seed: int) -> list[Tensor]:
    """Twice as many windows as the protocol says: half for each of CHESS's sweeps."""
    return common.windows(subject, 2 * options.windows, options.length, seed, batch=1)


@functools.lru_cache(2)
def _statistics(options: ChessOptions, subject: str, seed: int) -> list[GateStatistics]:
    found, half = _windows(options, subject, seed), options.windows
    return gate_statistics(common.dense_model(subject), found[:half], found[half:], options.shares)


@functools.lru_cache(2)
def _histograms(options: ChessOptions, subject: str, seed: int) -> Any:
    found = _windows(options, subject, seed)[: options.windows]
    return input_histograms(common.dense_model(subject), found)


@functools.lru_cache(2)
def _greedy(options: ChessOptions, subject: str, seed: int) -> dict[float, dict[str, Tensor]]:
    model, search = common.dense_model(subject), torch.cat(_windows(options, subject, seed)[:4])
    histograms = _histograms(options, subject, seed)
    return greedy_thresholds(model, [search], histograms, options.sparsities, options.step)


def thresholds(options: ChessOptions, subject: str, arm: str, share: float, seed: int) -> dict[str, Tensor]:
    """The thresholds of an arm; what a seed measures on a subject is measured once for all sparsities."""
    if arm in ALL_INPUTS:
        if arm == "TEAL":
            return _greedy(options, subject, seed)[share]
        return uniform_thresholds(_histograms(options, subject, seed), share)
    found = _statistics(options, subject, seed)
    if arm == "CATS":
        return cats_thresholds(found, share)
    if arm == "CHESS":
        return chess_thresholds(found, share, "none")
    return chess_thresholds(found, share, "selective", share / 2 if arm.endswith("half") else share)


def held_out(options: ChessOptions, subject: str) -> Tensor:
    """Windows of test text, one after the other."""
    tokens = token_stream(corpus(common.text_of(subject)).test, tokenizer_of(common.dense_model(subject)))
    return tokens[: _HELD_OUT * options.length].view(_HELD_OUT, options.length)


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


def sparsify(arm: str, model: nn.Module, batches: list[Tensor], case: Row, options: ChessOptions) -> Row:
    """Change a model to an arm at a sparsity; tells what that spares and how far the FFNs are off."""
    subject, share, seed = case["subject"], case["level"], case["seed"]
    held, facts = held_out(options, subject), Row()
    if arm == ORACLE:
        errors = ffn_errors(model, held, lambda: attach_oracle(model, share), lambda: detach_oracle(model))
        attach_oracle(model, share)
        return {"errors": errors}
    found = thresholds(options, subject, arm, share, seed)
    if arm in GATES:
        facts["errors"] = ffn_errors(model, held, lambda: attach(model, found), lambda: detach(model))
    if arm == "CHESS":
        statistics = _statistics(options, subject, seed)
        facts["channel_spread"] = [channel_spread(one.mean_square) for one in statistics]
    attach(model, found)
    report = held_out_shares(model, [held])
    return {**facts, "report": report, "skipped": skipped_share(report)}


def cases(options: ChessOptions) -> Iterator[Row]:
    """The dense model and the oracle once, then every arm of a seed, whose statistics are taken once."""
    for subject in options.subjects:
        yield {"subject": subject, "arm": common.DENSE, "level": 0.0, "seed": 0}
        yield from grid(ARMS, options.sparsities, 1, [ORACLE], subject=subject)
        for seed in range(options.seeds):
            for arm in THRESHOLDS:
                for share in options.sparsities:
                    yield {"subject": subject, "arm": arm, "level": share, "seed": seed}


def with_savings(rows: Rows, options: ChessOptions) -> Rows:
    """The rows, with how much smaller the FFN error of CHESS is than that of CATS where it gains least."""
    found: dict[tuple[str, int], list[float]] = {}
    means = {
        tuple(row[k] for k in ("subject", "seed", "level", "arm")): statistics.fmean(row["errors"])
        for row in rows
        if row["arm"] in GATES
    }
    for (subject, seed, level, arm), error in means.items():
        if arm == "CHESS" and (subject, seed, level, "CATS") in means:
            saved = 1 - error / means[subject, seed, level, "CATS"]
            found.setdefault((subject, seed), []).append(saved)
    least = {"arm": LEAST, "level": "all"}
    return [*rows, *({**least, "subject": s, "seed": k, "saved": min(v)} for (s, k), v in found.items())]


def _spread(view: View) -> str:
    spreads = [value for row in view.rows for value in row.get("channel_spread", [])]
    text = "Squared error of the FFN's output over its square, %, mean over blocks, on held-out text."
    if not spreads:
        return text
    over = f"is {min(spreads):.2f} to {max(spreads):.2f}"
    return f"{text} The 90/10 percentile ratio of sqrt(E[u^2]) over channels {over}."


def _realised(view: View, arm: str, share: float) -> str:
    """Closed gates, lowest to highest, and the weights that are not read, in percent."""
    own = view.chosen(arm, share)
    gates = [float(block["ffn"]) for row in own for block in row["report"] if "ffn" in block]
    text = f"{100 * min(gates):.1f}-{100 * max(gates):.1f}; " if gates else ""
    return f"{text}{100 * statistics.fmean(row['skipped'] for row in own):.1f}"


def facts(view: View) -> list[Verdict]:
    """Whether closed gates are as many as asked for; after the last subject, what decoding gains."""
    own = view.required("CHESS")
    off = max(abs(float(block["ffn"]) - row["level"]) for row in own for block in row["report"])
    claim = "{where}: closed gates on held-out text are within 2 points of the target in every block"
    found = [view.fact(claim, BAR, f"at most {100 * off:.1f} points off", off <= 0.02)]
    last = view.where["subject"] == view.options.subjects[-1]
    return found + (_speed_verdicts(view) if last else [])


def _speed(view: View) -> list[dict[str, Any]]:
    """The rows of the decoding benchmark against dense models, if its results are there."""
    files = sorted(view.options.speed.glob("llm_decode-*.json"))
    return [row for file in files for row in read_json(file)["rows"] if "dense" in row["seconds"]]


def speed_table(view: View) -> Table | None:
    """Decoding, end to end."""
    body = []
    for row in _speed(view):
        ours, dense = (row["seconds"][name]["median"] for name in ("ours", "dense"))
        labels = (row["labels"][name] for name in ("shape", "weights", "batch", "ours", "skips"))
        speeds = (f"{1 / dense:.2f}", f"{1 / ours:.2f}", f"{dense / ours:.2f}x", f"{1e3 * ours:.0f}")
        bound = f"{1e3 * row['bound']['seconds']:.0f}" if "bound" in row else ""
        goal = f">= {row['goal']['ratio']:g}x" if "goal" in row else ""
        body.append([*labels, *speeds, bound, goal])
    columns = ["shape", "weights", "batch", "model", "weights skipped", "dense calls/s", "calls/s", "ratio"]
    columns += ["ms", "bytes bound ms", "goal"]
    note = "A call is one token (or one prompt)."
    return Table("Decoding, end to end, two threads", columns, body, note) if body else None


def _speed_verdicts(view: View) -> list[Verdict]:
    published, found = "up to 1.27x end to end on a CPU", []
    for row in _speed(view):
        if "goal" in row:
            labels, goal = row["labels"], row["goal"]
            claim = (
                f"{labels['shape']} {labels['weights']}, batch {labels['batch']}: {labels['ours']} runs at "
                f"{goal['ratio']:g} times {goal['over']} or more"
            )
            source = published if labels["ours"].startswith("CHESS") and labels["batch"] == 1 else BAR
            paper = (22,) if labels["ours"].startswith("GQSA") else (15,)
            found.append(view.fact(claim, source, f"{goal['reached']:.2f}x", goal["met"], paper=paper))
    note = "run benchmarks/llm_decode.py --threads 2 --json"
    return found or [view.fact("decoding with CHESS is faster than dense", published, "", None, note=note)]


def _levels(view: View) -> tuple[float, ...]:
    return view.options.sparsities


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
            "word perplexity by sparsity", "Shares of gates; TEAL: of all weights in the blocks.", _levels
        ),
        Grid("{where}: error of the FFN", _spread, ERROR, (*GATES, ORACLE), _levels),
        Grid(
            "{where}: realised on held-out text",
            "In %: closed gates, lowest to highest over blocks and seeds; the blocks' weights not read.",
            _realised,
            THRESHOLDS,
            _levels,
        ),
    ],
    plots=[
        common.plot("sparsity, %", _levels),
        Curves(
            "weights-{slug}",
            "{where}: perplexity against weights not read, the only axis on which all arms are alike",
            "weights of the blocks not read, %",
            "log10 of word perplexity",
            THRESHOLDS,
            Value("skipped"),
            _levels,
            (common.DENSE,),
            log10=True,
        ),
    ],
    overall=[speed_table],
    notes=lambda options: [
        "Thresholds come from training text, perplexity from test documents. The oracle keeps each token's "
        "largest |g u| and needs no calibration.",
        "The published tables of accuracy could not be had; the paper's end-to-end figure is up to 1.27x.",
        "Speed is that of random weights of the real shapes; it is re-measured by benchmarks/llm_decode.py.",
    ],
)
