"""Verification: the figures on a card measured again from the weights file, the tasks and the dense twin.

Values of further seeds cannot be measured from a bundle, which holds one model: they are compared with what
is committed. A check says which of the two it did.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from zoo.bundles.card import Card, mean_and_spread, share_dropped
from zoo.bundles.catalog import Bundle, base_of
from zoo.bundles.store import PART_MASK, info, load_bundle
from zoo.errors import ConfigError, DataError, HubError, UnknownNameError
from zoo.harness.records import Record
from zoo.harness.runner import count_parameters, evaluate
from zoo.harness.subjects import Models, find_bundles, twin_of
from zoo.harness.tasks import Progress, get_task
from zoo.report import numbers
from zoo.shared.errors import PatternError, SparseError
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.masks.patterns import NM, parse_pattern
from zoo.shared.store.formats import save_packed
from zoo.shared.store.io import read_json, sha256_file
from zoo.studies.tables import Table

REPOSITORY = Path(__file__).parents[2]
_OUTCOMES = {True: "ok", False: "failed", None: "not checked"}
# Means and spreads on a card follow from its own values per seed up to rounding in the last digits.
ROUNDING = 1e-6
# What says that something is not on this machine, rather than that a figure is wrong.
_MISSING = (DataError, HubError, UnknownNameError, ConfigError)


@dataclass(frozen=True)
class Check:
    """One figure of a card.

    Attributes:
        figure: what it is.
        on_card: what the card says.
        measured: what it was checked against.
        ok: whether they agree; None where it could not be checked.
        note: why not, or by what.
        how: measured again, or compared with another statement (the card's own values, a committed file, the
            twin's card).
    """

    figure: str
    on_card: Any
    measured: Any
    ok: bool | None
    note: str = ""
    how: Literal["measured", "compared"] = "measured"


@dataclass(frozen=True)
class Verification:
    """All checks of one card."""

    model: str
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether every figure was checked and came back."""
        return all(check.ok is True for check in self.checks)

    @property
    def failed(self) -> list[Check]:
        """The figures that did not come back."""
        return [check for check in self.checks if check.ok is False]

    @property
    def unknown(self) -> list[Check]:
        """The figures that could not be checked."""
        return [check for check in self.checks if check.ok is None]


@dataclass(frozen=True)
class _Subject:
    """What is verified: a bundle, its model, its dense twin if it has one and that is at hand."""

    bundle: Bundle
    model: nn.Module
    twin: Bundle | None
    twin_model: nn.Module | None

    @property
    def card(self) -> Card:
        return self.bundle.card

    @property
    def lacks_twin(self) -> bool:
        return self.card.dense_twin is not None and self.twin is None


def verify(
    models: Models, *, tolerance: float = 1e-4, progress: Progress | None = None
) -> list[Verification]:
    """Measure the figures on the cards of `models` again, without any cache.

    Measured are the hash and the size of the weights file and of its base; parameters, kept counts, patterns
    and sparsity from the masks in the file; FLOPs as the task counts them; bytes from packing the loaded
    model anew; the value and the standard error of each metric, the value of the stored model's seed, and the
    value of the dense twin. Compared are mean and spread with the values per seed, the twin's values per seed
    with its card, and the values of other seeds with the committed evidence. What is not at hand (data, a
    twin, the evidence of several seeds) could not be checked.

    Args:
        models: names, globs or folders.
        tolerance: relative difference that is allowed for measured quality. Counts, bytes and hashes must be
            exact.
        progress: called after each model.
    """
    found = find_bundles(models)
    verifications = []
    for index, bundle in enumerate(found):
        if progress:
            progress(index, len(found), bundle.card.name)
        verifications.append(verify_bundle(bundle, tolerance=tolerance))
    if progress:
        progress(len(found), len(found), "done")
    return verifications


def verify_bundle(bundle: Bundle, *, tolerance: float = 1e-4) -> Verification:
    """Verify one bundle. A model that cannot be loaded is a failed check, not an error."""
    card = bundle.card
    sha = sha256_file(bundle.weights) if bundle.weights.exists() else "missing"
    checks = [_exact("sha256", card.weights.sha256, sha)]
    found: list[_Subject] = []

    def load() -> Iterator[Check]:
        twin, note = None, ""
        try:
            twin = twin_of(bundle) if card.dense_twin else None
        except UnknownNameError as error:
            note = str(error)
        model = load_bundle(bundle)
        found.append(_Subject(bundle, model, twin, load_bundle(twin) if twin is not None else None))
        if note:
            yield Check("dense twin", card.dense_twin, "not at hand", None, note)

    checks += _section("everything else", load)
    for subject in found:
        checks += _section("base", partial(_base, bundle))
        checks += _section("cost", partial(_cost, subject))
        checks += _section("sparsity", partial(_sparsity, card, subject.model))
        checks += _section("quality", partial(_quality, subject, tolerance))
        checks += _seeds(subject, tolerance)
        checks += _evidence(card, tolerance)
    return Verification(card.reference, checks)


def _section(name: str, checks: Callable[[], Iterable[Check]]) -> list[Check]:
    """The checks; where they break off, one more that says why: failed, or that something is missing."""
    done: list[Check] = []
    try:
        for check in checks():
            done.append(check)  # noqa: PERF402 - those before an error count
    except _MISSING as error:
        done.append(Check(name, "", "", None, str(error)))
    except SparseError as error:
        done.append(Check(name, "", "", False, str(error)))
    return done


def verification_table(verification: Verification, *, failed_only: bool = False) -> Table:
    """The checks as a table: figure, on the card, found, outcome, and how that was reached."""
    rows = [
        [
            check.figure,
            _shown(check.on_card),
            _shown(check.measured),
            _OUTCOMES[check.ok],
            check.how if check.ok is not None else "",
            check.note,
        ]
        for check in verification.checks
        if not failed_only or check.ok is not True
    ]
    columns = ["figure", "on the card", "found", "", "how", "note"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table(verification.model, columns, rows)


def _cost(subject: _Subject) -> Iterator[Check]:
    """Parameters, FLOPs and bytes. A network that was cut states the dense figures of its twin, which are
    larger."""
    cost, model, twin = subject.card.cost, subject.model, subject.twin_model
    own, report = count_parameters(model), _pack(model)
    # Layers that keep weights as codes, in buffers, count them like the parameters that they stand for.
    coded = sum(getattr(module, "coded_weights", 0) for module in model.modules())
    dense_parameters, dense_bytes = own.dense, report.dense_bytes
    if twin is not None:
        dense_parameters = max(dense_parameters, count_parameters(twin).dense)
        dense_bytes = max(dense_bytes, _pack(twin).dense_bytes)
    packed = sum(entry.bytes for entry in (*report.tensors.values(), *report.extras.values()))

    def beside(figure: str, on_card: int, measured: int) -> Check:
        """A dense figure, which may be the twin's."""
        check = _exact(figure, on_card, measured)
        return replace(check, ok=None, note="the dense twin is not at hand") if subject.lacks_twin else check

    yield beside("parameters, dense", cost.parameters.dense, dense_parameters)
    yield _exact("parameters, kept", cost.parameters.kept, own.sparse + coded)
    yield beside("bytes, dense", cost.bytes.dense, dense_bytes)
    yield _exact("bytes, packed", cost.bytes.sparse, packed)
    yield _exact("bytes on disk", cost.bytes.on_disk, subject.bundle.weights.stat().st_size)
    task = get_task(subject.card.metrics[0].task)
    flops = task.flops(model)
    if flops is None:
        yield Check("FLOPs", cost.flops.sparse, "", None, "the task counts no operations")
        return
    of_twin = task.flops(twin) if twin is not None else None
    yield beside("FLOPs, dense", cost.flops.dense, max(flops.dense, of_twin.dense if of_twin else 0))
    yield _exact("FLOPs, sparse", cost.flops.sparse, flops.sparse)


def _base(bundle: Bundle) -> Iterator[Check]:
    """The file on which the weights stand, if they do."""
    base, stated = base_of(bundle), bundle.card.base
    if base is not None and stated is not None:
        yield _exact(f"sha256 of the base {stated.reference}", stated.sha256, sha256_file(base.weights))
        yield _exact("bytes on disk, of the base", stated.bytes, base.weights.stat().st_size)


def _pack(model: nn.Module) -> Any:
    """What packing the model takes, by packing it into a file that is thrown away."""
    masks = masks_of(model) or MaskSet({})
    with tempfile.TemporaryDirectory() as folder:
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        return save_packed(Path(folder) / "again.safetensors", state, masks, info(model).extras)


def _sparsity(card: Card, model: nn.Module) -> Iterator[Check]:
    masks, extras = masks_of(model) or MaskSet({}), info(model).extras
    kept = total = 0
    for name, part in card.sparsity.parts.items():
        if name == "weights":
            found = (sum(mask.kept for mask in masks.values()), sum(mask.numel for mask in masks.values()))
        elif (keep := extras.get(f"{name}{PART_MASK}")) is not None:
            found = (int(keep.sum()), keep.numel())
        else:
            yield Check(
                f"{name}, kept", part.kept, "", False, f"the weights file holds no mask {name}{PART_MASK!r}"
            )
            continue
        kept, total = kept + found[0], total + found[1]
        yield _pattern(name, part.pattern, masks)
        yield _exact(f"{name}, kept", f"{part.kept} of {part.total}", f"{found[0]} of {found[1]}")
        yield _close(f"{name}, sparsity", part.sparsity, share_dropped(*found), ROUNDING)
    yield _close("sparsity, overall", card.sparsity.overall, share_dropped(kept, total), ROUNDING)
    lost = masks.zeros_intact(model)
    yield Check("zeros where masks drop", "all", "all" if not lost else f"not in {', '.join(lost)}", not lost)


def _pattern(name: str, stated: str, masks: MaskSet) -> Check:
    """A pattern on the card against that of the masks, which were checked when they were read. A part without
    masks of parameters (edges, channels, groups of a coded weight) keeps or drops things one by one: it may
    state what they are, never how many of how many stay."""
    if name == "weights":
        found = "+".join(sorted({str(mask.pattern) for mask in masks.values()}))
        return _exact(f"{name}, pattern", stated, found)
    try:
        ok = stated in ("channel", "rows") or not isinstance(parse_pattern(stated), NM)
    except PatternError:
        ok = False
    return Check(f"{name}, pattern", stated, stated if ok else "unstructured", ok)


def _quality(subject: _Subject, tolerance: float) -> Iterator[Check]:
    """Evaluate the model and its twin on each task of the card."""
    card = subject.card
    names = list(dict.fromkeys(metric.task for metric in card.metrics))
    own = _measure(subject.model, names)
    others = _measure(subject.twin_model, names) if subject.twin_model is not None else {}
    for metric in card.metrics:
        label = f"{metric.task}: {metric.metric}"
        measured = own[metric.task].metrics.get(metric.metric)
        if measured is None:
            yield Check(label, metric.value, "", False, "the task gives no such metric")
            continue
        yield _close(label, metric.value, measured.value, tolerance)
        if measured.stderr is not None:
            yield _close(f"{label}, stderr", metric.stderr, measured.stderr, tolerance)
        seed = card.method.seed
        yield _seed(f"{label}, seed {seed}", metric.per_seed.get(seed), measured.value, tolerance)
        if metric.dense is not None and subject.twin is not None:
            dense, seed = others[metric.task].metrics[metric.metric], subject.twin.card.method.seed
            yield _close(f"{label}, dense twin", metric.dense.value, dense.value, tolerance)
            stated = metric.dense.per_seed.get(seed)
            yield _seed(f"{label}, dense twin, seed {seed}", stated, dense.value, tolerance)


def _seed(figure: str, stated: float | None, measured: float, tolerance: float) -> Check:
    """The value per seed of the stored model, whose seed must be among them."""
    if stated is None:
        return Check(figure, "none", measured, False, "the values per seed lack that of the stored model")
    return _close(figure, stated, measured, tolerance)


def _measure(model: nn.Module, tasks: list[str]) -> dict[str, Record]:
    return {record.task: record for record in evaluate(model, tasks, use_cache=False)}


def _seeds(subject: _Subject, tolerance: float) -> Iterator[Check]:
    """Means and spreads against the values per seed, and the twin's values against its own card."""
    for metric in subject.card.metrics:
        label = f"{metric.task}: {metric.metric}"
        for name, figure in (("", metric), (", dense twin", metric.dense)):
            if figure is None or len(figure.per_seed) == 1:
                continue
            mean, spread = mean_and_spread(figure.per_seed)
            yield _stated(f"{label}{name}, mean of {len(figure.per_seed)} seeds", figure.mean, mean)
            yield _stated(f"{label}{name}, spread", figure.spread or 0.0, spread or 0.0)
        if metric.dense is not None and subject.twin is not None:
            known = next(
                (m for m in subject.twin.card.metrics if (m.task, m.metric) == (metric.task, metric.metric)),
                None,
            )
            if known is not None:
                name = f"{label} per seed, card of {subject.twin.card.name}"
                yield _same(name, metric.dense.per_seed, known.per_seed, tolerance, "by the twin's card")


def _evidence(card: Card, tolerance: float) -> Iterator[Check]:
    """The values per seed against the committed results; see `zoo.harness.evidence`."""
    several = [metric for metric in card.metrics if len(metric.per_seed) > 1]
    stored, why = _recorded(card)
    if stored is None:
        for metric in several:
            seeds = [seed for seed in metric.per_seed if seed != card.method.seed]
            label = f"{metric.task}: {metric.metric}, seeds {', '.join(map(str, seeds))}"
            yield Check(label, _listed({seed: metric.per_seed[seed] for seed in seeds}), "", None, why)
        return
    for metric in card.metrics:
        figures: list[tuple[str, Any]] = [(card.name, metric)]
        if metric.dense is not None:
            figures.append((metric.dense.name.partition("@")[0], metric.dense))
        for name, figure in figures:
            values = stored.get(name, {}).get(metric.task, {}).get(metric.metric, {})
            label = f"{metric.task}: {metric.metric} per seed, evidence of {name}"
            known = {int(seed): value for seed, value in values.items()}
            yield _same(label, figure.per_seed, known, tolerance, f"by {card.evidence}")


def _recorded(card: Card) -> tuple[dict[str, Any] | None, str]:
    """The values per seed in the file that the card names, or None and why there are none."""
    if card.evidence is None:
        return None, "the card names no evidence, and the bundle holds the model of one seed"
    path = REPOSITORY / card.evidence
    if not path.is_file():
        return None, f"{card.evidence} is not at hand: only a source checkout has the committed results"
    recorded = read_json(path)
    if not isinstance(recorded, dict) or "per_seed" not in recorded:
        return None, f"{card.evidence} has no values under 'per_seed'"
    return recorded["per_seed"], ""


def _same(
    figure: str, stated: Mapping[int, float], known: Mapping[int, float], tolerance: float, note: str
) -> Check:
    """Values per seed against another statement of them."""
    same = set(stated) == set(known) and all(
        math.isclose(value, known[seed], rel_tol=tolerance, abs_tol=1e-12) for seed, value in stated.items()
    )
    return Check(figure, _listed(stated), _listed(known), same, note, "compared")


def _stated(figure: str, on_card: float, computed: float) -> Check:
    """A figure that follows from others on the card."""
    check = _close(figure, on_card, computed, ROUNDING)
    return replace(check, note="by the card's values per seed", how="compared")


def _exact(figure: str, on_card: Any, measured: Any) -> Check:
    return Check(figure, on_card, measured, on_card == measured)


def _close(figure: str, on_card: float, measured: float, tolerance: float) -> Check:
    return Check(figure, on_card, measured, math.isclose(on_card, measured, rel_tol=tolerance, abs_tol=1e-9))


def _listed(values: Any) -> str:
    return ", ".join(f"{seed}: {value:.6g}" for seed, value in values.items()) or "none"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return numbers.value(value)
    if isinstance(value, int):
        return f"{value:,}"
    return str(value) if len(str(value)) <= 24 or " " in str(value) else f"{str(value)[:12]}..."
