"""The papers' bundles: dense and half sparse twins do what their papers are about."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

import zoo  # noqa: E402
from zoo.bundles.catalog import find  # noqa: E402
from zoo.diffusion.data import load_pictures  # noqa: E402
from zoo.diffusion.networks.one_d_piece import errors  # noqa: E402
from zoo.shared.masks import masks_of  # noqa: E402
from zoo.shared.store.formats import load_packed  # noqa: E402


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


def test_weights_are_stored_in_float16_and_computed_on_in_float32(tmp_path) -> None:
    """What float16 cannot hold is stored as it is, and both come back bit for bit."""
    network = zoo.load("diffusion/one-d-piece-digits")
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    stored = load_packed(find("diffusion/one-d-piece-digits").weights).tensors
    assert {value.dtype for value in stored.values()} == {torch.float16}
    with torch.no_grad():
        network.up.weight.mul_(1 / 3)
    zoo.save(network, tmp_path / "own", card=find("diffusion/one-d-piece-digits").card)
    mixed = load_packed(tmp_path / "own" / "weights.safetensors").tensors
    assert [name for name, value in mixed.items() if value.dtype == torch.float32] == ["up.weight"]
    assert torch.equal(zoo.load(tmp_path / "own").up.weight, network.up.weight)
