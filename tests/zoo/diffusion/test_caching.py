"""Inner levels that are used again between steps: which calls run them, exactness, refusals."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from zoo.diffusion.caching import cached, sample_cached  # noqa: E402
from zoo.diffusion.families import family  # noqa: E402
from zoo.diffusion.models import TextToImage  # noqa: E402
from zoo.diffusion.sampling import sample  # noqa: E402
from zoo.errors import ConfigError  # noqa: E402


@pytest.fixture(scope="module")
def model() -> TextToImage:
    torch.manual_seed(0)
    return TextToImage(side=8, widths=(16, 16), attention=(True, True), text_width=16, text_layers=1).eval()


NOISE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def conditions(model) -> tuple[torch.Tensor, torch.Tensor]:
    return model.encode(model.tokenise(["a two", "a six"])), model.encode(model.tokenise(["", ""]))


@torch.no_grad()
def test_inner_levels_run_at_every_third_step_and_for_each_branch(model) -> None:
    own, empty = conditions(model)
    inner, outer = [], []
    handles = [
        model.unet.mid_block.resnets[0].register_forward_hook(lambda *_: inner.append(1)),
        model.unet.down_blocks[0].register_forward_hook(lambda *_: outer.append(1)),
    ]
    made = {}
    for guidance, expected in ((1.0, (2, 6)), (2.0, (4, 12))):
        inner.clear()
        outer.clear()
        made[guidance] = sample_cached(
            model, NOISE, own, steps=6, every=3, guidance=guidance, unconditional=empty
        )
        assert (len(inner), len(outer)) == expected
    for handle in handles:
        handle.remove()
    assert "forward" not in vars(model.unet.mid_block)
    whole = sample(model, NOISE, own, steps=6)
    assert torch.equal(sample_cached(model, NOISE, own, steps=6, every=1), whole)
    error = (made[1.0] - whole).square().mean()
    assert 0 < float(error) < float(whole.square().mean())


def test_what_is_refused(model) -> None:
    own, _ = conditions(model)
    with pytest.raises(ConfigError, match="at least 5 steps"):
        sample_cached(model, NOISE, own, steps=4)
    with pytest.raises(ConfigError, match="at least 1"):
        sample_cached(model, NOISE, own, steps=6, every=0)
    with pytest.raises(ConfigError, match="no inner levels"), cached(family("dit")[0], 2):
        pass
