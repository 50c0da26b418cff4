"""Projections, proximal operators and splitting methods against brute force."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar
from torch import nn
from torch.nn.utils import parametrize

from zoo.shared.errors import BudgetError, PatternError
from zoo.shared.learned.constraints import (
    ADMM,
    SRSTE,
    AugmentedLagrangian,
    DecayingSTE,
    PatternSTE,
    SoftShrinkage,
    decaying_ste,
    envelope_factors,
    group_envelope,
    group_soft_factors,
    project_l0_,
    project_l1_,
    project_pattern_,
    prox_group_,
    prox_l0_,
    prox_l1_,
    prox_nonnegative_,
    soft_shrink_,
    sr_ste,
    straight_through,
)
from zoo.shared.masks.patterns import NM, Group, Unstructured


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


class TestOtherProjections:
    def test_l1_ball_equals_constrained_minimisation(self):
        vector = torch.randn(6, dtype=torch.float64)
        parts = [vector[:2].clone(), vector[2:].clone().view(2, 2)]
        project_l1_(parts, 1.5)
        found = torch.cat([p.reshape(-1) for p in parts])
        # w = a - b with a, b >= 0 turns the constraint into a smooth one.
        result = minimize(
            lambda ab: float(((ab[:6] - ab[6:] - vector.numpy()) ** 2).sum()),
            np.full(12, 0.1),
            bounds=[(0, None)] * 12,
            constraints={"type": "ineq", "fun": lambda ab: 1.5 - ab.sum()},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        np.testing.assert_allclose(found.numpy(), result.x[:6] - result.x[6:], atol=1e-5)
        assert float(found.abs().sum()) == pytest.approx(1.5, abs=1e-12)

    def test_l1_ball_leaves_inner_points(self):
        inner = torch.tensor([0.25, -0.5])
        project_l1_([inner], 1.0)
        assert inner.tolist() == [0.25, -0.5]

    def test_l1_ball_refuses_a_radius_that_is_not_positive(self):
        with pytest.raises(BudgetError, match="radius must be positive"):
            project_l1_([torch.ones(2)], 0.0)

    def test_pattern_projection_is_the_nearest_pattern(self):
        w = torch.tensor([[3.0, -4.0, 1.0, 2.0], [0.1, 0.2, -0.4, 0.3]])
        mask = project_pattern_(w, NM(2, 4), 0)
        assert w.tolist() == [[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, *torch.tensor([-0.4, 0.3]).tolist()]]
        assert torch.equal(mask, w != 0)
        with pytest.raises(PatternError, match="NaN"):
            project_pattern_(torch.tensor([float("nan"), 1.0]), Unstructured(), 1)


def _scalar_prox(penalty, v: float) -> float:
    """argmin 1/2 (w - v)^2 + penalty(w) on a fine grid, refined."""
    grid = np.linspace(-5, 5, 20001)
    best = grid[np.argmin(0.5 * (grid - v) ** 2 + penalty(grid))]
    refined = minimize_scalar(
        lambda w: 0.5 * (w - v) ** 2 + penalty(np.asarray(w)),
        bounds=(best - 1e-3, best + 1e-3),
        method="bounded",
    )
    candidates = [float(refined.x), 0.0]
    return min(candidates, key=lambda w: 0.5 * (w - v) ** 2 + float(penalty(np.asarray(w))))


class TestProximal:
    values = [-2.3, -0.71, -0.2, 0.0, 0.3, 0.69, 1.9]

    @pytest.mark.parametrize(
        ("operator", "penalty"),
        [
            (partial(prox_l1_, threshold=0.7), lambda w: 0.7 * np.abs(w)),
            (partial(prox_l0_, threshold=0.245), lambda w: 0.245 * (w != 0)),  # the edge lies at 0.7
            (partial(prox_nonnegative_, threshold=0.4), lambda w: 0.4 * w + np.where(w < 0, 1e9, 0)),
        ],
    )
    def test_scalar_prox_equals_numerical_minimum(self, operator, penalty):
        weight = torch.tensor(self.values, dtype=torch.float64)
        expected = [_scalar_prox(penalty, v) for v in self.values]
        result = operator(weight)
        assert result is weight
        np.testing.assert_allclose(weight.numpy(), expected, atol=1e-5)

    def test_l1_on_a_subset_leaves_the_rest(self):
        w = torch.tensor([1.0, -1.0, 0.2])
        prox_l1_(w, 0.5, where=torch.tensor([True, False, True]))
        assert w.tolist() == [0.5, -1.0, 0.0]

    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_group_prox_equals_numerical_minimum(self, dim):
        v = torch.randn(3, 4, dtype=torch.float64)
        w = v.clone()
        prox_group_(w, 1.3, dim)

        def objective(flat):
            x = flat.reshape(3, 4)
            return 0.5 * ((x - v.numpy()) ** 2).sum() + 1.3 * np.sqrt((x**2).sum(axis=1 - dim % 2)).sum()

        best = objective(w.numpy().ravel())
        rng = np.random.default_rng(0)
        for scale in (1e-4, 1e-2, 0.3):
            for _ in range(300):
                assert best <= objective(w.numpy().ravel() + scale * rng.standard_normal(12)) + 1e-15
        found = minimize(objective, v.numpy().ravel(), method="Powell", options={"xtol": 1e-9, "ftol": 1e-13})
        np.testing.assert_allclose(found.fun, best, atol=1e-6)

    def test_group_soft_factors_by_hand(self):
        norms = torch.tensor([0.0, 1.0, 2.0, 4.0])
        assert group_soft_factors(norms, 2.0).tolist() == [0.0, 0.0, 0.0, 0.5]
        assert group_soft_factors(norms, torch.tensor([0.0, 0.5, 3.0, 1.0])).tolist() == [0.0, 0.5, 0.0, 0.75]

    @pytest.mark.parametrize("bad", [-0.1, float("inf"), float("nan")])
    def test_refuses_bad_thresholds(self, bad):
        for operator in (prox_l1_, prox_l0_, prox_nonnegative_, prox_group_):
            with pytest.raises(BudgetError, match="threshold"):
                operator(torch.ones(2, 2), bad)


class TestGroupEnvelope:
    def test_limits(self):
        norms = torch.rand(20, dtype=torch.float64) + 0.01
        ones = torch.ones(20, dtype=torch.float64)
        ridge = envelope_factors(norms, ones, 20.0, 0.3)
        torch.testing.assert_close(ridge, torch.full_like(ridge, 1 / 1.3))
        torch.testing.assert_close(group_envelope(norms, ones, 20.0), norms.square().sum() / 2)
        torch.testing.assert_close(group_envelope(norms, ones, 1.0), norms.sum().square() / 2)

    @pytest.mark.parametrize("seed", range(8))
    def test_prox_is_never_beaten(self, seed):
        """1/2 ||w - v||^2 + step GS_k(w) over the group norms (the direction of a group cannot matter)."""
        generator = torch.Generator().manual_seed(seed)
        n = torch.rand(6, generator=generator, dtype=torch.float64) * 3
        n[0] = 0
        d = torch.rand(6, generator=generator, dtype=torch.float64) + 0.2
        k, step = 1.1, 0.05 * 4 ** (seed % 4)

        def objective(w):
            return float((w - n).square().sum() / 2 + step * group_envelope(w, d, k))

        w = n * envelope_factors(n, d, k, step)
        best = objective(w)
        for scale in (1e-3, 1e-2, 0.2):
            for _ in range(60):
                noise = scale * torch.randn(6, generator=generator, dtype=torch.float64)
                assert objective((w + noise).clamp(min=0)) >= best - 1e-12

    def test_repeated_steps_reach_the_budget(self):
        norms = torch.linspace(0.5, 2.0, 100, dtype=torch.float64)
        ones = torch.ones_like(norms)
        for _ in range(200):
            norms = norms * envelope_factors(norms, ones, 20.0, 0.3)
        assert int((norms > 0).sum()) <= 20

    def test_refusals(self):
        n, d = torch.ones(3), torch.ones(3)
        for bad, match in [
            (lambda: envelope_factors(n, d, 0.0, 1.0), "budget must be positive"),
            (lambda: envelope_factors(n, d * 0, 1.0, 1.0), "positive cost"),
            (lambda: envelope_factors(n, d * float("inf"), 1.0, 1.0), "positive cost"),
            (lambda: envelope_factors(n * float("nan"), d, 1.0, 1.0), "norm is NaN"),
            (lambda: envelope_factors(n, d, 1.0, 0.0), "step must be"),
        ]:
            with pytest.raises(BudgetError, match=match):
                bad()


class TestADMM:
    def test_converges_to_the_constrained_least_squares_solution(self):
        """min ||A w - b||^2 / 2 with ||w||_1 <= 1, a convex problem with a unique solution."""
        a, b = torch.randn(12, 5, dtype=torch.float64), torch.randn(12, dtype=torch.float64) * 3
        w = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        admm = ADMM([w], partial(project_l1_, radius=1.0), rho=5.0)
        hessian = a.T @ a + 5.0 * torch.eye(5, dtype=torch.float64)
        for _ in range(400):
            # an exact minimisation of loss + penalty: one Newton step, since both are quadratic
            ((a @ w - b).square().sum() / 2 + admm.penalty()).backward()
            with torch.no_grad():
                w -= torch.linalg.solve(hessian, w.grad)
            w.grad = None
            residuals = admm.dual_step()
        assert residuals.primal < 1e-6 and residuals.dual < 1e-6
        admm.finish_()
        # projected gradient as an independent solver
        x = torch.zeros(5, dtype=torch.float64)
        step = 1 / float(torch.linalg.matrix_norm(a, 2)) ** 2
        for _ in range(3000):
            x = x - step * a.T @ (a @ x - b)
            project_l1_([x], 1.0)
        torch.testing.assert_close(w.detach(), x, atol=1e-6, rtol=0)

    def test_any_projection_and_finish_returns_its_masks(self):
        linear = nn.Linear(8, 4)
        target = torch.randn(4, 8)
        with torch.no_grad():
            linear.weight.copy_(target)  # for the l0 ball the start decides the support
        admm = ADMM([linear.weight], partial(project_l0_, kept=10), rho=4.0)
        expected = target.clone()
        project_l0_([expected], 10)
        optimizer = torch.optim.SGD([linear.weight], lr=0.1)
        for _ in range(120):
            optimizer.zero_grad()
            ((linear.weight - target).square().sum() / 2 + admm.penalty()).backward()
            optimizer.step()
            admm.dual_step()
        (mask,) = admm.finish_()
        assert int(mask.sum()) == 10 and torch.equal(mask, expected != 0)
        torch.testing.assert_close(linear.weight.detach(), expected, atol=1e-3, rtol=0)

    def test_state_is_saved_and_model_parameters_are_not_owned(self):
        linear = nn.Linear(3, 3)
        admm = ADMM([linear.weight], partial(project_l0_, kept=4), rho=1.0)
        assert not list(admm.parameters()) and set(admm.state_dict()) == {"z0", "u0"}
        admm.dual_step()
        other = ADMM([linear.weight], partial(project_l0_, kept=4), rho=1.0)
        other.load_state_dict(admm.state_dict())
        torch.testing.assert_close(other.penalty(), admm.penalty())

    def test_refusals(self):
        with pytest.raises(BudgetError, match="no tensors"):
            ADMM([], partial(project_l0_, kept=1), rho=1.0)
        with pytest.raises(BudgetError, match="rho"):
            ADMM([torch.ones(2)], partial(project_l0_, kept=1), rho=0.0)
        with pytest.raises(BudgetError, match="rho"):
            AugmentedLagrangian(1.0, rho=-1.0, step=1.0)

    def test_augmented_lagrangian_finds_point_and_multiplier(self):
        """min (x - 3)^2 with x <= 1: x = 1, multiplier 4."""
        x = torch.zeros((), requires_grad=True)
        constraint = AugmentedLagrangian(1.0, rho=2.0, step=0.5)
        optimizer = torch.optim.SGD([x], lr=0.1)
        for _ in range(400):
            optimizer.zero_grad()
            ((x - 3).square() + constraint.penalty(x)).backward()
            optimizer.step()
            constraint.dual_step(x)
        assert float(x.detach()) == pytest.approx(1.0, abs=1e-4)
        assert float(constraint.dual) == pytest.approx(4.0, abs=1e-3)

    def test_an_inactive_inequality_costs_nothing(self):
        constraint = AugmentedLagrangian(5.0, rho=2.0, step=0.5)
        constraint.dual_step(torch.tensor(1.0))
        assert float(constraint.dual) == 0 and float(constraint.penalty(torch.tensor(1.0))) == 0


class TestSoftShrinkage:
    def test_operator(self):
        w = torch.tensor([1.0, -2.0, 4.0])
        keep = torch.tensor([False, True, False])
        assert soft_shrink_(w.clone(), keep, 0.5).tolist() == [0.5, -2.0, 2.0]
        assert soft_shrink_(w.clone(), keep, 0.0).tolist() == [0.0, -2.0, 0.0]

    def test_hand_table_then_finish(self):
        w = torch.tensor([[4.0, 1.0, -2.0, 3.0, 0.5]])
        shrinkage = SoftShrinkage({"w": w}, sparsity=0.5, alpha=0.5)  # floor(2.5) = 2 are shrunk
        assert shrinkage.step() == 0.0
        assert w.tolist() == [[4.0, 0.5, -2.0, 3.0, 0.25]]
        w[0, 1] = 2.5  # a shrunk weight recovers, another takes its place
        assert shrinkage.step() == pytest.approx(2 / 5)
        assert w.tolist() == [[4.0, 2.5, -1.0, 3.0, 0.125]]
        masks = shrinkage.finish()
        assert masks["w"].keep.tolist() == [[True, True, False, True, False]]
        assert w.tolist() == [[4.0, 2.5, 0.0, 3.0, 0.0]]

    def test_alpha_zero_is_the_projection_and_patterns_hold(self):
        w = torch.randn(6, 8)
        expected = w.clone()
        project_pattern_(expected, NM(2, 4), 0)
        shrinkage = SoftShrinkage({"w": w}, sparsity=0.5, alpha=0.0, pattern=NM(2, 4))
        shrinkage.step()
        assert torch.equal(w, expected)
        rows = SoftShrinkage({"w": torch.randn(5, 3)}, sparsity=0.5, alpha=0.9, pattern=Group(0)).finish()
        assert rows["w"].kept == 6  # 8 of 15 may stay, and rows have 3

    @pytest.mark.parametrize(("sparsity", "alpha"), [(1.0, 0.5), (-0.1, 0.5), (0.5, 1.0), (0.5, -0.1)])
    def test_refusals(self, sparsity, alpha):
        with pytest.raises(BudgetError):
            SoftShrinkage({"w": torch.ones(4)}, sparsity, alpha)


class TestStraightThrough:
    def setup_method(self):
        torch.manual_seed(1)
        self.w = torch.randn(4, 6, requires_grad=True)
        self.keep = torch.rand(4, 6) > 0.5
        self.g = torch.randn(4, 6)

    def _gradient(self, effective):
        (effective * self.g).sum().backward()
        return self.w.grad

    def test_forms_forward_and_backward_exactly(self):
        m = self.keep.float()
        w = self.w.detach()
        for effective, forward, backward in [
            (straight_through(self.w, self.keep), m * w, self.g),
            (sr_ste(self.w, self.keep, 0.02), m * w, self.g + 0.02 * (1 - m) * w),
            (decaying_ste(self.w, self.keep, 0.3), (m + 0.3 * (1 - m)) * w, self.g),
        ]:
            self.w.grad = None
            assert torch.equal(effective.detach(), forward)
            torch.testing.assert_close(self._gradient(effective), backward)

    def test_parametrisations_mask_and_train_every_weight(self):
        for gate, extra in [(PatternSTE(NM(2, 4)), 0.0), (SRSTE(NM(2, 4), decay=0.5), 0.5)]:
            linear = nn.Linear(8, 4, bias=False)
            original = linear.weight
            parametrize.register_parametrization(linear, "weight", gate)
            keep = gate.keep(original)
            assert torch.equal(linear.weight != 0, keep) and int(keep.sum()) == 16
            x = torch.randn(5, 8)
            linear(x).sum().backward()
            dense = torch.ones(4, 5) @ x
            torch.testing.assert_close(original.grad, dense + extra * original.detach() * ~keep)

    def test_decaying_mask_is_hard_in_eval_mode(self):
        linear = nn.Linear(10, 3)
        w = linear.weight.detach().clone()
        parametrize.register_parametrization(linear, "weight", DecayingSTE(Unstructured(), 0.7))
        DecayingSTE.set_beta(linear, 0.25)
        keep = linear.parametrizations.weight[0].keep(w)
        assert int(keep.sum()) == 9
        torch.testing.assert_close(linear.weight.detach(), torch.where(keep, w, 0.25 * w))
        linear.eval()
        assert torch.equal(linear.weight.detach(), w * keep)

    def test_refusals(self):
        with pytest.raises(BudgetError, match="needs a sparsity"):
            PatternSTE(Unstructured())
        with pytest.raises(BudgetError, match=r"\[0, 1\)"):
            SRSTE(Unstructured(), 1.0)
        with pytest.raises(BudgetError, match="beta"):
            DecayingSTE.set_beta(nn.Linear(2, 2), 1.5)
        with pytest.raises(PatternError, match="multiple of 4"):
            parametrize.register_parametrization(nn.Linear(6, 2), "weight", SRSTE(NM(2, 4)))


def test_a_restricted_flow_fades_the_gradient_with_the_weight() -> None:
    weight, keep = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([True, False])
    faded = decaying_ste(weight, keep, 0.25, restrict=True)
    faded.sum().backward()
    assert faded.tolist() == [1.0, 0.5] and weight.grad.tolist() == [1.0, 0.25]
