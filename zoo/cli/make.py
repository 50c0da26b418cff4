"""`zoo pretrain`, `sparsify`, `finetune`: options come from the dataclass of what is run."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from zoo.cli import OK
from zoo.cli.console import note, print_json, stdout
from zoo.cli.parsing import Positional, command_line, is_help, metavar, parse, parse_with, take_option
from zoo.errors import ConfigError
from zoo.progress import progress_bar
from zoo.registry import Registry
from zoo.studies.tables import Table


@dataclass
class Sparsify:
    """Options of `zoo sparsify` itself; the method's own are added."""

    model: Annotated[str, Positional, metavar("MODEL")]
    """The model to start from: a name, folder or hf://owner/name; usually a dense twin."""

    out: Path
    """Folder for the new bundle."""

    name: str | None = None
    """Name on the card; by default the domain and the folder's name."""

    share: bool = False
    """Store only what differs from the model that it was made from, which must then be at hand to load it;
    of a
    hub's model, hf://owner/name, masks are enough where the method changes no weight that it keeps."""

    overwrite: bool = False
    """Replace the bundle that is there."""

    json: bool = False
    """Print the new card as JSON."""


@dataclass
class JobOptions:
    """What a method trains or measures on, and how; what is left out follows the method's own recipe."""

    dataset: str | None = None
    """Data of the model's domain; by default those of the first figure on its card."""

    epochs: int | None = None
    """Passes over the data, in all phases together unless the method says otherwise."""

    steps: int | None = None
    """Optimiser steps, instead of epochs."""

    lr: float | None = None
    """Peak of the learning rate."""

    batch: int | None = None
    """Samples per step."""

    weight_decay: float | None = None
    """L2 penalty on all weights, or as the optimiser takes it."""

    optimizer: str | None = None
    """Name of an optimiser of torch.optim."""

    seed: int = 0
    """Of order, augmentation, fresh weights and random masks."""

    device: str = "cpu"
    """Where to train: cpu, cuda or cuda:1, say. Seeds draw the same on all of them."""

    def job(self, domain: str, method: Any, model: Any) -> Any:
        """The job for a model of a domain."""
        from zoo.methods.contract import default_recipe
        from zoo.registry import JOBS
        from zoo.shared.train import Recipe

        typed = {name: getattr(self, name) for name in RECIPE if getattr(self, name) is not None}
        recipe = Recipe(**{**default_recipe(method), **typed})
        make = JOBS.get(domain)
        return make(self.dataset, recipe=recipe, seed=self.seed, device=self.device, model=model)


RECIPE = ("epochs", "steps", "lr", "batch", "weight_decay", "optimizer")


@dataclass
class Rebase:
    """Store a model on the weights of another one, or whole again; tensors and figures stay as they are."""

    model: Annotated[str, Positional, metavar("MODEL")]
    """A name, folder or hf://owner/name."""

    out: Path
    """Folder for the bundle; with --overwrite also the one where it is."""

    base: str | None = None
    """The model whose tensors are left out where they are the same, a name, folder or hf://owner/name of
    another
    library's model; by default the dense twin."""

    whole: bool = False
    """Store all tensors, so that it stands by itself."""

    overwrite: bool = False
    """Replace the bundle that is there."""

    json: bool = False
    """Print the new card as JSON."""


@dataclass
class Train:
    """Options of `zoo pretrain` and `zoo finetune` themselves; the domain's own are added."""

    json: bool = False
    """Print the new card as JSON."""


