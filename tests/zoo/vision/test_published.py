"""Networks that others published: how their files are read, refused and stated on cards."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zoo
from zoo.bundles.card import parse_card
from zoo.bundles.catalog import find, select
from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.bundles.sources import published_file
from zoo.cli.browse import _dropped, dropped_parts, shelf_order
from zoo.errors import CardError, ConfigError, DataError
from zoo.vision.data import Images, Split, correct, ranks
from zoo.vision.domain import image_job
from zoo.vision.makers import taught
from zoo.vision.squeezenet import SqueezeNet, read_deep_compression

SQUEEZENET = "vision/deep-compression-squeezenet-imagenet"


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of `compressed_SqueezeNet.net`: three weights in the first layer, none in the others."""
    path = tmp_path_factory.mktemp("net") / "small.net"
    convs = [m for m in SqueezeNet().modules() if isinstance(m, torch.nn.Conv2d)]
    codebook = np.arange(256, dtype="<f4") / 4
    parts = [np.array([3] + [0] * 25, "<u4").tobytes()]
    for index, conv in enumerate(convs):
        parts += [codebook.tobytes(), np.full(conv.out_channels, index, "<f4").tobytes()]
        if index == 0:
            parts += [bytes([4, 8, 255]), bytes([0 | 15 << 4, 2])]
    path.write_bytes(b"".join(parts))
    return path


def test_deep_compression_by_hand(small_file: Path) -> None:
    """Gaps 0, 15, 2 are the places 0, 16, 19, codes 4, 8, 255 the values 1, 2, 63.75, blue is the last."""
    model = read_deep_compression(small_file)
    expected = torch.zeros(96, 3, 49)
    expected[0, 2, 0], expected[0, 2, 16], expected[0, 2, 19] = 1.0, 2.0, 63.75
    assert torch.equal(model.conv1.weight.detach().view(96, 3, 49), expected)
    assert not model.conv10.weight.any()
    assert model.conv1.bias.eq(0).all() and model.conv10.bias.eq(25).all()


@pytest.mark.parametrize("change, message", [(-1, "ends after"), (1, "1 bytes behind its last layer")])
def test_other_lengths_are_refused(small_file: Path, tmp_path: Path, change: int, message: str) -> None:
    raw = small_file.read_bytes()
    wrong = tmp_path / "wrong.net"
    wrong.write_bytes(raw[:change] if change < 0 else raw + b"\0")
    with pytest.raises(DataError, match=message):
        read_deep_compression(wrong)


def test_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there and the one that was published, or the message says where to get it."""
    stated = {"file": "weights/a.bin", "sha256": hashlib.sha256(b"right").hexdigest(), "address": "a.example"}
    with pytest.raises(ConfigError, match="imported"):
        published_file(None)
    monkeypatch.delenv("ZOO_DATA", raising=False)
    with pytest.raises(DataError, match=r"a\.bin is not there\. Get it from a\.example, put it at weights"):
        published_file(stated)
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a.bin").write_bytes(b"wrong")
    with pytest.raises(DataError, match="another file than the one published"):
        published_file(stated)
    (tmp_path / "weights" / "a.bin").write_bytes(b"right")
    assert published_file(stated) == tmp_path / "weights" / "a.bin"


def test_only_what_was_imported_may_lack_a_twin() -> None:
    fields = find(SQUEEZENET).card.to_dict()
    assert parse_card(fields).dense_twin is None
    with pytest.raises(CardError, match="dense_twin is missing"):
        parse_card({key: value for key, value in fields.items() if key != "imported"})
    dense = {"name": "vision/x", "value": 0.5, "per_seed": {0: 0.5}, "mean": 0.5, "spread": None}
    invented = {**fields, "metrics": [{**fields["metrics"][0], "dense": dense}]}
    with pytest.raises(CardError, match="dense_twin does not name"):
        parse_card(invented)


def test_the_shipped_squeezenet_runs_with_its_zeros() -> None:
    model = zoo.load(SQUEEZENET)
    masks = zoo.shared.masks.masks_of(model)
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 4)
    assert weights == 1_244_448 and sum(int(mask.keep.sum()) for mask in masks.values()) == 415_921
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 227, 227)).shape == (1, 1000)


class Fixed(torch.nn.Module):
    """Answers every image with the same logits."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(len(x), -1)


