"""One-2-3-45: elevations from matches, voxels that views see, the sparse U-Net, refusals."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError, DataError, TaskError
from zoo.neural3d.cameras import Camera, lens
from zoo.neural3d.hull import cube, pixels_of
from zoo.neural3d.methods.one2345 import (
    CostVolumeNet,
    One2345,
    Seen,
    elevation_of,
    near_views,
    reprojection,
)
from zoo.neural3d.networks import fresh
from zoo.neural3d.studies.one2345 import CarvedShapes, cameras, distances, drawn

K = lens(256, 256, 0.85)


def matches(elevation: float) -> torch.Tensor:
    points = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)) * 0.3
    return torch.stack([pixels_of(one, points)[0] for one in near_views(elevation, 1.8, K, 256)])


def test_only_the_true_elevation_explains_exact_matches() -> None:
    pixels = matches(25.0)
    assert reprojection(near_views(25.0, 1.8, K, 256), pixels) < 0.01
    assert reprojection(near_views(35.0, 1.8, K, 256), pixels) > 1
    assert elevation_of(pixels, lambda degrees: near_views(degrees, 1.8, K, 256)) == 25


def test_views_look_at_the_middle_from_where_they_should() -> None:
    first, higher, _, beside, _ = near_views(30.0, 2.0, K, 256)
    torch.testing.assert_close(first.centre, torch.tensor([0.0, -1.0, -(3**0.5)]))
    assert float(higher.centre[1]) < -1 and float(beside.centre[0]) > 0
    for one in (first, higher, beside):
        torch.testing.assert_close(pixels_of(one, torch.zeros(1, 3))[0], torch.full((1, 2), 128.0))


def test_distances_of_a_carved_shape_by_hand() -> None:
    balls = torch.tensor([[[0, 0, 0, 0.5], [2, 0, 0, 0.1], [2, 0, 0, 0.1], [0, -0.5, 0, 0.2]]])
    points = torch.tensor([[[0.0, 0.0, 0.0], [0.0, -0.5, 0.0], [0.0, 1.0, 0.0]]])
    torch.testing.assert_close(distances(balls, points), torch.tensor([[-0.3, 0.2, 0.5]]))


def small() -> tuple[CostVolumeNet, torch.Tensor]:
    return fresh(CostVolumeNet, 0, side=8, width=4, features=2), drawn(2, 0).pictures


def test_voxels_are_those_that_all_masks_hold() -> None:
    model, pictures = small()
    kept, _ = model.voxels(pictures, cameras())
    inside = distances_inside()
    assert bool(kept[inside].float().mean() > 0.9) and 0.02 < float(kept.float().mean()) < 0.5
    emptied = pictures.clone()
    emptied[:, 0, 3, :, :16] = 0  # what one mask does not hold is dropped
    fewer, _ = model.voxels(emptied, cameras())
    assert bool((kept | ~fewer).all()) and int(fewer.sum()) < int(kept.sum())


def distances_inside() -> torch.Tensor:
    shapes = drawn(2, 0)
    size = round(shapes.inside.shape[1] ** (1 / 3))
    grid = shapes.inside.reshape(2, 8, size // 8, 8, size // 8, 8, size // 8).float()
    return grid.amin((2, 4, 6)).bool().flatten(1)


def test_the_net_answers_on_its_sites_and_masks_alone_leave_colours_out() -> None:
    model, pictures = small()
    model.eval()
    logits, kept = model(pictures, cameras())
    assert (
        logits.shape == (2, 512) and bool((logits[~kept] == -20).all()) and bool((logits[kept] > -20).all())
    )
    alone, _ = model(pictures[1:], cameras())
    torch.testing.assert_close(alone[0], logits[1], atol=1e-4, rtol=1e-4)  # shapes of a batch do not mix
    other = pictures.clone()
    other[:, :, :3] = other[:, :, :3].flip(2)
    assert not torch.equal(model(other, cameras())[0], logits)
    blind = fresh(CostVolumeNet, 0, side=8, width=4, features=2, colours=False).eval()
    assert torch.equal(blind(other, cameras())[0], blind(pictures, cameras())[0])


def test_training() -> None:
    points = cube(torch.zeros(3), 1.0, 8)
    shapes = Seen(drawn(2, 0).pictures, (points.norm(dim=1) < 0.5).expand(2, -1))
    make = One2345(steps=2, batch=2)
    one, other = make.fit(shapes, cameras(), 1), make.fit(shapes, cameras(), 1)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_what_is_refused() -> None:
    views = near_views(25.0, 1.8, K, 256)
    with pytest.raises(DataError, match="no matched pixels"):
        reprojection(views, torch.zeros(5, 0, 2))
    mixed = [*views[:4], Camera(views[4].viewmat, lens(256, 256, 0.7), 256, 256)]
    with pytest.raises(DataError, match="with one lens"):
        reprojection(mixed, matches(25.0))
    model, pictures = small()
    own = cameras()
    with pytest.raises(DataError, match="several lenses"):
        model(pictures, [*own[:7], Camera(own[7].viewmat, lens(32, 32, 0.3), 32, 32)])
    with pytest.raises(DataError, match="no voxel of shape 0 is seen by two of 8 views"):
        model(torch.zeros_like(pictures), own)
    with pytest.raises(ConfigError, match="at least one step"):
        One2345(steps=0)
    with pytest.raises(TaskError, match="takes a CostVolumeNet"):
        CarvedShapes().evaluate(torch.nn.Linear(1, 1))
