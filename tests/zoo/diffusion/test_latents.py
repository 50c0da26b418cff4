"""Text-to-image models in the latent space of TAEF2, whose weights others published."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")
WEIGHTS = Path(os.environ.get("ZOO_DATA", "")) / "weights" / "taef2"
pytestmark = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="ZOO_DATA has no weights/taef2")

from zoo.diffusion import data, latents, tasks  # noqa: E402
from zoo.diffusion.classifier import accuracy, load_judge  # noqa: E402
from zoo.diffusion.domain import dense_model, make_job  # noqa: E402
from zoo.diffusion.grids import GAP, sample_grid  # noqa: E402
from zoo.diffusion.latents import LATENT_SHAPE, LatentTextToImage, decode  # noqa: E402
from zoo.diffusion.methods.ecodiff import EcoDiff  # noqa: E402
from zoo.diffusion.pipelines import LatentTextToImagePipeline  # noqa: E402
from zoo.errors import DataError, TaskError  # noqa: E402


@pytest.fixture(scope="module")
def few():
    """The latent set with fewer images yet, so that encoding takes no time."""
    before = dict(data.ENCODED)
    data.ENCODED["latents"] = 40
    data.load_pictures.cache_clear()
    yield data.load_pictures("latents")
    data.ENCODED |= before
    data.load_pictures.cache_clear()


def test_latents_of_digits_decode_to_the_same_digits(few) -> None:
    assert few.shape == LATENT_SHAPE and len(few.train) == 40 and few.train_labels[:3].tolist() == [5, 0, 4]
    seen = decode(few.train)
    assert seen.shape == (40, 1, 32, 32) and seen.abs().max() <= 1
    mnist = data.load_pictures("mnist")
    small = F.avg_pool2d(seen, 2)
    assert (small - mnist.train[:40]).square().mean() < 0.02
    assert accuracy(load_judge("mnist"), small, few.train_labels) > 0.9


def test_a_latent_model_is_trained_on_latents_and_its_pipeline_decodes(few, tmp_path) -> None:
    model = dense_model("latents", 0).eval()
    assert isinstance(model, LatentTextToImage) and model.sample_shape == LATENT_SHAPE
    images, noise, times, ids = next(iter(make_job("latents", model=model).sample(1)))
    assert images.shape[1:] == LATENT_SHAPE and noise.shape == images.shape and len(ids) == len(times)
    EcoDiff(keep=0.5, score="norm").sparsify(model)
    pipe = model.pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*decoder*"))  # the autoencoder is referred to, not copied
    again = LatentTextToImagePipeline.from_pretrained(tmp_path, use_safetensors=True)
    again.set_progress_bar_config(disable=True)
    start = torch.randn(2, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    made = [
        p(["a two", "a six"], latents=start, num_inference_steps=2, output_type="pt").images
        for p in (pipe, again)
    ]
    assert made[0].shape == (2, 1, 32, 32) and torch.equal(*made)
    assert again("a two", num_inference_steps=1).images[0].size == (32, 32)
    twin = copy.deepcopy(model)
    assert type(twin) is LatentTextToImage and twin.current_arguments() == model.current_arguments()


def test_the_task_and_the_grid_see_decoded_images(few, monkeypatch) -> None:
    monkeypatch.setattr(tasks, "IMAGES", 10)
    model, task = dense_model("latents", 0).eval(), tasks.MnistLatents()
    made, labels = task.images(model)
    assert made.shape == (10, 1, 16, 16) and labels.tolist() == list(range(10)) and made.abs().max() <= 1
    assert sample_grid([model], steps=1).shape == (32 + 2 * GAP, 10 * (32 + 2 * GAP))
    with pytest.raises(TaskError, match="samples values of"):
        task.images(dense_model("digits", 0))


def test_another_file_than_the_published_one_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    latents.codec.cache_clear()
    with pytest.raises(DataError, match="Get it from https://github.com/madebyollin/taesd"):
        decode(torch.zeros(1, *LATENT_SHAPE))
    (tmp_path / "weights" / "taef2").mkdir(parents=True)
    (tmp_path / "weights" / "taef2" / "taef2_encoder.pth").write_bytes(b"another file")
    with pytest.raises(DataError, match="another file than the one published"):
        decode(torch.zeros(1, *LATENT_SHAPE))
    latents.codec.cache_clear()