def few(train: int) -> Images:
    """Four images of classes 0 to 3, as test and, so many of them, as training images."""
    split = Split(torch.arange(0, 256, 16, dtype=torch.uint8).view(4, 1, 2, 2), torch.arange(4))
    return Images("few", split.take(torch.arange(train)), split, split, (0.0,), (1.0,), augment=False)


def test_ranks() -> None:
    """Among equals the first class is first, and what is not a number is behind everything."""
    data = few(4)
    assert ranks(Fixed([1.0, 3.0, 3.0, 0.0]), data, data.test).tolist() == [2, 0, 1, 3]
    assert correct(Fixed([1.0, 3.0, 3.0, 0.0]), data, data.test).tolist() == [False, True, False, False]
    assert not correct(Fixed([float("nan")] * 4), data, data.test).any()


def test_a_set_without_training_images_trains_nothing() -> None:
    """It says what a model takes, for exports, and gives no batch."""
    job = image_job(few(0))
    assert job.batches.example()[0].shape == (1, 1, 2, 2)
    with pytest.raises(DataError, match="few has images to test on only"):
        job.sample(1)


def test_taught(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The method's masks, and gradients of the teacher's answers alone where all weight is on them."""
    job = image_job(few(4), zoo.Recipe(epochs=1, batch=4))
    monkeypatch.setattr("zoo.vision.makers.make_job", lambda *a, **k: job.replace(recipe=k["recipe"]))
    torch.manual_seed(0)
    start = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4)).eval()
    monkeypatch.setattr("zoo.vision.makers.load", lambda name: copy.deepcopy(start))

    def made(recipe: dict[str, Any], **options: Any) -> torch.Tensor:
        all_options = {"teacher": "vision/x", **options}
        row = Row("vision/y", "", "", method="magnitude", options=all_options, recipe=recipe)
        weight: torch.Tensor = taught(row, 0, start, Work(tmp_path)).model[1].weight
        with pytest.raises(ConfigError, match="needs a model to start from"):
            taught(row, 0, None, Work(tmp_path))
        return weight

    plain = {"epochs": 1, "weight_decay": 0.0}
    same = made(plain, sparsity=0.0, distillation=1.0, stages=["1"], features=1.0)
    assert torch.allclose(same, start[1].weight, atol=1e-6)  # a network that is its own teacher stays
    assert not torch.allclose(made(plain, sparsity=0.0, distillation=0.5), start[1].weight, atol=1e-6)
    assert int((made(plain, sparsity=0.5, distillation=0.5) == 0).sum()) == 8


def test_published_networks_are_listed_first_and_digits_last() -> None:
    cards = [bundle.card for bundle in select("vision/*")]
    names = [card.name for card in shelf_order(cards)]
    assert sorted(names) == sorted(card.name for card in cards)
    assert {SQUEEZENET, "vision/dense-resnet20-cifar10"} <= set(names[:8])
    digits = ["digits" in name.split("-") for name in names]
    assert any(digits) and digits == sorted(digits)


def test_each_kind_of_zeros_has_a_column() -> None:
    """Weights first, then what most models drop; a model that drops no such thing has an empty cell."""
    cards = [bundle.card for bundle in select() if bundle.card.domain != "toy"]
    parts = dropped_parts(cards)
    assert parts[:2] == ["weights", "edges"] and {"channels", "gaussians", "heads"} <= set(parts)
    assert dropped_parts([card for card in cards if card.domain == "graph"]) == ["weights", "edges", "heads"]
    [ticket] = [card for card in cards if card.name == "graph/teddy-gcn-digits-g30-w80"]
    cells = [_dropped(ticket, part) for part in ("weights", "edges", "channels")]
    assert cells == ["80.0 %", "30.0 %", ""]
