"""Projections, proximal operators and splitting methods against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from shared.constraints import project_l0_
from shared.errors import BudgetError


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class TestProjectL0:
    @pytest.mark.parametrize("kept", range(8))
    def test_equals_exhaustive_search(self, kept):
        vector = torch.randn(7)
        supports = itertools.combinations(range(7), kept)
        candidates = [vector * torch.tensor([i in support for i in range(7)]) for support in supports]
        best = min(candidates, key=lambda candidate: float((candidate - vector).square().sum()))
        parts = [vector[:2].clone().reshape(1, 2), vector[2:].clone()]
        project_l0_(parts, kept)
        assert torch.equal(torch.cat([p.reshape(-1) for p in parts]), best)

    def test_is_global_over_tensors(self):
        small, large = torch.full((4,), 0.1), torch.full((2, 2), 5.0)
        masks = project_l0_([small, large], 4)
        assert not masks[0].any() and masks[1].all() and masks[1].shape == (2, 2)
        assert not small.any() and torch.equal(large, torch.full((2, 2), 5.0))

    @pytest.mark.parametrize("kept", [1, 2, 3, 5, 6])
    def test_ties_keep_the_lower_index(self, kept):
        a, b = torch.tensor([[1.0, -1.0], [1.0, 0.5]]), torch.tensor([-1.0, 2.0, 1.0])
        masks = project_l0_([a, b], kept)
        order = [5, 0, 1, 2, 4, 6, 3]  # largest magnitude first, then flat index
        flat = torch.cat([m.reshape(-1) for m in masks])
        assert flat.nonzero().squeeze(1).tolist() == sorted(order[:kept])

    def test_all_equal_and_all_zero_values(self):
        for value in (0.0, 3.0):
            parts = [torch.full((5,), value), torch.full((4,), value)]
            masks = project_l0_(parts, 6)
            assert masks[0].all() and masks[1].tolist() == [True, False, False, False]
            assert sum(int((p != 0).sum()) for p in parts) == (6 if value else 0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_exact_count_with_many_ties_in_every_dtype(self, dtype):
        parts = [torch.randn(300, 7).to(dtype), torch.randn(1000).to(dtype)]  # half precision repeats values
        before = torch.cat([p.reshape(-1) for p in parts])
        masks = project_l0_(parts, 1234)
        keep = torch.cat([m.reshape(-1) for m in masks])
        assert int(keep.sum()) == 1234
        assert before[keep].abs().min() >= before[~keep].abs().max()
        after = torch.cat([p.reshape(-1) for p in parts])
        assert torch.equal(after, torch.where(keep, before, torch.zeros_like(before)))
        assert not torch.signbit(after[~keep]).any(), "a removed entry is +0.0, not -0.0"

    def test_mixed_dtypes_compare_in_the_wider_one(self):
        wide, narrow = torch.tensor([1.001, 0.1]), torch.tensor([1.0, 0.2], dtype=torch.bfloat16)
        masks = project_l0_([wide, narrow], 1)
        assert masks[0].tolist() == [True, False] and not masks[1].any()

    def test_in_place_on_parameters_and_channels_last(self):
        conv = torch.nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        expected = conv.weight.detach().clone().contiguous()
        keep = torch.zeros(expected.numel(), dtype=torch.bool)
        keep[expected.abs().reshape(-1).topk(50).indices] = True
        weight = conv.weight
        (mask,) = project_l0_([conv.weight], 50)
        assert conv.weight is weight and weight.requires_grad and weight.is_leaf
        assert torch.equal(mask, keep.view_as(mask)) and torch.equal(weight, expected * mask)

    def test_projection_is_idempotent_and_linear_memory_path_agrees_on_large_input(self):
        w = torch.randn(200_000)
        reference = w.abs().sort(descending=True).values[12_344]
        (mask,) = project_l0_([w], 12_345)
        assert torch.equal(mask, w.abs() >= reference)
        again = w.clone()
        project_l0_([again], 12_345)
        assert torch.equal(again, w)

    def test_empty_input(self):
        assert project_l0_([], 0) == []
        (mask,) = project_l0_([torch.empty(0, 3)], 0)
        assert mask.shape == (0, 3)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_refuses_values_that_are_not_finite(self, bad):
        with pytest.raises(BudgetError, match="tensor 1 of 2 holds NaN or infinity"):
            project_l0_([torch.ones(3), torch.tensor([1.0, bad])], 2)

    @pytest.mark.parametrize("kept", [-1, 4])
    def test_refuses_impossible_counts(self, kept):
        with pytest.raises(BudgetError, match=rf"\[0, 3\].*received {kept}"):
            project_l0_([torch.ones(3)], kept)

    def test_refuses_a_tensor_passed_twice(self):
        w = torch.ones(3)
        with pytest.raises(BudgetError, match="passed twice"):
            project_l0_([w, w], 2)
