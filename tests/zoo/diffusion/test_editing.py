"""Localised editing: the levels of the sampler by hand, exact inversion, merging by masks, refusals."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from diffusers import DDPMScheduler  # noqa: E402

from zoo.diffusion.editing import Edit, Level, invert, recorded, schedule, step  # noqa: E402
from zoo.diffusion.models import TextToImage  # noqa: E402
from zoo.diffusion.plan import Plan  # noqa: E402
from zoo.diffusion.sampling import sample  # noqa: E402
from zoo.diffusion.units import unit_groups  # noqa: E402
from zoo.errors import ConfigError  # noqa: E402


def fresh() -> TextToImage:
    torch.manual_seed(0)
    return TextToImage(side=8, widths=(16, 16), attention=(True, True), text_width=16, text_layers=1).eval()


@pytest.fixture(scope="module")
def model() -> TextToImage:
    return fresh()


IMAGE = torch.rand(1, 8, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def half(left: bool = True) -> torch.Tensor:
    mask = torch.zeros(1, 8, 16, dtype=torch.bool)
    mask[..., :8] = left
    mask[..., 8:] = not left
    return mask


def test_a_step_moves_between_levels_by_hand() -> None:
    x, noise = torch.tensor([1.0]), torch.tensor([0.5])
    near, far = Level(10, 0.8, 0.6), Level(20, 0.6, 0.8)
    clean = (1.0 - 0.6 * 0.5) / 0.8
    assert float(step(noise, x, near, far)) == pytest.approx(0.6 * clean + 0.8 * 0.5)
    assert float(step(noise, step(noise, x, near, far), far, near)) == pytest.approx(1.0)


def test_guidance_goes_from_no_prompt_past_the_prompt_by_hand(model, monkeypatch) -> None:
    """Without a prompt 1, with it 3: three times as far is 7."""
    monkeypatch.setattr(model, "denoise", lambda x, times, condition: condition.mean().expand_as(x))
    x, own, empty = torch.zeros(1, 1, 8, 8), torch.full((1, 2, 16), 3.0), torch.ones(1, 2, 16)
    now = Level(10, 0.8, 0.6)
    assert torch.equal(Edit(guidance=3.0).guided(model, x, own, empty, now), torch.full_like(x, 7.0))
    assert torch.equal(Edit(guidance=1.0).guided(model, x, own, empty, now), torch.full_like(x, 3.0))


def test_the_levels_are_those_of_the_scheduler(model) -> None:
    levels = schedule(model.scheduler, 4)
    noise = torch.randn(1, 1, 8, 16)
    condition = model.encode(model.tokenise(["a seven"]))
    x = noise
    with torch.no_grad():
        for now, after in zip(reversed(levels[1:]), reversed(levels[:-1]), strict=True):
            x = step(model.denoise(x, torch.tensor([now.time]), condition), x, now, after)
        assert torch.allclose(x, sample(model, noise, condition, steps=4), atol=1e-4)
    assert len(invert(model, IMAGE[None], condition, levels)) == 5
    with pytest.raises(ConfigError, match="steps"):
        schedule(model.scheduler, 0)


def test_an_edit_to_what_is_there_gives_the_image_back(model) -> None:
    same = Edit(steps=3, bootstrap=0.0)(model, IMAGE, half(), ["a seven"], "a seven")
    assert torch.allclose(same, IMAGE, atol=1e-4)


def test_the_other_half_stays_and_the_losses_hold_it(model) -> None:
    edited = {}
    for weight in (0.0, 1.0):
        edit = Edit(steps=3, attention=weight, background=weight, guidance=2.0)
        edited[weight] = edit(model, IMAGE, half(), ["a two"], "a seven")
    inside = (edited[1.0] - IMAGE)[..., :8].abs().mean()
    assert float(inside) > 0.05
    errors = [float((edited[w] - IMAGE)[..., 8:].square().mean()) for w in (0.0, 1.0)]
    assert errors[1] < errors[0] < float(inside) ** 2


def test_two_masks_are_merged_with_the_background(model) -> None:
    masks = torch.zeros(2, 8, 16, dtype=torch.bool)
    masks[0, :, :4] = masks[1, :, 12:] = True
    out = Edit(steps=2)(model, IMAGE, masks, ["a two", "a nine"], "a seven")
    moved = (out - IMAGE).abs().mean((0, 1))
    assert float(moved[:4].mean()) > float(moved[4:12].mean()) < float(moved[12:].mean())


def test_recorded_attention_changes_nothing_and_sums_to_one(model) -> None:
    inputs = IMAGE[None], torch.tensor([5]), model.encode(model.tokenise(["a two"]))
    with torch.no_grad():
        before = model.denoise(*inputs)
        with recorded(model.unet) as found:
            assert torch.allclose(model.denoise(*inputs), before, atol=1e-5)
        assert found and all(torch.allclose(p.sum(-1), torch.ones(()), atol=1e-5) for p in found)
        count = len(found)
        model.denoise(*inputs)
        assert len(found) == count  # the context is over


def test_without_any_cross_attention_it_says_so() -> None:
    cut = fresh()
    groups = [g for g in unit_groups(cut.unet) if g.module.endswith("attn2")]
    cut.cut(Plan({group.name: () for group in groups}))
    with pytest.raises(ConfigError, match="attention=0"):
        Edit(steps=2)(cut, IMAGE, half(), ["a two"], "a seven")


def test_what_is_refused(model) -> None:
    def refused(match: str, masks=None, prompts=("a two",), image=IMAGE, owner=model) -> None:
        with pytest.raises(ConfigError, match=match):
            Edit(steps=2)(owner, image, half() if masks is None else masks, prompts, "a seven")

    refused("overlap", torch.cat([half(), half()]), ("a two", "a nine"))
    refused("empty", torch.zeros(1, 8, 16, dtype=torch.bool))
    refused("one prompt per mask", prompts=("a two", "a nine"))
    refused("boolean", half().float())
    refused("boolean", torch.ones(1, 8, 8, dtype=torch.bool))
    refused("multiples of 2", torch.ones(1, 7, 16, dtype=torch.bool), image=IMAGE[:, :7])
    other = fresh()
    other.scheduler = DDPMScheduler()
    refused("DDIMScheduler", owner=other)
    other = fresh()
    other.predict("v_prediction")
    refused("predicts noise", owner=other)
