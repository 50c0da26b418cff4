"""Wanda and SparseGPT: masks are those of the definition, updates those of optimal brain surgery."""

from __future__ import annotations

import copy

import pytest
import torch

from zoo.errors import ConfigError
from zoo.llm.loss import language_forward
from zoo.llm.methods.sparsegpt import sparsegpt_prune_, sparsegpt_pruner
from zoo.llm.methods.wanda import wanda_mask, wanda_pruner
from zoo.llm.models.blocks import find_blocks
from zoo.llm.pruning import prune_blocks, resolve_sparsity
from zoo.shared.errors import ActivationError, BudgetError
from zoo.shared.masks import Mask, MaskSet, masks_of, set_masks
from zoo.shared.masks.patterns import NM, Unstructured, parse_pattern
from zoo.shared.masks.topk import rowwise_mask
from zoo.shared.pruning.hessians import inverse_factor


def inputs_of(model, batches, name):
    """All inputs of one linear layer in a plain forward pass, [rows, in]."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().flatten(0, -2))
    )
    with torch.no_grad():
        for batch in batches:
            language_forward(model, batch)
    handle.remove()
    return torch.cat(seen)


def problem(rows=6, columns=12, samples=40, seed=0):
    """A weight, correlated inputs and their H = 2/n X^T X, in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, columns, generator=generator, dtype=torch.float64) @ mix
    return weight, x, 2 / samples * x.T @ x


def test_nan_activations_are_refused_by_name(llama, batches):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ActivationError, match=r"model.layers.1.mlp.down_proj are not finite"):
        prune_blocks(llama, batches, wanda_pruner(Unstructured(), 0.5))


# -- Wanda


def test_wanda_keeps_the_best_of_each_row_of_the_first_block(llama, batches):
    dense = copy.deepcopy(llama)
    masks = prune_blocks(llama, batches, wanda_pruner(Unstructured(), 0.6))
    name = "model.layers.0.mlp.down_proj"
    norms = inputs_of(dense, batches, name).norm(dim=0)
    weight = dense.get_submodule(name).weight.detach()
    score, keep = weight.abs() * norms, masks[f"{name}.weight"].keep
    columns = weight.shape[1]
    assert int(keep.sum()) == weight.numel() - int(0.6 * weight.numel())
    assert set(keep.sum(1).tolist()) <= {columns - int(columns * 0.6), columns - int(columns * 0.6) - 1}
    dropped, kept = score.masked_fill(keep, -1).amax(1), score.masked_fill(~keep, torch.inf).amin(1)
    assert (dropped <= kept).all()
    assert torch.equal(llama.get_submodule(name).weight, weight * keep)


