"""Studies of pruned and quantised weights on a tiny model: arms run, cells resume, verdicts follow rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from zoo.errors import ConfigError, DataError
from zoo.llm.models import llama
from zoo.llm.studies import common, nm_training, vision_language
from zoo.llm.studies.cfsp import CfspOptions
from zoo.llm.studies.common import Protocol
from zoo.llm.studies.ecoflap import EcoflapOptions
from zoo.llm.studies.flash_llm import FlashOptions
from zoo.llm.studies.gqsa import GqsaOptions
from zoo.llm.studies.nm_training import NMOptions
from zoo.llm.studies.pruning import STUDY, PruningOptions
from zoo.studies.cells import CellCache
from zoo.studies.runner import get_study
from zoo.studies.study import Arm, Claim

SMALL = {"subjects": ("tiny",), "seeds": 2, "windows": 4, "length": 16, "documents": 1}


@pytest.fixture(autouse=True)
def tiny_subject(monkeypatch):
    """One subject, `tiny`, on short text."""
    torch.manual_seed(0)
    model = llama(1024, 32, 44, 2, 4, 2, context=64, tokenizer="shakespeare").eval()
    monkeypatch.setattr(common, "dense_model", lambda subject: model)
    text = common.corpus("embedded")
    short = text.__class__(**{**text.__dict__, "test": (text.test[0][:200],), "train": text.train[:5]})
    monkeypatch.setattr(common, "corpus", lambda name: short)


def run(name, config, folder):
    return get_study(name).run(config, CellCache(folder))


def test_pruning(tmp_path):
    config = PruningOptions(**SMALL, sparsities=(0.5,))
    result = run("llm-pruning", config, tmp_path)
    assert len(result.rows) == 1 + 2 * (3 * 2 + 1)
    assert len(result.verdicts) == 6 and all(verdict.measured for verdict in result.verdicts)
    again = CellCache(tmp_path)
    assert get_study("llm-pruning").run(config, again).rows == result.rows and again.misses == 0


def test_cfsp(tmp_path):
    result = run("cfsp", CfspOptions(**SMALL, ratios=(0.4,), steps=2), tmp_path)
    assert len(result.rows) == 1 + 8 * 2 + 1 and len(result.verdicts) == 8
    mended = [row for row in result.rows if "recovered" in row["arm"]]
    assert len(mended) == 6 and all(sum(row["ranks"]) == 2 * 4 for row in mended)
    assert all(row["ranks"] == [4, 4] for row in mended if row["arm"] != "CFSP, repaired, recovered")
    released = [row for row in result.rows if row["arm"] == "CFSP, released"]
    assert all(before > after for before, after in (row["parameters"] for row in released))
    assert sum(released[0]["widths"]) < 0.62 * 88


def test_nm_training(tmp_path, monkeypatch):
    """Every arm ends with the pattern; the accuracy is that of the loss's own predictions."""
    text = common.corpus("embedded")
    monkeypatch.setattr(nm_training, "corpus", lambda name: text)
    nm_training.characters.cache_clear()
    made = []
    monkeypatch.setattr(nm_training, "accuracy", lambda model, *rest: made.append(model) or 0.5)
    options = NMOptions(seeds=1, patterns=("1:16",), steps=2, batch=2, window=8, width=32, layers=1)
    result = run("nm-training", options, tmp_path)
    assert [row["arm"] for row in result.rows] == list(nm_training.ARMS) and len(result.verdicts) == 4
    for model in made[1:]:
        for name, weight in model.named_parameters():
            if name.endswith("_proj.weight"):
                assert int((weight.view(len(weight), -1, 16) != 0).sum(2).max()) == 1, name
    costs = {row["arm"]: row["flops"] for row in result.rows}
    assert costs["BDWP"] < costs["SR-STE"] < costs["dense"]
    nm_training.characters.cache_clear()


