"""The sparse products against dense arithmetic, gradients included."""

from __future__ import annotations

import pytest
import torch

from zoo.graph.sparse import SparseMatrix, dropout


def random_matrix(rows: int, columns: int, density: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return values * (torch.rand(rows, columns, generator=generator) < density)


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (5, 0), (30, 17)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_product_and_gradient_equal_dense(shape, density):
    dense = random_matrix(*shape, density)
    matrix = SparseMatrix.from_dense(dense)
    assert matrix.shape == tuple(dense.shape)
    assert torch.equal(matrix.dense(), dense)
    right = torch.randn(shape[1], 3, dtype=torch.float64, requires_grad=True)
    out = matrix @ right
    assert torch.allclose(out, dense @ right, atol=1e-12)
    weights = torch.randn_like(out)
    (grad,) = torch.autograd.grad((out * weights).sum(), right)
    assert torch.allclose(grad, dense.t() @ weights, atol=1e-12)


def test_weighted_product_passes_gradcheck_in_both_arguments():
    matrix = SparseMatrix.from_dense(random_matrix(6, 4, 0.5))
    value = torch.randn(matrix.entries, dtype=torch.float64, requires_grad=True)
    right = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(matrix.weighted, (value, right))


def test_sums_over_rows_and_columns():
    dense = random_matrix(6, 4, 0.5)
    matrix = SparseMatrix.from_dense(dense)
    ones = matrix.value[:, None]
    assert torch.allclose(matrix.sum_rows(ones)[:, 0], dense.sum(1))
    assert torch.allclose(matrix.sum_columns(ones)[:, 0], dense.sum(0))


def test_coordinates_in_any_order_and_twice():
    row, col = torch.tensor([2, 0, 2, 2]), torch.tensor([1, 3, 0, 1])
    matrix = SparseMatrix.from_coo(row, col, torch.tensor([1.0, 2.0, 3.0, 4.0]), (3, 4))
    expected = torch.zeros(3, 4)
    expected[2, 1], expected[0, 3], expected[2, 0] = 5.0, 2.0, 3.0
    assert torch.equal(matrix.dense(), expected)
    assert torch.equal(matrix @ torch.eye(4), expected)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.6])
def test_dropout_keeps_the_mean_and_meets_the_rate(p):
    torch.manual_seed(0)
    x = torch.ones(200_001)
    out = dropout(x, p, training=True)
    share = float((out == 0).float().mean())
    assert abs(share - p) < 5 * (p * (1 - p) / len(x)) ** 0.5  # five standard errors
    assert torch.allclose(out[out != 0], torch.tensor(1 / (1 - p)))
    assert dropout(x, p, training=False) is x


def test_dropout_of_a_sparse_matrix_drops_the_same_entries_of_its_transpose():
    torch.manual_seed(0)
    matrix = SparseMatrix.from_dense(random_matrix(20, 20, 0.5)).dropout(0.5, training=True)
    right = torch.eye(20, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad((matrix @ right).sum(), right)
    assert torch.allclose(grad[:, 0], matrix.dense().sum(0))
