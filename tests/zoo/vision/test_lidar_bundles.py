"""The lidar bundles from training to fine-tuning, with detectors that hardly saw anything."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from zoo.bundles.make import Target, make
from zoo.bundles.recipes import find_row
from zoo.bundles.store import load
from zoo.errors import ConfigError
from zoo.harness.verify import verify
from zoo.registry import ARCHITECTURES, FINETUNERS, STUDIES, TASKS
from zoo.studies.cells import CellCache
from zoo.vision.finetune import Finetune
from zoo.vision.lidar import data
from zoo.vision.lidar.detector import Detector
from zoo.vision.lidar.pictures import bev_picture, recall_text
from zoo.vision.lidar.tasks import Scenes, detections
from zoo.vision.studies import dsvt
from zoo.vision.studies.dsvt import DSVTOptions, make_arm


@pytest.fixture(autouse=True)
def _few_scenes(monkeypatch):
    monkeypatch.setattr(Scenes, "frames", 2)
    monkeypatch.setattr(dsvt, "SPEED_FRAMES", 4)
    monkeypatch.setattr(dsvt, "SPEED_ROUNDS", 1)


@pytest.fixture
def bundles(tmp_path) -> Path:
    """The dense-pillar twin and DSVT, made from their rows with two scenes and an epoch."""
    for name in ("dense-pillars-scenes", "dsvt-pillars-scenes"):
        row = find_row(f"vision/{name}")
        few = {"options": {**row.options, "scenes": 2}, "recipe": {**row.recipe, "epochs": 1}, "seeds": 1}
        make(dataclasses.replace(row, **few), Target(tmp_path / "cards"))
    return tmp_path / "cards"


def test_everything_is_registered():
    assert ARCHITECTURES.get("vision/lidar-detector") is Detector
    assert TASKS.get("vision/lidar-scenes") is Scenes
    assert "lidar" not in FINETUNERS.names()
    assert STUDIES.get("dsvt") is dsvt.STUDY


def failed(model: Path) -> list[str]:
    """Figures that do not come back, but for those of the committed evidence, which is of other trainings."""
    (found,) = verify([model])
    return [check.figure for check in found.checks if check.ok is False and "evidence" not in check.figure]


def test_bundles_verify_and_fine_tune(bundles, tmp_path, capsys):
    for folder in sorted(bundles.iterdir()):
        assert failed(folder) == []
    own = bundles / "dsvt-pillars-scenes"
    model = load(own)
    assert isinstance(model, Detector)
    assert sum(p.numel() for p in model.parameters()) < 200_000
    assert (own / "weights.safetensors").stat().st_size < 700_000
    options = {"train_images": 2, "epochs": 1, "batch": 2}
    # Beside the twin, where it is found.
    tuned = Finetune(str(own), bundles / "tuned", **options).run()
    assert failed(tuned) == []
    assert "zoo finetune vision --model" in load(tuned).zoo_info.card.training.command
    assert any(
        not torch.equal(p, q) for p, q in zip(model.parameters(), load(tuned).parameters(), strict=True)
    )
    with pytest.raises(ConfigError, match="is there already"):
        Finetune(str(own), bundles / "tuned", **options).run()
    with pytest.raises(ConfigError, match="Distillation needs classes"):
        Finetune(str(own), tmp_path / "x", distillation=1.0, **options).run()
    with pytest.raises(ConfigError, match="no model of the vision domain"):
        Finetune("graph/dense-gcn-digits", tmp_path / "x").run()


def test_the_study_resumes_from_its_cells(tmp_path):
    config = DSVTOptions(arms=("dsvt", "dense pillars"), seeds=2, scenes=2, test_scenes=2, epochs=1, batch=2)
    cells = CellCache(tmp_path)
    result = dsvt.STUDY.run(config, cells)
    assert len(result.verdicts) == 2 and len(result.rows) == 10
    computed = cells.misses
    again = dsvt.STUDY.run(config, cells)
    assert cells.misses == computed and again.rows == result.rows
    size = next(table for table in result.tables if table.title == "Size and time")
    assert [row[0] for row in size.rows] == ["dsvt", "dense pillars"] and all(
        float(row[2]) > 0 for row in size.rows
    )


def test_pictures_show_points_and_boxes():
    frame = data.scene_frames("test", 1)[0]
    model = make_arm("dense pillars", 0).eval()
    (found,) = detections(model, [frame])
    assert bev_picture(frame, found, model, "a scene", least=0.0)[:4] == b"\x89PNG"
    assert recall_text(frame, found, model.classes).count(" of ") == 3
