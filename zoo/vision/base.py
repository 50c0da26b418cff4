"""What the domain's methods have in common: options, checks, data, and the answer that the zoo expects."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified
from zoo.shared.masks import MaskSet, masks_of, set_masks
from zoo.shared.pruning.budgets import check_sparsity
from zoo.shared.pruning.choose import prunable_parameters
from zoo.vision.data import load_images
from zoo.vision.models import Classifier, device_of
from zoo.vision.train import Recipe, Trainer


class Pruned(NamedTuple):
    """What `VisionMethod.prune` made: a model with its masks, and boolean extras for parts that have none
    (`channels/keep`: which of the channels are still there)."""

    model: Classifier
    extras: dict[str, Tensor] = {}


@dataclass
class VisionMethod(ABC):
    """Base of the methods that train on images.

    A subclass says in `prune` what becomes of a dense model; everything else is here.
    """

    sparsity: float = 0.9
    """Share of zeros over the pruned weights, from 0 up to 1."""

    dataset: str | None = None
    """Images to train on: digits, cifar10-jpeg or cifar10-true; by default those on the model's card."""

    epochs: int = 10
    """Passes over the training images, in all phases together unless the method says otherwise."""

    lr: float = 0.05
    """Peak of the learning rate of SGD."""

    batch: int = 64
    """Images per step."""

    weight_decay: float = 5e-4
    """L2 penalty on all weights."""

    seed: int = 0
    """Of shuffling, augmentation, fresh weights and random masks."""

    device: str = "cpu"
    """Where to train: cpu, cuda or cuda:1, say. Seeds draw the same on all of them."""

    def sparsify(self, model: nn.Module) -> Sparsified:
        """Train a sparse relative of `model`, which stays as it is.

        Raises:
            BudgetError: a sparsity outside [0, 1), or one that the method cannot reach.
            PatternError: a weight whose shape its pattern does not allow.
            ConfigError: a model of another kind or with weights that are not finite, no data to train on, or
                a device that is not there.
        """
        check_sparsity(self.sparsity)
        device = checked_device(self.device)
        if not isinstance(model, Classifier):
            raise ConfigError(
                f"this method trains the image classifiers of zoo.vision; received {type(model).__name__}"
            )
        broken = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
        if broken:
            raise ConfigError(
                f"{broken[0]!r} holds NaN or infinity ({len(broken)} such tensors); repair the model first"
            )
        dataset = self.dataset or dataset_of(model)
        trainer = Trainer(load_images(dataset).to(device), self.recipe(), self.seed)
        made, extras = self.prune(clone(model).to(device), trainer)
        made = back_on_cpu(made)
        options = self.options() | {"dataset": dataset, "training_flops": trainer.cost.flops}
        return Sparsified(
            made.eval(),
            masks_of(made) or MaskSet({}),
            extras,
            options,
            arguments=made.current_arguments(),
            parts={"channels": {"pattern": "channel"}} if "channels/keep" in extras else {},
        )

    @abstractmethod
    def prune(self, model: Classifier, trainer: Trainer) -> Pruned:
        """The sparse model, which carries its masks (`masks_of`).

        Args:
            model: a copy of the dense one, in float32 and without masks, that may be changed.
            trainer: by which everything is trained, so that it is counted.
        """

    def recipe(self) -> Recipe:
        """The recipe that the options describe."""
        return Recipe(self.epochs, self.lr, self.batch, self.weight_decay)

    def options(self) -> dict[str, Any]:
        """The options that decide the result, as a card states them: all but the device."""
        stated = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        del stated["device"]
        return stated


def checked_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: no device has such a name, or this machine has none of its kind.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{name!r} is no device; write cpu, cuda or cuda:1, say") from error
    there = torch.cuda.device_count() if device.type == "cuda" else int(device.type == "cpu")
    if (device.index or 0) >= there:
        raise ConfigError(f"this machine has no device {name!r}; train on cpu, or where torch finds one")
    return device


Model = TypeVar("Model", bound=nn.Module)


def back_on_cpu(model: Model) -> Model:
    """The model, in place, on the processor in the usual layout, with its masks."""
    masks = masks_of(model)
    model.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    if masks is not None:
        set_masks(model, masks.to("cpu"))
    return model


def clone(model: Classifier) -> Classifier:
    """A copy in float32 on the same device, without masks and without what the zoo knows of the original."""
    copy = type(model)(**model.current_arguments()).to(device_of(model))
    copy.load_state_dict(
        {
            name: value.float() if value.is_floating_point() else value
            for name, value in model.state_dict().items()
        }
    )
    set_masks(copy, None)
    return copy


def inner_weights(model: nn.Module) -> list[str]:
    """The prunable weights without those of the first and the last layer."""
    names = prunable_parameters(model)
    if len(names) < 3:
        raise ConfigError("the model has no layer between its first and its last; choose weights by names")
    return names[1:-1]


def dataset_of(model: nn.Module) -> str:
    """The images of the first figure on the card of a model from the zoo.

    Raises:
        ConfigError: the model is not from the zoo.
    """
    info: Any = getattr(model, "zoo_info", None)
    if info is None:
        raise ConfigError("This model has no card that names its images: give the option dataset.")
    return str(info.card.metrics[0].task).partition("/")[2]
