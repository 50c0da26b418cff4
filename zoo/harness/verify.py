"""Verification: every figure on a card is measured again from the weights file, the tasks and the dense
twin."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from zoo.bundles.card import Card, Metric, mean_and_spread, share_dropped
from zoo.bundles.catalog import Bundle, base_of
from zoo.bundles.store import PART_MASK, info, load_bundle
from zoo.harness.records import Record
from zoo.harness.runner import count_parameters, evaluate
from zoo.harness.subjects import Models, find_bundles, twin_of
from zoo.harness.tables import Table
from zoo.harness.tasks import Progress, get_task
from zoo.report import numbers
from zoo.shared.errors import SparseError
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.store.formats import save_packed
from zoo.shared.store.io import read_json, sha256_file

REPOSITORY = Path(__file__).parents[2]
_OUTCOMES = {True: "ok", False: "failed", None: "not checked"}
# Means and spreads on a card follow from its own values per seed up to rounding in the last digits.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Check:
    """One figure: what the card says, what was measured, whether they agree (None: could not be checked)."""

    figure: str
    on_card: Any
    measured: Any
    ok: bool | None
    note: str = ""


@dataclass(frozen=True)
class Verification:
    """All checks of one card."""

    model: str
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether every figure that could be checked came back."""
        return all(check.ok is not False for check in self.checks)


