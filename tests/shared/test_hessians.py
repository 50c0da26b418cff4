"""Inverses of damped Hessians, against explicit ones."""

from __future__ import annotations

import pytest
import torch

from zoo.shared.errors import BudgetError
from zoo.shared.pruning.hessians import inverse_diagonal, inverse_factor


def damped_hessian(size=12, damping=0.01):
    x = torch.randn(40, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hessian = 2 / 40 * x.T @ x
    return hessian, hessian + damping * hessian.diagonal().mean() * torch.eye(size, dtype=torch.float64)


def test_both_are_those_of_the_damped_inverse():
    hessian, damped = damped_hessian()
    factor, dead = inverse_factor(hessian, 0.01)
    torch.testing.assert_close((factor.T @ factor).double(), damped.inverse(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(inverse_diagonal(hessian, 0.01), damped.inverse().diagonal())
    assert not dead.any() and torch.equal(factor, factor.triu())


def test_inputs_that_never_fired_are_named_and_an_empty_hessian_counts_all_alike():
    hessian, _ = damped_hessian(4)
    hessian[1], hessian[:, 1] = 0, 0
    assert inverse_factor(hessian, 0.01)[1].tolist() == [False, True, False, False]
    assert inverse_diagonal(torch.zeros(3, 3)).tolist() == [1.0, 1.0, 1.0]


def test_a_damping_that_cannot_invert_is_refused():
    with pytest.raises(BudgetError, match="positive share"):
        inverse_factor(torch.eye(2), 0.0)
    with pytest.raises(BudgetError, match="raise the damping"):
        inverse_factor(torch.ones(3, 3) - 2 * torch.eye(3), 1e-9)
