"""Verification: the figures on a card measured again from the weights file, the tasks and the dense twin.

Values of further seeds cannot be measured from a bundle, which holds one model: they are compared with what
is committed, or (`seeds`) their models are made again by the bundle's recipe. A check says which it did.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from zoo.bundles.card import Card, share_dropped
from zoo.bundles.catalog import Bundle, base_of, twin_of
from zoo.bundles.public import public_base_of
from zoo.bundles.store import PART_MASK, info, load_bundle, stored_state
from zoo.errors import ConfigError, DataError, HubError, UnknownNameError
from zoo.harness.checks import ROUNDING, Check, Verification, close, exact
from zoo.harness.records import Record
from zoo.harness.runner import count_parameters, evaluate
from zoo.harness.seed_checks import evidence_checks, remade_checks, seed_checks
from zoo.harness.subjects import Models, find_bundles
from zoo.harness.tasks import Progress, get_task
from zoo.report import numbers
from zoo.shared.errors import PatternError, SparseError
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.masks.patterns import NM, parse_pattern
from zoo.shared.store.formats import save_packed
from zoo.shared.store.io import sha256_file
from zoo.studies.tables import Table

REPOSITORY = Path(__file__).parents[2]
_OUTCOMES = {True: "ok", False: "failed", None: "not checked"}
# What says that something is not on this machine, rather than that a figure is wrong.
_MISSING = (DataError, HubError, UnknownNameError, ConfigError)


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
    models: Models, *, tolerance: float = 1e-4, seeds: bool = False, progress: Progress | None = None
) -> list[Verification]:
    """Measure the figures on the cards of `models` again, without any cache.

    Measured are the hash and the size of the weights file and of its base; parameters, kept counts, patterns
    and sparsity from the masks in the file; FLOPs as the task counts them; bytes from packing the loaded
    model anew; the value and the standard error of each metric, the value of the stored model's seed, and the
    value of the dense twin. Compared are mean and spread with the values per seed, the twin's values per seed
    with its card, and the values of other seeds with the committed evidence. What is not at hand (data, a
    twin, the evidence of several seeds) could not be checked.

    Args:
        models: names, globs or folders; of a nested model each level is verified.
        tolerance: relative difference that is allowed for measured quality. Counts, bytes and hashes must be
            exact.
        seeds: train the model of every seed again by its recipe and measure it. Finished trainings are kept
            in the cache under the digest of the code that made them.
        progress: called after each model.
    """
    found = [
        level
        for bundle in find_bundles(models)
        for level in (bundle, *map(bundle.at_level, range(1, 1 + len(bundle.card.levels))))
    ]
    verifications = []
    for index, bundle in enumerate(found):
        if progress:
            progress(index, len(found), bundle.label)
        verifications.append(verify_bundle(bundle, tolerance=tolerance, seeds=seeds))
    if progress:
        progress(len(found), len(found), "done")
    return verifications


def verify_bundle(bundle: Bundle, *, tolerance: float = 1e-4, seeds: bool = False) -> Verification:
    """Verify one bundle. A model that cannot be loaded is a failed check, not an error."""
    card = bundle.card
    sha = sha256_file(bundle.weights) if bundle.weights.exists() else "missing"
    checks = [exact("sha256", card.weights.sha256, sha)]
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
        checks += seed_checks(card, subject.twin.card if subject.twin is not None else None, tolerance)
        stated = list(evidence_checks(bundle, tolerance))
        if seeds:
            again = _section("seeds, made again", partial(remade_checks, bundle, tolerance))
            checks += again
            if all(check.ok is not None for check in again):  # measured now, whatever vouches for them
                stated = [check for check in stated if check.ok is not None]
        checks += stated
    return Verification(bundle.reference, checks)


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
        check = exact(figure, on_card, measured)
        return replace(check, ok=None, note="the dense twin is not at hand") if subject.lacks_twin else check

    yield beside("parameters, dense", cost.parameters.dense, dense_parameters)
    yield exact("parameters, kept", cost.parameters.kept, own.sparse + coded)
    yield beside("bytes, dense", cost.bytes.dense, dense_bytes)
    yield exact("bytes, packed", cost.bytes.sparse, packed)
    yield exact("bytes on disk", cost.bytes.on_disk, subject.bundle.weights.stat().st_size)
    if cost.flops is None:
        return
    task = get_task(subject.card.metrics[0].task)
    flops = task.flops(model)
    if flops is None:
        yield Check("FLOPs", cost.flops.sparse, "", None, "the task counts no operations")
        return
    of_twin = task.flops(twin) if twin is not None else None
    yield beside("FLOPs, dense", cost.flops.dense, max(flops.dense, of_twin.dense if of_twin else 0))
    yield exact("FLOPs, sparse", cost.flops.sparse, flops.sparse)


def _base(bundle: Bundle) -> Iterator[Check]:
    """The file on which the weights stand, if they do."""
    base, stated = base_of(bundle), bundle.card.base
    if base is not None and stated is not None:
        yield exact(f"sha256 of the base {stated.reference}", stated.sha256, sha256_file(base.weights))
        yield exact("bytes on disk, of the base", stated.bytes, base.weights.stat().st_size)
    public = public_base_of(bundle)
    if public is not None:
        public.check()
        found = sum((public.folder / name).stat().st_size for name in public.stated.files)
        yield exact(f"bytes of {public.stated.reference}", public.stated.bytes, found)


def _pack(model: nn.Module) -> Any:
    """What packing the model takes, by packing it into a file that is thrown away."""
    masks = masks_of(model) or MaskSet({})
    with tempfile.TemporaryDirectory() as folder:
        return save_packed(Path(folder) / "again.safetensors", stored_state(model), masks, info(model).extras)


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
        yield exact(f"{name}, kept", f"{part.kept} of {part.total}", f"{found[0]} of {found[1]}")
        yield close(f"{name}, sparsity", part.sparsity, share_dropped(*found), ROUNDING)
    yield close("sparsity, overall", card.sparsity.overall, share_dropped(kept, total), ROUNDING)
    lost = masks.lost_zeros(model)
    yield Check("zeros where masks drop", "all", "all" if not lost else f"not in {', '.join(lost)}", not lost)


def _pattern(name: str, stated: str, masks: MaskSet) -> Check:
    """A pattern on the card against that of the masks, which were checked when they were read. A part without
    masks of parameters (edges, channels, groups of a coded weight) keeps or drops things one by one: it may
    state what they are, never how many of how many stay."""
    if name == "weights":
        found = "+".join(sorted({str(mask.pattern) for mask in masks.values()}))
        return exact(f"{name}, pattern", stated, found)
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
        yield close(label, metric.value, measured.value, tolerance)
        if measured.stderr is not None:
            yield close(f"{label}, stderr", metric.stderr, measured.stderr, tolerance)
        seed = card.seed
        yield _seed(f"{label}, seed {seed}", metric.per_seed.get(seed), measured.value, tolerance)
        if metric.dense is not None and subject.twin is not None:
            dense, seed = others[metric.task].metrics[metric.metric], subject.twin.card.seed
            yield close(f"{label}, dense twin", metric.dense.value, dense.value, tolerance)
            stated = metric.dense.per_seed.get(seed)
            yield _seed(f"{label}, dense twin, seed {seed}", stated, dense.value, tolerance)


def _seed(figure: str, stated: float | None, measured: float, tolerance: float) -> Check:
    """The value per seed of the stored model, whose seed must be among them."""
    if stated is None:
        return Check(figure, "none", measured, False, "the values per seed lack that of the stored model")
    return close(figure, stated, measured, tolerance)


def _measure(model: nn.Module, tasks: list[str]) -> dict[str, Record]:
    return {record.task: record for record in evaluate(model, tasks, use_cache=False)}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return numbers.value(value)
    if isinstance(value, int):
        return f"{value:,}"
    return str(value) if len(str(value)) <= 24 or " " in str(value) else f"{str(value)[:12]}..."
