"""`zoo make`: bundles from their recipe rows, every seed trained, measured beside the dense twin.

A maker is a function of a row, a seed, the model to start from and where to work; it returns the model of
that seed as a `Sparsified` (for a dense one with no masks). `sparsify` here is the usual one: the row's
method with its options. A domain registers its own in `zoo.registry.MAKERS`. Each seed is kept in the cache
as it finishes, so that an interrupted run goes on.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.bundles.building import fill_model
from zoo.bundles.catalog import CACHE_REMEDY, Bundle, cache_folder, find, open_bundle
from zoo.bundles.publish import About, Evidence, Figure, Trained, figures_of, publish
from zoo.bundles.recipes import Row, find_row
from zoo.bundles.sources import with_digest
from zoo.bundles.store import load_bundle
from zoo.errors import ConfigError, UnknownNameError
from zoo.methods.contract import Sparsified, default_recipe, needs_job
from zoo.registry import ARCHITECTURES, JOBS, MAKERS, METHODS
from zoo.shared.masks import set_masks
from zoo.shared.store.formats import load_packed, save_packed
from zoo.shared.store.identity import code_digest, data_digest
from zoo.shared.store.io import require_writable
from zoo.shared.store.kept import going_on_from, keep_in_mind
from zoo.shared.train import Recipe

Note = Callable[[str], None]


@dataclass(frozen=True)
class Work:
    """Where a maker works.

    Attributes:
        folder: of its own, for checkpoints; it is there again after an interruption.
        device: where to train.
    """

    folder: Path
    device: str = "cpu"


@dataclass(frozen=True)
class Target:
    """Where bundles go.

    Attributes:
        folder: of the bundles.
        repository: of the source checkout whose evidence is to be updated; None records none.
        overwrite: whether a bundle that is there is made again.
        device: where to train.
    """

    folder: Path
    repository: Path | None = None
    overwrite: bool = False
    device: str = "cpu"


def make(row: Row, target: Target, note: Note | None = None) -> Path:
    """Make one bundle.

    Args:
        row: see `zoo.bundles.recipes`.
        target: where it goes; sources and twins that lie there are used rather than those found by name.
        note: told what is being done.

    Returns:
        The bundle's folder.

    Raises:
        UnknownNameError: the source or the twin is not on this machine.
        SparseError: whatever the maker, the tasks or saving refuse.
    """
    kept = train_seeds(row, target, note)
    made, seconds = {seed: one.made for seed, one in kept.items()}, sum(one.seconds for one in kept.values())
    if note:
        note(f"{row.name}: measuring")
    twin = _twin(row, target)
    trained = Trained.by_method(made, row.method, _architecture(row, target), seconds)
    trained = dataclasses.replace(
        trained, hyperparameters={**row.options, **row.recipe, **trained.hyperparameters}
    )
    figures = [_figure(one) for one in row.figures] or (figures_of(twin.card) if twin is not None else [])
    if not figures:
        raise ConfigError(f"the recipe of {row.name} names no figures, and it has no twin that has some")
    data = row.data or (twin.card.data.model_dump() if twin is not None else {})
    data = with_digest(row.name.partition("/")[0], row.dataset, data)
    command = f"zoo make {row.name}"
    about = About(
        row.name,
        row.summary,
        command,
        row.citation,
        data,
        row.license,
        imported=row.imported,
        formerly=row.formerly,
    )
    evidence = None
    if target.repository is not None and row.evidence is not None:
        evidence = Evidence(target.repository, row.evidence)
    return publish(
        trained,
        about,
        figures,
        target.folder / row.slug,
        twin=twin,
        base=_at_hand(row.source, target) if row.share and row.source is not None else None,
        evidence=evidence,
        overwrite=target.overwrite,
    )


@dataclass(frozen=True)
class Kept:
    """A finished training of one seed."""

    made: Sparsified
    seconds: float


def train_seeds(row: Row, target: Target, note: Note | None = None) -> dict[int, Kept]:
    """What a row makes with each of its seeds, in the precision that its bundle stores."""
    kept = {}
    for seed in range(row.seeds):
        if note:
            note(f"{row.name}: seed {seed}")
        kept[seed] = train(row, seed, target)
        if row.dtype is not None:
            round_to(kept[seed].made.model, getattr(torch, row.dtype))
    return kept


def round_to(model: nn.Module, dtype: torch.dtype) -> None:
    """Round a model's weights in place to what a bundle stores.

    One of full precision goes on computing in float32, and what is not stored, such as constants in
    buffers, stays as it is: loading makes it anew.
    """
    if not getattr(model, "full_precision", False):
        model.to(dtype)
        return
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype))


def train(row: Row, seed: int, target: Target) -> Kept:
    """What a row's maker makes with a seed, from the cache if it is there."""
    maker: Callable[[Row, int, nn.Module | None, Work], Sparsified] = MAKERS.get(row.maker)
    digest = data_digest(json.dumps(_identity(row, target), sort_keys=True))
    file = cache_folder() / "cells" / "make" / f"{row.slug}-{seed}-{digest[:16]}.safetensors"
    if not file.exists():
        require_writable(file.parent, CACHE_REMEDY)
        start = _start(row, seed, target)
        clock = time.process_time()
        work = Work(file.with_suffix(".state"), target.device)
        with going_on_from(work.folder):
            made = maker(row, seed, start, work)
        _keep(file, made, time.process_time() - clock)
    keep_in_mind()
    return _kept(file, row, target)


