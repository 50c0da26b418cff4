"""GVGEN's volumes: claims on the pool by hand, the exact count, ranges, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from zoo.errors import ConfigError
from zoo.neural3d.methods.gvgen import GaussianVolume, VolumeFit, boxed, claimed
from zoo.neural3d.refine import mean_psnr
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.shapes import shapes

WHITE = (1.0, 1.0, 1.0)


def test_claims_by_hand() -> None:
    pool = torch.tensor([[0.0, 0, 0], [1, 0, 0], [5, 5, 5]])
    places = torch.tensor([[0.1, 0, 0], [0.05, 0, 0], [0.9, 0.2, 0], [2.6, 2.6, 5], [1, 1.4, 0]])
    which, node = claimed(places, pool, 1.5)
    assert dict(zip(node.tolist(), which.tolist(), strict=True)) == {0: 1, 1: 2}
    which, node = claimed(places[4:], pool, 1.5)
    assert (which.tolist(), node.tolist()) == ([0], [1])
    assert [len(part) for part in claimed(places, pool[:0], 1.5)] == [0, 0]
    assert [len(part) for part in claimed(places[:0], pool, 1.5)] == [0, 0]


def test_the_count_is_that_of_the_grid() -> None:
    views = shapes(24, 6, 2)
    centre = torch.tensor([0.0, -0.3, 0.0])
    train = boxed(views.train, centre, 3.0)
    method = VolumeFit(side=5, steps=160, every=8)
    grown = GaussianVolume(5, WHITE)
    before = mean_psnr(grown, train)
    volume = method.fit(train, WHITE)
    assert len(volume) == 125 == len(volume.nodes.unique()) and len(volume.pooled()) == 0
    assert volume.nodes.tolist() != list(range(125))  # some went and came back
    assert mean_psnr(volume, train) > before + 0.5
    still = replace(method, pool=False, offsets=False).fit(train, WHITE)
    assert torch.equal(still.means, still.grid) and still.nodes.tolist() == list(range(125))
    placed = GaussianScene.from_splats(volume.placed(centre, 3.0), WHITE)
    torch.testing.assert_close(placed(views.test[0].camera), volume(boxed(views.test, centre, 3.0)[0].camera))


def test_ranges_and_the_price_of_leaving() -> None:
    volume = GaussianVolume(4, WHITE)
    assert volume.reach == pytest.approx(0.5)
    with torch.no_grad():
        volume.offsets[0, 0], volume.offsets[1, 1] = 0.14, -9.0
        volume.opacities[:] = 20
    volume.clamp()
    assert float(volume.offsets.detach()[1, 1]) == pytest.approx(-0.15)
    assert float(volume.opacities.detach().max()) == 7
    small = GaussianVolume(16, WHITE)
    with torch.no_grad():
        small.offsets[0, 0] = 0.12  # 0.02 beyond 1.5 / 15
    assert float(small.excess().detach()) == pytest.approx(0.02 / (3 * 16**3), rel=1e-4)


def test_a_boxed_view_sees_the_same() -> None:
    view = shapes(16, 1, 1).train[0]
    centre = torch.tensor([0.1, -0.3, 0.2])
    camera, moved = view.camera, boxed([view], centre, 2.5)[0].camera
    point = torch.tensor([0.4, -0.2, 0.1])
    one = camera.viewmat[:3, :3] @ point + camera.viewmat[:3, 3]
    other = moved.viewmat[:3, :3] @ ((point - centre) / 2.5) + moved.viewmat[:3, 3]
    torch.testing.assert_close(one, 2.5 * other)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="two nodes"):
        GaussianVolume(1, WHITE)
