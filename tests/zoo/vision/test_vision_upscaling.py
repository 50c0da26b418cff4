"""Super-resolution: data, metrics, ISS-P and its experiment, on images made for the tests."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from zoo.bundles.store import load, save
from zoo.cli import main
from zoo.errors import ConfigError, DataError
from zoo.harness.tasks import get_task
from zoo.methods.iss_p import ISSP
from zoo.registry import FINETUNERS
from zoo.shared.errors import BudgetError
from zoo.shared.masks import masks_of
from zoo.shared.pruning.inventory import inner_weights
from zoo.shared.train import Recipe
from zoo.studies.cells import CellCache
from zoo.vision.domain import make_job
from zoo.vision.studies.superres import BICUBIC, CHOICES, STUDY, SuperresOptions, cases
from zoo.vision.superres import PatchBatches, load_t91, load_test, luma, quality
from zoo.vision.upscalers import EDSR, SwinIR

QUICK = Recipe(epochs=2, lr=1e-3, batch=2, weight_decay=0.0, optimizer="adam")


def quick_job(model):
    """Two epochs of four steps on patches of T91."""
    job = make_job("t91", recipe=QUICK, model=model)
    return job.replace(batches=dataclasses.replace(job.batches, patch=8, steps=4))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder laid out like the real one, with small images of stripes and noise."""
    from PIL import Image

    def image(seed, side):
        generator = np.random.default_rng(seed)
        waves = np.sin(np.arange(side)[:, None] / (2 + seed % 3)) + np.cos(np.arange(side)[None] / 3)
        noise = generator.normal(0, 0.1, (side, side, 3))
        return Image.fromarray(np.uint8(np.clip(128 + 50 * (waves[..., None] + noise), 0, 255)))

    root = tmp_path / "data" / "superres"
    for folder in ("T91", "Set5/HR", "Set5/LRx2", "Set14/HR", "Set14/LRx2"):
        (root / folder).mkdir(parents=True)
    for seed in range(4):
        image(seed, 41).save(root / "T91" / f"t{seed}.png")  # odd sides are cropped
    for name in ("Set5", "Set14"):
        for seed in (7, 8):
            large = image(seed, 40)
            large.save(root / name / "HR" / f"{seed}.png")
            large.resize((20, 20), Image.Resampling.BICUBIC).save(root / name / "LRx2" / f"{seed}.png")
    monkeypatch.setenv("ZOO_DATA", str(tmp_path / "data"))
    return root


def test_images_come_in_pairs_and_patches_from_both(data):
    pairs = load_t91(2)
    assert [tuple(side.shape) for side in pairs[0]] == [(3, 20, 20), (3, 40, 40)]
    batches = PatchBatches(pairs, patch=8, batch=3, steps=2)
    drawn = list(batches.draw(torch.Generator().manual_seed(0)))
    assert len(drawn) == len(batches) == 2
    for small, large in drawn:
        assert small.shape == (3, 3, 8, 8) and large.shape == (3, 3, 16, 16)
        shrunk = torch.nn.functional.avg_pool2d(large, 2)
        assert (shrunk - small).abs().mean() < 0.05  # the same piece, turned and mirrored alike
    again = list(batches.draw(torch.Generator().manual_seed(0)))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(drawn, again, strict=True))


def test_missing_images_are_said_with_the_remedy(data, monkeypatch):
    with pytest.raises(DataError, match="x2 and x4"):
        load_test("Set5", 3)
    monkeypatch.setenv("ZOO_DATA", "/nowhere")
    with pytest.raises(DataError, match="ZOO_DATA"):
        load_t91(2)


def test_quality_is_that_of_luma_without_borders():
    true = torch.full((3, 20, 20), 100, dtype=torch.uint8)
    made = true.float().add(4).div(255)
    made[:, :2] = 0  # inside the border that is cropped
    psnr, ssim = quality(made, true, crop=2)
    difference = 4 * 219 / 255  # luma spans 16 to 235
    assert psnr == pytest.approx(20 * math.log10(255 / difference), abs=1e-3)
    assert 0.99 < ssim < 1
    assert luma(torch.full((3, 1, 1), 255.0)).item() == pytest.approx(235, abs=1e-3)


