"""De-fencing: fills, gates, losses and measures by hand, the composite, and what is refused."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from zoo.diffusion.networks.defencing import (  # noqa: E402
    STRUCTURE,
    TEXTURE,
    UNSEEN,
    Critics,
    Defencing,
    GatedConv,
    draw_fences,
    edges,
    harmonic,
    hinge,
    hole_psnr,
    iou,
    segmentation_loss,
)
from zoo.errors import ConfigError  # noqa: E402
from zoo.shared.train import Recipe  # noqa: E402

PHOTOS = (Path(os.environ.get("ZOO_DATA", "/nowhere")) / "superres").is_dir()


@pytest.fixture
def model() -> Defencing:
    return Defencing.fresh(0, side=16, width=4, growth=4).eval()


def test_discriminators_raise_what_is_true_and_the_completion_what_it_made() -> None:
    """True images score 0.25, made ones -0.5: (1 - 0.25) + (1 - 0.5) for each of two discriminators."""

    def score(images: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images.mean((1, 2, 3)), images.mean((1, 2, 3))

    true, made, masks = (torch.full((2, 1, 4, 4), value) for value in (0.25, -0.5, 1.0))
    assert float(hinge(score, (made, masks, true))) == pytest.approx(2 * (0.75 + 0.5))


def test_the_completions_loss_falls_as_discriminators_believe_it(model, monkeypatch) -> None:
    critics, masks = Critics(width=4), torch.zeros(1, 1, 16, 16)
    masks[..., 4:8] = 1
    batch = torch.full((1, 1, 16, 16), 0.5), masks, torch.full((1, 1, 16, 16), 0.25)
    losses = []
    for believed in (torch.zeros(1), torch.ones(1)):
        monkeypatch.setattr(critics, "forward", lambda *_, score=believed: (score, 2 * score))
        losses.append(float(critics.against(model, batch).detach()))
    assert losses[1] - losses[0] == pytest.approx(-TEXTURE - 2 * STRUCTURE, rel=1e-4)


def test_harmonic_fill_by_hand() -> None:
    """Between columns of 0 and 1 two missing columns are 1/3 and 2/3; what is known stays."""
    true = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0]).expand(1, 1, 4, 4)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 1:3] = 1
    given = torch.where(mask > 0, torch.tensor(0.9), true)
    torch.testing.assert_close(harmonic(given, mask), true, atol=1e-4, rtol=0)


def test_gates_by_hand() -> None:
    gate = GatedConv(1, 1)
    with torch.no_grad():
        gate.both.weight.zero_()
        gate.both.bias.copy_(torch.tensor([2.0, 0.0]))  # feature 2, gate sigmoid(0)
    assert gate(torch.zeros(1, 1, 3, 3)).unique().tolist() == [1.0]
    with torch.no_grad():
        gate.both.bias.copy_(torch.tensor([-1.0, 50.0]))  # ELU of -1, open
    assert float(gate(torch.zeros(1, 1, 3, 3))[0, 0, 1, 1].detach()) == pytest.approx(math.exp(-1) - 1)


def test_edges_iou_and_psnr_by_hand() -> None:
    ramp = torch.arange(5.0).expand(1, 1, 5, 5) / 10
    assert edges(ramp)[0, 0, 2, 2] == pytest.approx(0.2)  # (1 + 2 + 1) * 0.2 / 4
    assert edges(torch.ones(1, 1, 4, 4)).abs().max() == 0
    a, b = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    a[0, 0, 0] = 1
    b[0, 0, :, 0] = 1
    assert iou(a, b).tolist() == [pytest.approx(1 / 3)]
    made = torch.full((1, 1, 2, 2), 0.5)
    made[0, 0, 1, 1] = 0.9  # outside the hole: does not count
    assert float(hole_psnr(made, torch.full_like(made, 0.4), a)) == pytest.approx(20.0, abs=1e-3)


def test_fences_are_thin_lattices_and_test_patterns_are_others() -> None:
    masks, shade = draw_fences(200, 32, torch.Generator().manual_seed(0))
    share = masks.flatten(1).mean(1)
    assert 0.1 < float(share.mean()) < 0.5 and share.min() > 0 and share.max() < 0.8
    assert shade.min() >= 0 and shade.max() <= 1
    grids = draw_fences(200, 32, torch.Generator().manual_seed(0), UNSEEN)[0]
    # A grid has rows or columns that are nearly all fence, a lattice of slanted wires has none.
    fullest = [torch.maximum(m.mean(2).amax(-1), m.mean(3).amax(-1)).mean() for m in (masks, grids)]
    assert fullest[1] > fullest[0] + 0.1


def test_the_composite_keeps_what_is_outside_and_begins_as_harmonic_fill(model) -> None:
    images = torch.rand(2, 1, 16, 16)
    masks = draw_fences(2, 16, torch.Generator().manual_seed(0))[0]
    with torch.no_grad():
        torch.testing.assert_close(model.complete(images, masks), harmonic(images, masks))
        model.completion.out.bias.fill_(0.25)
        made = model.complete(images, masks)
    torch.testing.assert_close(made * (1 - masks), images * (1 - masks), atol=0, rtol=0)
    torch.testing.assert_close(made, harmonic(images, masks) + 0.25 * masks)
    # The hole's own pixels are not looked at: the fence cannot leak.
    other = torch.where(masks > 0, torch.rand(2, 1, 16, 16), images)
    with torch.no_grad():
        torch.testing.assert_close(model.complete(other, masks), made)


def test_every_place_is_told_of_the_whole_image_if_asked() -> None:
    """Convolutions alone reach 11 pixels: a change in a far corner is seen through mean and deviation."""
    images = torch.rand(1, 1, 48, 48)
    other = images.clone()
    other[..., :4, :4] = 1 - other[..., :4, :4]
    for whole in (False, True):
        segmentation = Defencing.fresh(0, side=16, width=4, growth=4, whole=whole).segmentation
        with torch.no_grad():
            apart = (segmentation(images) - segmentation(other))[..., -8:, -8:].abs()
        assert float(apart.min()) > 0 if whole else float(apart.max()) == 0


def test_losses_by_hand(model, monkeypatch) -> None:
    masks = draw_fences(4, 16, torch.Generator().manual_seed(0))[0]
    right = 40 * (masks - 0.5)
    for sign, low, high in ((1, 0.0, 1e-3), (-1, 10.0, 30.0)):
        monkeypatch.setattr(model.segmentation, "forward", lambda images, s=sign: s * right)
        assert low <= float(segmentation_loss(model, (masks, masks, masks))) <= high

    class Fixed:
        def __call__(self, images, masks):
            return images, -images

    ones = torch.ones(1, 1, 2, 2)
    # D(true) = 0.5 and -0.5, D(made) = -0.25 and 0.25: (0.5 + 0.75) + (1.5 + 1.25).
    assert float(hinge(Fixed(), (-0.25 * ones, ones, 0.5 * ones))) == pytest.approx(4.0)
    critics = Critics.fresh(0, width=4)
    critics.last = 0.1 * torch.rand(4, 1, 16, 16), masks, torch.rand(4, 1, 16, 16)
    optimizer = torch.optim.Adam(critics.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = hinge(critics, critics.last)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        (torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 4), r"received \[1, 1, 8, 8\] and \[1, 1, 8, 4\]"),
        (torch.full((1, 1, 8, 8), 1.5), torch.eye(8)[None, None], r"in \[0, 1\]; received 1.5"),
        (torch.full((1, 1, 8, 8), torch.nan), torch.eye(8)[None, None], r"in \[0, 1\]"),
        (torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), "empty or covers"),
        (torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8), "empty or covers"),
        (torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.5), "threshold them first"),
    ],
)
def test_what_is_refused(model, images, masks, message) -> None:
    from zoo.diffusion.networks.defencing import check

    with pytest.raises(ConfigError, match=message):
        check(images, masks)


def test_settings_that_do_not_fit_are_refused(model) -> None:
    with pytest.raises(ConfigError, match="received 18"):
        Defencing(side=18)
    with pytest.raises(ConfigError, match="'faces'"):
        model.make_job("faces")
    with pytest.raises(ConfigError, match="Defencing network"):
        Critics.fresh(0).make_job("photos")


@pytest.mark.skipif(not PHOTOS, reason="no photographs below ZOO_DATA/superres")
def test_training_moves_both_stages() -> None:
    network = Defencing.fresh(0, side=16, width=4, growth=4)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    network.learn("photos", recipe=Recipe(steps=3, lr=1e-3, batch=4, optimizer="adam"))
    moved = [name for name, p in network.named_parameters() if not torch.equal(p, before[name])]
    assert any(n.startswith("segmentation") for n in moved) and any(n.startswith("completion") for n in moved)