def test_wanda_scores_the_second_block_on_the_pruned_first(llama, batches):
    dense = copy.deepcopy(llama)
    masks = prune_blocks(llama, batches, wanda_pruner(Unstructured(), 0.5))
    name = "model.layers.1.self_attn.q_proj"
    mixed = copy.deepcopy(llama)  # the first block pruned, the second as it was
    mixed.model.layers[1] = dense.model.layers[1]
    weight = dense.get_submodule(name).weight
    on_pruned = wanda_mask(weight, inputs_of(mixed, batches, name).norm(dim=0), weight.numel() // 2)
    on_dense = wanda_mask(weight, inputs_of(dense, batches, name).norm(dim=0), weight.numel() // 2)
    assert torch.equal(masks[f"{name}.weight"].keep, on_pruned)
    assert not torch.equal(on_pruned, on_dense)


def test_equal_norms_make_wanda_row_wise_magnitude():
    weight = torch.randn(5, 8)
    keep = wanda_mask(weight, torch.full((8,), 3.0), 20)
    assert torch.equal(keep, rowwise_mask(weight.abs(), 20))


@pytest.mark.parametrize("pruner", [wanda_pruner, sparsegpt_pruner])
@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8"])
def test_nm_masks_have_their_counts_and_their_pattern(llama, batches, pruner, text):
    pattern = parse_pattern(text)
    masks = prune_blocks(llama, batches, pruner(pattern, 0.5))
    assert set(masks) == {name for block in find_blocks(llama) for name in block.weight_names()}
    for mask in masks.values():
        groups = mask.keep.unflatten(-1, (-1, pattern.m))
        assert (groups.sum(-1) == pattern.n).all() and mask.pattern == pattern
    assert masks_of(llama).equal(masks) and masks.lost_zeros(llama) == []


def test_rowwise_counts_are_exact_with_a_remainder():
    score = torch.rand(7, 10)
    for kept in (0, 1, 6, 7, 33, 69, 70):
        keep = rowwise_mask(score, kept)
        assert int(keep.sum()) == kept
        assert int(keep.sum(1).max() - keep.sum(1).min()) <= 1


# -- SparseGPT


def brute_force_obs(weight, hessian, keep):
    """Column after column, the optimal update of the columns not yet passed, by explicit inverses."""
    result = weight.clone()
    for j in range(weight.shape[1]):
        inverse = hessian[j:, j:].inverse()
        for row in range(weight.shape[0]):
            if not keep[row, j]:
                result[row, j:] -= result[row, j] / inverse[0, 0] * inverse[0]
                result[row, j] = 0
    return result


@pytest.mark.parametrize("block", [4, 5, 12, 128])
def test_updates_are_those_of_brute_force_surgery_whatever_the_block(block):
    weight, _, hessian = problem()
    keep = rowwise_mask(weight.abs(), 36)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    expected = brute_force_obs(weight, damped, keep)
    found = weight.float()
    sparsegpt_prune_(found, hessian, 36, keep=keep, block=block)
    torch.testing.assert_close(found, expected.float(), rtol=2e-3, atol=2e-3)
    assert (found[~keep] == 0).all()


def test_dropping_the_first_columns_is_the_least_squares_solution():
    weight, _, hessian = problem()
    keep = torch.ones(6, 12, dtype=torch.bool)
    keep[:, :4] = False
    damped = hessian + 1e-4 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    # min over w' on the kept columns of (w - w') H (w - w')^T
    rest = torch.linalg.solve(damped[4:, 4:], damped[4:] @ weight.T).T
    found = weight.float()
    sparsegpt_prune_(found, hessian, 48, keep=keep, block=3, damping=1e-4)
    torch.testing.assert_close(found[:, 4:], rest.float(), rtol=2e-2, atol=2e-2)


def test_choice_within_a_block_is_the_definition():
    weight, _, hessian = problem()
    factor, _ = inverse_factor(hessian, 0.01)
    cost = (weight.float() / factor.diagonal()).square()
    mask = sparsegpt_prune_(weight.float(), hessian, 30, block=12)
    assert float(cost[mask].min()) >= float(cost[~mask].max())


@pytest.mark.parametrize("kept", [0, 1, 29, 36, 71, 72])
def test_counts_are_exact_for_any_block(kept):
    weight, _, hessian = problem()
    assert int(sparsegpt_prune_(weight.float(), hessian, kept, block=5).sum()) == kept


def test_errors_of_the_layer_fall_from_magnitude_to_wanda_to_sparsegpt():
    errors = {"magnitude": [], "wanda": [], "sparsegpt": []}
    for seed in range(5):
        weight, _, _ = problem(32, 64, 256, seed)
        generator = torch.Generator().manual_seed(seed)
        sources = torch.randn(256, 16, generator=generator, dtype=torch.float64)
        mix = torch.randn(16, 64, generator=generator, dtype=torch.float64)
        scale = torch.rand(64, generator=generator, dtype=torch.float64) + 0.2
        noise = torch.randn(256, 64, generator=generator, dtype=torch.float64)
        x = (sources @ mix + noise) * scale  # features that resemble one another, of unequal size
        hessian = 2 / len(x) * x.T @ x
        half = weight.numel() // 2
        adjusted = weight.float()
        sparsegpt_prune_(adjusted, hessian, half)
        found = {
            "magnitude": weight * rowwise_mask(weight.abs(), half),
            "wanda": weight * wanda_mask(weight, x.norm(dim=0), half),
            "sparsegpt": adjusted.double(),
        }
        for name, pruned in found.items():
            errors[name].append(float((x @ (pruned - weight).T).square().sum()))
    means = {name: sum(values) for name, values in errors.items()}
    assert means["sparsegpt"] < 0.7 * means["wanda"] and means["wanda"] < 0.9 * means["magnitude"]


def test_inputs_that_never_fire_lose_their_weights():
    weight, x, _ = problem()
    x[:, 3] = 0
    found = weight.float()
    mask = sparsegpt_prune_(found, 2 / len(x) * x.T @ x, 36, block=4)
    assert torch.isfinite(found).all() and (found[:, 3] == 0).all() and int(mask.sum()) == 36


def test_bad_options_are_refused_with_a_remedy():
    weight, _, hessian = problem()
    with pytest.raises(BudgetError, match="damping is a positive share"):
        sparsegpt_prune_(weight.float(), hessian, 10, damping=0.0)
    with pytest.raises(ConfigError, match="multiple of 4"):
        sparsegpt_prune_(weight.float(), hessian, 10, NM(2, 4), block=6)
    for sparsity in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="between 0 and 1"):
            resolve_sparsity(Unstructured(), sparsity)
    with pytest.raises(ConfigError, match="needs a sparsity"):
        resolve_sparsity(Unstructured(), None)
    with pytest.raises(ConfigError, match="2:4 drops 0.5"):
        resolve_sparsity(NM(2, 4), 0.7)
    with pytest.raises(ConfigError, match="unstructured or N:M along the inputs"):
        wanda_pruner(parse_pattern("block4x1"), 0.5)


@pytest.mark.parametrize("pruner", [wanda_pruner, sparsegpt_pruner])
@pytest.mark.parametrize("first,second", [(0.5, 0.3), (0.3, 0.61), ("2:4", 0.7), (0.6, "2:4")])
def test_a_second_pruning_never_thaws_the_first(llama, batches, pruner, first, second):
    def prune(target):
        if isinstance(target, str):
            return prune_blocks(llama, batches, pruner(parse_pattern(target), 0.5))
        return prune_blocks(llama, batches, pruner(Unstructured(), target))

    embedding = MaskSet({"model.embed_tokens.weight": torch.rand(96, 32) < 0.5})
    embedding.apply_(llama)
    set_masks(llama, embedding)
    before, after = prune(first), prune(second)
    assert after["model.embed_tokens.weight"].equal(embedding["model.embed_tokens.weight"])
    assert all(not bool((after[name].keep & ~mask.keep).any()) for name, mask in before.items())
    assert masks_of(llama).equal(after) and after.lost_zeros(llama) == []
    if second in (0.61, 0.7):  # what is gone already counts
        for name in (name for name in after if "layers" in name):
            assert after[name].kept == after[name].numel - int(second * after[name].numel)
    if second == 0.3:
        assert all(after[name].equal(mask) for name, mask in before.items())


def test_rows_with_little_left_keep_it_and_the_others_share_the_rest():
    score = torch.arange(12.0).view(3, 4)
    before = torch.tensor([[True, False, False, False], [True, True, False, True], [True, True, True, True]])
    keep = rowwise_mask(score, 6, before)
    assert keep.tolist() == [
        [True, False, False, False],
        [False, True, False, True],
        [False, True, True, True],
    ]


def test_masks_are_only_of_the_blocks(llama, batches):
    masks = prune_blocks(llama, batches, sparsegpt_pruner(Unstructured(), 0.5))
    assert not any("embed" in name or "lm_head" in name for name in masks)
    assert all(isinstance(mask, Mask) and mask.sparsity == 0.5 for mask in masks.values())