@pytest.mark.parametrize("network", [EDSR(1, 4), SwinIR(1, 8, 2, window=4)], ids=["edsr", "swinir"])
@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_ends_at_the_share_with_every_zero_kept(network, choice, data):
    made, again = (ISSP(0.75, choice).sparsify(network, quick_job(network)) for _ in range(2))
    masks, pairs = made.masks, zip(made.model.parameters(), again.model.parameters(), strict=True)
    assert list(masks) == inner_weights(network) and not masks.lost_zeros(made.model)
    for mask in masks.values():
        assert mask.kept == mask.numel - int(0.75 * mask.numel)
    assert again.masks.equal(masks) and all(torch.equal(a, b) for a, b in pairs)


def test_an_untrained_network_enlarges_bicubically(data):
    small = load_test("Set5", 2)[0][0][None].float() / 255
    network = EDSR(1, 4).eval()
    with torch.no_grad():
        made = network(small)
    expected = torch.nn.functional.interpolate(small, scale_factor=2, mode="bicubic", align_corners=False)
    assert torch.equal(made, expected)


def test_what_can_not_be_trained_is_refused(data):
    network = EDSR(1, 4)
    job = quick_job(network)
    with pytest.raises(BudgetError, match="sparsity"):
        ISSP(1.0).sparsify(network, job)
    with pytest.raises(BudgetError, match="alpha"):
        ISSP(0.5, alpha=1.0).sparsify(network, job)
    with pytest.raises(ConfigError, match="shrink_share"):
        ISSP(0.5, shrink_share=1.0).sparsify(network, job)
    with pytest.raises(ConfigError, match="edsr"):
        SuperresOptions(networks=("edsrr",))
    with pytest.raises(ConfigError, match="sparsity 0"):
        SuperresOptions(sparsities=(0.0,))


def test_the_study_sums_up_its_cells(data, tmp_path, monkeypatch):
    monkeypatch.setattr("zoo.vision.studies.superres.NETWORKS", {"edsr": lambda: EDSR(1, 4)})
    config = SuperresOptions(networks=("edsr",), sparsities=(0.5, 0.75), seeds=2, epochs=2, steps=2, batch=2)
    cells = CellCache(tmp_path / "cells")
    result = STUDY.run(config, cells)
    assert len(result.rows) == len(list(cases(config))) == cells.misses == 2 * (1 + 2 * 4) + 1
    assert len(result.verdicts) == 8 and all(v.verdict != "not measured" for v in result.verdicts)
    named = [(row[0], row[1]) for row in result.tables[0].rows]
    assert set(named) >= {(arm, zeros) for arm in CHOICES for zeros in ("50 %", "75 %")}
    assert {BICUBIC, "dense"} <= {name for name, _ in named}
    assert [row[0] for row in result.tables[1].rows] == [arm for arm in CHOICES if arm != "iss-p"]
    assert len(result.plots) == 1
    found = next(r for r in result.rows if r["arm"] == "iss-p" and r["level"] == 0.75)
    assert found["sparsity"] == pytest.approx(0.75, abs=0.01) and len(found["psnr Set14"]) == 2


def test_an_upscaler_is_pruned_verified_and_tuned(data, card_of, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZOO_PATH", str(tmp_path))
    model, task = EDSR(1, 4).eval(), get_task("vision/set5-x2")
    value, flops = task.evaluate(model).metrics["psnr"], task.flops(model)
    architecture = {"name": "vision/edsr", "args": model.current_arguments()}
    figure = (task.name, "psnr", value.value, value.stderr, (flops.dense, flops.sparse))
    card = card_of("vision/tiny-edsr", architecture, *figure)
    dense, out, tuned = save(model, tmp_path / "tiny-edsr", card=card), tmp_path / "made", tmp_path / "tuned"
    options = ["--sparsity", "0.5", "--epochs", "2", "--batch", "2"]
    assert main(["sparsify", str(dense), "--method", "iss-p", "--out", str(out), *options]) == 0
    assert (
        main(
            ["finetune", "vision", "--model", str(out), "--out", str(tuned), "--epochs", "1", "--batch", "1"]
        )
        == 0
    )
    for folder in (out, tuned):
        assert main(["verify", str(folder)]) == 0, capsys.readouterr().out
    sparse = load(str(tuned))
    assert masks_of(sparse).equal(masks_of(load(str(out)))) and not masks_of(sparse).lost_zeros(sparse)
    with pytest.raises(ConfigError, match="there already"):
        FINETUNERS.get("vision")(model=str(out), out=tuned).run()
