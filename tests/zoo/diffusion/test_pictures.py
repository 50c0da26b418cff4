"""Pictures, their judge, the task, the pipeline and the maker of the text-to-image models."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

import zoo.diffusion.tasks as tasks  # noqa: E402
from zoo.bundles.catalog import find  # noqa: E402
from zoo.bundles.make import Work  # noqa: E402
from zoo.bundles.recipes import rows  # noqa: E402
from zoo.bundles.store import load_bundle  # noqa: E402
from zoo.diffusion.classifier import accuracy, frechet_distance, load_judge  # noqa: E402
from zoo.diffusion.data import CaptionedNoise, captions, load_pictures  # noqa: E402
from zoo.diffusion.domain import dense_model, make_job  # noqa: E402
from zoo.diffusion.grids import GAP, ZOOM, picture, png, sample_grid  # noqa: E402
from zoo.diffusion.makers import text_to_image  # noqa: E402
from zoo.diffusion.methods.ecodiff import EcoDiff  # noqa: E402
from zoo.diffusion.models import TextToImage  # noqa: E402
from zoo.diffusion.pipelines import TextToImagePipeline  # noqa: E402
from zoo.errors import ConfigError, DataError, TaskError  # noqa: E402


@pytest.fixture(scope="module")
def model() -> TextToImage:
    torch.manual_seed(0)
    return TextToImage(side=8, widths=(16, 16), attention=(True, True), text_width=16, text_layers=1).eval()


def test_the_digits_are_split_and_captioned() -> None:
    data = load_pictures("digits")
    assert data.shape == (1, 8, 8) and len(data.train) == 1297 and len(data.test) == 500
    assert float(data.train.min()) == -1 and float(data.train.max()) == 1
    seen = {image.numpy().tobytes() for image in data.train}
    assert sum(image.numpy().tobytes() in seen for image in data.test) == 0
    assert captions(torch.tensor([7, 0])) == ["a photo of a seven", "a photo of a zero"]
    with pytest.raises(DataError, match="digits, mnist"):
        load_pictures("letters")


def test_a_tenth_of_the_captions_is_empty_and_batches_repeat() -> None:
    texts: list[str] = []

    def note(batch: list[str]) -> torch.Tensor:
        texts.extend(batch)
        return torch.zeros(len(batch), 1)

    data = CaptionedNoise(load_pictures("digits"), note, 1000, batch=500, steps=4)
    first = list(data.draw(torch.Generator().manual_seed(1)))
    assert 0.07 < texts.count("") / len(texts) < 0.13
    second = list(data.draw(torch.Generator().manual_seed(1)))
    assert all(
        torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert texts[:2000] == texts[2000:]


@pytest.mark.parametrize("content", [b"nothing", gzip.compress(b"\0\0\x08\x03" + bytes(12) + b"x", mtime=0)])
def test_files_that_are_not_mnist_are_refused(content: bytes, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    load_pictures.cache_clear()
    with pytest.raises(DataError, match="ZOO_DATA"):
        load_pictures("mnist")
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read|IDX"):
        load_pictures("mnist")
    load_pictures.cache_clear()


def test_the_frechet_distance_of_shifted_and_scaled_samples() -> None:
    """|m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^1/2): a shift adds its square, a scale (1 - s)^2 trace C."""
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)).double()
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(x, x + torch.tensor([1.0, 2.0, 0.0])) == pytest.approx(5, abs=1e-3)
    centred = x - x.mean(0)
    trace = float(torch.cov(x.T).trace())
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * trace, rel=1e-4)
    with pytest.raises(DataError, match="at least two"):
        frechet_distance(x[:1], x)


def test_the_judge_knows_digits_from_noise() -> None:
    data, judge = load_pictures("digits"), load_judge("digits")
    assert accuracy(judge, data.test, data.test_labels) > 0.95
    noise = torch.randn(data.test.shape, generator=torch.Generator().manual_seed(0))
    assert accuracy(judge, noise, data.test_labels) < 0.3
    with pytest.raises(DataError, match="digits"):
        load_judge("letters")


def test_the_task_measures_what_images_show(model, monkeypatch) -> None:
    data, task = load_pictures("digits"), tasks.Digits()
    real = lambda *_: (data.train[:500], data.train_labels[:500])  # noqa: E731
    wrong = lambda *_: (data.train[:500], (data.train_labels[:500] + 1) % 10)  # noqa: E731
    monkeypatch.setattr(task, "images", real)
    good = task.evaluate(model).metrics
    assert good["accuracy"].value > 0.95 and good["frechet"].value == pytest.approx(task.floor(), rel=1e-6)
    monkeypatch.setattr(task, "images", wrong)
    assert task.evaluate(model).metrics["accuracy"].value < 0.1
    monkeypatch.setattr(task, "images", lambda *_: (torch.zeros_like(data.test), data.test_labels))
    assert task.evaluate(model).metrics["frechet"].value > 10 * task.floor()


def test_the_task_samples_by_prompt_from_fixed_noise(model, monkeypatch) -> None:
    monkeypatch.setattr(tasks, "IMAGES", 20)
    monkeypatch.setattr(tasks, "BATCH", 10)
    task = tasks.Digits()
    made, labels = task.images(model)
    noise, _ = task.noise()
    assert made.shape == (20, 1, 8, 8) and labels.tolist() == [*range(10), *range(10)]
    pipe = model.pipeline()
    pipe.set_progress_bar_config(disable=True)
    own = pipe(captions(labels), latents=noise, num_inference_steps=10, output_type="pt").images
    assert (own - made).abs().max() < 1e-5
    with pytest.raises(TaskError, match="this model makes"):
        task.images(TextToImage(side=16, widths=(16, 16), attention=(True, True), text_width=16))
    with pytest.raises(TaskError, match="Linear"):
        task.images(torch.nn.Linear(1, 1))
    flops = task.flops(model)
    assert 0 < flops.sparse == flops.dense  # nothing is masked


def test_a_cut_pipeline_is_saved_and_loaded_as_cut(tmp_path) -> None:
    torch.manual_seed(0)
    net = TextToImage(side=8, widths=(16, 16), attention=(True, True), text_width=16, text_layers=1)
    EcoDiff(keep=0.5, score="norm").sparsify(net)
    pipe = net.pipeline()
    pipe.save_pretrained(tmp_path)
    again = TextToImagePipeline.from_pretrained(tmp_path, use_safetensors=True)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a seven", "the digit two"]
    first, second = (
        p(prompts, latents=noise, num_inference_steps=2, guidance_scale=2.0, output_type="pt").images
        for p in (pipe, again)
    )
    assert torch.equal(first, second)
    assert again("a two", num_inference_steps=1).images[0].size == (8, 8)
    with pytest.raises(ConfigError, match="Shorten"):
        pipe(["one two three four five six seven eight nine"])
    with pytest.raises(ConfigError, match="output_type"):
        pipe(["one"], output_type="latent")


def test_the_job_and_the_maker_refuse_and_repeat(tmp_path) -> None:
    import dataclasses

    row = rows()["diffusion/dense-t2i-digits"]
    row = dataclasses.replace(row, recipe={**row.recipe, "epochs": 1, "steps": 1, "batch": 8})
    first, second = (text_to_image(row, 0, None, Work(tmp_path)) for _ in range(2))
    pairs = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    fresh = dense_model("digits", 0).state_dict()
    assert any(not torch.equal(a, fresh[name]) for name, a in first.model.state_dict().items())
    assert not first.model.training and "pruning_plan" not in first.arguments
    with pytest.raises(ConfigError, match="digits, mnist"):
        dense_model("letters", 0)
    with pytest.raises(ConfigError, match="Linear"):
        make_job("digits", model=torch.nn.Linear(1, 1))


def test_a_grid_shows_models_from_the_same_noise(model) -> None:
    twice = sample_grid([model, model], steps=1)
    side = 8 + 2 * GAP
    assert twice.shape == (2 * side, 10 * side)
    assert torch.equal(twice[:side], twice[side:])
    noise = torch.randn((10, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made = model.pipeline()(
            captions(torch.arange(10)), latents=noise, num_inference_steps=1, output_type="pt"
        )
    expected = ((made.images[3, 0].clamp(-1, 1) + 1) * 127.5).round()
    shown = twice[GAP : GAP + 8, 3 * side + GAP : 3 * side + GAP + 8]
    assert (shown.float() - expected).abs().max() <= 1
    assert png(twice)[:4] == b"\x89PNG"
    with pytest.raises(ConfigError, match="no model"):
        sample_grid([])


def test_the_picture_of_a_bundle_shows_its_twin_above_it(tmp_path) -> None:
    slim, twin = (find(f"diffusion/{name}") for name in ("slimflow-digits-w48", "dense-flow-digits"))
    said = picture(slim, tmp_path / "digits.png")
    assert "twin above" in said
    shown = np.asarray(Image.open(tmp_path / "digits.png"))[::ZOOM, ::ZOOM]
    half = len(shown) // 2
    for one, seen in ((twin, shown[:half]), (slim, shown[half:])):
        assert (seen == sample_grid([load_bundle(one)]).numpy()).all()
    with pytest.raises(ConfigError, match="ends in .png"):
        picture(slim, tmp_path / "digits.gif")
    with pytest.raises(ConfigError, match="OneDPiece makes no images from noise"):
        picture(find("diffusion/one-d-piece-digits"), tmp_path / "digits.png")
