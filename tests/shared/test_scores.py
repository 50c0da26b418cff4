"""Scores against hand computation and autograd; measurements leave the model as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zoo.shared.errors import MaskError
from zoo.shared.masks import Mask, MaskSet
from zoo.shared.pruning.scores import (
    LAMP,
    OBS,
    SCORES,
    SNIP,
    GraSP,
    Magnitude,
    Movement,
    Random,
    Score,
    ScoreContext,
    Taylor,
    Wanda,
    collect_activations,
    collect_gradients,
    collect_hessian_gradients,
    collect_hessians,
)

W = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
G = torch.tensor([[0.5, 0.25], [-4.0, 8.0]])


def square_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def small_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 16, 5)
    )


def test_hand_computed():
    context = ScoreContext(
        grads={"w": G}, hessian_gradients={"w": G}, activations={"w": torch.tensor([3.0, 0.5])}
    )
    assert torch.equal(Magnitude().score("w", W, context), torch.tensor([[1.0, 2], [0.5, 0]]))
    assert torch.equal(SNIP().score("w", W, context), torch.tensor([[0.5, 0.5], [2, 0]]))
    assert torch.equal(Taylor().score("w", W, context), torch.tensor([[0.25, 0.25], [4, 0]]))
    assert torch.equal(GraSP().score("w", W, context), torch.tensor([[0.5, -0.5], [-2, 0]]))
    assert torch.equal(Wanda().score("w", W, context), torch.tensor([[3.0, 1], [1.5, 0]]))


def test_lamp_hand_computed():
    # squares 4, 1, 0.25, 0: each over the sum of those not smaller
    expected = torch.tensor([[1 / 5, 1.0], [0.25 / 5.25, 0]])
    assert torch.allclose(LAMP().score("w", W, ScoreContext()), expected)
    ties = LAMP().score("w", torch.tensor([1.0, 1.0, 1.0]), ScoreContext())
    assert torch.allclose(ties, torch.tensor([1.0, 1 / 2, 1 / 3]))
    assert torch.equal(LAMP().score("w", torch.zeros(3), ScoreContext()), torch.zeros(3))


def test_wanda_on_convolutions_and_groups():
    weight = torch.ones(4, 2, 3, 3)
    norms = torch.tensor([1.0, 2, 3, 4])
    got = Wanda().score("w", weight, ScoreContext(activations={"w": norms}))
    # two groups: the first two filters read channels 0-1, the others 2-3
    assert torch.equal(got[:, :, 0, 0], torch.tensor([[1.0, 2], [1, 2], [3, 4], [3, 4]]))
    with pytest.raises(MaskError, match="cannot take input norms"):
        Wanda().score("w", weight, ScoreContext(activations={"w": torch.ones(3)}))


def test_random_comes_from_its_generator():
    def draw(seed: int) -> torch.Tensor:
        return Random().score("w", W, ScoreContext(generator=torch.Generator().manual_seed(seed)))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_movement_adds_up():
    movement, context = Movement(), ScoreContext(grads={"w": G})
    movement.observe("w", W, context)
    movement.observe("w", 2 * W, context)
    assert torch.equal(movement.score("w", W, context), -3 * W * G)
    assert torch.equal(movement.score("w", W, ScoreContext(grads={"w": G})), -W * G)


def test_obs_is_the_least_loss_of_removing_one_weight():
    torch.manual_seed(0)
    inputs = torch.randn(50, 3, dtype=torch.float64)
    weight = torch.randn(2, 3, dtype=torch.float64)
    hessian = 2 / 50 * inputs.T @ inputs
    got = OBS(damping=0.0).score("w", weight, ScoreContext(hessians={"w": hessian}))
    for row in range(2):
        for column in range(3):
            # Least squares over the other weights, with this one at zero: min of mean (x (w' - w))^2.
            rest = [i for i in range(3) if i != column]
            target = inputs @ weight[row]
            solution = torch.linalg.lstsq(inputs[:, rest], target[:, None]).solution
            loss = (inputs[:, rest] @ solution - target[:, None]).square().mean()
            assert got[row, column] == pytest.approx(float(loss), rel=1e-8)
    with pytest.raises(MaskError, match="3 inputs per output"):
        OBS().score("w", weight, ScoreContext(hessians={"w": torch.eye(2)}))
    dead = OBS().score("w", weight, ScoreContext(hessians={"w": torch.zeros(3, 3)}))
    assert torch.equal(dead.argsort(), weight.abs().argsort())


@pytest.mark.parametrize("name", sorted(SCORES))
def test_missing_measurements_are_named(name):
    score = SCORES[name]()
    assert isinstance(score, Score)
    if score.needs:
        with pytest.raises(MaskError, match=r"needs \w+ of 'w'.*pass loss_fn and batches"):
            score.score("w", W, ScoreContext())
    else:
        assert score.score("w", W, ScoreContext()).shape == W.shape


def test_gradients_are_autograds_and_the_model_is_untouched():
    model = small_net()
    batches = [torch.randn(6, 3, 4, 4) for _ in range(3)]
    before = copy.deepcopy(model.state_dict())
    model[4].weight.grad = torch.ones_like(model[4].weight)
    got = collect_gradients(model, square_loss, batches)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert (
        torch.equal(model[4].weight.grad, torch.ones_like(model[4].weight)) and model[0].weight.grad is None
    )
    twin = copy.deepcopy(model)
    twin.zero_grad()
    torch.stack([square_loss(twin, batch) for batch in batches]).mean().backward()
    for name, parameter in twin.named_parameters():
        assert torch.allclose(got[name], parameter.grad, atol=1e-6)


def test_gradients_are_dense_where_masks_are_attached():
    model = nn.Linear(3, 2)
    keep = torch.tensor([[True, False, False], [False, True, False]])
    with MaskSet({"weight": Mask(keep)}).attach(model):
        got = collect_gradients(model, square_loss, [torch.randn(5, 3)])
        square_loss(model, torch.randn(5, 3)).backward()
        assert (model.weight.grad[~keep] == 0).all()
    assert (got["weight"] != 0).all()


def test_hessian_gradient_product_against_the_full_hessian():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    batches = [torch.randn(4, 3, dtype=torch.float64) for _ in range(2)]

    def loss(weight: torch.Tensor) -> torch.Tensor:
        outputs = [
            nn.functional.linear(batch, weight, model.bias.detach()).tanh().square().mean()
            for batch in batches
        ]
        return torch.stack(outputs).mean()

    def tanh_loss(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return module(batch).tanh().square().mean()

    model.bias.requires_grad_(False)
    got = collect_hessian_gradients(model, tanh_loss, batches)
    weight = model.weight.detach()
    hessian = torch.autograd.functional.hessian(loss, weight).reshape(6, 6)
    gradient = torch.autograd.functional.jacobian(loss, weight).reshape(6)
    assert list(got) == ["weight"]
    assert torch.allclose(got["weight"].reshape(6), hessian @ gradient)


def test_removing_the_weight_of_largest_grasp_score_costs_most_gradient_norm():
    # First order: |g|^2 after removing w_q changes by -2 w_q (Hg)_q.
    torch.manual_seed(1)
    model = nn.Linear(3, 1, bias=False).double()
    batch = torch.randn(20, 3, dtype=torch.float64)
    product = collect_hessian_gradients(model, square_loss, [batch])
    score = GraSP().score("weight", model.weight, ScoreContext(hessian_gradients=product)).reshape(-1)
    step, base = 1e-6, collect_gradients(model, square_loss, [batch])["weight"].square().sum()
    for index in range(3):
        nudged = copy.deepcopy(model)
        with torch.no_grad():
            nudged.weight[0, index] *= 1 - step
        norm = collect_gradients(nudged, square_loss, [batch])["weight"].square().sum()
        assert float((base - norm) / step) == pytest.approx(2 * float(score[index]), rel=1e-4)


def test_activation_norms_and_hessians():
    model = small_net().eval()
    batches = [torch.randn(6, 3, 4, 4), torch.randn(2, 3, 4, 4)]
    everything = torch.cat(batches)
    norms = collect_activations(model, batches)
    assert torch.allclose(norms["0.weight"], everything.square().sum((0, 2, 3)).sqrt())
    features = model[:4](everything).detach()
    assert torch.allclose(norms["4.weight"], features.square().sum(0).sqrt(), atol=1e-5)
    hessians = collect_hessians(model, batches)
    assert torch.allclose(hessians["4.weight"], 2 / 8 * features.T @ features, atol=1e-5)
    # A convolution is linear in its patches: the mean squared output without bias is w H w / 2 per filter.
    plain = nn.functional.conv2d(everything, model[0].weight, padding=1).detach()
    rows = model[0].weight.detach().flatten(1)
    assert torch.allclose(
        (rows @ hessians["0.weight"] * rows).sum(1) / 2, plain.square().mean((0, 2, 3)), atol=1e-5
    )
    assert not model[0]._forward_pre_hooks


def test_no_batches_are_refused():
    model = nn.Linear(2, 2)
    for collect in (collect_activations, collect_hessians):
        with pytest.raises(MaskError, match="at least one"):
            collect(model, [])
    with pytest.raises(MaskError, match="at least one"):
        collect_gradients(model, square_loss, [])
