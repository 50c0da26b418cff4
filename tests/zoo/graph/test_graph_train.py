"""The training loop: its loss by hand, the l0 ball, and what is taken at the best epoch."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError
from zoo.graph.models import GCN, GIN
from zoo.graph.train import (
    FixedMasks,
    L0Ball,
    accuracy_of,
    distilled_loss,
    graph_job,
    graph_recipe,
    train_best,
)
from zoo.shared.masks import MaskSet
from zoo.shared.train import Recipe


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
    assert torch.allclose(distilled_loss(logits, labels, train, teacher, 0.7), expected)
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


def recipe(epochs: int, lr: float = 0.01) -> Recipe:
    return graph_recipe(epochs, lr)


def test_zeros_may_come_back_but_the_result_is_on_the_ball(graph):
    model = gcn()
    ball = L0Ball.for_sparsity(model, 0.8)
    seen = []

    def constraint(trained):
        masks = ball(trained)
        seen.append(trained.conv1.lin.weight.detach() != 0)
        return masks

    best = train_best(model, graph_job(model, graph, recipe(15, lr=0.05)), constraint)
    assert bool((seen[-2] & ~seen[0]).any())  # not sticky
    assert sum(int(mask.sum()) for mask in best.masks.values()) == ball.kept
    assert MaskSet(best.masks).lost_zeros(model) == []
    assert all(torch.equal(value, best.weights[name]) for name, value in model.state_dict().items())
    again = model(*model.prepare(graph.x, graph.edge_index))
    assert torch.allclose(again, best.logits, atol=1e-6)


def test_best_epoch_is_the_last_of_equals_after_the_constraint(graph):
    model, history = gcn(), []
    job = graph_job(model, graph, recipe(12))
    score = job.score

    def watched(trained):
        history.append(score(trained))
        return history[-1]

    best = train_best(model, job.replace(score=watched))
    assert len(history) == 12 and best.val_accuracy == max(history)
    assert best.epoch == 12 - history[::-1].index(max(history))
    val = graph.val_mask.nonzero().flatten()
    assert accuracy_of(best.logits, graph.y, val) == best.val_accuracy


def test_training_learns_and_distillation_follows_the_teacher(graph):
    model = gcn()
    dense = train_best(model, graph_job(model, graph, recipe(40)))
    assert dense.val_accuracy > 0.5  # chance is a third
    apart = {}
    for weight in (0.0, 30.0):
        student = gcn(1)
        job = graph_job(student, graph, recipe(40), teacher=dense.logits, distillation=weight)
        # the last epoch, since the best of each is not equally far trained
        job.fit(student, select="last").run()
        with torch.no_grad():
            logits = student.eval()(*student.prepare(graph.x, graph.edge_index))
        apart[weight] = float((logits.softmax(1) - dense.logits.softmax(1)).abs().mean())
    assert apart[30.0] < 0.5 * apart[0.0]


def test_the_seed_decides_dropout(graph):
    runs = []
    for seed in (3, 3, 4):
        model = gcn(3)
        runs.append(train_best(model, graph_job(model, graph, recipe(5), seed=seed)).logits)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_fixed_masks_hold(graph):
    model = gcn()
    masks = L0Ball.for_sparsity(model, 0.7)(model)
    best = train_best(model, graph_job(model, graph, recipe(5)), FixedMasks(masks))
    for name, mask in masks.items():
        assert bool((best.weights[name][~mask] == 0).all())
        assert bool((best.weights[name][mask] != 0).any())


def test_impossible_weights_of_distillation_are_refused(graph):
    with pytest.raises(ConfigError, match="distillation"):
        graph_job(gcn(), graph, distillation=float("inf"))
