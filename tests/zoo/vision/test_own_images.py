"""Images of your own: folders and lists, a new head at the same sparsity, figures measured on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.bundles.card import read_card
from zoo.bundles.publish import Figure
from zoo.bundles.store import load
from zoo.cli import main
from zoo.errors import DataError, TaskError
from zoo.harness.making import figures_on
from zoo.harness.runner import evaluate
from zoo.shared.masks import masks_of
from zoo.vision.data import load_images
from zoo.vision.folders import is_folder

SPARSE = "vision/global-magnitude-convnet-digits-s90"


def draw(folder, classes=("cat", "dog", "owl"), count=10, size=(12, 10), mode="RGB"):
    """Images of whose class the brightness tells."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(60 * number, 60 * number + 60, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name / f"{i}.png")
    return folder


def test_a_folder_for_each_class(tmp_path):
    images = load_images(str(draw(tmp_path / "mine")))
    assert [len(part) for part in (images.train, images.val, images.test)] == [21, 3, 6]
    assert images.test.images.shape[1:] == (3, 12, 10)
    assert images.test.labels.bincount().tolist() == [2, 2, 2]
    assert load_images(f"{tmp_path}/mine@8L").test.images.shape[1:] == (1, 8, 8)
    bright = images.train.images.float().mean((1, 2, 3))
    assert all(
        bright[images.train.labels == i].max() < bright[images.train.labels == i + 1].min() for i in (0, 1)
    )
    Image.new("RGB", (10, 12)).save(tmp_path / "mine" / "cat" / "new.png")
    again = load_images(str(tmp_path / "mine"))
    assert sum(len(part) for part in (again.train, again.val, again.test)) == 31, "files are looked at again"


def test_a_split_that_is_given_and_a_list(tmp_path):
    draw(tmp_path / "mine" / "train", count=8)
    draw(tmp_path / "mine" / "test", count=2)
    images = load_images(str(tmp_path / "mine"))
    assert [len(part) for part in (images.train, images.val, images.test)] == [22, 2, 6]
    rows = [f"mine/train/{c}/{i}.png,{c},train" for c in ("cat", "dog") for i in range(8)]
    rows += [f"mine/test/{c}/{i}.png,{c},{s}" for c in ("cat", "dog") for i, s in enumerate(("val", "test"))]
    (tmp_path / "list.csv").write_text("file,label,split\n" + "\n".join(rows))
    images = load_images(str(tmp_path / "list.csv"))
    assert [len(part) for part in (images.train, images.val, images.test)] == [16, 2, 2]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "cat" / "0.png").write_bytes(b"no image"), "cat/0.png: cannot be read as an image"),
        (lambda f: Image.new("RGB", (5, 5)).save(f / "cat" / "0.png"), "first image.*give one size|is 10x12"),
        (lambda f: [p.unlink() for p in (f / "cat").iterdir() if p.name > "1.png"], "three are the least"),
        (lambda f: (f / "train").mkdir(), "a split needs train and test"),
    ],
)
def test_folders_that_are_refused(tmp_path, spoil, message):
    spoil(draw(tmp_path / "mine"))
    with pytest.raises(DataError, match=message):
        load_images(str(tmp_path / "mine"))


def test_a_grey_image_among_coloured_ones_gets_three_channels(tmp_path):
    draw(tmp_path / "mine")
    pixels = np.arange(120, dtype=np.uint8).reshape(12, 10)
    for number in range(10):
        Image.fromarray(pixels).save(tmp_path / "mine" / "cat" / f"{number}.png")
    images = load_images(str(tmp_path / "mine"))
    assert images.train.images.shape[1:] == (3, 12, 10)
    cats = images.train.images[images.train.labels == 0]
    assert (cats == torch.from_numpy(pixels)).all()


def test_names_of_nothing(tmp_path):
    assert not is_folder("imagenet")
    with pytest.raises(DataError, match="Unknown image set 'imagenet'. There are: digits.*a folder with one"):
        load_images("imagenet")
    with pytest.raises(DataError, match="no folder of images"):
        load_images(str(tmp_path / "nowhere"))
    (tmp_path / "one").mkdir()
    with pytest.raises(DataError, match="0 classes"):
        load_images(str(tmp_path / "one"))


def test_own_images_go_through_every_command(tmp_path, monkeypatch, capsys):
    """A new head masked at the same share, zeros kept, and figures of the own images alone on the card."""
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "mine")
    start = ["finetune", "vision", "--dataset", "mine", "--epochs", "1", "--batch", "8"]
    assert main([*start, "--model", "vision/dense-convnet-digits", "--out", "dense"]) == 0
    card = read_card(tmp_path / "dense" / "card.yaml")
    assert [metric.task for metric in card.metrics] == ["images:mine@8L"]
    assert card.architecture.args["classes"] == 3 and card.data.name == "mine"
    capsys.readouterr()
    assert main([*start, "--model", SPARSE, "--out", "sparse"]) == 2
    said = capsys.readouterr().err
    assert "give that model with --twin DIR" in said and "loss" not in said, "refused before it is trained"
    assert main([*start, "--model", SPARSE, "--twin", "dense", "--out", "sparse"]) == 0
    before, after = load(SPARSE), load("sparse")
    old, new = masks_of(before), masks_of(after)
    head = [name for name, mask in old.items() if mask.keep.shape != new[name].keep.shape]
    assert len(head) == 1 and new[head[0]].keep.shape[0] == 3
    assert abs(new[head[0]].sparsity - old[head[0]].sparsity) < 1 / new[head[0]].numel + 1e-9
    assert all(old[name].equal(new[name]) for name in old if name not in head)
    assert new.lost_zeros(after) == []
    assert main(["sparsify", "dense", "--method", "prune", "--sparsity", "0.5", "--out", "pruned"]) == 0
    assert main(["eval", "pruned", "--data", "mine@8L"]) == 0
    capsys.readouterr()
    with pytest.raises(TaskError, match="has 3 classes, this ConvNet 10. Give it a new head"):
        evaluate(before, "images:mine@8L")


def test_labels_decide_the_classes(tmp_path):
    images = load_images(str(draw(tmp_path / "mine", classes=("b", "a"), count=4)))
    assert int(torch.cat([images.train.labels, images.test.labels]).max()) == 1


def test_what_models_only_train_on_keeps_the_figures_of_the_card(capsys):
    figures = [Figure("vision/set5-x2")]
    assert figures_on("vision", "t91", figures)[0] == figures
    assert figures_on("vision", "digits", figures)[0] == [Figure("vision/digits")]
    assert main(["eval", "vision/dense-edsr-x2", "--data", "t91"]) == 2
    assert "models only train on it" in capsys.readouterr().err
