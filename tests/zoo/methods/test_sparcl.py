"""SparCL: scores, moves, removal, replay and sparse gradients by hand, tasks that are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.methods.conformance import plain_network, quarter_images
from zoo.methods.sparcl import (
    Examples,
    Replay,
    Reservoir,
    SparCL,
    SparseGradients,
    importance,
    left_in,
    moved_mask,
    tasks_of,
)


def test_importance_adds_both_gradients_to_the_magnitude():
    found = importance(torch.tensor([1.0, -2.0]), torch.tensor([-4.0, 0.0]), torch.tensor([0.0, 2.0]), 0.5)
    assert found.tolist() == [3.0, 3.0]


def test_a_mask_keeps_its_best_and_grows_elsewhere():
    keep = torch.tensor([True, True, True, False, False, False])
    score = torch.tensor([3.0, 1.0, 2.0, 9.0, 9.0, 9.0])  # what is dropped has no say
    seen = torch.zeros(6)
    for seed in range(60):
        moved = moved_mask(keep, score, 2, 3, torch.Generator().manual_seed(seed))
        assert moved[0] and moved[2] and int(moved.sum()) == 3
        seen += moved
    assert all(5 < n < 30 for n in seen[[1, 3, 4, 5]].tolist())  # random among the four others
    with pytest.raises(ConfigError, match="cannot grow to 1"):
        moved_mask(keep, score, 2, 1, torch.Generator())


def test_the_least_forgotten_go_and_the_never_learned_stay():
    events, ever = torch.tensor([0, 3, 0, 1]), torch.tensor([False, True, True, True])
    assert left_in(events, ever, 1).tolist() == [0, 1, 3]
    assert left_in(events, ever, 3).tolist() == [0]


def test_forgetting_is_right_then_wrong():
    replay = Replay(Reservoir(4, 0), torch.tensor([0, 1]), 3, 0.1, 0.5)
    both = torch.arange(2)
    for right in ([True, False], [False, False], [False, True], [True, False]):
        replay.note(both, torch.tensor(right))
    assert replay.events.tolist() == [1, 1, 0] and replay.ever.tolist() == [True, True, False]


def test_the_loss_is_of_the_tasks_classes_and_of_the_buffer():
    logits = torch.tensor([[0.0, 0.0, 100.0]])
    replay = Replay(Reservoir(1, 0), torch.tensor([0, 1]), 1, 0.1, 0.5)
    assert float(replay.task_loss(logits, torch.tensor([0]))) == pytest.approx(0.6931, abs=1e-4)
    model = nn.Linear(1, 3, bias=False)
    nn.init.zeros_(model.weight)
    replay.buffer.add(torch.ones(1, 1), torch.tensor([2]), torch.tensor([[3.0, 0.0, 0.0]]))
    # 0.1 * 9 / 3 + 0.5 * ln 3
    assert replay.of_buffer(model, 2).item() == pytest.approx(0.3 + 0.5 * 1.0986, abs=1e-4)


def test_a_reservoir_holds_everything_with_equal_chance():
    counts = torch.zeros(8)
    for seed in range(200):
        buffer = Reservoir(4, seed)
        buffer.add(torch.arange(8.0))
        counts[buffer.stored[0].long()] += 1
    assert all(70 < n < 130 for n in counts.tolist())


def test_gradients_are_looked_up_now_and_then():
    sparse = SparseGradients(0.5, 2)
    assert sparse.filtered("w", torch.tensor([1.0, -3.0, 2.0, 0.0])).tolist() == [0, -3, 2, 0]
    assert sparse.filtered("w", torch.tensor([9.0, 1.0, 1.0, 9.0])).tolist() == [0, 1, 1, 0]
    assert sparse.filtered("w", torch.tensor([9.0, 1.0, 1.0, 8.0])).tolist() == [9, 0, 0, 8]


@pytest.fixture
def learned(job_of):
    def run(**options):
        x, y = quarter_images(32)
        job, kept = job_of(epochs=2, batch=16), []
        method = SparCL(0.75, removal=0.5, buffer=16, **options)
        made = method.learn(
            plain_network(0), x, y, tasks_of(y, 2), job, lambda model: kept.append(model.state_dict())
        )
        return made, kept, job

    return run


def test_zeros_and_their_number_hold_through_all_tasks(learned):
    made, after, job = learned()
    assert len(after) == 2
    for state in after:
        assert int((state["3.weight"] != 0).sum()) <= 288  # a quarter of 1,152
    _, _, whole = learned(sparse_gradients=False)
    assert 0 < job.cost.flops < whole.cost.flops


def test_examples_are_those_of_the_task():
    part = Examples(torch.arange(6.0), torch.zeros(6), torch.tensor([1, 4, 5]), 2)
    ((x, _, numbers),) = part.draw(torch.Generator().manual_seed(0))
    assert len(part) == 1 and torch.equal(x, numbers.float()) and set(numbers.tolist()) < {1, 4, 5}


@pytest.mark.parametrize(
    ("options", "tasks", "said"),
    [
        ({"buffer": 4}, [[0, 1], [2, 3]], "smaller than a batch"),
        ({"removal": 1.0}, [[0, 1], [2, 3]], "share from 0 up to 1"),
        ({}, [[0, 1], [1, 2]], "must not share classes"),
        ({}, [[0, 1], [7]], "must have samples"),
    ],
)
def test_what_contradicts_itself_is_refused(options, tasks, said, job_of):
    x, y = quarter_images(32)
    method = SparCL(0.5, **{"buffer": 16, **options})
    with pytest.raises(ConfigError, match=said):
        method.learn(plain_network(0), x, y, [torch.tensor(t) for t in tasks], job_of(batch=8))
    with pytest.raises(ConfigError, match="cannot be divided"):
        tasks_of(y, 5)
