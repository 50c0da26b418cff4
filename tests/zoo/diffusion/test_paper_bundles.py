"""The papers' bundles: dense and half sparse twins do what their papers are about."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

import zoo  # noqa: E402
from zoo.diffusion.data import load_pictures  # noqa: E402
from zoo.diffusion.networks.one_d_piece import errors  # noqa: E402
from zoo.shared.masks import masks_of  # noqa: E402


@pytest.mark.parametrize("name", ["one-d-piece-digits"])
def test_half_of_the_weights_are_zero_in_the_sparse_twin(name: str) -> None:
    dense, sparse = zoo.load(f"diffusion/{name}"), zoo.load(f"diffusion/{name}-s50")
    masks = masks_of(sparse)
    assert masks is not None and masks.sparsity() == pytest.approx(0.5, abs=0.01)
    assert not masks.lost_zeros(sparse)
    assert {n: p.shape for n, p in dense.named_parameters()} == {
        n: p.shape for n, p in sparse.named_parameters()
    }


@pytest.mark.parametrize("name", ["one-d-piece-digits", "one-d-piece-digits-s50"])
def test_more_tokens_show_more(name: str) -> None:
    network, images = zoo.load(f"diffusion/{name}"), load_pictures("digits").test[:100]
    found = [float(errors(network, images, k).mean()) for k in (1, 4, 16)]
    flat = float((images - images.mean(0)).square().mean())
    assert found[0] > found[1] and found[2] < 1.01 * found[1] and found[2] < 0.8 * flat