def verify(
    models: Models, *, tolerance: float = 1e-4, progress: Progress | None = None
) -> list[Verification]:
    """Measure every figure on the cards of `models` again, without any cache.

    Checked are the hash and the size of the weights file and of its base; parameters, kept counts and
    sparsity from the masks in the file; FLOPs as the task counts them; bytes from packing the loaded model
    anew; the value and the standard error of each metric, and those of the dense twin by evaluating the twin;
    mean and spread from the values per seed; and these against the committed evidence, if the card names it
    and it is at hand.

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
    """Verify one bundle. What cannot even be loaded or measured is a failed check, not an error."""
    card = bundle.card
    checks = [
        _exact(
            "sha256",
            card.weights.sha256,
            sha256_file(bundle.weights) if bundle.weights.exists() else "missing",
        )
    ]
    try:
        model = load_bundle(bundle)
        twin = load_bundle(twin_of(bundle)) if card.dense_twin else None
        checks += _base(bundle)
        checks += [*_cost(bundle, model, twin), *_sparsity(card, model)]
        checks += _quality(bundle, model, twin, tolerance)
    except SparseError as error:
        checks.append(Check("everything else", "", "", False, str(error)))
        return Verification(card.reference, checks)
    for metric in card.metrics:
        checks += _seeds(metric)
    checks += _evidence(card, tolerance)
    return Verification(card.reference, checks)


def verification_table(verification: Verification, *, failed_only: bool = False) -> Table:
    """The checks as a table: figure, on the card, measured, outcome."""
    rows = [
        [
            check.figure,
            _shown(check.on_card),
            _shown(check.measured),
            _OUTCOMES[check.ok],
            check.note,
        ]
        for check in verification.checks
        if not failed_only or check.ok is False
    ]
    columns = ["figure", "on the card", "measured", "", "note"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table(verification.model, columns, rows)


def _cost(bundle: Bundle, model: nn.Module, twin: nn.Module | None) -> Iterator[Check]:
    """Parameters, FLOPs and bytes. A network that was cut states the dense figures of its twin, which are
    larger."""
    cost = bundle.card.cost
    own, report = count_parameters(model), _pack(model)
    # Layers that keep weights as codes, in buffers, count them like the parameters that they stand for.
    coded = sum(getattr(module, "coded_weights", 0) for module in model.modules())
    dense_parameters, dense_bytes = own.dense, report.dense_bytes
    if twin is not None:
        dense_parameters = max(dense_parameters, count_parameters(twin).dense)
        dense_bytes = max(dense_bytes, _pack(twin).dense_bytes)
    packed = sum(entry.bytes for entry in (*report.tensors.values(), *report.extras.values()))
    yield _exact("parameters, dense", cost.parameters.dense, dense_parameters)
    yield _exact("parameters, kept", cost.parameters.kept, own.sparse + coded)
    yield _exact("bytes, dense", cost.bytes.dense, dense_bytes)
    yield _exact("bytes, packed", cost.bytes.sparse, packed)
    yield _exact("bytes on disk", cost.bytes.on_disk, bundle.weights.stat().st_size)
    task = get_task(bundle.card.metrics[0].task)
    flops = task.flops(model)
    if flops is None:
        yield Check("FLOPs", cost.flops.sparse, "", None, "the task counts no operations")
        return
    of_twin = task.flops(twin) if twin is not None else None
    yield _exact("FLOPs, dense", cost.flops.dense, max(flops.dense, of_twin.dense if of_twin else 0))
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
        yield _exact(f"{name}, kept", f"{part.kept} of {part.total}", f"{found[0]} of {found[1]}")
        yield _close(f"{name}, sparsity", part.sparsity, share_dropped(*found), ROUNDING)
    yield _close("sparsity, overall", card.sparsity.overall, share_dropped(kept, total), ROUNDING)
    lost = masks.zeros_intact(model)
    yield Check("zeros where masks drop", "all", "all" if not lost else f"not in {', '.join(lost)}", not lost)


def _quality(bundle: Bundle, model: nn.Module, twin: nn.Module | None, tolerance: float) -> Iterator[Check]:
    """Evaluate the model and its twin on each task of the card."""
    names = list(dict.fromkeys(metric.task for metric in bundle.card.metrics))
    own = _measure(model, names)
    others = _measure(twin, names) if twin is not None else {}
    for metric in bundle.card.metrics:
        label = f"{metric.task}: {metric.metric}"
        measured = own[metric.task].metrics.get(metric.metric)
        if measured is None:
            yield Check(label, metric.value, "", False, "the task gives no such metric")
            continue
        yield _close(label, metric.value, measured.value, tolerance)
        if measured.stderr is not None:
            yield _close(f"{label}, stderr", metric.stderr, measured.stderr, tolerance)
        if metric.dense is not None:
            dense = others[metric.task].metrics[metric.metric]
            yield _close(f"{label}, dense twin", metric.dense.value, dense.value, tolerance)


def _measure(model: nn.Module, tasks: list[str]) -> dict[str, Record]:
    return {record.task: record for record in evaluate(model, tasks, use_cache=False)}


def _seeds(metric: Metric) -> Iterator[Check]:
    label = f"{metric.task}: {metric.metric}"
    for name, figure in (("", metric), (", dense twin", metric.dense)):
        if figure is not None:
            mean, spread = mean_and_spread(figure.per_seed)
            yield _close(f"{label}{name}, mean of {len(figure.per_seed)} seeds", figure.mean, mean, ROUNDING)
            yield _close(f"{label}{name}, spread", figure.spread, spread, ROUNDING)


def _evidence(card: Card, tolerance: float) -> Iterator[Check]:
    """The values per seed against the committed results; see `zoo.harness.evidence`."""
    if card.evidence is None:
        yield Check("values per seed", "", "", None, "the card names no evidence")
        return
    path = REPOSITORY / card.evidence
    if not path.is_file():
        yield Check(
            "evidence", card.evidence, "not at hand", None, "only a source checkout has the committed results"
        )
        return
    recorded = read_json(path)
    if not isinstance(recorded, dict) or "per_seed" not in recorded:
        yield Check("values per seed", card.evidence, "", None, "the evidence has none under 'per_seed'")
        return
    stored = recorded["per_seed"]
    for metric in card.metrics:
        figures: list[tuple[str, Any]] = [(card.name, metric)]
        if metric.dense is not None:
            figures.append((metric.dense.name.partition("@")[0], metric.dense))
        for name, figure in figures:
            values = stored.get(name, {}).get(metric.task, {}).get(metric.metric, {})
            same = {str(seed) for seed in figure.per_seed} == set(values) and all(
                math.isclose(value, values[str(seed)], rel_tol=tolerance, abs_tol=1e-12)
                for seed, value in figure.per_seed.items()
            )
            label = f"{metric.task}: {metric.metric} per seed, evidence of {name}"
            yield Check(label, _listed(figure.per_seed), _listed(values), same)


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
