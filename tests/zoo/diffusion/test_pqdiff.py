"""PQDiff: relative positions and crops by hand, the query that decides, fills, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from zoo.diffusion.networks.base import sine_cosine
from zoo.diffusion.networks.pqdiff import (  # noqa: E402
    Outpainted,
    PQDiff,
    View,
    cut,
    random_boxes,
    relative_positions,
)
from zoo.errors import ConfigError  # noqa: E402
from zoo.shared.train import Recipe  # noqa: E402


@pytest.fixture
def model() -> PQDiff:
    return PQDiff.fresh(0, side=8, grid=4, width=16, depth=1).eval()


def test_relative_positions_by_hand() -> None:
    """Anchor (top 4, left 2, 8 high, 4 wide), target (top 0, left 4, 16 high, 2 wide), G = 4: an anchor token
    is 2 x 1, so y = (0 - 4) / 2 + i * 2 and x = (4 - 2) / 1 + j / 2."""
    anchor, target = torch.tensor([[4.0, 2.0, 8.0, 4.0]]), torch.tensor([[0.0, 4.0, 16.0, 2.0]])
    places = relative_positions(anchor, target, 4)[0].view(4, 4, 2)
    assert places[:, 0, 0].tolist() == [-2.0, 0.0, 2.0, 4.0]
    assert places[0, :, 1].tolist() == [2.0, 2.5, 3.0, 3.5]
    assert places[3, 0].tolist() == [4.0, 2.0]  # rows are y
    own = relative_positions(anchor, anchor, 4)[0]
    assert own[:5].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]]


def test_sines_and_cosines_by_hand() -> None:
    found = sine_cosine(torch.tensor([[2.0, -1.0]]), 8)[0]
    want = [f(v * r) for v in (2.0, -1.0) for f in (math.sin, math.cos) for r in (1.0, 0.01)]
    torch.testing.assert_close(found, torch.tensor(want))


def test_a_crop_by_hand() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    box = torch.tensor([[0.5, 0.0, 0.5, 0.5]])  # top 2, left 0, two rows and columns
    assert cut(image, box, 2)[0, 0].tolist() == [[8.0, 9.0], [12.0, 13.0]]


def test_boxes_have_the_shares_and_ratios_of_the_paper() -> None:
    boxes = random_boxes(2000, (0.2, 0.5), torch.Generator().manual_seed(0))
    top, left, height, width = boxes.T
    area, ratio = height * width, height / width
    assert area.min() > 0.199 and area.max() < 0.501 and abs(float(area.mean()) - 0.35) < 0.01
    assert ratio.min() > 0.749 and ratio.max() < 1.334
    assert top.min() >= 0 and left.min() >= 0 and (top + height).max() <= 1 and (left + width).max() <= 1


def test_extensions_become_positions(model, monkeypatch) -> None:
    """One quarter above and below, nothing left, one whole anchor at the right: top, bottom, left, right."""
    seen = []
    monkeypatch.setattr(model, "denoise", lambda x, times, condition: seen.append(condition[1]) or x)
    model.outpaint(torch.zeros(1, 1, 5, 7), (0.25, 0.25, 0.0, 1.0), steps=1)
    places = seen[0][0].view(4, 4, 2)
    assert places[:, 0, 0].tolist() == [-1.0, 0.5, 2.0, 3.5] and places[0, :, 1].tolist() == [0, 2, 4, 6]
    seen.clear()
    model.outpaint(torch.zeros(1, 1, 5, 7), (0.25, 0.25, 0.0, 1.0), steps=1, shuffled=True)
    shuffled = seen[0][0]
    assert not torch.equal(shuffled, places.flatten(0, 1))
    assert sorted(map(tuple, shuffled.tolist())) == sorted(map(tuple, places.flatten(0, 1).tolist()))


def test_the_fills_show_the_centre(model) -> None:
    view = View(2.0, 8, 20)
    assert int(view.inside.sum()) == 16 and view.extension == (0.5,) * 4
    for mean in (True, False):
        filled = view.filled(mean)
        assert float(view.psnr(filled).mean()) > float(view.psnr(torch.zeros_like(filled)).mean()) + 3
        corner = view.anchor.mean((1, 2, 3)) if mean else view.anchor[:, 0, 0, 0]
        torch.testing.assert_close(filled[:, 0, 0, 0], corner)
    assert float(view.right(view.whole).mean()) > 0.9


@pytest.mark.parametrize(
    ("anchor", "extension", "message"),
    [
        ((1, 1, 4, 4), (0.5, -0.1, 0, 0), "not negative"),
        ((1, 1, 4, 4), (0.5, math.nan, 0, 0), "finite"),
        ((1, 1, 4, 4), (math.inf, 0, 0, 0), "finite"),
        ((1, 1, 4, 4), (0.5, 0.5), "four"),
        ((1, 1, 0, 4), (0.5,) * 4, r"received \[1, 1, 0, 4\]"),
        ((1, 3, 4, 4), (0.5,) * 4, r"received \[1, 3, 4, 4\]"),
    ],
)
def test_what_is_refused(model, anchor, extension, message) -> None:
    with pytest.raises(ConfigError, match=message):
        model.outpaint(torch.zeros(anchor), extension)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="received 9, 4 and 16"):
        PQDiff(side=9, grid=4, width=16)


def test_training_learns_the_clean_target_and_the_task_measures(model, monkeypatch) -> None:
    monkeypatch.setattr(Outpainted, "count", 20)
    recipe = Recipe(steps=8, lr=5e-3, batch=16, optimizer="adamw", weight_decay=0.0)
    job = model.make_job("digits", recipe=recipe)
    batch = job.sample(1, 7)[0]
    with torch.no_grad():
        before = job.loss(model, batch)
    assert model.learn("digits", recipe=recipe).loss is job.loss
    with torch.no_grad():
        assert job.loss(model, batch) < 0.9 * before
    result = Outpainted().evaluate(model)
    assert set(result.metrics) == {"accuracy", "psnr"} and result.n == 20
    assert Outpainted().flops(model).dense > 0
