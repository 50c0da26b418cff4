"""Low rank by outputs: the pair by hand, the least error on the data, what is chosen, DeepFM, refusals."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import zoo
from zoo.errors import ConfigError, DataError, TaskError
from zoo.graph.click_tasks import Adult
from zoo.graph.clicks import DeepFM, area, click_job, logits_of
from zoo.graph.methods.low_rank import LowRank, components, decompose, imitate, thin_rank
from zoo.shared.errors import MaskError
from zoo.shared.train import Job, Recipe
from zoo.tables import Clicks


def clicks(rows: int = 200) -> Clicks:
    drawn = np.random.default_rng(0)
    fields = np.stack([drawn.integers(0, 12, rows), drawn.integers(0, 30, rows)], 1)
    labels = (fields[:, 0] + drawn.integers(0, 5, rows) > 8).astype(np.int64)
    return Clicks(fields, np.array([12, 30]), labels, np.arange(rows) < 160)


def layers() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16))
    inputs = torch.randn(64, 12) * torch.linspace(0.05, 3, 12) + 1
    return net, inputs


def job(inputs: torch.Tensor) -> Job:
    loader = DataLoader(TensorDataset(inputs, torch.zeros(len(inputs), 16)), 16)
    return Job(
        loader,
        loss=lambda m, b: (m(b[0]) - b[1]).square().mean(),
        recipe=Recipe(lr=0.0, epochs=1, warmup=0.0),
    )


def test_the_pair_by_hand() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2], [3, 4]]))
        layer.bias.copy_(torch.tensor([5.0, 6]))
    basis, mean = torch.tensor([[1.0], [0]]).double(), torch.tensor([7.0, 8]).double()
    first, second = imitate(layer, basis, mean)
    # U^T W = (1, 2); the bias is (5, 0) from b and (0, 8) from the mean outside the basis.
    assert first.weight.tolist() == [[1, 2]] and first.bias is None
    assert second.weight.tolist() == [[1], [0]] and second.bias.tolist() == [5, 8]
    table = nn.Embedding(2, 2)
    with torch.no_grad():
        table.weight.copy_(torch.tensor([[1.0, 2], [9, 4]]))
    rows, spread = imitate(table, basis, mean)
    assert rows.weight.tolist() == [[-6], [2]] and spread.bias.tolist() == [7, 8]
    assert spread(rows(torch.tensor([1]))).tolist() == [[9, 8]]


def test_principal_components_come_first() -> None:
    found = components(torch.diag(torch.tensor([1.0, 9, 4])).double(), 2).abs()
    assert found.tolist() == [[0, 0], [1, 0], [0, 1]]


def test_no_pair_of_that_rank_is_nearer_to_the_outputs_on_the_data() -> None:
    net, inputs = layers()
    errors = {}
    for by in ("outputs", "weights", "random"):
        made = LowRank(ratio=2.0, by=by, tune=False).sparsify(nn.Sequential(net[0]), job(inputs)).model
        errors[by] = (made(inputs) - net[0](inputs)).square().mean().item()
    assert errors["outputs"] < 0.8 * errors["weights"] and errors["outputs"] < 0.8 * errors["random"]


def test_the_nearest_weight_is_its_decomposition() -> None:
    layer = layers()[0][2]
    first, second = decompose(layer, 5)
    values = torch.linalg.svdvals(layer.weight.double())
    left = (second.weight.double() @ first.weight.double() - layer.weight.double()).square().sum()
    torch.testing.assert_close(left, values[5:].square().sum(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(second.bias, layer.bias)
    table = nn.Embedding(9, 8)
    torch.testing.assert_close(decompose(table, 8)(torch.arange(9)), table.weight)


def test_ranks_by_hand() -> None:
    assert thin_rank(nn.Linear(128, 128), 4.0) == 16  # 128 * 128 / (4 * 256)
    assert thin_rank(nn.Embedding(100, 16), 4.0) == 4
    assert thin_rank(nn.Linear(128, 1), 4.0) == 0 and thin_rank(nn.Embedding(2, 16), 8.0) == 0


def test_any_module_through_the_front_door_and_a_shared_weight_is_left_alone() -> None:
    net, inputs = layers()
    made = zoo.sparsify(net, method="low-rank", job=job(inputs), ratio=2.0)
    assert isinstance(made.model[0], nn.Sequential) and isinstance(net[0], nn.Linear)
    before, after = made.hyperparameters["parameters"]
    assert before == sum(p.numel() for p in net.parameters())
    assert after == sum(p.numel() for p in made.model.parameters()) < before
    net.append(nn.Linear(16, 16))
    net[3].weight = net[2].weight
    kept = zoo.sparsify(net, method="low-rank", job=job(inputs), ratio=2.0, tune=False).model
    assert isinstance(kept[2], nn.Linear) and kept[3].weight is kept[2].weight


def test_deepfm_learns_and_is_rebuilt_from_its_arguments() -> None:
    torch.manual_seed(0)
    model = DeepFM([12, 30], 8, (16, 16))
    trained = click_job(clicks(), Recipe(epochs=6, lr=0.02, batch=32, optimizer="adam"))
    trained.fit(model, macs=lambda: 0.0).run()
    fields, labels = (torch.from_numpy(one) for one in (clicks().fields, clicks().labels))
    assert area(logits_of(model, fields), labels) > 0.8
    made = LowRank(ratio=2.0, tune=False).sparsify(model, trained)
    again = DeepFM(**made.arguments)
    again.load_state_dict(made.model.state_dict())
    torch.testing.assert_close(again(fields), made.model(fields))
    assert set(made.arguments["ranks"]) == {"tables.0", "tables.1", "deep.0", "deep.2"}


def test_products_of_pairs_by_hand() -> None:
    model = DeepFM([2, 2, 2], 2, (4,))
    with torch.no_grad():
        for number, table in enumerate(model.tables):
            table.weight.fill_(number + 1.0)
            model.first[number].weight.fill_(10.0**number)
        model.deep[-1].weight.zero_()
        model.deep[-1].bias.fill_(0.5)
    # 1 + 10 + 100; per column 1 * 2 + 1 * 3 + 2 * 3 = 11, twice; 0.5.
    assert model(torch.zeros(1, 3, dtype=torch.long)).item() == pytest.approx(111 + 22 + 0.5)


def test_what_is_refused() -> None:
    net, inputs = layers()
    for ratio in (1.0, float("nan")):
        with pytest.raises(ConfigError, match="the ratio must be above 1"):
            LowRank(ratio=ratio).sparsify(net, job(inputs))
    with pytest.raises(ConfigError, match="none were given"):
        LowRank().sparsify(net)
    with pytest.raises(ConfigError, match="Sequential runs no linear layer or table"):
        LowRank().sparsify(nn.Sequential(nn.Linear(12, 1)), job(inputs))
    with pytest.raises(DataError, match="0 has 2 outputs, too few for rank 3"):
        LowRank(ratio=2.0).sparsify(net, job(inputs[:2]))
    zoo.sparsify(net, sparsity=0.5)
    with pytest.raises(MaskError, match="would fill the zeros"):
        LowRank().sparsify(net, job(inputs))


@pytest.mark.skipif(not os.environ.get("ZOO_DATA"), reason="reads a table of ZOO_DATA")
def test_the_task_measures_bundles_beside_their_dense_twin() -> None:
    dense, thin = zoo.load("graph/dense-deepfm-adult"), zoo.load("graph/low-rank-deepfm-adult-r5")
    task = Adult()
    assert task.accepts(dense.zoo_info.card) and task.direction("log_loss") == -1
    found = task.evaluate(thin)
    assert found.metrics["auc"].value > 0.91 and found.n == 16_281
    assert task.flops(thin).dense < 0.4 * task.flops(dense).dense
    with pytest.raises(TaskError, match="takes a DeepFM of 14 fields; received Linear"):
        task.evaluate(nn.Linear(2, 2))
