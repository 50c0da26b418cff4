"""The study of structured pruning: penalties are chosen on validation images, budgets are work."""

from __future__ import annotations

import pytest

from zoo.errors import ConfigError
from zoo.methods.channels import macs_budget
from zoo.methods.wgsef import WGSEF
from zoo.shared.measure.account import count
from zoo.shared.structure.groups import trace_groups
from zoo.shared.structure.relatives import copied
from zoo.studies.tuning import at_best
from zoo.vision.studies.structured import StructuredOptions


def test_each_arm_keeps_the_penalty_that_is_best_on_validation():
    rows = [
        {
            "arm": "WGSEF",
            "level": 0.5,
            "seed": seed,
            "penalty": one,
            "validation": value,
            "cut": 1 - value,
        }
        for one, values in {0.1: (0.2, 0.5), 0.3: (0.4, 0.4)}.items()
        for seed, value in enumerate(values)
    ]
    kept = at_best(rows, "penalty")
    assert [(row["penalty"], row["cut"]) for row in kept] == [(0.3, 0.6), (0.3, 0.6)]


@pytest.mark.parametrize("given", [{"wgsef": (0.0,)}, {"epochs": 2}])
def test_options_that_contradict_are_refused(given):
    with pytest.raises(ConfigError):
        StructuredOptions(**given)


@pytest.mark.traced
def test_the_envelope_shrinks_norm_scales_with_the_weights(net, job, monkeypatch):
    """A norm does not undo it: makers' weights and the scale behind them lose the same share."""
    groups, before = trace_groups(net, job.batches.example()), copied(net)
    made, method = copied(net), WGSEF(0.5, sparse_epochs=1, penalty=1.0)
    monkeypatch.setattr(type(job.fit(made).optimizer), "step", lambda self, closure=None: None)
    method.cut(made, job.replace(recipe=job.recipe.__class__(epochs=2, lr=0.05, batch=16, weight_decay=0.0)))
    old, new = (dict(model.named_parameters()) for model in (before, made))
    name = next(iter(groups))
    scale = next(m.name for m in groups[name].roles("follow") if m.name.endswith("weight"))
    assert len(new[scale]) < len(old[scale])
    assert float(new[scale].detach().abs().max()) < float(old[scale].detach().abs().min())


@pytest.mark.traced
def test_a_budget_of_work_is_met(net, job):

    groups = trace_groups(net, job.batches.example())
    budget = macs_budget(net, groups, 0.5, job)
    layers = {layer.name: layer.macs for layer in count(net, job.batches.example()).layers}
    makers = {m.name.removesuffix(".weight") for f in groups.values() for m in f.roles("out")} & set(layers)
    assert budget.kept == pytest.approx(0.5 * sum(layers[name] for name in makers))
    made, method = copied(net), WGSEF(0.5, budget="macs", sparse_epochs=1, penalty=0.0)
    whole = count(net, job.batches.example()).total.macs
    method.cut(made, job)
    assert 0.4 * whole < count(made, job.batches.example()).total.macs <= 0.5 * whole
