"""A small model, its card's fields and its bundle, for every test of the house."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.registry import ARCHITECTURES
from zoo.shared.masks import MaskSet, set_masks
from zoo.shared.train import Checkpoint


class TinyNet(nn.Module):
    """Two layers, a norm with buffers, an integer buffer and a tied weight."""

    def __init__(self, width: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width)
        self.second_again = nn.Linear(width, width, bias=False)
        self.second_again.weight = self.second.weight
        self.scale = scale
        self.edges: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.second_again(torch.relu(self.second(self.norm(self.first(x))))) * self.scale

    def load_extras(self, extras: dict[str, Tensor]) -> None:
        self.edges = extras.get("edges/keep")


@pytest.fixture(autouse=True)
def _tiny_architecture(monkeypatch) -> None:
    """`test/tiny` exists while a test runs."""
    ARCHITECTURES.names()
    monkeypatch.setitem(ARCHITECTURES._entries, "test/tiny", TinyNet)


@pytest.fixture
def stopped(monkeypatch) -> Callable[[], AbstractContextManager[None]]:
    """A context in which a run stops right after its first checkpoint, as at ctrl-C."""

    @contextmanager
    def stop() -> Iterator[None]:
        write = Checkpoint.write

        def write_and_stop(self: Checkpoint, *state: Any) -> None:
            write(self, *state)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Checkpoint, "write", write_and_stop)
            yield

    return stop


@pytest.fixture
def tiny_model() -> nn.Module:
    """A masked model with trained-looking buffers."""
    generator = torch.Generator().manual_seed(0)
    model = TinyNet(width=8, scale=0.5)
    with torch.no_grad():
        for value in [*model.parameters(), model.norm.running_mean, model.norm.running_var]:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.1)
    masks = MaskSet(
        {
            name: torch.rand(value.shape, generator=generator) >= 0.8
            for name, value in model.named_parameters()
            if value.dim() == 2
        }
    )
    masks.apply_(model)
    set_masks(model, masks)
    return model


@pytest.fixture
def tiny_extras() -> dict[str, Tensor]:
    return {"edges/keep": torch.arange(20) % 4 != 0, "thresholds": torch.linspace(0, 1, 5)}


def card_fields(
    name: str,
    architecture: dict[str, Any],
    task: str,
    metric: str,
    value: float = 1.0,
    stderr: float = 0.1,
    flops: tuple[int, int] = (1, 1),
    **changes: Any,
) -> dict[str, Any]:
    """The fields of a dense model's card with one figure; keywords replace fields."""
    figure = {"task": task, "metric": metric, "split": "test", "protocol": "none"}
    spread = {"value": value, "stderr": stderr, "per_seed": {0: value}, "mean": value, "spread": 0.0}
    return {
        "name": name,
        "version": "1.0.0",
        "domain": name.partition("/")[0],
        "summary": "A small model for tests.",
        "architecture": architecture,
        "method": {"name": "dense", "seed": 0},
        "dense_twin": None,
        "cost": {"flops": dict(zip(("dense", "sparse"), flops, strict=True))},
        "metrics": [figure | spread],
        "training": {"command": "none", "seconds": 0.0},
        "data": {"name": "none", "source": "none", "licence": "none"},
        "license": "Apache-2.0",
        "citation": "none",
        **changes,
    }


@pytest.fixture(scope="session")
def card_of() -> Callable[..., dict[str, Any]]:
    """The function that makes the fields of a card."""
    return card_fields


_FIELDS = card_fields(
    "graph/tiny-test",
    {"name": "test/tiny", "args": {"width": 8, "scale": 0.5}},
    "graph/cora",
    "accuracy",
    0.8,
    0.01,
    (1000, 250),
    method={"name": "graph/magnitude", "hyperparameters": {"sparsity": 0.8}, "seed": 0},
    dense_twin="graph/tiny-dense",
    training={"command": "zoo sparsify tiny", "seconds": 1.0},
    data={"name": "Cora", "source": "https://example.org", "licence": "CC0"},
)
_FIELDS["metrics"][0] |= {
    "protocol": "public",
    "dense": {
        "name": "graph/tiny-dense",
        "value": 0.81,
        "per_seed": {0: 0.81},
        "mean": 0.81,
        "spread": 0.0,
    },
}


@pytest.fixture
def tiny_fields() -> dict[str, Any]:
    """The fields of the tiny model's card that are not measured."""
    return copy.deepcopy(_FIELDS)


@pytest.fixture
def save_tiny(tiny_model, tiny_extras) -> Callable[..., Path]:
    """Writes the tiny model's bundle; keywords replace fields of the card."""
    from zoo.bundles.store import save

    def write(folder: Path, overwrite: bool = False, **changes: Any) -> Path:
        fields = {**copy.deepcopy(_FIELDS), **changes}
        return save(tiny_model, folder, card=fields, extras=tiny_extras, overwrite=overwrite)

    return write


@pytest.fixture
def tiny_bundle(save_tiny, tmp_path: Path) -> Path:
    """The folder of the tiny model's bundle."""
    return save_tiny(tmp_path / "tiny")
