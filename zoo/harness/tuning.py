"""What the fine-tuners of all domains share: the new card, the command on it, proof that no zero was lost."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from zoo.bundles.card import Card, mean_and_spread
from zoo.bundles.catalog import Bundle
from zoo.bundles.publish import cost_beside
from zoo.bundles.store import save
from zoo.errors import ConfigError
from zoo.harness.tables import Table
from zoo.harness.tasks import Task
from zoo.shared.masks import MaskSet, masks_of, set_masks

# Options that say where the work is done and where the result goes, not what it is.
_PLACES = ("model", "out", "overwrite", "name", "device")


def options_of(config: Any) -> dict[str, Any]:
    """The options of a fine-tuner that decide the result."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in _PLACES}


def command_of(config: Any, domain: str, verb: str = "finetune") -> str:
    """The command line of a fine-tuner's options, or of another verb's."""
    words = [f"zoo {verb} {domain}"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.default is dataclasses.MISSING or value != field.default:
            option = "--" + field.name.replace("_", "-")
            words.append(option if value is True else f"{option} {value}")
    return " ".join(words)


def check_target(config: Any) -> None:
    """Refuse a fine-tuner's options before any work: its folder must be free, or may be replaced.

    Raises:
        ConfigError: the folder is taken, or checkpoints are wanted more often than there are steps.
    """
    if getattr(config, "checkpoint_every", 1) < 1:
        raise ConfigError(f"checkpoint_every must be at least 1. Received: {config.checkpoint_every}.")
    if config.out.exists() and not config.overwrite:
        raise ConfigError(f"{config.out} is there already. Add --overwrite, or choose another --out.")


def publish(config: Any, model: nn.Module, card: dict[str, Any], extras: Mapping[str, Tensor]) -> Path:
    """Write the bundle of a finished fine-tuning, and then forget its checkpoint."""
    config.out.parent.mkdir(parents=True, exist_ok=True)
    path = save(model, config.out, card=card, extras=extras, overwrite=config.overwrite)
    shutil.rmtree(checkpoint_folder(config.out), ignore_errors=True)
    return path


def finetuned_card(
    config: Any,
    source: Card,
    twin: Bundle | None,
    model: nn.Module,
    task: Task,
    *,
    protocol: str,
    seconds: float,
    data: dict[str, str],
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """The fields of the card of a fine-tuned model; `save` fills in what it can count itself.

    Args:
        config: the fine-tuner, with fields `seed`, `out` and `name`.
        source: card of the model that was fine-tuned.
        twin: the dense model that stands beside the new one; None for a dense model.
        model: the result.
        task: that measures it.
        protocol: how it was trained and chosen.
        seconds: that training took.
        data: name, source and licence of what it was trained on.
        arguments: of its architecture.

    Raises:
        TaskError: the task counts no operations of this model.
    """
    value = task.evaluate(model).metrics[task.primary]
    per_seed = {config.seed: value.value}
    mean, spread = mean_and_spread(per_seed)
    metric: dict[str, Any] = {
        "task": task.name,
        "metric": task.primary,
        "split": "test",
        "protocol": protocol,
        "value": value.value,
        "stderr": value.stderr or 0.0,
        "per_seed": per_seed,
        "mean": mean,
        "spread": spread,
    }
    if twin is not None:
        own = next(m for m in twin.card.metrics if m.task == task.name)
        figure = {key: getattr(own, key) for key in ("value", "per_seed", "mean", "spread")}
        metric["dense"] = {"name": twin.card.name, **figure}
    method = {**source.method.model_dump(), "seed": config.seed}
    tuned = {**options_of(config), "from": source.reference}
    method["hyperparameters"] = {**method["hyperparameters"], "finetuned": tuned}
    return source.to_dict() | {
        "name": config.name or f"{source.domain}/{config.out.name}",
        "summary": f"{source.name} fine-tuned on {data['name']}.",
        "architecture": {"name": source.architecture.name, "args": arguments},
        "method": method,
        "sparsity": {},
        "cost": cost_beside(model, task.name, twin.card if twin is not None else None),
        "metrics": [metric],
        "dense_twin": twin.card.name if twin is not None else None,
        "training": {"command": command_of(config, source.domain), "seconds": round(seconds, 3)},
        "data": data,
        "evidence": None,
    }


def require_zeros(model: nn.Module, masks: MaskSet | None) -> None:
    """Let the model carry its masks again, after checking that every dropped weight is still zero.

    Raises:
        ConfigError: a zero was lost.
    """
    if masks is None:
        return
    set_masks(model, masks)
    if lost := masks.zeros_intact(model):
        raise ConfigError(
            f"Fine-tuning lost zeros of {lost[0]!r}; this is a fault of the zoo, please report it."
        )


def zero_count(model: nn.Module) -> int:
    """Weights that are zero and that the masks drop."""
    masks, weights = masks_of(model), dict(model.named_parameters())
    return sum(int((weights[n][~m.keep] == 0).sum()) for n, m in masks.items()) if masks else 0


def show_change(title: str, metric: str, values: tuple[float, float], zeros: tuple[int, int]) -> None:
    """The before/after table, on standard error: standard output belongs to the command line's own answer."""
    from rich.console import Console

    from zoo.report.terminal import show_table

    rows = [
        [f"test {metric}", *(f"{value:.4f}" for value in values)],
        ["pruned weights that are zero", *(f"{count:,}" for count in zeros)],
    ]
    show_table(Console(stderr=True), Table(title, ["", "before", "after"], rows))


def checkpoint_folder(out: Path) -> Path:
    """Where an unfinished run keeps its state, beside its output."""
    return out.parent / f".{out.name}.checkpoint"
