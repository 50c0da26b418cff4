"""From a model in the zoo and a method to a new bundle, measured beside its dense twin."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from zoo.bundles.catalog import Bundle, base_of, twin_of
from zoo.bundles.public import public_base_of
from zoo.bundles.publish import About, Figure, Trained, figures_of, publish, require_data
from zoo.bundles.sources import with_digest
from zoo.bundles.store import load_bundle
from zoo.errors import ConfigError
from zoo.harness.tasks import Progress
from zoo.methods.contract import Method
from zoo.registry import MEASURED
from zoo.shared.train import Job


@dataclasses.dataclass(frozen=True)
class Origin:
    """What the new card says of where the model comes from."""

    name: str
    method: str
    command: str


def make_bundle(
    source: Bundle,
    method: Method,
    origin: Origin,
    folder: str | Path,
    *,
    job: Callable[[nn.Module], Job] | None = None,
    dataset: str | None = None,
    share: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Sparsify the model of `source`, measure it beside the dense twin, and save it.

    In several processes all take part in the work, and the first one saves. The twin's figures are those on
    its card.

    Args:
        source: the bundle to start from; if it is sparse itself, its own dense twin stays the twin.
        method: see `zoo.methods.contract`.
        origin: name, method's name and command for the card.
        folder: where to write.
        job: what the method trains or measures on, made for the model that it is given.
        dataset: name or file of the data that the method was given; what is measured on it goes on the card.
            None measures the source's tasks.
        share: whether to store only what differs from the source, or from the base that it has itself.
        overwrite: whether a bundle that is there may be replaced.
        progress: called as the steps finish.

    Raises:
        ConfigError: a name of another domain than the source's.
        SparseError: whatever the method, the tasks or saving refuse.
    """
    domain = source.card.domain
    if origin.name.partition("/")[0] != domain:
        raise ConfigError(f"the name {origin.name!r} must begin with {domain + '/'!r}, the source's domain")
    twin = source if source.card.dense_twin is None else twin_of(source)
    figures: Sequence[Figure] = figures_of(source.card)
    data = None
    if dataset is not None and domain in MEASURED:
        figures, data = figures_on(domain, dataset, figures)
    require_data(figures)
    steps = _Steps(progress, 2)
    steps.next(f"sparsifying {source.card.name}")
    start = time.perf_counter()
    model = load_bundle(source)
    made = method.sparsify(model, job(model)) if job is not None else method.sparsify(model)
    seconds = time.perf_counter() - start
    steps.next("measuring it")
    seed = int(made.hyperparameters.get("seed", source.card.seed))
    architecture = source.card.architecture.model_dump()
    about = About.like(
        source.card, origin.name, f"{source.card.name} sparsified by {origin.method}.", origin.command
    )
    if data is not None:
        about = dataclasses.replace(about, data=with_digest(domain, dataset, data))
    path = publish(
        Trained.by_method({seed: made}, origin.method, architecture, seconds),
        about,
        figures,
        folder,
        twin=twin,
        base=(base_of(source) or public_base_of(source) or source) if share else None,
        overwrite=overwrite,
    )
    steps.next("done")
    return path


def figures_on(domain: str, dataset: str, known: Sequence[Figure]) -> tuple[Sequence[Figure], dict[str, str]]:
    """What is measured on a data set, those of `known` if they are its, and the data's fields on a card."""
    task, source = MEASURED.get(domain)(dataset)
    own = known if task is None else [figure for figure in known if figure.task == task]
    return own or [Figure(task)], {"name": source.title, "source": source.origin, "licence": source.licence}


class _Steps:
    """Progress over a few named steps."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def next(self, note: str) -> None:
        if self.progress:
            self.progress(min(self.done, self.total), self.total, note)
        self.done += 1
