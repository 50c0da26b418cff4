"""CHESS in the house: bundles that keep their thresholds, the task of what they spare, the experiment."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from zoo.bundles.catalog import find
from zoo.bundles.store import info, load, save
from zoo.errors import BundleError, ConfigError
from zoo.harness.tasks import get_task
from zoo.llm.methods.chess import Chess
from zoo.llm.models import serving
from zoo.llm.models.serving import PackedGatedMLP
from zoo.llm.models.thresholds import thresholds_of
from zoo.shared.store.io import write_json
from zoo.studies.cells import CellCache
from zoo.studies.runner import get_study

TWIN = "llm/dense-shakespeare"
METHOD = Chess(sparsity=0.5, windows=4, length=64)


@pytest.fixture(autouse=True)
def _small_weights_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "SMALL", 0)


@pytest.fixture(scope="module")
def made():
    return METHOD.sparsify(load(TWIN))


def card(**changes):
    fields = find(TWIN).card.to_dict()
    fields |= {"name": "llm/chess-test", "method": {"name": "chess", "hyperparameters": {}, "seed": 0}}
    for metric in fields["metrics"]:
        known = {key: metric[key] for key in ("value", "per_seed", "mean", "spread")}
        metric["dense"] = {"name": TWIN, **known}
    return {**fields, "dense_twin": TWIN, "evidence": None, **changes}


def test_a_bundle_keeps_thresholds_and_packs_them(made, tmp_path):
    path = save(made.model, tmp_path / "chess-test", card=card(), masks=made.masks, extras=made.extras)
    again, packed = load(path), load(path, execution="packed")
    wanted = thresholds_of(made.model)
    assert len(wanted) == 12 and info(again).extras.keys() == made.extras.keys()
    for name, value in thresholds_of(again).items():
        assert torch.equal(value, wanted[name])
    assert isinstance(packed.model.layers[3].mlp, PackedGatedMLP)
    ids = torch.randint(1024, (1, 7))
    with torch.no_grad():
        outputs = [model.float()(ids).logits for model in (again, packed)]
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-2, rtol=2e-2)


def test_thresholds_of_another_model_are_refused(made, tmp_path):
    extras = dict(made.extras)
    extras["thresholds/model.layers.0.mlp.act_fn"] = torch.ones(7)
    with pytest.raises(BundleError, match="another model"):
        save(made.model, tmp_path / "wrong", card=card(), masks=made.masks, extras=extras)
    assert not (tmp_path / "wrong").exists()


def test_the_task_measures_what_thresholds_spare(made):
    task = get_task("llm/sparsity-embedded")
    found = task.evaluate(made.model)
    assert found.metrics["closed_gates"].value == pytest.approx(0.5, abs=0.05) and found.n == 47
    # half of up's and down's 704 columns and a quarter of q's and o's 256, of 1440 in a block
    assert found.metrics["skipped_weights"].value == pytest.approx(0.289, abs=0.02)
    assert task.evaluate(load(TWIN)).metrics["skipped_weights"].value == 0.0


def test_the_study_sums_up(tmp_path):
    study = get_study("chess")
    seconds = {"ours": {"median": 0.1}, "dense": {"median": 0.15}}
    labels = {"shape": "s", "weights": "float32", "batch": 1, "ours": "CHESS 50%", "skips": "35%"}
    goal = {"ratio": 1.25, "over": "dense", "reached": 1.5, "met": True}
    row = {"labels": labels, "seconds": seconds, "goal": goal}
    write_json(tmp_path / "llm_decode-s.json", {"rows": [row]})
    config = study.options(
        subjects=(TWIN,),
        seeds=1,
        windows=2,
        length=48,
        documents=1,
        sparsities=(0.5,),
        step=2.0,
        speed=tmp_path,
    )
    result = study.run(config, CellCache(tmp_path / "cells"))
    arms = {row["arm"]: row for row in result.rows}
    assert len(arms) == 8 and arms["per-token oracle"]["errors"] < arms["CHESS"]["errors"]
    assert 0 < arms["CHESS"]["skipped"] < arms["CHESS + q, o"]["skipped"]
    assert [t.title for t in result.tables][-1].startswith("Decoding")
    speed = result.verdicts[-1]
    assert speed.measured == "1.50x" and speed.verdict == "holds"
    again = study.run(config, CellCache(tmp_path / "cells"))
    assert again.rows == result.rows
    empty = dataclasses.replace(config, speed=tmp_path / "nothing")
    assert study.run(empty, CellCache(tmp_path / "cells")).verdicts[-1].verdict == "not measured"
    with pytest.raises(ConfigError, match="at least 1 of sparsities"):
        study.options(sparsities=())
