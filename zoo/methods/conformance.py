"""Conformance of a method: what every method must do, checked on any of them, plug-ins included.

    from zoo.methods.conformance import check_method

    check_method("my-method", sparsity=0.5)  # raises ConformanceError, or says what the method refused

`python -m zoo.methods.table` runs it over all registered methods and writes docs/methods.md.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zoo.errors import ZooError
from zoo.methods.contract import Method, Sparsified, default_recipe
from zoo.methods.front import made_method
from zoo.registry import METHODS
from zoo.shared.errors import SparseError
from zoo.shared.masks import masks_of
from zoo.shared.pruning.budgets import kept_count
from zoo.shared.store.formats import load_packed, save_packed
from zoo.shared.train import Job, Recipe


class ConformanceError(ZooError, AssertionError):
    """A method does not do what every method must."""


@dataclass(frozen=True)
class Outcome:
    """What came of a check: `refusal` is the method's message about this model, empty if it took it."""

    refusal: str
    made: Sparsified | None

    @property
    def taken(self) -> bool:
        """Whether the method made this model sparse."""
        return self.made is not None


def check_method(
    method: str | type,
    *,
    model: Callable[[], nn.Module] | None = None,
    job: Callable[[], Job] | None = None,
    sparsity: float | None = 0.5,
    **options: Any,
) -> Outcome:
    """Check that a method keeps the contract on a model.

    It must meet the sparsity exactly, give the same bits for the same seed, give zeros that survive a
    training step and a save, and refuse impossible sparsities. A model that it cannot handle it must refuse
    by an error of this project, whose message becomes the outcome; any other exception goes through.

    Args:
        method: a registered name, or the class.
        model: makes the model, always the same one; by default a small `nn.Sequential` of images.
        job: makes the job, always the same one; by default a few images of four classes.
        sparsity: to ask for; None where the method has no such option.
        options: further options of the method.

    Raises:
        ConformanceError: the method breaks the contract; the message says how.
    """
    kind = METHODS.get(method) if isinstance(method, str) else method
    name = method if isinstance(method, str) else kind.__name__
    make = model or (lambda: plain_network(0))
    if sparsity is not None:
        options = {"sparsity": sparsity, **options}

    def run(changes: dict[str, Any] | None = None) -> Sparsified:
        wanted = {**options, **(changes or {})}
        chosen = made_method(name, wanted) if isinstance(method, str) else kind(**wanted)
        return _run(chosen, make(), job)

    try:
        first = run()
    except SparseError as error:
        return Outcome(str(error), None)
    if sparsity is not None:
        _check_sparsity(name, first, sparsity)
        for impossible in (1.0, -0.1, float("nan")):
            try:
                run({"sparsity": impossible})
            except SparseError:
                continue
            raise ConformanceError(f"{name} takes the impossible sparsity {impossible}")
    _check_bits(name, first, run())
    _check_zeros(name, copy.deepcopy(first))
    return Outcome("", first)


def _run(method: Method, model: nn.Module, job: Callable[[], Job] | None) -> Sparsified:
    return method.sparsify(model, job() if job is not None else images_job(method))


def _check_sparsity(name: str, made: Sparsified, sparsity: float) -> None:
    """As many zeros as asked for: over all masked weights, up to one per tensor where each is cut by itself;
    or as many channels. What makes activations sparse has neither."""
    if (channels := made.extras.get("channels/keep")) is not None:
        kept, total, room = int(channels.sum()), channels.numel(), 0
    else:
        kept = sum(mask.kept for mask in made.masks.values())
        total = sum(mask.numel for mask in made.masks.values())
        room = len(made.masks)
    if not total and made.extras:
        return
    if total == 0 or abs(kept - kept_count(total, sparsity)) > room:
        raise ConformanceError(f"{name} keeps {kept} of {total} at a sparsity of {sparsity}")
    carried = masks_of(made.model)
    if made.masks and (carried is None or not carried.equal(made.masks)):
        raise ConformanceError(f"{name} returns other masks than the model carries")


def _check_bits(name: str, first: Sparsified, second: Sparsified) -> None:
    other = second.model.state_dict()
    for key, value in first.model.state_dict().items():
        if not torch.equal(value, other[key]):
            raise ConformanceError(f"{name} gives two different {key!r} for one seed")
    if not first.masks.equal(second.masks):
        raise ConformanceError(f"{name} gives two different sets of masks for one seed")


def _check_zeros(name: str, made: Sparsified) -> None:
    """Through a step of an optimiser with moments and decay, and through a file."""
    if made.masks.lost_zeros(made.model):
        raise ConformanceError(
            f"{name} leaves weights where its masks drop: {made.masks.lost_zeros(made.model)}"
        )
    parameters = [p for p in made.model.parameters() if p.is_floating_point()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    with made.masks.attach(made.model, optimizer):
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    if lost := made.masks.lost_zeros(made.model):
        raise ConformanceError(f"{name}: a training step moves dropped weights of {lost[0]!r}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.safetensors")
        state = {key: value.contiguous() for key, value in made.model.state_dict().items()}
        save_packed(file, state, made.masks)
        read = load_packed(file)
    for key, value in state.items():
        if not torch.equal(read.tensors[key], value):
            raise ConformanceError(f"{name}: {key!r} is not the same after a save")
    if not read.masks.equal(made.masks):
        raise ConformanceError(f"{name}: the masks are not the same after a save")


def plain_network(seed: int) -> nn.Sequential:
    """Three convolutions with batch norms and a linear layer: images [B, 3, 8, 8] to 4 logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
        )


def quarter_images(count: int, size: int = 8) -> tuple[Tensor, Tensor]:
    """Noisy images [count, 3, size, size] whose class is the bright quarter, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    images = torch.randn(count, 3, size, size, generator=generator) * 0.5
    half = size // 2
    for image, label in zip(images, labels.tolist(), strict=True):
        row, column = divmod(label, 2)
        image[:, row * half : (row + 1) * half, column * half : (column + 1) * half] += 1.0
    return images, labels


def images_job(method: object, size: int = 8) -> Job:
    """Two epochs of batches of 16 quarter images, with the method's recipe otherwise."""
    images, labels = quarter_images(32, size)
    loader = DataLoader(TensorDataset(images, labels), 16, shuffle=True)
    recipe = Recipe(**{**default_recipe(method), "epochs": 2, "batch": 16})
    return Job(loader, recipe=recipe)
