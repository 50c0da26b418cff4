"""`zoo pull`, `zoo push`, `zoo export`: models in and out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from zoo.cli import OK
from zoo.cli.console import note, print_json
from zoo.cli.parsing import Positional, metavar, parse, take_option
from zoo.errors import ConfigError, HubError
from zoo.progress import progress_bar
from zoo.report import numbers
from zoo.shared.store.io import atomic_write, write_json


@dataclass
class Pull:
    """Fetch a model from a hub into the local cache and check it against its card; of another library's model
    the safetensors and texts, for `zoo sparsify` and for bundles that stand on it."""

    reference: Annotated[str, Positional, metavar("hf://OWNER/NAME[@REVISION]")]
    """Where it is; the revision is a branch, tag or commit."""

    offline: bool = False
    """Only look into the cache."""

    rebind: bool = False
    """Let the model's name mean this repository from now on, also if it meant another one."""

    json: bool = False
    """Print JSON."""


@dataclass
class Push:
    """Publish a model on a hub: its card and its weights, after checking them."""

    model: Annotated[str, Positional, metavar("MODEL")]
    """A name or folder."""

    reference: Annotated[str, Positional, metavar("hf://OWNER/NAME[@BRANCH]")]
    """Where to."""

    private: bool = False
    """Make the repository private, if it has to be made."""

    dry_run: bool = False
    """Only check, and say what would be uploaded."""

    json: bool = False
    """Print JSON."""


@dataclass
class Export:
    """Write a model's weights densely, zeros included, as plain safetensors that any program reads."""

    model: Annotated[str, Positional, metavar("MODEL")]
    """A name, folder or hf://owner/name."""

    to: Path
    """FILE.safetensors, or a folder for model.safetensors and card.json; or, with --out FILE, onnx or
    torch-export; gguf for language models; viewer or turntable for scenes."""

    overwrite: bool = False
    """Replace a file that is there."""

    json: bool = False
    """Print JSON."""


def pull_command(argv: Sequence[str]) -> int:
    """`zoo pull`."""
    options = parse(Pull, argv, "pull")
    _require_hub(options.reference)
    from zoo.bundles.foreign import fetch_folder
    from zoo.bundles.hub import pull

    offline = True if options.offline else None
    with progress_bar() as progress:
        foreign = fetch_folder(options.reference, offline, progress)
    if foreign is not None:
        size = sum(path.stat().st_size for path in foreign.rglob("*") if path.is_file())
        if options.json:
            print_json({"name": None, "version": foreign.name, "folder": str(foreign), "bytes": size})
        else:
            print(f"a model of another library, {numbers.size(size)}, in {foreign}")
            note(f"Next: zoo sparsify {options.reference} --method NAME --out DIR")
        return OK
    bundle = pull(options.reference, offline, options.rebind)
    card = bundle.card
    if options.json:
        where = {"name": card.name, "version": card.version, "folder": str(bundle.folder)}
        print_json({**where, "license": card.license, "data": card.data.model_dump()})
    else:
        print(f"{card.reference}, {numbers.size(card.weights.bytes)}, in {bundle.folder}")
        print(f"Licence: {card.license}; made from {card.data.name}, {card.data.licence}")
        note(f"Next: zoo eval {options.reference}")
    return OK


def push_command(argv: Sequence[str]) -> int:
    """`zoo push`."""
    options = parse(Push, argv, "push")
    _require_hub(options.reference)
    from zoo.bundles.hub import push

    pushed = push(options.model, options.reference, private=options.private, dry_run=options.dry_run)
    if options.json:
        print_json({"files": pushed.files, "url": pushed.url})
        return OK
    for name, size in pushed.files.items():
        print(f"{name}  {numbers.size(size)}")
    print("nothing was uploaded (--dry-run)" if options.dry_run else f"published: {pushed.url}")
    return OK


def export_command(argv: Sequence[str]) -> int:
    """`zoo export`."""
    from zoo.registry import EXPORTERS

    to, rest = take_option(argv, "to", "")
    if to in EXPORTERS:
        other: Any = parse(EXPORTERS.get(to), rest, "export")
        report = other.run()
        print_json(report) if other.json else print(other.describe(report))
        return OK
    if to and any(word.partition("=")[0] == "--out" for word in rest):  # only formats of the registry have it
        EXPORTERS.get(to)
    options = parse(Export, argv, "export")
    is_file = options.to.suffix == ".safetensors"
    if not is_file and options.to.suffix:
        raise ConfigError(f"--to {options.to}: give a .safetensors file or a folder")
    weights = options.to if is_file else options.to / "model.safetensors"
    if weights.exists() and not options.overwrite:
        raise ConfigError(f"{weights} is there already; give another place, or --overwrite")
    from safetensors.torch import save

    from zoo.bundles.store import info, load

    model = load(options.model)
    card = info(model).card
    left = _not_in_tensors(model, info(model).extras)
    if left and not is_file:
        raise ConfigError(
            f"{card.name} computes with {left} besides its tensors, and plain tensors beside card.json "
            f"would be "
            "another function than its figures tell of. Give FILE.safetensors for the tensors alone, or "
            "--to onnx "
            "or torch-export, whose outputs are compared"
        )
    if left:
        note(f"{card.name} computes with {left} besides; the file has its tensors alone, another function")
    # Tied tensors are written once each, since plain safetensors knows no ties.
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    weights.parent.mkdir(parents=True, exist_ok=True)
    content = save(state, metadata={"format": "pt", "model": card.reference})
    atomic_write(weights, content)
    if not is_file:
        write_json(options.to / "card.json", card.to_dict())
    if options.json:
        sizes = {"bytes": len(content), "tensors": len(state)}
        print_json({"model": card.reference, "file": str(weights), **sizes})
    else:
        packed = numbers.size(card.bytes_needed)
        print(f"{weights}: {len(state)} tensors, {numbers.size(len(content))} dense ({packed} packed)")
    return OK


def _not_in_tensors(model: Any, extras: Any) -> str:
    """What decides about a model's outputs and is in no plain tensor: thresholds, a ticket's edges, codes."""
    inert = ("tokenizer", "generation", "levels")
    kinds = {
        name.partition("/")[0]
        for name in extras
        if name.startswith("edges/") or not name.endswith("/keep") and name.partition("/")[0] not in inert
    }
    coded = any(getattr(module, "coded_weights", 0) for module in model.modules())
    return " and ".join(sorted(kinds) + ["the decoding of four-bit codes"] * coded)


def _require_hub(reference: str) -> None:
    from zoo.bundles.hub import parse_reference

    try:
        parse_reference(reference)
    except HubError as error:  # mistyped, which no other network mends
        raise ConfigError(str(error)) from None