def sparsify_command(argv: Sequence[str]) -> int:
    """`zoo sparsify MODEL --method NAME --out DIR ...`, or a file of a kind that a domain knows."""
    from zoo.methods.contract import default_recipe, needs_job
    from zoo.registry import FILE_SPARSIFIERS, METHODS

    suffix = Path(argv[0]).suffix if argv else ""
    if suffix and suffix in FILE_SPARSIFIERS:
        return _sparsify_file(argv, FILE_SPARSIFIERS.get(suffix))
    from zoo.names import check_model_name, name_for

    method_name, rest = take_option(argv, "method", "prune")
    method_class: Any = METHODS.get(method_name)
    description = (
        "Make a sparse model and measure it beside its dense twin. "
        f"The options include those of --method {method_name}; methods: {', '.join(METHODS.names())}."
    )
    trains = needs_job(method_class) or bool(default_recipe(method_class))
    common = dataclasses.make_dataclass("Sparsify", [], bases=(JobOptions, Sparsify)) if trains else Sparsify
    options, method = parse_with(common, method_class, rest, "sparsify", description, ("--method",))
    if options.name is not None:
        check_model_name(options.name)
    from zoo.bundles.catalog import HUB_PREFIX, find
    from zoo.harness.making import Origin, make_bundle

    extra: dict[str, Any] = {}  # what the domain's function takes besides
    if options.model.startswith(HUB_PREFIX):
        from zoo.bundles.foreign import fetch_folder
        from zoo.bundles.public import public_model

        with progress_bar() as progress:
            folder = fetch_folder(options.model, progress=progress)
        if folder is not None:  # on the card stands the commit that was read, whatever a branch means later
            pinned = f"{options.model.partition('@')[0]}@{folder.name}"
            argv = [pinned if word == options.model else word for word in argv]
            options.model = str(folder)
            extra = {"base": public_model(pinned)} if options.share else {}
    if (handler := foreign_folder(options.model)) is not None:
        domain, sparsify_folder = handler
        if options.share and not extra:
            raise ConfigError(
                f"--share leaves the weights to a model that everybody finds, and {options.model} is a "
                f"folder of "
                "yours: give its address, hf://OWNER/NAME, or make a bundle of it first"
            )
        taken = inspect.signature(sparsify_folder).parameters
        if extra and "base" not in taken:
            raise ConfigError(f"--share: models of {domain} come out as whole folders; leave it out")
        if trains:
            given = {f.name: getattr(options, f.name) for f in dataclasses.fields(JobOptions)}
            typed = [f.name for f in dataclasses.fields(JobOptions) if given[f.name] != f.default]
            if unused := [name for name in typed if name not in taken]:
                raise ConfigError(
                    f"--{unused[0].replace('_', '-')} is for models of the zoo: folders of {domain} are not "
                    "trained on. Leave it out"
                )
            extra |= {name: given[name] for name in typed}
        origin = Origin(
            options.name or name_for(domain, options.out), method_name, command_line("sparsify", argv)
        )
        with progress_bar() as progress:
            said = sparsify_folder(
                Path(options.model),
                method,
                origin,
                options.out,
                overwrite=options.overwrite,
                progress=progress,
                **extra,
            )
        note(said)
        if (options.out / "card.yaml").is_file():
            return _show_new(options.out, options.json)
        if options.json:
            print_json({"name": origin.name, "folder": str(options.out)})
        return OK
    source = find(options.model)
    name = options.name or name_for(source.card.domain, options.out)
    origin = Origin(name, method_name, command_line("sparsify", argv))
    from zoo.bundles.folders import refuse_folder
    from zoo.harness.workers import workers

    refuse_folder(options.out, options.overwrite)
    first = workers().index == 0
    with progress_bar(quiet=not first) as progress:
        path = make_bundle(
            source,
            method,
            origin,
            options.out,
            job=(lambda model: options.job(source.card.domain, method, model)) if trains else None,
            dataset=getattr(options, "dataset", None) or getattr(method, "dataset", None),
            share=options.share,
            overwrite=options.overwrite,
            progress=progress,
        )
    return _show_new(path, options.json, before=options.model) if first else OK


