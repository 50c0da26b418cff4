"""SLASH: kernel, matching and competition by hand; shepherded slots; sprites; refusals."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError, DataError, TaskError
from zoo.vision.methods.slash import SlotAttention, SlotModel, Smoothing, matched
from zoo.vision.slots import Batch, Shepherded, SpriteSlots, indices, judged, seen, slot_loss
from zoo.vision.sprites import MOST, sprites


def test_the_kernel_is_positive_sums_to_one_and_learns() -> None:
    smoothing = Smoothing(3)
    kernel = smoothing.kernel().detach()
    assert float(kernel.min()) > 0 and float(kernel.sum()) == pytest.approx(1)
    maps = torch.zeros(1, 2, 5, 5)
    maps[0, 1, 2, 2] = 1.0
    out = smoothing(maps)
    torch.testing.assert_close(out[0, 1, 1:4, 1:4].detach(), kernel.flip(0, 1))
    assert not bool(out[0, 0].any())  # no slot sees another's map
    torch.testing.assert_close(
        smoothing(torch.full((1, 1, 4, 4), 2.0)).detach(), torch.full((1, 1, 4, 4), 2.0)
    )
    out[0, 1, 2, 2].backward()
    assert float(smoothing.logits.grad[1, 1]) > 0


def test_centres_go_to_the_nearest_points_by_hand() -> None:
    points = torch.tensor([[[0.4, 0.4], [0.0, 0.0], [-0.4, 0.1]]])
    centres = torch.tensor([[[-0.3, 0.1], [0.3, 0.3], [torch.nan, torch.nan]]])
    targets, known = matched(points, centres)
    assert known.tolist() == [[True, False, True]]
    torch.testing.assert_close(targets[0, [0, 2]], torch.tensor([[0.3, 0.3], [-0.3, 0.1]]))
    assert not bool(matched(points, torch.full((1, 3, 2), torch.nan))[1].any())


def test_slots_share_every_pixel_and_hear_the_known_centres() -> None:
    torch.manual_seed(0)
    attention = SlotAttention(8, 3, kernel=3, points=True)
    features, noise = torch.randn(2, 8, 5, 5), torch.randn(2, 3, 8)
    slots, share, error = attention(features, noise)
    torch.testing.assert_close(share.sum(1), torch.ones(2, 5, 5))
    assert slots.shape == (2, 3, 8) and error.item() == 0
    centres = torch.full((2, 3, 2), torch.nan)
    centres[0, 0] = torch.tensor([0.5, -0.5])
    told, _, error = attention(features, noise, centres)
    assert error.item() > 0
    assert not torch.allclose(told[0], slots[0]) and torch.equal(told[1], slots[1])
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(attention(features, noise[:, order])[0], slots[:, order], atol=1e-5, rtol=0)


def test_a_model_learns_and_its_points_come_near_the_centres() -> None:
    torch.manual_seed(0)
    model = SlotModel(8, kernel=3, points=True)
    (batch,) = Shepherded(1, batch=8, pictures=16, labelled=8, size=8).draw(torch.Generator().manual_seed(0))
    assert isinstance(batch, Batch) and bool(batch.centres[2:].isnan().all())
    assert bool(batch.centres[:2, 0].isfinite().all())
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses, errors = [], []
    for _ in range(15):
        optimizer.zero_grad()
        loss = slot_loss(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        errors.append(model(*batch)[2].item())
    assert losses[-1] < 0.9 * losses[0] and errors[-1] < 0.9 * errors[0]
    assert float(model.attention.smoothing.logits.grad.abs().max()) > 0
    found = sprites(3, 8, torch.Generator().manual_seed(0))
    drawn, slots = seen(model, found)
    assert drawn.shape == (3, 3, 8, 8) and slots.shape == (3, 8, 8)


def test_sprites_lie_where_their_centres_say() -> None:
    found = sprites(40, 24, torch.Generator().manual_seed(0))
    assert float(found.images.min()) >= 0 and float(found.images.max()) <= 1
    there = found.centres.isfinite().all(2)
    assert set(there.sum(1).tolist()) == {2, MOST}
    right = 0
    for owners, centres in zip(found.owners, found.centres, strict=True):
        last = int(centres.isfinite().all(1).sum())  # the one in front
        row, column = ((centres[last - 1] + 0.5) * 24).int().tolist()
        right += int(owners[row, column]) == last
    assert right == 40


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be odd; received 4"):
        Smoothing(4)
    with pytest.raises(DataError, match="picture 1 has 2 objects and the model 1 slots"):
        matched(torch.zeros(2, 1, 2), torch.tensor([[[0.0, 0], [torch.nan, 0]], [[0, 0], [0, 1]]]))
    model = SlotModel(8)
    with pytest.raises(ConfigError, match=r"takes pictures of \(8, 8\) pixels; received \(8, 9\)"):
        model(torch.zeros(1, 3, 8, 9), torch.zeros(1, 4, 24))


def test_slots_that_are_the_objects_have_an_index_of_one() -> None:
    class Oracle(SlotModel):
        def forward(self, images, noise, centres=None):
            owners = torch.nn.functional.one_hot(judged(12).owners, self.slots).permute(0, 3, 1, 2)
            return images + 0.5, owners.double(), torch.zeros(())

    found = SpriteSlots().evaluate(Oracle(12)).metrics
    assert found["foreground"].value == found["all"].value == 1.0
    assert found["error"].value == pytest.approx(0.25)
    plain = indices(SlotModel(12), judged(12))
    assert len(plain["foreground"]) == 200 and sum(plain["foreground"]) / 200 < 0.5
    with pytest.raises(TaskError, match="12 pixels"):
        SpriteSlots().evaluate(SlotModel(8))
    with pytest.raises(TaskError, match="SlotModel"):
        SpriteSlots().evaluate(torch.nn.Linear(2, 2))
