"""Models of classes that nobody registered: saved as they are, loaded into what their owner hands over.

A card of the domain `own` says what can be counted and nothing that was not measured. Its architecture is
named `python:MODULE:CLASS`; loading imports nothing by that name, as a card is somebody else's text: the
caller gives the class, or a model of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.bundles.building import check_fits
from zoo.bundles.card import OWN, Card
from zoo.bundles.provenance import environment
from zoo.errors import BundleError, ConfigError
from zoo.names import name_for
from zoo.shared.masks import MaskSet

PYTHON = "python:"
_UNSTATED = "not stated"


def class_name(kind: type) -> str:
    """What an architecture is called on a card: `python:MODULE:CLASS`."""
    return f"{PYTHON}{kind.__module__}:{kind.__qualname__}"


def own_fields(
    model: nn.Module, folder: Path, masks: MaskSet, name: str | None, arguments: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The fields of a card that are known of any model; sizes and shares are added by whoever writes it.

    Args:
        model: what is saved.
        folder: of the bundle, whose name is the model's by default.
        masks: of its parameters.
        name: of the model, which begins with `own/`.
        arguments: with which its class makes it again.

    Raises:
        ConfigError: another domain in the name.
    """
    called = name or name_for(OWN, folder)
    if not called.startswith(f"{OWN}/"):
        raise ConfigError(
            f"a model without measured figures is called {OWN}/..., not {called!r}; give a card to save it "
            "under another name"
        )
    kind = type(model)
    return {
        "name": called,
        "version": "1.0.0",
        "domain": OWN,
        "summary": f"A {kind.__name__}, saved as it was; nothing about it was measured.",
        "architecture": {"name": class_name(kind), "args": dict(arguments or {})},
        "method": {"name": "own" if masks else "dense"},
        "training": {"command": f"zoo.save(model, {folder.name!r})", "environment": environment()},
        "data": {"name": _UNSTATED, "source": _UNSTATED, "licence": _UNSTATED},
        "license": _UNSTATED,
        "citation": _UNSTATED,
    }


def handed(card: Card, into: nn.Module | type[nn.Module] | None, tensors: Mapping[str, Any]) -> nn.Module:
    """The model that the stored tensors go into: the given one, or one that the given class makes with the
    card's arguments.

    Raises:
        BundleError: nothing is given, or a model that the tensors do not fit.
        ConfigError: a class of another name than the card's, or one that refuses the card's arguments.
    """
    stated = card.architecture.name
    kind = stated.rpartition(":")[2].rpartition(".")[2]
    if into is None:
        raise BundleError(
            f"{card.name}: its class {stated.removeprefix(PYTHON)} is not the zoo's; hand it over: "
            f"zoo.load(..., into={kind}), or into=a model of it"
        )
    if isinstance(into, nn.Module):
        model = into
    else:
        if class_name(into) != stated:
            raise ConfigError(f"{card.name} is a {stated}; received the class {class_name(into)}")
        try:
            with torch.random.fork_rng(devices=[]):
                model = into(**card.architecture.args)
        except TypeError as error:
            raise ConfigError(
                f"{card.name}: {kind} cannot be made with the card's arguments {card.architecture.args}: "
                f"{error}. Make it yourself: into={kind}(...), or state them: zoo.save(..., arguments=...)"
            ) from error
    try:
        check_fits(model.state_dict(keep_vars=True), tensors)
    except BundleError as error:
        raise BundleError(f"{card.name} does not fit this {type(model).__name__}: {error}") from error
    return model
