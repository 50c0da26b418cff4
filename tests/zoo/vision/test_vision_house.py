"""The vision domain inside the zoo: registry, data, tasks, training, cells, plug-ins and refusals."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from pathlib import Path

import pytest
import torch

from zoo.bundles.store import info, load, save
from zoo.cli import main
from zoo.errors import ConfigError, DataError, TaskError
from zoo.harness.tasks import get_task
from zoo.registry import FINETUNERS, Registry
from zoo.shared.errors import BudgetError, MaskError, PatternError, TrainingError
from zoo.shared.masks import masks_of, set_masks
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.store.io import read_json
from zoo.shared.structure.relatives import copied, reinitialised
from zoo.shared.structure.surgery import drop_layers
from zoo.shared.train import Fit, Recipe, step_macs
from zoo.studies.cells import CellCache
from zoo.vision.data import ImageBatches, accuracy, drawn_moves, load_images, shifted_and_mirrored
from zoo.vision.domain import make_job
from zoo.vision.models import MLP, ConvNet, ResNet, ViT, pretrained_resnet
from zoo.vision.studies import claims, pruning
from zoo.vision.studies.common import unpacked
from zoo.vision.studies.pruning import PruningOptions

RESULTS = Path(__file__).parents[3] / "benchmarks/results/vision/claims"
needs_data = pytest.mark.skipif(not os.environ.get("ZOO_DATA"), reason="needs the images below ZOO_DATA")


def test_the_digits_are_split_once_and_for_all():
    data = load_images("digits")
    assert (len(data.train), len(data.val), len(data.test)) == (1167, 130, 500)
    values = data.normalised(data.train.images)
    assert values.mean().abs() < 1e-5 and (values.std() - 1).abs() < 1e-3
    with pytest.raises(DataError, match="Unknown image set"):
        load_images("cifar100")
    with pytest.raises(DataError, match="1167"):
        data.subset(2000)


def test_augmentation_moves_images_by_up_to_four_pixels():
    images = torch.zeros(64, 1, 32, 32, dtype=torch.uint8)
    images[:, 0, 16, 10] = 255
    moved = shifted_and_mirrored(images, drawn_moves(64, torch.Generator().manual_seed(0)))
    places = moved.flatten(1).argmax(1)
    rows, columns = places // 32, places % 32
    assert set(rows.tolist()) <= set(range(12, 21)) and len(set(rows.tolist())) > 5
    assert set(columns.tolist()) <= {*range(6, 15), *range(17, 26)}
    assert (columns < 16).any() and (columns > 16).any()


@needs_data
def test_published_weights_have_their_published_accuracy():
    data = load_images("cifar10-true")
    model = pretrained_resnet(20)
    first = data.test.take(torch.arange(300))
    assert accuracy(model, data, first) == pytest.approx(0.92, abs=0.02)
    assert (len(data.train), len(data.val), len(data.test)) == (7107, 790, 932)


def test_relatives_are_built_from_arguments():
    for model in (ConvNet((8, 16), (1, 2)), MLP(), ViT(), ResNet(8, 4, channels=1)):
        wide = model.wider(2)
        assert sum(p.numel() for p in wide.parameters()) > 2 * sum(p.numel() for p in model.parameters())
        fresh = reinitialised(model, 3)
        assert torch.equal(next(fresh.parameters()), next(reinitialised(model, 3).parameters()))
    with pytest.raises(ConfigError, match="6 n"):
        ResNet(21)


def test_what_lost_blocks_or_hidden_units_is_built_from_its_arguments():
    net, vit = ResNet(20, 4, channels=1), ViT(dim=8, depth=2, heads=2, hidden=16)
    drop_layers(net, ["layer1.0", "layer1.1", "layer1.2", "layer3.1"])
    vit.blocks[1].fc1, vit.blocks[1].fc2 = torch.nn.Linear(8, 5), torch.nn.Linear(5, 8)
    x = torch.rand(2, 1, 8, 8)
    for model in (net.eval(), vit.eval()):
        same = type(model)(**model.current_arguments()).eval()
        same.load_state_dict(model.state_dict())
        assert torch.equal(same(x), model(x))
    assert net.current_arguments()["blocks"] == [0, 3, 2] and vit.current_arguments()["hidden"] == [16, 5]
    with pytest.raises(ConfigError, match="1 to 3 blocks"):
        ResNet(20, 4, blocks=[3, 0, 3])
    with pytest.raises(ConfigError, match="2 blocks"):
        ViT(depth=2, hidden=[4])


def test_a_resumed_training_equals_an_uninterrupted_one(net, images):
    masks = sparsify(net, sparsity=0.5)
    recipe = Recipe(epochs=4, lr=0.05, batch=16)

    def fit() -> Fit:
        return Fit(copied(net), ImageBatches(images, 16), recipe, seed=1)

    whole, first, second = fit(), fit(), fit()
    with masks.attach(whole.model, whole.optimizer):
        whole.run()
    with masks.attach(first.model, first.optimizer):
        first.run(until=2)
    second.load_state({name: value.clone() for name, value in first.state().items()})
    with masks.attach(second.model, second.optimizer):
        second.run()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name])


def test_training_cost_counts_kept_weights(net, images):
    example = ImageBatches(images, 16).example()
    dense = step_macs(net, example)
    sparsify(net, sparsity=0.75, budget="uniform")
    assert step_macs(net, example) == pytest.approx(dense / 4, rel=0.02)
    with_dense = step_macs(net, example, dense_gradients=True)
    assert with_dense == pytest.approx(dense / 3 + 2 * dense / 12, rel=0.02)


def test_diverging_training_is_refused(net, images):
    with pytest.raises(TrainingError, match="lower the lr"):
        Fit(net, ImageBatches(images, 16), Recipe(epochs=8, lr=1e30, batch=16)).run()


def test_a_job_without_images_is_refused(net):
    with pytest.raises(ConfigError, match="no card"):
        make_job(model=net)


def test_masks_of_another_model_and_tied_weights_are_refused(net):
    masks = sparsify(net, sparsity=0.5)
    with pytest.raises(MaskError, match="another model|no parameter"):
        set_masks(reinitialised(ConvNet((8, 16), (1, 2), classes=4), 0), masks)
    tied = reinitialised(MLP(64, (64, 64), 10), 0)
    tied.layers[3].weight = tied.layers[1].weight
    both = {"layers.1.weight": torch.ones(64, 64).bool(), "layers.3.weight": torch.zeros(64, 64).bool()}
    with pytest.raises(MaskError, match="tied"):
        set_masks(tied, type(masks)(both))
    with pytest.raises(PatternError, match="multiple"):
        sparsify(reinitialised(ConvNet((6, 10), (1, 2), classes=4), 0), pattern="2:8")


def test_tasks_refuse_models_of_other_images(net):
    with pytest.raises(TaskError, match="channels"):
        get_task("vision/digits").evaluate(ResNet(8, 4))
    with pytest.raises(TaskError, match="upscaler"):
        get_task("vision/set5-x2").evaluate(net)


SMALL = PruningOptions(
    arms=("global magnitude", "random mask"),
    sparsities=(0.9,),
    seeds=2,
    widths=(),
    dense_epochs=1,
    epochs=1,
    train_images=128,
    test_images=100,
)


def test_the_benchmark_resumes_from_its_cells(tmp_path):
    cells = CellCache(tmp_path)
    result = pruning.STUDY.run(SMALL, cells)
    assert len(result.rows) == len(list(pruning.cases(SMALL))) == 8
    assert cells.misses == 8 + 2  # and the dense networks themselves
    again = CellCache(tmp_path)
    assert pruning.STUDY.run(SMALL, again) == result and again.misses == 0
    assert [t.title for t in result.tables][0] == "Accuracy (%)" and len(result.plots) == 2
    row = next(r for r in result.rows if (r["arm"], r["seed"]) == ("global magnitude", 0))
    assert unpacked(row).mean() == pytest.approx(row["accuracy"]) and row["images"] == 100
    model, dense = pruning.dense_start(SMALL, {"width": 1.0, "seed": 0}, again)
    assert dense["sparsity"] == 0 and row["flops"] == dense["flops"] + row["own_flops"]
    assert masks_of(model) is None


def test_outer_sparsities_are_for_the_main_arms(tmp_path):
    config = dataclasses.replace(SMALL, arms=("global magnitude", "LAMP"), outer=(0.98,), seeds=1)
    assert config.levels == (0.9, 0.98)
    assert [case["arm"] for case in pruning.cases(config) if case["level"] == 0.98] == ["global magnitude"]
    result = pruning.STUDY.run(config, CellCache(tmp_path))
    lamp = next(row for row in result.tables[0].rows if row[0] == "LAMP")
    assert lamp[1] and lamp[2] == ""
    curves = {series.label: list(series.x) for series in result.plots[0].series}
    assert curves["LAMP"] == [10.0] and curves["global magnitude"] == [10.0, 2.0]


def test_cells_are_the_same_on_every_device():
    case = {"arm": "BiP", "level": 0.9, "seed": 1, "width": 1.0}
    key = pruning.STUDY.key(SMALL, case)
    assert "device" not in key and key["code"] and key["data"]
    assert pruning.STUDY.key(dataclasses.replace(SMALL, seeds=5), case) == key
    assert pruning.STUDY.key(dataclasses.replace(SMALL, epochs=2), case) != key
    assert pruning.STUDY.key(dataclasses.replace(SMALL, train_images=64), case)["data"] != key["data"]
    assert pruning.STUDY.key(SMALL, {**case, "arm": "LAMP"})["code"] != key["code"]


def test_unknown_arms_and_impossible_options_are_refused():
    with pytest.raises(ConfigError, match="global magnitude"):
        PruningOptions(arms=("global magnitud",))
    with pytest.raises(ConfigError, match="true pixels"):
        PruningOptions(dataset="cifar10-jpeg", pretrained=True)
    with pytest.raises(BudgetError):
        PruningOptions(sparsities=(1.0,))
    with pytest.raises(ConfigError, match="at least 1 of epochs"):
        PruningOptions(epochs=0)
    with pytest.raises(ConfigError, match="jackpots"):
        claims.ClaimsOptions(studies=("jackpot",))


def test_studies_are_summed_up_by_their_claims():
    figures = {
        "soup": lambda s: 90.0 + s + s * s / 100,
        "mean member": lambda s: 88.0 + s,
        "best member": lambda s: 90.0 + s + (1 - s) / 10,
        "soup, norms not recalibrated": lambda s: 20.0,
        "one network, three times as long": lambda s: 95.0 + s,
    }
    rows = [
        {"study": "soups", "arm": arm, "level": "", "seed": s, "value": figure(s)}
        for arm, figure in figures.items()
        for s in range(3)
    ]
    result = claims.STUDY.report(rows, claims.ClaimsOptions())
    assert [v.verdict for v in result.verdicts] == ["holds", "cannot be told", "holds", "does not hold"]
    assert result.tables[0].rows[0][0] == "soup" and result.verdicts[0].paper == (28,)
    assert result.verdicts[0].claim == (
        "Sparse soups, 95 % zeros, one phase: 'soup' is 0.5 points or more above 'mean member'"
    )


def test_every_claim_names_figures_that_its_study_gives():
    rows = read_json(RESULTS / "pruning-claims.json")["result"]["rows"]
    given = {(row["study"], row["arm"]) for row in rows}
    for claim in claims.STUDY.claims:
        assert {(claim.only["study"], arm) for arm in (claim.first, claim.second)} <= given


def test_a_toy_package_adds_a_method_by_entry_point(tmp_path, monkeypatch):
    package = tmp_path / "toy_pruning"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from dataclasses import dataclass\n"
        "from zoo.shared.pruning.sparsifier import sparsify\n"
        "from zoo.methods.contract import Sparsified\n\n"
        "@dataclass\nclass Toy:\n    sparsity: float = 0.5\n\n"
        "    def sparsify(self, model):\n"
        "        return Sparsified(model, sparsify(model, sparsity=self.sparsity))\n"
    )
    meta = tmp_path / "toy_pruning-1.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-pruning\nVersion: 1.0\n")
    (meta / "entry_points.txt").write_text("[zoo.methods]\ntoy = toy_pruning:Toy\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert any(e.name == "toy" for e in importlib.metadata.entry_points(group="zoo.methods"))
    registry = Registry("method", "zoo.methods", needs=("sparsify",))
    method = registry.get("toy")(sparsity=0.75)
    made = method.sparsify(reinitialised(ConvNet((8, 16), (1, 2)), 0))
    assert made.masks.sparsity() == pytest.approx(0.75, abs=1e-3)


@pytest.fixture
def dense_bundle(card_of, tmp_path):
    """An untrained small net on digits as a bundle."""
    model = reinitialised(ConvNet((8, 16), (1, 2)), 0).eval()
    task = get_task("vision/digits")
    value, flops = task.evaluate(model).metrics["accuracy"], task.flops(model)
    architecture = {"name": "vision/convnet", "args": model.current_arguments()}
    figure = (task.name, "accuracy", value.value, value.stderr, (flops.dense, flops.sparse))
    return save(model, tmp_path / "tiny", card=card_of("vision/tiny", architecture, *figure))


@pytest.mark.traced
@pytest.mark.parametrize(
    "options",
    [
        ["--method", "magnitude", "--sparsity", "0.8", "--epochs", "1"],
        ["--method", "wgsef", "--sparsity", "0.5", "--epochs", "2", "--sparse-epochs", "1"],
        ["--method", "sparse-ift", "--sparsity", "0.5", "--epochs", "1"],
    ],
    ids=["masked", "cut", "wider"],
)
def test_a_sparsified_model_is_saved_verified_and_tuned(options, dense_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZOO_PATH", str(tmp_path))
    out = tmp_path / "made"
    assert main(["sparsify", str(dense_bundle), "--out", str(out), *options]) == 0
    assert main(["verify", str(out)]) == 0, capsys.readouterr().out
    tuned = tmp_path / "tuned"
    assert main(["finetune", "vision", "--model", str(out), "--out", str(tuned), "--epochs", "1"]) == 0
    assert main(["verify", str(tuned)]) == 0, capsys.readouterr().out
    if "magnitude" in options:
        model = load(str(tuned))
        assert masks_of(model).equal(masks_of(load(str(out)))) and not masks_of(model).lost_zeros(model)
        assert info(model).card.dense_twin == "vision/tiny"
        with pytest.raises(ConfigError, match="there already"):
            FINETUNERS.get("vision")(model=str(out), out=tuned).run()


OPTIONS = {
    "random-pruning": (),
    "dynamic-sparse": (),
    "magnitude": (),
    "lottery-jackpot": (),
    "bip": (),
    "lottery-ticket": ("--rounds", "1", "--rewind", "0"),
    "sparse-soup": ("--members", "2", "--epochs", "2"),
    "pgf": ("--sparsity", "0.75"),
    "bdwp": ("--sparsity", "0.75"),
    "sparse-ift": ("--sparsity", "0.5"),
    "mask-sparsity": ("--sparsity", "0.5", "--sparse-epochs", "1", "--epochs", "2"),
    "wgsef": ("--sparsity", "0.5", "--sparse-epochs", "1", "--epochs", "2"),
}


@pytest.mark.traced
@pytest.mark.parametrize("method", OPTIONS)
def test_zoo_sparsify_takes_every_classifier_method(method, dense_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZOO_PATH", str(tmp_path))
    monkeypatch.setattr("zoo.vision.domain.load_images", lambda name: load_images(name).subset(128))
    own, out = OPTIONS[method], tmp_path / "made"
    usual = {"--sparsity": "0.6", "--epochs": "1"}
    options = [word for pair in usual.items() if pair[0] not in own for word in pair] + [*own]
    command = ["sparsify", str(dense_bundle), "--method", method, "--out", str(out), *options]
    assert main(command) == 0, capsys.readouterr().err
    card = load(str(out)).zoo_info.card
    assert card.method.name == method and card.dense_twin == "vision/tiny"
    assert card.sparsity.overall >= float(options[options.index("--sparsity") + 1]) - 0.01


def test_unknown_options_are_refused(dense_bundle, tmp_path):
    assert main(["sparsify", str(dense_bundle), "--method", "bip", "--sparsit", "0.5", "--out", "x"]) != 0
