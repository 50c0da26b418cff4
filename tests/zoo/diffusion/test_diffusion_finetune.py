"""Fine-tuning sparse and cut diffusion models: zeros, plans, exact resuming, and what is refused."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from diffusers import DDIMScheduler  # noqa: E402

import zoo  # noqa: E402
from zoo.bundles.catalog import find  # noqa: E402
from zoo.bundles.store import load  # noqa: E402
from zoo.diffusion.finetune import Finetune  # noqa: E402
from zoo.diffusion.lora import attach_lora  # noqa: E402
from zoo.diffusion.models import TextToImage, denoising_loss, denoising_target  # noqa: E402
from zoo.diffusion.sampling import sample  # noqa: E402
from zoo.diffusion.tasks import TextToImageTask  # noqa: E402
from zoo.errors import ConfigError  # noqa: E402
from zoo.shared.masks import masks_of, set_masks  # noqa: E402
from zoo.shared.train import Checkpoint  # noqa: E402

SPARSE = "diffusion/magnitude-t2i-digits-s35"
FLOW = "diffusion/slimflow-digits-w48"


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


def test_the_target_is_what_the_scheduler_says_by_hand() -> None:
    schedule = DDIMScheduler(num_train_timesteps=2, trained_betas=[0.36, 0.5])  # kept: 0.64, then 0.32
    images, noise = torch.tensor([3.0, 2.0]).view(2, 1, 1, 1), torch.tensor([5.0, 1.0]).view(2, 1, 1, 1)
    times = torch.tensor([0, 1])
    assert denoising_target(schedule, images, noise, times) is noise
    schedule.register_to_config(prediction_type="v_prediction")
    velocity = torch.tensor([0.8 * 5 - 0.6 * 3, 0.32**0.5 - 0.68**0.5 * 2]).view(2, 1, 1, 1)
    torch.testing.assert_close(denoising_target(schedule, images, noise, times), velocity)

    class Knows(torch.nn.Module):
        scheduler = schedule

        def forward(self, x, times, ids):
            torch.testing.assert_close(x[0].item(), 0.8 * 3 + 0.6 * 5)
            return ids * velocity

    batch = images, noise, times
    assert float(denoising_loss(Knows(), (*batch, torch.tensor(1.0)))) < 1e-12
    assert float(denoising_loss(Knows(), (*batch, torch.tensor(-1.0)))) > 1
    schedule.register_to_config(prediction_type="sample")
    with pytest.raises(ConfigError, match="epsilon, v_prediction; received 'sample'"):
        denoising_target(schedule, images, noise, times)


def planned(name: str, model=None, **options):
    """The plan of a fine-tuning, without training."""
    tuner = Finetune(name, Path("unwritten"), steps=2, batch=4, **options)
    return tuner.plan(find(name), load(name) if model is None else model, None, torch.device("cpu"))


def copied(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights and masks."""
    copy_ = load(FLOW).float()
    copy_.load_state_dict(model.state_dict())
    set_masks(copy_, masks_of(model))
    return copy_


def test_a_model_told_to_predict_velocity_keeps_that_and_samples_back_to_an_image() -> None:
    plan = planned(SPARSE, prediction="v_prediction")
    model = TextToImage(**plan.arguments)
    assert model.prediction == plan.model.prediction == copy.deepcopy(model).prediction == "v_prediction"
    assert TextToImage(**model.current_arguments()).scheduler.config.prediction_type == "v_prediction"
    assert "prediction" not in planned(SPARSE).arguments
    image, kept = torch.full((1, 1, 8, 8), 0.5), model.scheduler.alphas_cumprod

    def velocity(x, times, condition):
        alpha, sigma = kept[times[0]].sqrt(), (1 - kept[times[0]]).sqrt()
        return alpha * (x - alpha * image) / sigma - sigma * image

    model.denoise = velocity
    torch.testing.assert_close(
        sample(model, torch.randn(1, 1, 8, 8), None, steps=4), image, atol=1e-3, rtol=0
    )


def test_lora_merges_under_the_masks_and_goes_on_where_it_was_killed() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    before = load(FLOW).float()
    zoo.sparsify(before, sparsity=0.5)
    masks = masks_of(before)
    plan, again = (planned(FLOW, copied(before), lora_rank=2, ema=0.5, lr=0.05) for _ in range(2))
    fit, resumed = plan.job.fit(plan.model), again.job.fit(again.model)
    assert all(".lora_" in name for name, p in plan.model.named_parameters() if p.requires_grad)
    states = []
    fit.run(on_step=lambda fit: states.append({k: v.clone() for k, v in fit.state().items()}))
    resumed.load_state(states[0])
    resumed.run()
    example = plan.job.batches.example()
    with torch.no_grad():
        trained = plan.model.eval()(*example)
        plan.finish(), again.finish()
        torch.testing.assert_close(plan.model(*example), trained, rtol=1e-4, atol=1e-4)
    assert masks_of(plan.model).equal(masks) and masks.lost_zeros(plan.model) == []
    old, state, same = before.state_dict(), plan.model.state_dict(), again.model.state_dict()
    assert list(state) == list(old) and all(torch.equal(value, same[name]) for name, value in state.items())
    linear = {f"{name}.weight" for name, part in before.named_modules() if type(part) is torch.nn.Linear}
    assert {name for name, value in old.items() if not torch.equal(state[name], value)} == linear


def test_lora_adapts_the_linear_layers_of_the_denoiser_alone() -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    model, before = load(SPARSE).float(), load(SPARSE).float()
    merge = attach_lora(model, 1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_B." in name:
                value.fill_(1.0)
    merge()
    assert masks_of(model).equal(masks_of(before)) and masks_of(before).lost_zeros(model) == []
    state = model.state_dict()
    linear = {f"unet.{n}.weight" for n, m in before.unet.named_modules() if type(m) is torch.nn.Linear}
    assert {n for n, value in before.state_dict().items() if not torch.equal(state[n], value)} == linear
    with pytest.raises(ConfigError, match="rank of LoRA is at least 1; received 0"):
        attach_lora(model, 0)
    with pytest.raises(ConfigError, match="no linear layer to adapt"):
        attach_lora(torch.nn.Conv2d(1, 1, 1), 1)


def test_lora_without_peft_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.delitem(sys.modules, "zoo.training.peft_lora", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'sparse-model-zoo\[peft\]'"):
        planned(SPARSE, lora_rank=2)


def test_what_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"makes images of \(1, 8, 8\)"):
        tuned(tmp_path / "tuned", dataset="digit-triples")
    with pytest.raises(ConfigError, match="text-to-image models and flows"):
        Finetune(SPARSE, tmp_path / "tuned").plan(
            find(SPARSE), torch.nn.Linear(1, 1), None, torch.device("cpu")
        )
    with pytest.raises(ConfigError, match="lora_rank must not be negative. Received: -1"):
        planned(SPARSE, lora_rank=-1)
    with pytest.raises(ConfigError, match="epsilon, v_prediction; received 'noise'"):
        tuned(tmp_path / "tuned", prediction="noise")
    with pytest.raises(ConfigError, match="twin predicts epsilon and cannot teach"):
        tuned(tmp_path / "tuned", prediction="v_prediction", distillation=1.0)
    with pytest.raises(ConfigError, match="is a flow, which predicts its velocity"):
        tuned(tmp_path / "tuned", FLOW, prediction="epsilon")
    assert not list(tmp_path.iterdir())
