"""Jobs by data-set name: every domain makes one that trains and scores its models."""

from __future__ import annotations

import math

import pytest

from zoo.bundles.store import load
from zoo.errors import ConfigError
from zoo.registry import JOBS
from zoo.shared.errors import TrainingError
from zoo.shared.train import Job, Recipe

MODELS = {
    "graph": "graph/dense-gcn-digits",
    "llm": "llm/dense-shakespeare",
    "vision": "vision/dense-convnet-digits",
}
RECIPE = Recipe(steps=2, lr=1e-4, batch=4, optimizer="adam", select="best", score_every=2)


@pytest.mark.parametrize("domain", sorted(MODELS))
def test_a_domain_makes_a_job_of_the_data_on_the_card(domain: str) -> None:
    model = load(MODELS[domain]).float()
    job = JOBS.get(domain)(None, recipe=RECIPE, seed=3, model=model)
    assert isinstance(job, Job) and job.seed == 3 and len(job.sample(1)) == 1
    fit = job.fit(model, macs=lambda: 0.0).run()
    assert fit.step == 2 and fit.best is not None and math.isfinite(fit.best.score)
    with pytest.raises(TrainingError, match="no device 'cuda:99'"):
        JOBS.get(domain)(None, device="cuda:99", model=model)


@pytest.mark.parametrize(
    ("domain", "message"),
    [("graph", "GCN, GAT and GIN"), ("llm", "the tokens of a model"), ("vision", "give the option dataset")],
)
def test_a_job_that_needs_a_model_says_so(domain: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        JOBS.get(domain)(None)
