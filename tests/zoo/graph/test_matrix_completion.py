"""Matrix completion: least squares by hand, sketches, bases, recovery, SoftImpute's step, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zoo.errors import ConfigError, DataError, TaskError
from zoo.graph.factors import Factors, FilmTrust
from zoo.graph.methods.matrix_completion import (
    Completion,
    balanced,
    conjugate_gradients,
    exact,
    first_factor,
    normal_factors,
    observed,
    predicted,
)
from zoo.graph.studies.matrix_completion import Split, biases, low_rank, soft_impute


def problem(rank: int = 3):
    split = low_rank((40, 30), rank, 700, 0.0, 0)
    return split, *split.of(split.fit)


def test_exact_least_squares_by_hand() -> None:
    # One column that sees rows 0 and 2 of the design (1, 0), (0, 1), (1, 1) at 2 and 3.
    rows, cols = torch.tensor([0, 2]), torch.tensor([0, 0])
    _, by_column = observed(rows, cols, torch.tensor([2.0, 3.0]).double(), (3, 2))
    design = torch.tensor([[1.0, 0], [0, 1], [1, 1]]).double()
    torch.testing.assert_close(
        exact(by_column, design, 0.0)[0], torch.tensor([2.0, 1.0]).double(), atol=1e-6, rtol=0
    )
    # With a ridge of 1: [[3, 1], [1, 2]] x = (5, 3).
    torch.testing.assert_close(exact(by_column, design, 1.0)[0], torch.tensor([1.4, 0.8]).double())
    assert exact(by_column, design, 1.0)[1].tolist() == [0, 0]


@pytest.mark.parametrize("sketch", [0, 4])
def test_as_many_iterations_as_unknowns_solve_exactly_and_a_good_start_stays(sketch) -> None:
    _, _, by_column = problem()
    generator = torch.Generator().manual_seed(0)
    design = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    factors = normal_factors(by_column, design, 3 * sketch, 0.1, generator)
    wanted, start = exact(by_column, design, 0.1), torch.zeros(30, 3).double()
    rough = conjugate_gradients(by_column, design, start, factors, 0.1, 1)
    solved = conjugate_gradients(by_column, design, start, factors, 0.1, 3)
    torch.testing.assert_close(solved, wanted, atol=1e-6, rtol=1e-6)
    assert float((rough - wanted).abs().max()) > 1e-3
    torch.testing.assert_close(
        conjugate_gradients(by_column, design, wanted, factors, 0.1, 1), wanted, atol=1e-6, rtol=1e-6
    )


def test_a_sketch_with_a_bucket_for_each_row_is_the_matrix_itself() -> None:
    _, _, by_column = problem()
    generator = torch.Generator().manual_seed(3)
    design = torch.randn(40, 2, generator=generator, dtype=torch.float64)
    factors = normal_factors(by_column, design, 100_000, 0.5, generator)
    seen = by_column.col[: by_column.crow[1]].long()
    a = design[seen]
    square = a.T @ a + 0.5 * torch.eye(2)
    torch.testing.assert_close(factors[0] @ factors[0].T, square, atol=1e-4, rtol=1e-4)


def test_balanced_factors_keep_the_product_and_share_its_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (9, 7))
    p, q = balanced(u, v)
    torch.testing.assert_close(p @ q.T, u @ v.T)
    torch.testing.assert_close(p.T @ p, torch.diag(torch.linalg.svdvals(u @ v.T)[:3]), atol=1e-9, rtol=0)
    torch.testing.assert_close(p.T @ p, q.T @ q, atol=1e-9, rtol=0)


def test_a_matrix_is_found_again_by_rough_updates_and_large_entries_of_the_start_are_cut() -> None:
    split, *entries = problem()
    u, v = Completion(rank=3, rounds=30, inner=2, sketch=4).fit(*entries)
    assert split.error(lambda r, c: predicted(u, v, r, c), split.judge) < 1e-4
    spread = float(split.values.std())
    once, other = Completion(rank=3, rounds=1, inner=1).fit(*entries)
    assert split.error(lambda r, c: predicted(once, other, r, c), split.judge) > 0.05 * spread
    plain, cut = (first_factor(entries[0], 3, clip, 0) for clip in (100.0, 0.7))
    torch.testing.assert_close(plain.T @ plain, torch.eye(3).double(), atol=1e-9, rtol=0)
    assert bool((cut == 0).any()) and not bool((plain == 0).any())


def test_soft_impute_thresholds_singular_values() -> None:
    # Everything is seen, so that one round is the singular values less the penalty.
    values = torch.diag(torch.tensor([5.0, 3.0, 1.0]).double()) + 0.1
    rows, cols = torch.arange(9) // 3, torch.arange(9) % 3
    by_row, _ = observed(rows, cols, values.flatten(), (3, 3))
    (_, u, v), (_, less, more) = soft_impute(by_row, (2.0, 3.5), 2, 3, 0)
    wanted = (torch.linalg.svdvals(values)[:2] - 3.5).clamp(min=0)
    torch.testing.assert_close(torch.linalg.svdvals(u @ v.T)[:2], wanted, atol=1e-6, rtol=0)
    assert float(torch.linalg.matrix_norm(less @ more.T)) > float(torch.linalg.matrix_norm(u @ v.T))


def test_biases_are_of_users_and_items() -> None:
    users, items = np.repeat(np.arange(50), 40), np.tile(np.arange(40), 50)
    values = 3 + 0.1 * users - 0.05 * items
    found = biases(users, items, values, np.arange(2000))
    assert np.abs(found - values).max() < 0.6 and np.corrcoef(found, values)[0, 1] > 0.999


def test_what_is_refused() -> None:
    _, *entries = problem()
    one, two = torch.tensor([0]), torch.tensor([0, 0])
    with pytest.raises(DataError, match="given once"):
        observed(two, two, torch.ones(2), (3, 3))
    with pytest.raises(DataError, match="not finite"):
        observed(one, one, torch.tensor([torch.nan]), (3, 3))
    with pytest.raises(DataError, match=r"outside the matrix of shape \(3, 3\)"):
        observed(one + 3, one, torch.ones(1), (3, 3))
    for options in ({"rank": 30}, {"rank": 0}):
        with pytest.raises(ConfigError, match="at least 1 and below 30"):
            Completion(**options).fit(*entries)
    for options in ({"rounds": 0}, {"ridge": -1.0}, {"inner": -1}):
        with pytest.raises(ConfigError, match="needs a round"):
            Completion(rank=2, **options).fit(*entries)


def test_the_model_of_ratings_and_its_errors_by_hand(monkeypatch) -> None:
    model = Factors(2, 2, 1)
    with torch.no_grad():
        model.mean.fill_(3.0)
        model.by_user.copy_(torch.tensor([0.5, -0.5]))
        model.by_item.copy_(torch.tensor([0.0, 1.0]))
        model.u.copy_(torch.tensor([[1.0], [2.0]]))
        model.v.copy_(torch.tensor([[0.5], [-1.0]]))
    rows, cols = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    assert model(rows, cols).tolist() == [4.0, 3.5, 1.5]
    every, none = torch.arange(3), torch.arange(0)
    values = torch.tensor([4.0, 3.0, 3.5])
    split = Split(rows, cols, values, torch.zeros(3), none, none, every, (2, 2))
    monkeypatch.setattr("zoo.graph.factors.ratings", lambda seed: split)
    found = FilmTrust().evaluate(model).metrics
    assert found["mae"].value == pytest.approx(2.5 / 3)
    assert found["rmse"].value == pytest.approx((4.25 / 3) ** 0.5)
    with pytest.raises(ConfigError, match="at least 1"):
        Factors(2, 2, 0)
    with pytest.raises(TaskError, match="Factors"):
        FilmTrust().evaluate(torch.nn.Linear(2, 2))
