"""Part123: contrast within a view, clean masks, joined masks, the number of parts, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.errors import ConfigError, DataError
from zoo.neural3d.methods.part123 import (
    Lifted,
    Part123,
    PartHead,
    cleaned,
    clustered,
    contrast,
    overlaps,
)
from zoo.neural3d.networks import fresh
from zoo.neural3d.studies.part123 import COUNT, PartOptions, chair, distances, masks_of
from zoo.neural3d.weighed import WeighedField


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_contrast_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    masks = torch.tensor([7, 7, 2, 2])
    good = float(contrast(features, masks, generator(), temperature=0.5))
    assert good == pytest.approx(math.log(1 + 2 * math.exp(-2)))  # alike: 2, unlike: 0, twice
    bad = float(contrast(features, torch.tensor([7, 2, 7, 2]), generator(), temperature=0.5))
    assert bad > 2 * good
    # What the masks are called has no meaning.
    assert float(contrast(features, torch.tensor([1, 1, 9, 9]), generator(), temperature=0.5)) == good


def flat(masks: torch.Tensor, colour: torch.Tensor) -> Lifted:
    return Lifted(colour[:, None], torch.ones(len(masks), 1), torch.ones(len(masks)), masks)


def test_features_of_two_views_agree_though_their_masks_are_numbered_otherwise() -> None:
    places = torch.cat(
        [torch.rand(40, 3, generator=generator()), torch.rand(40, 3, generator=generator()) - 1.1]
    )
    first = torch.arange(80) // 40
    views = [flat(first + 1, places), flat(2 - first, places)]
    head = Part123(steps=25, rays=24).fit(views, 0)
    with torch.no_grad():
        found = head.rendered(places[:, None], torch.ones(80, 1))
    alike = found @ found.mT
    same = first[:, None] == first
    assert float(alike[same].mean()) > 0.8 > 0.3 > float(alike[~same].mean())


def test_small_masks_go() -> None:
    masks = torch.ones(30, 30, dtype=torch.long)
    masks[:4, :4], masks[10:15, 10:15] = 2, 3
    assert cleaned(masks).unique().tolist() == [0, 1, 3]  # 16 pixels are too few, 25 are not
    large = torch.ones(60, 60, dtype=torch.long)
    large[:5, :5] = 2
    assert cleaned(large).unique().tolist() == [0, 1]  # 25 of 3,600 are under 2 %


def test_masks_that_cover_each_other_are_joined_and_the_number_of_parts_is_found() -> None:
    shares = torch.zeros(6, 6)
    for one, other, share in ((0, 1, 0.9), (1, 2, 0.8), (3, 4, 0.9), (2, 3, 0.25)):
        shares[one, other] = shares[other, one] = share
    blobs = torch.tensor([[0.0, 0.0], [5.0, 0.0]])
    surface = (blobs[:, None] + 0.1 * torch.randn(2, 50, 2, generator=generator())).reshape(-1, 2)
    centres = blobs[torch.tensor([0, 0, 0, 1, 1, 1])]
    found = clustered(surface, shares, [9, 8, 7, 6, 5, 1], centres)
    assert len(found.unique()) == 2 and len(found[:50].unique()) == len(found[50:].unique()) == 1
    with pytest.raises(DataError, match="join to one"):
        clustered(surface, torch.ones(6, 6), [1] * 6, centres)


def test_shares_of_masks_in_neighbouring_views() -> None:
    scene = chair()
    views, masks = scene.views[:2], scene.labels[:2]
    rendered, depths = [], []
    for view, labels in zip(views, masks, strict=True):
        origin, rays = view.camera.rays()
        far = torch.full(labels.shape, 1.8)
        for _ in range(60):
            far = far + distances(origin + far[..., None] * rays).amin(-1)
        rows = labels.flatten() > 0
        rendered.append(Lifted(*torch.zeros(2, 0, 0), far.flatten()[rows], labels.flatten()[rows]))
        depths.append(far)
    nodes, shares = overlaps(views, masks, rendered, depths)
    at = {node: place for place, node in enumerate(nodes)}
    assert torch.equal(shares, shares.mT)
    for label in (1, 2):  # the seat and the back are seen from both
        assert float(shares[at[0, label], at[1, label]]) > 0.4
    assert float(shares[at[0, 1], at[1, 2]]) < 0.2 and float(shares[at[0, 1], at[0, 2]]) == 0


def test_the_chair_and_its_masks() -> None:
    scene = chair()
    assert len(scene.views) == COUNT and all(
        set(one.unique().tolist()) == {0, 1, 2, 3} for one in scene.labels
    )
    masks = masks_of(scene, 3)
    assert [len(one.unique()) for one in masks].count(5) == 1
    assert any(not torch.equal(one, other) for one, other in zip(masks, scene.labels, strict=True))
    assert distances(torch.tensor([0.0, 0.1, 0.0])).argmin() == 0
    torch.testing.assert_close(distances(torch.tensor([0.0, 0.97, 0.0]))[2], torch.tensor(0.2))


def test_weights_leave_the_geometry_alone_where_they_are_detached() -> None:
    model = fresh(WeighedField, 0, levels=2, log2_size=6, finest=8, hidden=4, samples=8)
    origins, rays = (
        torch.tensor([[0.0, 0.0, -3.0]]).expand(5, 3),
        torch.tensor([[0.0, 0.0, 1.0]]).expand(5, 3),
    )
    model.eval()
    seen = model.weigh(origins, rays)
    torch.testing.assert_close(seen.colour(model.background), model.march(origins, rays).colour)
    torch.testing.assert_close(seen.depth(), model.march(origins, rays).depth)
    seen.colour(model.background, detached=True).sum().backward()
    last = list(model.colour.parameters())[-1]
    assert bool(last.grad.any())
    density = list(model.density.parameters())[-1]
    assert not bool(density.grad[0].any()) and bool(density.grad[1:].any())  # row 0 is the density


def test_what_is_refused() -> None:
    with pytest.raises(DataError, match="'front' has no mask of 20 pixels"):
        cleaned(torch.zeros(5, 5, dtype=torch.long), "front")
    with pytest.raises(DataError, match="all 4 rays are of one mask"):
        contrast(torch.rand(4, 2), torch.ones(4, dtype=torch.long), generator())
    with pytest.raises(DataError, match="none of 2 views has two masks"):
        one = flat(torch.ones(30, dtype=torch.long), torch.rand(30, 3))
        Part123().fit([one, one])
    with pytest.raises(ConfigError, match="at least one seed"):
        PartOptions(rays=0)
    assert PartHead()(torch.zeros(2, 3)).shape == (2, 16)
