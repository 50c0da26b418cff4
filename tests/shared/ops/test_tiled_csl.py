"""Tiled-CSL: exact round trips, the size formula, and words as the format says."""

from __future__ import annotations

import pytest
import torch

from zoo.shared import ops
from zoo.shared.errors import FormatError, OpError
from zoo.shared.ops import _native
from zoo.shared.ops.tiled_csl import TiledCSL, pack_tiled_csl, tiled_bytes, tiled_linear


def sparse(rows: int, columns: int, sparsity: float, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).half()
    return weight * (torch.rand(rows, columns, generator=generator) >= sparsity)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(128, 64), (256, 192), (100, 70), (1, 1), (300, 65)])
def test_round_trips_are_exact_and_sizes_as_predicted(shape, sparsity):
    weight = sparse(*shape, sparsity)
    packed = pack_tiled_csl(weight)
    assert torch.equal(packed.to_dense(), weight)
    least, most = tiled_bytes(*shape, int((weight != 0).sum()))
    assert least <= packed.nbytes <= most
    assert int(packed.offsets[-1]) == int(packed.offsets[-2]) and packed.words.numel() % 4 == 0


def test_words_are_value_and_swizzled_place():
    weight = torch.zeros(128, 64)
    weight[3, 5] = 1.5
    packed = pack_tiled_csl(weight)
    found = {(int(word) >> 16) & 0xFFFF: int(word) & 0xFFFF for word in packed.words}
    assert found[3 * 64 + (5 ^ 24)] == 0x3E00  # 1.5 in fp16
    assert sorted(found.values()) == [0, 0, 0, 0x3E00] and len(found) == 4


def test_break_even_is_at_half_and_a_tenth_costs_a_fifth():
    for sparsity, share in ((0.5, 1.0), (0.8, 0.4), (0.9, 0.2)):
        packed = pack_tiled_csl(sparse(1024, 1024, sparsity))
        assert packed.nbytes / (2 * 1024**2) == pytest.approx(share, rel=0.03)


def test_the_product_is_that_of_the_dense_weight():
    weight = sparse(200, 130, 0.8)
    x = torch.randn(3, 4, 130)
    torch.testing.assert_close(tiled_linear(x, pack_tiled_csl(weight)), x @ weight.float().T)
    with pytest.raises(OpError, match="130 columns"):
        tiled_linear(torch.randn(2, 7), pack_tiled_csl(weight))


def test_negative_zero_is_zero_and_subnormals_are_kept():
    weight = torch.zeros(128, 64).half()
    weight[0, 0], weight[0, 1] = -0.0, 6e-8
    packed = pack_tiled_csl(weight)
    assert packed.words.numel() == 4 and torch.equal(packed.to_dense(), weight)


def test_tiles_beyond_the_kernels_registers_are_told():
    assert pack_tiled_csl(sparse(128, 64, 0.3)).fullest_tile > 4096
    assert pack_tiled_csl(sparse(128, 64, 0.7)).fullest_tile < 4096


def test_bad_weights_and_damage_are_refused():
    with pytest.raises(OpError, match="finite fp16"):
        pack_tiled_csl(torch.full((4, 4), 1e6))
    with pytest.raises(OpError, match="finite fp16"):
        pack_tiled_csl(torch.full((4, 4), torch.nan))
    with pytest.raises(OpError, match="the mask is"):
        pack_tiled_csl(torch.ones(4, 4), torch.ones(4, 5, dtype=torch.bool))
    full = torch.ones(128, 64)
    assert torch.equal(pack_tiled_csl(full).to_dense(), full.half())  # a multiple of four needs no padding
    packed = pack_tiled_csl(sparse(128, 128, 0.5))
    with pytest.raises(FormatError, match="offsets"):
        TiledCSL(packed.words[:-4], packed.offsets, packed.shape).to_dense()
    broken = packed.words.clone()
    broken[0] = -1
    with pytest.raises(FormatError, match="outside its tile"):
        TiledCSL(broken, packed.offsets, packed.shape).to_dense()


def test_a_damaged_weight_is_refused_by_each_backend():
    packed = pack_tiled_csl(sparse(128, 128, 0.5))
    place, ends = packed.words.clone(), packed.offsets.clone()
    place[5], ends[1] = -1, ends[-1] + 1
    for broken in (
        TiledCSL(place, packed.offsets, packed.shape),
        TiledCSL(packed.words, ends, packed.shape),
        TiledCSL(packed.words[:-4], packed.offsets, packed.shape),
        TiledCSL(packed.words, packed.offsets[:-1], packed.shape),
    ):
        for name in ("reference", "native"):
            if name == "reference" or _native.available():
                with ops.backend(name), pytest.raises((OpError, FormatError)):
                    tiled_linear(torch.randn(2, 128), broken)
