"""Options of a training command: which decide the result, how they are written, where the work is done."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from zoo.bundles.folders import refuse_place
from zoo.errors import ConfigError
from zoo.names import check_model_name

# Options that say where the work is done and where the result goes, not what it is.
_PLACES = ("model", "out", "overwrite", "name", "device", "checkpoint_every", "pictures")


def options_of(config: Any) -> dict[str, Any]:
    """The options of a training command that decide the result."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in _PLACES}


def command_of(config: Any, domain: str, verb: str = "finetune") -> str:
    """The command line of a training's options."""
    words = [f"zoo {verb} {domain}"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            option = "--" + field.name.replace("_", "-")
            words.append(option if value is True else f"{option} {value}")
    return " ".join(words)


def check_target(config: Any) -> None:
    """Refuse options before any work: the folder must be free, or may be replaced.

    Raises:
        ConfigError: the folder is taken, or checkpoints are wanted more often than there are steps.
    """
    if config.checkpoint_every < 1:
        raise ConfigError(f"checkpoint_every must be at least 1. Received: {config.checkpoint_every}.")
    if getattr(config, "name", None) is not None:
        check_model_name(config.name)
    refuse_place(config.out)
    if config.out.exists() and not config.overwrite:
        raise ConfigError(f"{config.out} is there already. Add --overwrite, or choose another --out.")


def checkpoint_folder(out: Path) -> Path:
    """Where an unfinished run keeps its state, beside its output."""
    return out.parent / f".{out.name}.checkpoint"