def sparsify(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """Maker: the row's method with its options, applied to the source; with a job of the row's recipe and
    seed if it takes one."""
    if start is None:
        raise ConfigError(f"the recipe of {row.name} needs a model to start from: give it `from`")
    method: Any = METHODS.get(row.method)
    known = {one.name for one in dataclasses.fields(method)}
    given = {"seed": seed, "dataset": row.dataset, "device": work.device}
    own = {key: value for key, value in {**given, **row.recipe}.items() if key in known}
    made = method(**own, **row.method_options())
    result: Sparsified
    if needs_job(method) or default_recipe(method):
        rest = {key: value for key, value in row.recipe.items() if key not in known}
        recipe = Recipe(**{**default_recipe(method), **rest})
        job = JOBS.get(row.name.partition("/")[0])
        result = made.sparsify(
            start, job(row.dataset, recipe=recipe, seed=seed, device=str(work.device), model=start)
        )
    else:
        result = made.sparsify(start)
    return result


def _identity(row: Row, target: Target) -> dict[str, Any]:
    """What decides the weights of a seed: the row, the code of its maker and method, and what it starts
    from."""
    own = [MAKERS.get(row.maker), *([METHODS.get(row.method)] if row.method in METHODS else [])]
    found: dict[str, Any] = {**row.identity(), "code": code_digest(*own), "from": None}
    if row.source is not None and row.start == "stored":
        found["from"] = _at_hand(row.source, target).card.weights.sha256
    elif row.source is not None:
        found["from"] = _identity(find_row(row.source), target)
    return found


def _start(row: Row, seed: int, target: Target) -> nn.Module | None:
    if row.source is None:
        return None
    if row.start == "stored":
        return load_bundle(_at_hand(row.source, target))
    return train(find_row(row.source), seed, target).made.model


def _at_hand(name: str, target: Target) -> Bundle:
    """A bundle in the target's folder, or by its name."""
    beside = target.folder / name.partition("/")[2]
    if beside.is_dir():
        return open_bundle(beside)
    try:
        return find(name)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error} Make it first: zoo make {name}") from error


def _twin(row: Row, target: Target) -> Bundle | None:
    if row.method == "dense" or (row.imported is not None and row.twin is None):
        return None
    if row.twin is not None:
        return _at_hand(row.twin, target)
    if row.source is None:
        raise ConfigError(f"the recipe of {row.name} names neither `from` nor `twin`")
    source = _at_hand(row.source, target)
    return source if source.card.dense_twin is None else _at_hand(source.card.dense_twin, target)


def _architecture(row: Row, target: Target) -> dict[str, Any]:
    """Name and arguments of what is built."""
    if row.architecture is not None:
        return {"name": row.architecture, "args": dict(row.arguments)}
    if row.source is None:
        raise ConfigError(f"the recipe of {row.name} names neither `from` nor `architecture`")
    if row.start == "stored":
        return _at_hand(row.source, target).card.architecture.model_dump()
    return _architecture(find_row(row.source), target)


def _figure(fields: Any) -> Figure:
    return Figure(**{**fields, "metrics": tuple(fields.get("metrics", ()))})


def _keep(file: Path, made: Sparsified, seconds: float) -> None:
    """Write a training's result; what is not a tensor goes into the file's metadata."""
    facts = {
        "hyperparameters": made.hyperparameters,
        "parts": made.parts,
        "arguments": made.arguments,
        "seconds": seconds,
    }
    state = {name: value.detach().cpu() for name, value in made.model.state_dict().items()}
    # Plain values only: what a tuple was comes back as a list, as on a card.
    save_packed(file, state, made.masks, made.extras, {"made": json.loads(json.dumps(facts))})


def _kept(file: Path, row: Row, target: Target) -> Kept:
    """Read what `_keep` wrote."""
    contents = load_packed(file)
    facts = contents.metadata["made"]
    architecture = _architecture(row, target)
    arguments = architecture["args"] if facts["arguments"] is None else facts["arguments"]
    with torch.random.fork_rng(devices=[]):
        model = ARCHITECTURES.get(architecture["name"])(**arguments)
    fill_model(model, contents.tensors)
    set_masks(model, contents.masks)
    if callable(take := getattr(model, "load_extras", None)):
        take(contents.extras)
    made = Sparsified(
        model.eval(),
        contents.masks,
        contents.extras,
        facts["hyperparameters"],
        facts["parts"],
        facts["arguments"],
    )
    return Kept(made, facts["seconds"])
