"""GVGEN from text: the distance field by hand, attributes and their ranges, prompts, the judge, refusals."""

from __future__ import annotations

import builtins
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

from zoo.bundles.make import Work
from zoo.bundles.recipes import find_row
from zoo.errors import ConfigError, DataError, TaskError
from zoo.neural3d import exports
from zoo.neural3d.domain import make_job
from zoo.neural3d.methods import gvgen_text
from zoo.neural3d.methods.gvgen import LIMITS, GaussianVolume
from zoo.neural3d.methods.gvgen_text import (
    WHITE,
    GVGenText,
    VolumeNet,
    attributes,
    denoised,
    diffused,
    draws,
    gaussian_distance_field,
    scene_of,
    scheduler,
    trained,
)
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.solids import BOX, HELD, KNOWN, PROMPTS, SHAPES, TOTAL, WORDS, built, inside, surface, told
from zoo.neural3d.studies import gvgen_text as study
from zoo.neural3d.studies.gvgen_text import HeldToys, OneStage, PromptedToys, agreement, centred, judged
from zoo.registry import MAKERS
from zoo.shared.store.formats import load_packed, save_packed
from zoo.studies.cells import CellCache

GRID = GaussianVolume(12, WHITE).grid  # spacing 1/11, so that the field is flat beyond 4.65 / 11


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """One volume of a prompt, and two steps of sampling."""
    monkeypatch.setattr(gvgen_text, "POOL", 1)
    monkeypatch.setattr(gvgen_text, "STEPS", 2)


def test_the_field_by_hand() -> None:
    """One Gaussian that is seen, a tenth of a spacing off its node along x: five distances from there."""
    offsets, opacities = torch.zeros(1728, 3), torch.full((1728,), -7.0)
    own = 12 * 12 * 5 + 12 * 5 + 5
    offsets[own, 0], opacities[own] = 0.1 / 11, 2.0
    offsets[own + 1] = 0.02  # of one that is not seen: without influence
    field = gaussian_distance_field(offsets, opacities, GRID)
    spacings = {
        0: 0.1,
        144: 0.9,
        -144: 1.1,
        1: math.hypot(0.1, 1),
        2 * 144 + 2 * 12 + 1: math.hypot(1.9, 2, 1),
    }
    for step, distance in spacings.items():
        assert float(field[own + step]) == pytest.approx(2 * distance / 4.65 - 1, abs=1e-4)
    assert float(field[0]) == 1 == float(field.max())  # a corner, 8.7 spacings away
    assert float(field.min()) == pytest.approx(2 * 0.1 / 4.65 - 1, abs=1e-4)


def test_fields_of_what_is_no_volume_are_refused() -> None:
    seen = torch.zeros(1728)
    with pytest.raises(ConfigError, match=r"as many nodes along each axis.*received \[6, 12, 12\]"):
        half = GRID[:864]
        gaussian_distance_field(0 * half, seen[:864], half)
    wrong = torch.zeros(1728, 3)
    wrong[7, 1] = torch.nan
    with pytest.raises(DataError, match="Gaussian 7 has an offset or opacity that is not finite"):
        gaussian_distance_field(wrong, seen, GRID)
    with pytest.raises(DataError, match="opacity of 0.005 or more"):
        gaussian_distance_field(torch.zeros(1728, 3), seen - 7, GRID)


def test_attributes_have_the_published_ranges_in_order() -> None:
    values = torch.zeros(TOTAL, 4, 4, 4)
    values[0], values[5, 1, 2, 3], values[6:9], values[9], values[13] = 1.0, -9.0, -0.5, 1.0, 0.5
    found = attributes(values)
    assert found["offsets"][0].tolist() == pytest.approx([0.15, 0, 0])
    node = 16 * 1 + 4 * 2 + 3
    assert found["sh0"][node, 0].tolist() == pytest.approx([1.5, 1.5, -2])
    assert found["sh0"][0, 0].tolist() == pytest.approx([1.5] * 3)
    assert found["scales"][0].tolist() == pytest.approx([-5] * 3)
    assert found["quats"][0].tolist() == pytest.approx([1, 0, 0, 0])
    assert float(found["opacities"][0]) == pytest.approx(3.5)
    scene = scene_of(values)
    assert isinstance(scene, GaussianScene) and len(scene) == 64
    torch.testing.assert_close(scene.means.detach()[node, 1:], GaussianVolume(4, WHITE).grid[node, 1:])


