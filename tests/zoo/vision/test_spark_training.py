"""SparK as commands: pre-training with resume, the linear probe, fine-tuning, the study, pictures."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import zoo
from zoo.bundles.catalog import find
from zoo.bundles.make import Target, Work, make
from zoo.bundles.recipes import find_row
from zoo.cli import main
from zoo.errors import ConfigError
from zoo.harness.verify import verify_bundle
from zoo.shared.errors import IdentityError, TrainingError
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.train import Recipe
from zoo.studies.runner import reproduce
from zoo.vision.data import accuracy, load_images
from zoo.vision.makers import classifier
from zoo.vision.models import ResNet
from zoo.vision.spark.command import Pretrain
from zoo.vision.spark.encoder import SparKEncoder
from zoo.vision.spark.objective import SparK
from zoo.vision.spark.pictures import reconstructions, write_sheet
from zoo.vision.spark.pretraining import held_out_loss, pretraining
from zoo.vision.spark.probe import fit_head

SMALL = ("--width", "4", "--decoder", "8", "--ratio", "0.5", "--batch", "128", "--execution", "grid")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bundle made by the command as it is typed."""
    folder = tmp_path_factory.mktemp("spark")
    picture = folder / "pictures.png"
    out = folder / "spark-small"
    command = ["pretrain", "vision", "--out", str(out), *SMALL, "--epochs", "3"]
    assert main([*command, "--pictures", str(picture)]) == 0
    return out, picture


def test_the_command_makes_a_bundle_that_verifies(made, capsys):
    out, picture = made
    assert picture.stat().st_size > 1000
    assert not (out.parent / f".{out.name}.checkpoint").exists()
    assert main(["verify", str(out)]) == 0
    card = find(out).card
    assert card.method.hyperparameters["pretraining"] == "SparK"
    assert "linear probe" in card.metrics[0].protocol
    assert card.metrics[0].value > 0.5
    assert isinstance(zoo.load(str(out)), ResNet)


def test_the_bundle_is_fine_tuned_by_the_usual_command(made, capsys):
    out, _ = made
    tuned = out.parent / "tuned"
    command = ["finetune", "vision", "--model", str(out), "--out", str(tuned), "--train-images", "300"]
    assert main([*command, "--epochs", "5", "--lr", "0.05", "--batch", "16"]) == 0
    assert find(tuned).card.metrics[0].value > 0.5


def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, stopped):
    options = {"width": 4, "decoder": 8, "ratio": 0.5, "batch": 128, "execution": "grid", "epochs": 3}
    with stopped():
        Pretrain(tmp_path / "stopped", **options).run()
    assert (tmp_path / ".stopped.checkpoint" / "state.safetensors").exists()
    assert not (tmp_path / "stopped").exists()
    with pytest.raises(IdentityError, match="other options"):
        Pretrain(tmp_path / "stopped", **{**options, "epochs": 4}).run()
    first, second = (zoo.load(str(Pretrain(tmp_path / n, **options).run())) for n in ("stopped", "whole"))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_pre_training_learns_to_fill_hidden_cells():
    data = load_images("digits").subset(256)
    encoder = SparKEncoder(reinitialised(ResNet(8, 8, channels=1), 0), 8, channels=1)
    spark = SparK(encoder, 16, execution="grid")
    before = held_out_loss(spark, data, data.val, 0.5)
    pretraining(spark, data, Recipe(12, 3e-3, 32, 0.0, optimizer="adam"), 0.5, seed=0).run()
    after = held_out_loss(spark, data, data.val, 0.5)
    assert 0.85 < before < 1.1  # nothing learnt: 15/16
    assert after < 0.75
    whole, visible, filled = reconstructions(spark, data, 0.5, count=6)
    seen = visible == whole
    torch.testing.assert_close(filled[seen & (whole != 0.5)], whole[seen & (whole != 0.5)], atol=1e-5, rtol=0)
    error = (filled - whole).square().mean()
    assert error < (visible - whole).square().mean()


def test_the_probe_fits_the_head_alone():
    data = load_images("digits")
    model = reinitialised(ResNet(8, 8, channels=1), 0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    low = accuracy(model, data, data.test)
    fit_head(model, data)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"linear.weight", "linear.bias"}
    assert accuracy(model, data, data.test) > max(0.5, low + 0.2)  # random features say that much


def test_pictures_are_written(tmp_path):
    from PIL import Image

    data = load_images("digits")
    spark = SparK(SparKEncoder(ResNet(8, 4, channels=1), 8, channels=1), 8, execution="grid")
    path = write_sheet(spark, data, 0.5, tmp_path / "sheet.png", count=5)
    assert Image.open(path).size == (5 * 10 * 4, 3 * 10 * 4)


