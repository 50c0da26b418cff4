"""SPIn-NeRF: harmonic fillings, masks that agree, which loss moves what, refusals."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError, DataError
from zoo.neural3d.cameras import lens, look_at
from zoo.neural3d.fields import rays_of
from zoo.neural3d.methods.spin_nerf import Masked, SPInNeRF, check_masks, dilated, harmonic, segmented
from zoo.neural3d.networks import fresh
from zoo.neural3d.studies.spin_nerf import arc, imagined, rough
from zoo.neural3d.views import View
from zoo.neural3d.weighed import WeighedField

SMALL = {"levels": 2, "log2_size": 6, "finest": 8, "hidden": 4, "samples": 8}


def view(size: int = 8) -> View:
    camera = look_at(
        torch.tensor([0.0, 0.0, -3.0]), torch.zeros(3), lens(size, size, 0.6), size, size, (0, -1, 0)
    )
    return View(camera, torch.rand(size, size, 3, generator=torch.Generator().manual_seed(0)), name="front")


def test_a_harmonic_filling_by_hand() -> None:
    line = torch.tensor([1.0, 9, 9, 9, 5]).reshape(1, 5, 1)
    hole = torch.tensor([[False, True, True, True, False]])
    torch.testing.assert_close(harmonic(line, hole)[0, :, 0], torch.tensor([1.0, 2, 3, 4, 5]))
    y, x = torch.meshgrid(torch.arange(7.0), torch.arange(9.0), indexing="ij")
    slope = torch.stack([2 * x + y, 1 - x], 2)
    hole = torch.zeros(7, 9, dtype=torch.bool)
    hole[2:5, 3:7] = True
    spoiled = torch.where(hole[..., None], 50.0, slope)
    torch.testing.assert_close(harmonic(spoiled, hole), slope, atol=1e-4, rtol=0)  # a plane stays a plane
    assert torch.equal(harmonic(slope, torch.zeros_like(hole)), slope)


def test_masks_grow_in_all_directions() -> None:
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[2, 2] = True
    assert (
        int(dilated(mask, 1).sum()) == 9
        and bool(dilated(mask, 2).all())
        and torch.equal(dilated(mask, 0), mask)
    )


def batch(hole: bool) -> Masked:
    origins, directions, colours = rays_of(view())
    count = len(origins)
    return Masked(
        origins,
        directions,
        colours,
        torch.full((count,), hole),
        torch.full((count,), 0.3),
        torch.zeros(count),
    )


def density_moves(make: SPInNeRF, given: Masked) -> bool:
    model = fresh(WeighedField, 0, **SMALL).eval()
    make.loss(model, given).backward()
    return bool(list(model.density.parameters())[-1].grad[0].any())  # row 0 is the density


def test_colours_in_the_hole_never_move_the_geometry_and_disparities_do() -> None:
    assert not density_moves(SPInNeRF(disparity=0.0), batch(True))
    assert density_moves(SPInNeRF(disparity=1.0), batch(True))
    assert density_moves(SPInNeRF(hole="plain"), batch(True))
    assert density_moves(SPInNeRF(disparity=0.0), batch(False))


def test_known_distances_count_where_they_are_known() -> None:
    model, given = fresh(WeighedField, 0, **SMALL).eval(), batch(False)
    none = SPInNeRF().loss(model, given)
    assert torch.equal(SPInNeRF(depth=5.0).loss(model, given), none)
    known = given._replace(distances=torch.full_like(given.distances, 2.5))
    depth = model.weigh(given.origins, given.directions).depth()
    added = SPInNeRF(depth=5.0).loss(model, known) - none
    torch.testing.assert_close(added, 5 * (depth - 2.5).square().mean())


def test_fits_leave_out_what_is_masked() -> None:
    one, mask = view(), torch.zeros(8, 8, dtype=torch.bool)
    mask[3:5, 3:5] = True
    make = SPInNeRF(steps=1, rays=8, grow=1, arguments=SMALL)
    scene = make.scene([one])
    seen: list[tuple[int, int]] = []

    def inpainter(image: torch.Tensor, hole: torch.Tensor) -> torch.Tensor:
        seen.append((image.shape[2], int(hole.sum())))
        return image

    fields = [
        SPInNeRF(hole=hole, steps=1, rays=8, grow=1, inpainter=inpainter, arguments=SMALL).fit(
            scene, [one], [mask]
        )
        for hole in ("detached", "none")
    ]
    assert seen[1] == (3, 16) and seen[0][0] == 1 and seen[0][1] >= 16
    assert not torch.equal(fields[0].table, fields[1].table)
    assert [one.shape for one in segmented(scene, [one], [mask], 1)] == [(8, 8)]


def test_the_scene_and_its_rough_masks() -> None:
    scene = arc(test=True)
    for one, empty, mask in zip(scene.views, scene.empty, scene.masks, strict=True):
        assert 0.02 < float(mask.float().mean()) < 0.1
        assert torch.allclose(one.image[~mask], empty.image[~mask], atol=0.03)
        assert 0 < int((one.depth > 0).sum()) < 0.1 * mask.numel()
    given = rough(scene.masks, 2)
    assert not bool((given[2] & ~given[1]).all()) and int(given[2].sum()) == 0
    image, hole = scene.views[0].image, scene.masks[0]
    made = imagined(image, hole)
    assert torch.equal(made[~hole], image[~hole]) and not torch.equal(made, harmonic(image, hole))


def test_what_is_refused() -> None:
    one, mask = view(), torch.zeros(8, 8, dtype=torch.bool)
    mask[0] = True
    with pytest.raises(DataError, match=r"'front' is \(8, 8\) and its mask \(4, 8\)"):
        check_masks([one], [mask[:4]])
    with pytest.raises(DataError, match="'front' covers 100 %"):
        check_masks([one], [torch.ones_like(mask)])
    with pytest.raises(DataError, match="nothing is masked in any of 1 views"):
        check_masks([one], [torch.zeros_like(mask)])
    with pytest.raises(DataError, match="1 views and 2 masks"):
        check_masks([one], [mask, mask])
    with pytest.raises(ConfigError, match="none, detached or plain"):
        SPInNeRF(hole="all")