@pytest.mark.parametrize("shape", SHAPES)
def test_surfaces_are_of_their_solids(shape: str) -> None:
    points = surface(shape, 4000, generator())
    assert bool(inside(shape, 0.999 * points).all()) and not bool(inside(shape, 1.01 * points).any())
    middle = {"ball": 0.0, "box": 0.0, "cone": None}[shape]
    if middle is not None:
        torch.testing.assert_close(points.mean(0), torch.zeros(3), atol=0.04, rtol=0)
    assert bool(inside(shape, torch.zeros(1, 3)).all())
    assert not bool(inside("cone", torch.tensor([[0.3, -0.9, 0.0]])).any())  # thin at its apex, which is up
    assert float((surface("box", 4000, generator()).abs() - BOX).amax()) <= 1e-6


def test_built_volumes_are_seen_near_the_surface_only() -> None:
    values = built("large red ball", 8, generator()).unflatten(1, (8, 8, 8))
    assert values.abs().max() <= 1
    scene = scene_of(values)
    seen = scene.opacities.detach().sigmoid() > 0.5
    away = (scene.means.detach()[seen] - scene.means.detach()[seen].mean(0)).norm(dim=1)
    assert 50 < int(seen.sum()) < 400 and float(away.std()) < 0.03 < 0.25 < float(away.mean()) < 0.4
    colours = scene.sh0.detach()[seen, 0].mean(0)
    assert int(colours.argmax()) == 0 and float(scene.quats.detach()[:, 0].min()) == 1
    assert float(attributes(values)["offsets"].abs().max()) == pytest.approx(LIMITS["offsets"][1])


def test_prompts_are_words_in_any_order_one_of_each_kind() -> None:
    one, other = told(["small red ball", "ball red small"])
    assert torch.equal(one, other) and [WORDS[n] for n in one.nonzero()[:, 0]] == ["small", "red", "ball"]
    assert len(PROMPTS) == 24 == len({*KNOWN, *HELD}) and len(HELD) == 6
    for word in WORDS:  # every word is learned, only pairs are not
        assert any(word in prompt.split() for prompt in KNOWN)
    with pytest.raises(ConfigError, match="has the word 'pink'; known: small, large, red"):
        told(["small pink ball"])
    with pytest.raises(ConfigError, match="'red ball' needs one size: small or large"):
        told(["red ball"])
    with pytest.raises(ConfigError, match="needs one shape: ball or box or cone"):
        told(["small red ball box"])


def test_the_loss_is_of_the_clean_volume_and_sampling_ends_at_it(little: None) -> None:
    """A net that knows the clean volume has no loss, and DDIM of what it says ends there."""
    batch = draws(4, 3, 0).make(3, generator())

    class Knowing(VolumeNet):
        def forward(self, x, time, words):
            return batch.fields

    net = Knowing(1, 1, 8)
    assert float(denoised(net, batch.fields, batch)) == 0
    found = diffused(net, batch.words, (1, 4, 4, 4), generator())
    torch.testing.assert_close(found, batch.fields, atol=1e-4, rtol=0)
    steps = scheduler().config
    assert (steps.num_train_timesteps, steps.beta_start, steps.beta_end) == (1000, 1e-4, 0.02)
    assert (steps.beta_schedule, steps.prediction_type, steps.clip_sample) == ("linear", "sample", True)


def test_without_diffusers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refusing(name, *rest):
        if name == "diffusers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    scheduler.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(ConfigError, match=r"diffusers is not installed. Run: pip install .*\[diffusion\]"):
        scheduler()


def test_a_training_is_decided_by_its_seed_and_comes_back_from_a_file(little: None, tmp_path: Path) -> None:
    one, again, other = (trained(GVGenText, seed, 2, 2, 1e-3, side=4, width=8) for seed in (0, 0, 1))
    volumes = [model.volumes(["small red ball"] * 2, generator()) for model in (one, again, other)]
    assert torch.equal(volumes[0], volumes[1]) and not torch.equal(volumes[0], volumes[2])
    assert not torch.equal(volumes[0][0], volumes[0][1])
    save_packed(tmp_path / "weights.safetensors", one.state_dict(), {})
    loaded = GVGenText(4, 8)
    loaded.load_state_dict(load_packed(tmp_path / "weights.safetensors").tensors)
    first, second = (m.eval().generate("large blue cone", generator(3)) for m in (one, loaded))
    assert isinstance(first, GaussianScene) and torch.equal(first.means, second.means)
    with pytest.raises(ConfigError, match="the word 'huge'"):
        one.generate("huge red ball", generator())
    noise, words = torch.zeros(1, 1, 4, 4, 4), told(["small red ball"])
    field, values = one(noise, torch.ones(1), words)
    assert field.shape == (1, 1, 4, 4, 4) and values.shape == (1, TOTAL, 4, 4, 4)
    assert not torch.equal(values, one(noise, torch.ones(1), told(["small red cone"]))[1])