TINY = {
    "pretrain_epochs": 1,
    "few": 20,
    "few_epochs": 1,
    "all_epochs": 1,
    "train_images": 60,
    "seeds": 1,
    "lrs": (0.05,),
    "width": 4,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A tiny study: its cells and its result."""
    folder = tmp_path_factory.mktemp("study")
    return folder, reproduce("spark", out=folder / "out", cells=folder / "cells", **TINY).result


def test_the_study_reports_and_resumes(study):
    folder, first = study
    assert next(v for v in first.verdicts if "occupancy" in v.claim).verdict == "holds"
    assert {row["arm"] for row in first.rows} >= {"scratch", "SparK", "no re-masking", "single scale"}
    probes = {(row["arm"], row["labels"]): row["accuracy"] for row in first.rows if row["what"] == "probe"}
    assert len(probes) == 8 and all(0 < accuracy < 1 for accuracy in probes.values())
    assert len(set(probes.values())) > 4, "each arm has features of its own"
    kept = sorted((folder / "cells").glob("*.safetensors"))
    again = reproduce("spark", out=folder / "out", cells=folder / "cells", **TINY)
    assert sorted((folder / "cells").glob("*.safetensors")) == kept
    assert again.result == first
    assert json.loads((folder / "out" / "spark.json").read_text())["cells"]["computed"] == 0


def test_bundles_from_recipes_verify(tmp_path):
    """The probe, and what is fine-tuned from it, with rows that take a second."""
    rows = {
        name: dataclasses.replace(find_row(f"vision/{name}"), name=f"vision/{name}-small", seeds=1, **changes)
        for name, changes in (
            ("dense-resnet8-digits-n100", {}),
            ("spark-resnet8-digits", {"twin": "vision/dense-resnet8-digits-n100-small"}),
        )
    }
    arguments = {"depth": 8, "width": 4, "channels": 1}
    dense = dataclasses.replace(
        rows["dense-resnet8-digits-n100"],
        arguments=arguments,
        recipe={**rows["dense-resnet8-digits-n100"].recipe, "epochs": 1},
    )
    spark = dataclasses.replace(
        rows["spark-resnet8-digits"],
        arguments=arguments,
        options={**rows["spark-resnet8-digits"].options, "width": 4, "decoder": 8, "execution": "grid"},
        recipe={"epochs": 1, "lr": 0.003, "batch": 128},
    )
    target = Target(tmp_path)
    cards = [find(make(row, target)).card for row in (dense, spark)]
    for card in cards:
        assert verify_bundle(find(tmp_path / card.name.partition("/")[2])).ok, card.name
    assert cards[1].dense_twin == cards[0].name and cards[1].method.name == "spark"
    assert cards[1].metrics[0].value > cards[0].metrics[0].value, "a probe of all labels after one epoch"
    assert cards[1].method.hyperparameters["hidden_loss"] > 0
    tuned = classifier(dense, 0, zoo.load(str(tmp_path / spark.slug)), Work(tmp_path / "work")).model
    fresh = classifier(dense, 0, None, Work(tmp_path / "work")).model
    assert not torch.equal(tuned.conv1.weight, fresh.conv1.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "0.99"], "mask ratio"),
        (["--cell", "3"], "multiple"),
        (["--cell", "8"], "one cell"),
        (["--decoder", "6"], "multiple of 4"),
        (["--dataset", "nothing"], "nothing"),
        (["--device", "cuda:7"], "cuda:7"),
        (["--depth", "9"], "depth"),
        (["--epochs", "0"], "epochs"),
    ],
)
def test_bad_options_are_refused_with_the_remedy(tmp_path, capsys, options, message):
    assert main(["pretrain", "vision", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_names_its_domains(capsys):
    assert main(["pretrain"]) == 2
    assert "vision" in capsys.readouterr().err
    assert main(["pretrain", "--help"]) == 0
    assert main(["pretrain", "vision", "--help"]) == 0
    assert "--ratio" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "cifar"}, "image set"),
        ({"arms": ("spark",)}, "arm"),
        ({"device": "tpu"}, "tpu"),
        ({"ratio": 0.99}, "mask ratio"),
    ],
)
def test_bad_studies_are_refused(tmp_path, options, message):
    with pytest.raises((ConfigError, TrainingError), match=message):
        reproduce("spark", out=tmp_path, cells=tmp_path, **options)
