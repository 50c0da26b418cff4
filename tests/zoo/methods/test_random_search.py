"""Random search: exact counts, the candidate that wins by its loss or score, refusals."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.methods.random_search import RandomSearch, drawn
from zoo.shared.errors import GroupError
from zoo.shared.structure.groups import trace_groups
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.structure.surgery import cut
from zoo.shared.train import Job

pytestmark = pytest.mark.traced


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4)
    )


def test_each_family_gives_its_share(job):
    groups = trace_groups(network(), (torch.zeros(1, 3, 8, 8),))
    for kept, counts in ((9, [3, 6]), (18, [6, 12]), (2, [1, 1]), (4, [1, 3])):
        found = drawn(groups, kept, torch.Generator().manual_seed(0))
        assert sorted(int(units.sum()) for units in found.values()) == counts
    one, two = (drawn(groups, 9, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert any(not torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(GroupError, match="at least one each"):
        drawn(groups, 1, torch.Generator())


def test_the_candidate_with_the_lowest_untrained_loss_is_trained(job):
    made = RandomSearch(0.5, candidates=6).sparsify(network(), job)
    fresh = reinitialised(network(), job.seed)
    groups = trace_groups(fresh, (torch.zeros(1, 3, 8, 8),))
    generator, losses, choices = torch.Generator().manual_seed(job.seed), [], []
    for _ in range(6):
        keep = drawn(groups, 9, generator)
        tried = reinitialised(network(), job.seed)
        cut(tried, trace_groups(tried, (torch.zeros(1, 3, 8, 8),)), keep)
        with torch.no_grad():
            losses.append(torch.stack([job.loss(tried, batch) for batch in job.sample(4)]).mean().item())
        choices.append(torch.cat([keep[name] for name in groups]))
    best = min(range(6), key=losses.__getitem__)
    assert losses[best] < max(losses) and torch.equal(made.extras["channels/keep"], choices[best])
    assert torch.equal(
        RandomSearch(0.5, candidates=1).sparsify(network(), job).extras["channels/keep"], choices[0]
    )


def test_short_trainings_are_judged_by_the_score(job):
    scores = iter([0.1, 0.9, 0.5])
    judged = dataclasses.replace(job, score=lambda model: next(scores))
    made = RandomSearch(0.5, candidates=3, short=1).sparsify(network(), judged)
    groups = trace_groups(network(), (torch.zeros(1, 3, 8, 8),))
    generator = torch.Generator().manual_seed(job.seed)
    second = [drawn(groups, 9, generator) for _ in range(2)][1]
    assert torch.equal(made.extras["channels/keep"], torch.cat([second[name] for name in groups]))


def test_searches_that_cannot_be_are_refused(job):
    with pytest.raises(ConfigError, match="at least one candidate"):
        RandomSearch(0.5, candidates=0).sparsify(network(), job)
    with pytest.raises(ConfigError, match="judged by the job's score"):
        RandomSearch(0.5, short=1).sparsify(network(), Job(job.batches, recipe=job.recipe))
