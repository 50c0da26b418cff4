"""Networks that were trained elsewhere compute what their notes say; methods run on them or refuse."""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")
WEIGHTS = Path(os.environ.get("ZOO_DATA", "")) / "weights" / "taef2"
pytestmark = pytest.mark.skipif(not WEIGHTS.is_dir(), reason="ZOO_DATA has no weights/taef2")

from zoo.diffusion.gates import gated  # noqa: E402
from zoo.diffusion.methods.ecodiff import EcoDiff, column_norms, kept_units  # noqa: E402
from zoo.diffusion.methods.laptop import Laptop  # noqa: E402
from zoo.diffusion.models import TextToImage  # noqa: E402
from zoo.diffusion.sampling import sample  # noqa: E402
from zoo.diffusion.units import unit_groups  # noqa: E402
from zoo.errors import DataError  # noqa: E402
from zoo.shared.errors import SparseError  # noqa: E402


@pytest.fixture(scope="module")
def foreign():
    path = Path(__file__).parents[3] / "benchmarks" / "diffusion_weights.py"
    spec = importlib.util.spec_from_file_location("diffusion_weights", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_denoisers_predict_noise_as_their_notes_say(foreign) -> None:
    unet = foreign.attention_unet()
    assert sum(p.numel() for p in unet.parameters()) == 376_228
    for time, noted in ((200, 0.054), (500, 0.026), (800, 0.014)):
        times = torch.full((32,), time)
        assert foreign.noise_error(unet, times, 0) == pytest.approx(noted, rel=0.15)
    times = torch.arange(0, 1000, 50)
    assert foreign.noise_error(foreign.conv_denoiser(), times, 0) == pytest.approx(0.017, rel=0.4)


def test_small_weights_matter_less_than_any(foreign) -> None:
    times = torch.arange(100, 1000, 100)
    errors = {}
    for score in ("magnitude, global", "wanda", "random"):
        model = foreign.pruned(foreign.attention_unet, 0.2, score, 0)
        weights = [
            m.weight for m in model.denoiser.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)
        ]
        zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        assert zeros == pytest.approx(0.2, abs=0.002)
        errors[score] = foreign.noise_error(model, times, 0)
    assert 3 * max(errors["magnitude, global"], errors["wanda"]) < errors["random"]


def test_what_cuts_diffusers_modules_refuses_others_and_leaves_them(foreign) -> None:
    model = foreign.attention_unet()
    before = copy.deepcopy(model.state_dict())
    for method in (EcoDiff(score="norm"), Laptop(score="magnitude")):
        with pytest.raises(SparseError):
            method.sparsify(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_missing_files_are_named(foreign, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("ZOO_DATA", str(tmp_path))
    with pytest.raises(DataError, match="taef2_decoder.pth is not there"):
        foreign.read("taef2/taef2_decoder.pth")


def test_a_pipeline_in_latent_space_is_cut_as_it_was_gated(foreign) -> None:
    encoder, decoder = foreign.codec()
    with torch.no_grad():
        photos = foreign.photographs(2, 64)
        latents = encoder(photos)
        error = (decoder(latents).clamp(0, 1) - photos).square().mean()
    assert latents.shape == (2, 32, 8, 8) and -10 * float(error.log10()) > 22
    torch.manual_seed(0)
    model = TextToImage(
        side=8, channels=32, widths=(16, 32), attention=(True, True), text_width=16, text_layers=1
    )
    groups = unit_groups(model.eval().unet)
    scores = {g.name: column_norms(model.unet, g) for g in groups}
    kept = dict(kept_units(groups, scores, 0.5, "global"))
    masks = {g.name: torch.tensor([float(unit in kept[g.name]) for unit in range(g.count)]) for g in groups}
    condition = model.encode(model.tokenise(["a photo of a seven", "a three"]))
    with torch.no_grad(), gated(model.unet, masks):
        expected = decoder(sample(model, latents, condition, steps=2))
    whole = sum(p.numel() for p in model.parameters())
    EcoDiff(keep=0.5, score="norm").sparsify(model)
    with torch.no_grad():
        found = decoder(sample(model, latents, condition, steps=2))
    assert sum(p.numel() for p in model.parameters()) < whole and found.shape == photos.shape
    assert (found - expected).abs().max() < 1e-4