def test_characters_that_are_right_are_counted_over_whole_windows(monkeypatch):
    class Next(torch.nn.Module):
        """Expects the number after the one it is given."""

        def forward(self, input_ids):
            return type("Out", (), {"logits": torch.nn.functional.one_hot(input_ids + 1, 8).float()})

    tokens = torch.tensor(
        [0, 1, 2, 3, 3, 4, 6, 1, 2]
    )  # right: 1, 2, 3, 4 of the first six; 8 make no third window
    assert nm_training.accuracy(Next(), tokens[:8], 3) == pytest.approx(4 / 6)


def test_gqsa(tmp_path):
    result = run("gqsa", GqsaOptions(**SMALL, block_epochs=1, model_epochs=1), tmp_path)
    assert len(result.rows) == 1 + 9 * 2 and len(result.verdicts) == 6
    bits = {row["arm"]: row["bits"] for row in result.rows if "bits" in row}
    # 6.5 bits for half the weights, and the pointer of each row
    assert 3.25 < bits["W4S50, one shot"] < 5 and bits["W2, one shot"] == 3.125


def test_ecoflap(tmp_path):
    result = run("ecoflap", EcoflapOptions(**SMALL, sparsities=(0.6,), vision=False), tmp_path)
    assert len(result.rows) == 1 + 2 * (1 + 3) + 1
    exact = next(verdict for verdict in result.verdicts if "exact to one weight" in verdict.claim)
    assert exact.verdict == "holds"


def test_flash_llm(tmp_path):
    config = FlashOptions(rows=256, columns=128, sparsities=(0.8,), batches=(1, 4), processors=1, rounds=2)
    result = run("flash-llm", config, tmp_path)
    by_claim = {verdict.claim: verdict.verdict for verdict in result.verdicts}
    assert by_claim["Tiled-CSL gives back every weight bit for bit"] == "holds"
    assert by_claim["all products equal the dense one (relative error below 1e-4)"] == "holds"
    assert len(result.rows) == 2


def test_captions_of_digits_are_right():
    batch = vision_language.pairs(50, seed=3)
    words = vision_language._WORDS
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        left, right, larger, _, total = (words[i] for i in ids[-5:])
        assert int(left) + int(right) == int(total)
        relation = "left" if int(left) > int(right) else "right" if int(left) < int(right) else "equal"
        assert larger == relation and labels[:17] == [-100] * 17
    assert batch["pixel_values"].shape == (50, 1, 16, 16)
    train, test = vision_language.pairs(5, 0), vision_language.pairs(5, 0, train=False)
    assert not torch.equal(train["pixel_values"], test["pixel_values"])


def test_verdicts_follow_the_figures():
    rows = [
        {"subject": "s", "arm": arm, "level": 0.5, "seed": seed, "perplexity": base + seed / 100}
        for arm, base in (("good", 10.0), ("bad", 20.0))
        for seed in range(3)
    ]
    rows.append({"subject": "s", "arm": "dense", "level": 0.0, "seed": 0, "perplexity": 5.0})
    rows.append({"subject": "s", "arm": "fixed", "level": 0.5, "seed": 0, "perplexity": 30.0})
    claims = [Claim(a + b, "p", a, b) for a in ("good", "bad") for b in ("bad", "good", "fixed") if a != b]
    arms = {"good": Arm(), "bad": Arm(), "fixed": Arm(once=True)}
    study = dataclasses.replace(STUDY, arms=arms, claims=claims)
    found = {v.claim: v.verdict for v in study.report(rows, PruningOptions(subjects=("s",))).verdicts}
    assert found == {
        "goodbad": "holds",
        "goodfixed": "holds",
        "badgood": "does not hold",
        "badfixed": "holds",
    }


def test_bad_options_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="at least 1 of subjects"):
        Protocol(subjects=())
    with pytest.raises(ConfigError, match="ratios lie between"):
        CfspOptions(ratios=(1.0,))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        PruningOptions(sparsities=(1.5,))
    with pytest.raises(ConfigError, match="multiple of 128"):
        FlashOptions(rows=100)
    monkeypatch.undo()
    monkeypatch.setenv("ZOO_DATA", "/nowhere")
    common.dense_model.cache_clear()
    with pytest.raises(DataError, match="stories260k is not there"):
        common.dense_model("stories260k")
