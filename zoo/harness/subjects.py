"""What can be evaluated: bundles by name, glob or folder, `module:callable` references, and modules."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.bundles.card import Card
from zoo.bundles.catalog import Bundle, base_of, find, list_models, twin_of
from zoo.bundles.public import public_base_of
from zoo.bundles.store import Execution, ModelInfo, load_bundle
from zoo.errors import ConfigError
from zoo.names import is_glob
from zoo.registry import ARCHITECTURES
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.store.identity import code_digest, data_digest, state_digest

Models = str | Path | nn.Module | Iterable[str | Path | nn.Module]
_REFERENCE = re.compile(r"(?:[A-Za-z_][\w.]*|[^:*?]+\.py):[A-Za-z_]\w*")


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated, not loaded yet.

    Attributes:
        name, version, card: of a bundle; of a module its class's name, and no card.
        weights_sha256: of the weights file, or of a module's tensors.
        identity: gives the digest of all that decides what the model computes - weights, other state, code;
            "" where some of it is unknown.
        load: gives the model.
    """

    name: str
    version: str | None
    card: Card | None
    weights_sha256: str
    identity: Callable[[], str]
    load: Callable[[Execution], nn.Module]


def resolve(models: Models, *, twins: bool = False) -> list[Subject]:
    """The subjects that names, globs, folders and modules stand for, each once; with `twins` their dense
    twins first.

    Raises:
        UnknownNameError: a name or glob that matches nothing.
    """
    items: list[Any] = [models] if isinstance(models, str | Path | nn.Module) else list(models)
    found: dict[str, Subject] = {}
    for item in items:
        if isinstance(item, str) and _REFERENCE.fullmatch(item) and not Path(item).exists():
            item = python_model(item)
        if isinstance(item, nn.Module):
            subject = _module_subject(item)
            found.setdefault(f"{subject.name} {subject.weights_sha256}", subject)
            continue
        for bundle in _bundles(item):
            if twins and bundle.card.dense_twin:
                twin = twin_of(bundle)
                found.setdefault(_place(twin), bundle_subject(twin))
            found.setdefault(_place(bundle), bundle_subject(bundle))
    return list(found.values())


def find_bundles(models: Models) -> list[Bundle]:
    """The bundles that names, globs and folders stand for, each once.

    Raises:
        UnknownNameError: a name or glob that matches nothing.
        ConfigError: a module, which is no bundle.
    """
    items: list[Any] = [models] if isinstance(models, str | Path | nn.Module) else list(models)
    found: dict[str, Bundle] = {}
    for item in items:
        if isinstance(item, nn.Module):
            raise ConfigError(f"a {type(item).__name__} is no bundle with a card; save it first (zoo.save)")
        for bundle in _bundles(item):
            found.setdefault(_place(bundle), bundle)
    return list(found.values())


def _place(bundle: Bundle) -> str:
    """What tells a bundle, or a level of one, from all others."""
    return f"{bundle.folder} {bundle.level or 0}"


def bundle_subject(bundle: Bundle) -> Subject:
    """A bundle as a subject of evaluation."""
    card = bundle.card
    return Subject(
        name=bundle.label,
        version=card.version,
        card=card,
        weights_sha256=card.weights.sha256,
        identity=lambda: _bundle_identity(bundle),
        load=lambda execution: load_bundle(bundle, execution),
    )


def _bundle_identity(bundle: Bundle) -> str:
    """Weights as they are on the disk, their base's, the architecture, and the code that builds it."""
    bundle.check()
    base, public = base_of(bundle), public_base_of(bundle)
    if base is not None:
        base.check()
    if public is not None:
        public.check()
    stated = bundle.card.architecture
    code = code_digest(ARCHITECTURES.get(stated.name), load_bundle)
    stands_on = public.stated.identity["sha256"] if public else base.card.weights.sha256 if base else None
    hashes = [bundle.card.weights.sha256, stands_on, *([bundle.level] if bundle.level is not None else [])]
    return data_digest([hashes, stated.model_dump(), code]) if code else ""


def _bundles(item: str | Path) -> list[Bundle]:
    if isinstance(item, str) and is_glob(item) and not Path(item).exists():
        return [find(name) for name in list_models(item)]
    return [find(item)]


def python_model(reference: str) -> nn.Module:
    """The module that `package.module:callable` or `folder/file.py:callable` makes (or is).

    This imports and runs the code that it names: only what the user typed, never what a file says.

    Raises:
        ConfigError: it cannot be imported, or gives no module.
    """
    origin, _, attribute = reference.rpartition(":")
    try:
        if origin.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(origin).stem, origin)
            if spec is None or spec.loader is None:
                raise ImportError(f"{origin} is not a Python file")
            module = importlib.util.module_from_spec(spec)
            sys.modules.setdefault(module.__name__, module)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(origin)
        made = getattr(module, attribute)
    except (ImportError, AttributeError, FileNotFoundError) as error:
        raise ConfigError(
            f"{reference!r} cannot be imported: {error}; give package.module:callable"
        ) from error
    model = made if isinstance(made, nn.Module) else made()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{reference!r} gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def _module_subject(model: nn.Module) -> Subject:
    """A module as it is: its tensors decide its hash, since it may have been changed after it was loaded."""
    digest = hashlib.sha256()
    tensors = dict(model.state_dict(keep_vars=False))
    tensors |= {f"mask:{name}": mask.keep for name, mask in (masks_of(model) or MaskSet({})).items()}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    sha = digest.hexdigest()
    known = getattr(model, "zoo_info", None)
    name = known.card.name if isinstance(known, ModelInfo) else type(model).__name__
    return Subject(
        name=name,
        version=None,
        card=None,  # the card describes the weights file, not what became of them
        weights_sha256=sha,
        identity=lambda: state_digest(model),
        load=lambda execution: model,
    )
