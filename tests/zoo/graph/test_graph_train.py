"""The training loop: its loss by hand, the l0 ball, and what is taken at the best epoch."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError
from zoo.graph.models import GCN, GIN
from zoo.graph.train import Fit, FixedMasks, L0Ball, TrainConfig, accuracy_of, distilled_loss
from zoo.shared.masks import MaskSet


def gcn(seed: int = 0) -> GCN:
    torch.manual_seed(seed)
    return GCN(12, 16, 3)


def test_loss_is_cross_entropy_plus_kl_over_all_nodes():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    labels, train = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([1, 4])
    p, q = teacher.softmax(1), logits.softmax(1)
    kl = (p * (p.log() - q.log())).sum(1).mean()
    expected = -(q[1, 1].log() + q[4, 1].log()) / 2 + 0.7 * kl
    assert torch.allclose(distilled_loss(logits, labels, train, teacher.log_softmax(1), 0.7), expected)
    assert torch.allclose(distilled_loss(logits, labels, train, None, 0.7), expected - 0.7 * kl)


def test_l0_ball_counts_every_tensor_of_the_model():
    model = GIN(12, 16, 3)
    total = 12 * 16 + 16 * 3 + 16 * 3 + 2  # both eps belong to it
    ball = L0Ball.for_sparsity(model, 0.9)
    assert ball.kept == total - -(-total * 9 // 10)
    masks = ball(model)
    assert set(masks) == dict(model.named_parameters()).keys()
    assert sum(int(mask.sum()) for mask in masks.values()) == ball.kept
    assert sum(int(p.count_nonzero()) for p in model.parameters()) <= ball.kept


def test_zeros_may_come_back_but_the_result_is_on_the_ball(graph):
    model = gcn()
    ball = L0Ball.for_sparsity(model, 0.8)
    fit = Fit(model, graph, TrainConfig(epochs=15, lr=0.05, distillation=0.0), constraint=ball)
    seen = []
    fit.run(lambda f: seen.append(f.model.conv1.lin.weight.detach() != 0))
    assert bool((seen[-1] & ~seen[0]).any())  # not sticky
    best = fit.result()
    kept = sum(int(mask.sum()) for mask in best.masks.values())
    assert kept == ball.kept
    model.load_state_dict(best.weights)
    assert MaskSet(best.masks).zeros_intact(model) == []
    again = model(*model.prepare(graph.x, graph.edge_index))
    assert torch.allclose(again, best.logits, atol=1e-6)


def test_best_epoch_is_the_last_of_equals(graph):
    fit = Fit(gcn(), graph, TrainConfig(epochs=12, distillation=0.0))
    history = []
    val = graph.val_mask.nonzero().flatten()

    def on_epoch(fit: Fit) -> None:
        with torch.no_grad():
            logits = fit.model.eval()(fit.features, fit.graph)
        history.append(accuracy_of(logits, graph.y, val))

    best = fit.run(on_epoch)
    assert best.val_accuracy == max(history)
    assert best.epoch == 12 - history[::-1].index(max(history))


def test_training_learns_and_distillation_follows_the_teacher(graph):
    dense = Fit(gcn(), graph, TrainConfig(epochs=40, distillation=0.0)).run()
    assert dense.val_accuracy > 0.5  # chance is a third
    apart = {}
    for weight in (0.0, 30.0):
        recipe = TrainConfig(epochs=40, distillation=weight)
        fit = Fit(gcn(1), graph, recipe, teacher=dense.logits)
        fit.run()
        with torch.no_grad():  # the last epoch, since the best of each is not equally far trained
            logits = fit.model(fit.features, fit.graph)
        apart[weight] = float((logits.softmax(1) - dense.logits.softmax(1)).abs().mean())
    assert apart[30.0] < 0.5 * apart[0.0]


def test_the_same_seed_gives_the_same_run(graph):
    runs = [Fit(gcn(3), graph, TrainConfig(epochs=5, distillation=0.0)).run() for _ in range(2)]
    assert torch.equal(runs[0].logits, runs[1].logits)


def test_fixed_masks_hold(graph):
    model = gcn()
    masks = L0Ball.for_sparsity(model, 0.7)(model)
    best = Fit(model, graph, TrainConfig(epochs=5, distillation=0.0), constraint=FixedMasks(masks)).run()
    for name, mask in masks.items():
        assert bool((best.weights[name][~mask] == 0).all())
        assert bool((best.weights[name][mask] != 0).any())


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"lr": float("nan")}, {"weight_decay": -1.0}, {"distillation": float("inf")}]
)
def test_impossible_recipes_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_no_result_before_the_first_epoch(graph):
    with pytest.raises(ConfigError, match="No epoch"):
        Fit(gcn(), graph, TrainConfig(epochs=1)).result()