def test_the_row_its_job_and_its_picture(little: None, monkeypatch: pytest.MonkeyPatch) -> None:
    row = find_row("neural3d/gvgen-text-toys")
    row = replace(row, recipe={**row.recipe, "steps": 1, "batch": 2})
    model = MAKERS.get(row.maker)(row, 0, None, Work(Path("unused"))).model
    assert isinstance(model, GVGenText)
    job = make_job("toys", model=model, recipe=replace(gvgen_text.RECIPE, steps=1, batch=2))
    before = model.field.out.weight.detach().clone()
    job.fit(model, macs=lambda: 0.0).run()
    assert not torch.equal(before, model.field.out.weight)
    with pytest.raises(ConfigError, match="data set toys; received 'lego'"):
        make_job("lego", model=model)
    pictures = exports.prompted(model.eval())
    assert [len(row) for row in pictures] == [4] * 6 and pictures[0][0].shape == (96, 96, 3)


@pytest.mark.parametrize("arguments", [(7, 16), (8, 12), (2, 16)])
def test_nets_that_do_not_halve_are_refused(arguments: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match="even side from 4 and a width in eights"):
        GVGenText(*arguments)


def test_the_judge_knows_what_was_built_and_sees_when_nothing_is_there() -> None:
    prompts = ["small red ball", "large green box", "small blue cone", "large yellow cone", "large blue ball"]
    volumes = [built(prompt, 8, generator(n)).unflatten(1, (8, 8, 8)) for n, prompt in enumerate(prompts)]
    assert agreement(volumes, prompts)["all"] == [1.0] * 5
    assert min(agreement(volumes, prompts)["overlap"]) > 0.7
    wrong = agreement(volumes[:2], ["small red cone", "large red box"])
    assert (wrong["shape"], wrong["colour"], wrong["all"]) == ([0.0, 1.0], [1.0, 0.0], [0.0, 0.0])
    empty = volumes[0].clone()
    empty[13] = -1
    look = judged(scene_of(empty))
    assert look.words == {"size": "", "colour": "", "shape": ""} and set(look.overlap.values()) == {0.0}
    mask = torch.zeros(5, 7, dtype=torch.bool)
    assert torch.equal(centred(mask), mask)
    mask[0, 0] = True
    assert centred(mask).nonzero().tolist() == [[2, 3]]


def test_the_tasks_take_this_network_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GVGenText(8, 8).eval()
    monkeypatch.setattr(PromptedToys, "prompts", KNOWN[:2])
    monkeypatch.setattr(
        model.__class__, "volumes", lambda self, prompts, generator: study.constructed(prompts, generator)
    )
    assert PromptedToys().evaluate(model).metrics["all"].value == 1
    assert PromptedToys().flops(model).dense > 1e6 and len(HeldToys().prompts) == 72
    with pytest.raises(TaskError, match="takes a GVGenText; received Linear"):
        HeldToys().evaluate(torch.nn.Linear(1, 1))


def test_the_study_by_two_steps(little: None, tmp_path: Path) -> None:
    options = study.PromptOptions(seeds=1, steps=(1,), batch=2, samples=1)
    result = study.STUDY.run(options, CellCache(tmp_path))
    arms = {(row["arm"], row["level"]): row for row in result.rows}
    assert set(arms) == set(product(study.ARMS, (study.SEEN, study.UNSEEN)))
    assert arms[study.TRUE, study.SEEN]["all"] > 0.8 > arms[study.RANDOM, study.UNSEEN]["all"]
    assert len(result.verdicts) == 8
    with pytest.raises(ConfigError, match="at least one seed"):
        study.PromptOptions(samples=0)
    assert OneStage(4, 8).volumes(["small red ball"], generator()).shape == (1, TOTAL, 4, 4, 4)
