"""A small network of plain layers, and a job of images whose class is the bright quarter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zoo.methods.conformance import plain_network, quarter_images
from zoo.shared.train import Job, Recipe


@pytest.fixture
def net() -> nn.Sequential:
    """Three convolutions with batch norms and a linear layer, with fixed weights."""
    return plain_network(0)


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """Forty-eight images [48, 3, 8, 8] and their labels."""
    return quarter_images(48)


@pytest.fixture
def job_of(images) -> Callable[..., Job]:
    """Makes a job on these images, scored by accuracy; arguments are batch, seed and fields of the recipe."""
    inputs, labels = images

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return float((model.eval()(inputs).argmax(1) == labels).float().mean())

    def make(batch: int = 16, seed: int = 0, **recipe) -> Job:
        loader = DataLoader(TensorDataset(inputs, labels), batch, shuffle=True)
        fields = {"epochs": 1, "lr": 0.05, "batch": batch, **recipe}
        return Job(loader, score=accuracy, recipe=Recipe(**fields), seed=seed)

    return make


@pytest.fixture
def job(job_of) -> Job:
    """Two epochs of batches of 16."""
    return job_of(epochs=2)
