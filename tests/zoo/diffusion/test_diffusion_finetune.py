"""Fine-tuning sparse and cut diffusion models: zeros, plans, exact resuming, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from zoo.bundles.catalog import find  # noqa: E402
from zoo.bundles.store import load  # noqa: E402
from zoo.diffusion.finetune import Finetune  # noqa: E402
from zoo.diffusion.tasks import TextToImageTask  # noqa: E402
from zoo.errors import ConfigError  # noqa: E402
from zoo.shared.masks import masks_of  # noqa: E402
from zoo.shared.train import Checkpoint  # noqa: E402

SPARSE = "diffusion/magnitude-t2i-digits-s35"


@pytest.fixture(autouse=True)
def few_images(monkeypatch) -> None:
    """The figures of the new cards over 20 images instead of 500."""
    monkeypatch.setattr("zoo.diffusion.tasks.IMAGES", 20)
    monkeypatch.setattr("zoo.diffusion.tasks.STEPS", 1)
    monkeypatch.setattr(TextToImageTask, "version", "few images")


def tuned(out: Path, model: str = SPARSE, **options) -> Path:
    return Finetune(model, out, steps=2, batch=4, checkpoint_every=1, **options).run()


class Stop(Exception):
    pass


def test_zeros_stay_and_an_interrupted_run_ends_in_the_same_bits(tmp_path, monkeypatch) -> None:
    whole = load(tuned(tmp_path / "whole", distillation=1.0))
    write = Checkpoint.write

    def write_and_stop(self, *state):
        write(self, *state)
        raise Stop

    monkeypatch.setattr(Checkpoint, "write", write_and_stop)
    with pytest.raises(Stop):
        tuned(tmp_path / "again", distillation=1.0)
    monkeypatch.setattr(Checkpoint, "write", write)
    resumed = load(tuned(tmp_path / "again", distillation=1.0))
    before = load(SPARSE)
    assert masks_of(before).equal(masks_of(whole)) and masks_of(before).lost_zeros(whole) == []
    state, again = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert any(not torch.equal(state[name], value) for name, value in before.state_dict().items())
    card = find(tmp_path / "whole").card
    assert card.dense_twin == "diffusion/dense-t2i-digits"
    assert card.method.hyperparameters["finetuned"]["ema"] == 0.98


def test_what_was_cut_stays_cut(tmp_path) -> None:
    name = "diffusion/laptop-t2i-digits-20"
    path = tuned(tmp_path / "tuned", name)
    before, after = find(name).card, find(path).card
    assert before.architecture.args == after.architecture.args and "pruning_plan" in after.architecture.args
    assert before.sparsity.parts == after.sparsity.parts
    assert before.cost.parameters == after.cost.parameters


def test_what_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"makes images of \(1, 8, 8\)"):
        tuned(tmp_path / "tuned", dataset="digit-triples")
    with pytest.raises(ConfigError, match="text-to-image models and flows"):
        Finetune(SPARSE, tmp_path / "tuned").plan(
            find(SPARSE), torch.nn.Linear(1, 1), None, torch.device("cpu")
        )
    assert not list(tmp_path.iterdir())