def foreign_folder(model: str) -> tuple[str, Any] | None:
    """The domain and function that take a folder of another library; None for a bundle or a name.

    Handlers are known by `domain/file`, or `domain/file:field` where a JSON file must have a field.
    """
    from zoo.registry import FOLDERS
    from zoo.shared.store.io import read_json

    folder = Path(model)
    if not folder.is_dir() or (folder / "card.yaml").is_file():
        return None
    for name in sorted(FOLDERS.names(), key=lambda name: ":" not in name):  # those that ask for more first
        domain, _, marker = name.partition("/")
        file, _, key = marker.partition(":")
        if (folder / file).is_file() and (not key or key in read_json(folder / file)):
            return domain, FOLDERS.get(name)
    return None


def _sparsify_file(argv: Sequence[str], options_class: Any) -> int:
    options = parse(options_class, argv, "sparsify")
    report = options.run()
    if options.json:
        print_json(report)
    else:
        print(options.describe(report))
    return OK


def rebase_command(argv: Sequence[str]) -> int:
    """`zoo rebase MODEL --out DIR`."""
    options = parse(Rebase, argv, "rebase")
    if options.whole and options.base is not None:
        raise ConfigError("--whole stores everything: leave --base out")
    from zoo.bundles.catalog import find, twin_of
    from zoo.bundles.public import base_for
    from zoo.bundles.store import load_bundle, save

    bundle = find(options.model)
    base = None
    if not options.whole:
        base = base_for(options.base) if options.base is not None else twin_of(bundle)
    path = save(load_bundle(bundle), options.out, card=bundle.card, base=base, overwrite=options.overwrite)
    return _show_new(path, options.json, before=bundle.folder)


def finetune_command(argv: Sequence[str]) -> int:
    """`zoo finetune DOMAIN ...`."""
    from zoo.registry import FINETUNERS

    return _train(argv, "finetune", FINETUNERS)


def pretrain_command(argv: Sequence[str]) -> int:
    """`zoo pretrain DOMAIN ...`."""
    from zoo.registry import PRETRAINERS

    return _train(argv, "pretrain", PRETRAINERS)


def _train(argv: Sequence[str], verb: str, registry: Registry[Any]) -> int:
    domains = registry.names()
    if not argv or argv[0].startswith("-"):
        usage = f"usage: zoo {verb} DOMAIN ...   with DOMAIN one of: {', '.join(domains) or 'none'}"
        if is_help(argv):
            print(f"{usage}\n\nzoo {verb} DOMAIN --help shows the options of a domain.")
            return OK
        raise ConfigError(usage)
    config_class: Any = registry.get(argv[0])
    options, config = parse_with(
        Train, config_class, argv[1:], f"{verb} {argv[0]}", inspect.getdoc(config_class)
    )
    path = config.run()
    return _show_new(path, options.json, before=getattr(config, "model", None))


def _show_new(path: Path, as_json: bool, before: Any = None) -> int:
    """Print what became of a model: its figures beside those of where it came from and of its dense twin."""
    from zoo.bundles.catalog import find
    from zoo.report import numbers
    from zoo.report.terminal import show_table

    card = find(path).card
    if as_json:
        print_json(card.to_dict())
        return OK
    earlier = _figures(before)
    rows = [
        [
            metric.task,
            metric.metric,
            numbers.value(earlier[metric.task, metric.metric])
            if (metric.task, metric.metric) in earlier
            else "",
            numbers.value(metric.value, metric.stderr),
            numbers.value(metric.dense.value) if metric.dense else "",
        ]
        for metric in card.metrics
    ]
    table = Table(card.reference, ["task", "metric", "before", "after", "dense twin"], rows)
    show_table(stdout(), table)
    note(
        f"{numbers.percent(card.sparsity.overall)} sparse, {numbers.size(card.cost.bytes.on_disk)} on disk"
        f"{f' beside {card.stands_on.reference}' if card.stands_on else ''}. "
        f"Written to {path}\nNext: zoo verify {path}"
    )
    return OK


def _figures(model: Any) -> dict[tuple[str, str], float]:
    """Figures on the card of the model that the work started from."""
    if model is None:
        return {}
    from zoo.bundles.catalog import find

    return {(metric.task, metric.metric): metric.value for metric in find(model).card.metrics}
