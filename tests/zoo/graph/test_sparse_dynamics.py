"""Few ReLUs: choices, stages and folding by hand; programs against enumeration and replay; refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import zoo
from zoo.errors import ConfigError
from zoo.graph.methods.planning import Goal, plan, rolled, sampled
from zoo.graph.methods.sparse_dynamics import (
    IDENTITY,
    RELU,
    ZERO,
    Choice,
    FoldedReLU,
    SparseDynamics,
    close_by,
    fold,
)
from zoo.graph.pusher import Pusher
from zoo.graph.studies.sparse_dynamics import moved, predicts
from zoo.shared.errors import MaskError
from zoo.shared.train import Job, Recipe


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 2))


def job() -> Job:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator)
    data = TensorDataset(x, torch.stack([x[:, 0].relu(), x[:, 1]], 1))
    return Job(
        DataLoader(data, 16),
        lambda m, b: (m(b[0]) - b[1]).square().mean(),
        recipe=Recipe(epochs=1, lr=0.02, optimizer="adam"),
    )


def folded(seed: int = 0) -> FoldedReLU:
    """Three states, one control, three ReLUs in two layers."""
    torch.manual_seed(seed)
    net = FoldedReLU(4, 3, [2, 1]).requires_grad_(False)
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.mul_(0.8)
    return net


def test_a_choice_by_hand() -> None:
    choice = Choice(3).eval()
    with torch.no_grad():
        choice.logits.copy_(torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2]]))
    assert choice(torch.tensor([[-1.0, -2, -3], [1, 2, 3]])).tolist() == [[0, -2, 0], [1, 2, 0]]
    torch.testing.assert_close(choice.likely(), choice.logits.softmax(1)[:, 0])
    choice.fixed[:] = torch.tensor([ZERO, RELU, IDENTITY])
    assert choice(torch.tensor([[-1.0, -2, -3], [1, 2, 3]])).tolist() == [[0, 0, -3], [0, 2, 3]]
    assert choice.likely().tolist() == [0, 1, 0]


def test_stages_keep_the_likeliest_relus_of_all_layers() -> None:
    first, second = Choice(2), Choice(2)
    with torch.no_grad():
        first.logits.copy_(torch.tensor([[3.0, 0, 1], [1, 0, 1]]))
        second.logits.copy_(torch.tensor([[2.0, 1, 0], [0, 2, 1]]))
    close_by([first, second], [first.likely(), second.likely()], 2, False)
    assert first.fixed.tolist() == [-1, ZERO] and second.fixed.tolist() == [-1, IDENTITY]
    close_by([first, second], [first.likely(), second.likely()], 1, True)
    assert first.fixed.tolist() == [RELU, ZERO] and second.fixed.tolist() == [IDENTITY, IDENTITY]


def test_folding_is_the_same_function() -> None:
    net = perceptron()
    choices = [torch.tensor([0, 1, 2, 0, 1, 1]), torch.tensor([1, 0, 2, 0, 1])]
    small = fold([net[0], net[2], net[4]], choices)
    gated = nn.Sequential(net[0], Choice(6), net[2], Choice(5), net[4]).eval()
    gated[1].fixed, gated[3].fixed = choices
    x = torch.randn(20, 3)
    torch.testing.assert_close(small(x), gated(x), atol=1e-5, rtol=1e-5)
    assert small.relus == 4 and [layer.in_features for layer in small.hidden] == [3, 5]


@pytest.mark.parametrize("order", ["learned", "magnitude", "random"])
def test_any_perceptron_through_the_front_door(order) -> None:
    net = perceptron()
    made = zoo.sparsify(net, method="sparse-dynamics", job=job(), relus=3, order=order)
    assert made.model.relus == 3 == sum(made.hyperparameters["relus_by_layer"])
    again = zoo.sparsify(net, method="sparse-dynamics", job=job(), relus=3, order=order).model
    assert all(torch.equal(a, b) for a, b in zip(made.model.parameters(), again.parameters(), strict=True))


def test_large_weights_stay_by_magnitude() -> None:
    net = perceptron()
    with torch.no_grad():
        net[0].weight[4] *= 50
        net[4].weight[:, 1] *= 50
    made = SparseDynamics(relus=2, order="magnitude", stages=1).sparsify(net, job())
    assert made.hyperparameters["relus_by_layer"] == [1, 1]


@pytest.mark.parametrize("seed", [0, 3])
def test_a_program_is_no_worse_than_a_fine_grid_and_its_states_are_replayed(seed) -> None:
    model, x = folded(seed), torch.tensor([0.3, -0.2, 0.1])
    goal = Goal(torch.tensor([0.5, 0.4, -0.3]), torch.tensor([1.0, 0.5, 0.2]), 0.05, 1.0, 2)
    found = plan(model, x, goal)
    assert found is not None and found.optimal
    states = rolled(predicts(model), x, found.controls[None])
    torch.testing.assert_close(states[0], found.states, atol=1e-4, rtol=1e-4)
    assert float(goal.cost(states, found.controls[None])) == pytest.approx(found.cost, abs=1e-4)
    line = torch.linspace(-1, 1, 81)
    tried = torch.cartesian_prod(line, line)[..., None]
    best = float(goal.cost(rolled(predicts(model), x, tried), tried).min())
    assert best - 0.1 < found.cost < best + 2e-3


@pytest.mark.parametrize("rule", ["cem", "mppi", "random"])
def test_samples_come_near_the_program(rule) -> None:
    model, x = folded(), torch.tensor([0.3, -0.2, 0.1])
    goal = Goal(torch.tensor([0.5, 0.4, -0.3]), torch.ones(3), 0.05, 1.0, 2)
    best = plan(model, x, goal)
    assert best is not None
    generator, last = torch.Generator().manual_seed(0), torch.zeros(2, 1)
    moves = sampled(predicts(model), x, goal, last, generator, seconds=0.03, rule=rule)
    cost = float(goal.cost(rolled(predicts(model), x, moves[None]), moves[None]))
    still = float(goal.cost(rolled(predicts(model), x, last[None]), last[None]))
    assert best.cost - 1e-3 < cost < best.cost + 0.5 * (still - best.cost) + 1e-3


def test_a_goal_costs_by_hand_and_the_pusher_pushes() -> None:
    goal = Goal(torch.tensor([1.0, 2]), torch.tensor([1.0, 0.5]), 0.1)
    assert float(goal.cost(torch.tensor([[0.0, 4], [1, 2]]), torch.tensor([[2.0], [-1]]))) == pytest.approx(
        2.3
    )
    state = torch.tensor([0.0, 0.25, 0.5, 0.0, 0.1])
    # The pusher stops at 0.1, the first block at 0.3; the second slides by itself to 0.6.
    wanted = torch.tensor([0.1, 0.3, 0.6, 0.025, 0.05])
    torch.testing.assert_close(moved(state, torch.tensor([0.1])), wanted)


def test_what_is_refused() -> None:
    for net in (nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))):
        with pytest.raises(ConfigError, match="takes an nn.Sequential of linear layers with a ReLU"):
            SparseDynamics().sparsify(net, job())
    for options in ({"relus": 0}, {"relus": 12}, {"stages": 0}):
        with pytest.raises(ConfigError, match="from 1 to 11 relus"):
            SparseDynamics(**options).sparsify(perceptron(), job())
    with pytest.raises(ConfigError, match="learned, magnitude or random"):
        SparseDynamics(order="size").sparsify(perceptron(), job())
    with pytest.raises(ConfigError, match="none were given"):
        SparseDynamics().sparsify(perceptron())
    net = perceptron()
    zoo.sparsify(net, sparsity=0.5)
    with pytest.raises(MaskError, match="fills the zeros"):
        SparseDynamics().sparsify(net, job())
    with pytest.raises(ConfigError, match="within a finite bound"):
        Goal(torch.zeros(3), torch.ones(3), bound=float("inf"))
    goal = Goal(torch.zeros(3), torch.ones(3))
    with pytest.raises(ConfigError, match="starts from 3 finite numbers"):
        plan(folded(), torch.tensor([0.0, torch.nan, 0.0]), goal)


def test_the_task_of_the_pusher_does_not_depend_on_time() -> None:
    torch.manual_seed(0)
    model = FoldedReLU(6, 5, [2, 1]).eval()
    first, again = (Pusher().evaluate(model) for _ in range(2))
    assert first.metrics == again.metrics and set(first.metrics) == {"ten", "one", "cost"}
    same = FoldedReLU(**model.arguments)
    same.load_state_dict(model.state_dict())
    assert Pusher().evaluate(same.eval()).metrics == first.metrics
