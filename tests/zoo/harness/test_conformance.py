"""Every domain and task of the zoo keeps the contract; the suite sees each way of breaking it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import zoo
from zoo.errors import TaskError
from zoo.harness.conformance import ConformanceError, check_domain, check_task
from zoo.harness.tasks import Flops, Task, TaskResult
from zoo.registry import FINETUNERS, JOBS
from zoo.shared.train import Job

MODELS = {
    "graph": "graph/dense-gcn-digits",
    "llm": "llm/dense-shakespeare",
    "vision": "vision/dense-convnet-digits",
    "neural3d": "neural3d/dense-gaussians-shapes",
    "diffusion": "diffusion/dense-t2i-digits",
}
DATASETS = {"diffusion": "digits"}  # the others know what their model is trained on


@pytest.mark.parametrize("domain", MODELS)
def test_domains_keep_the_contract(domain):
    check_domain(domain, zoo.load(MODELS[domain]), DATASETS.get(domain))


@pytest.mark.traced
@pytest.mark.parametrize(
    "task,domain",
    [
        ("graph/digits", "graph"),
        ("vision/digits", "vision"),
        ("llm/embedded", "llm"),
        ("llm/cloze-embedded", "llm"),
        ("neural3d/shapes", "neural3d"),
    ],
)
def test_tasks_keep_the_contract(task, domain, monkeypatch):
    if domain == "llm":
        from zoo.llm.data import corpus

        text = corpus("embedded")
        short = text.__class__(**{**text.__dict__, "test": tuple(one[:600] for one in text.test[:8])})
        monkeypatch.setattr("zoo.llm.tasks.corpus", lambda name: short)
    check_task(task, zoo.load(MODELS[domain]))


class Toy(Task):
    """A plug-in's task, with one way of breaking the contract or none."""

    name, domain, primary, calls = "toy/task", "toy", "accuracy", 0

    def __init__(self, fault: str = "") -> None:
        self.fault = fault

    def evaluate(self, model, *, progress=None):
        if self.fault != "measures anything" and not hasattr(model, "known"):
            raise TaskError(f"{self.name} knows no {type(model).__name__}")
        self.calls += self.fault == "unseeded"
        found = TaskResult.from_samples({"accuracy": [1.0, float(self.calls)]})
        if self.fault == "no primary":
            return TaskResult.from_samples({"loss": [1.0]})
        if self.fault == "not finite":
            found.metrics["accuracy"] = found.metrics["accuracy"].__class__(math.inf)
        if self.fault == "another mean":
            found.samples["accuracy"][0] = 0.0
        if self.fault == "another count":
            return TaskResult(found.metrics, found.samples, 3)
        return found

    def flops(self, model):
        return Flops(1, 2) if self.fault == "more than dense" else Flops(2, 1)


@pytest.mark.parametrize(
    "fault,message",
    [
        ("unseeded", "two results"),
        ("no primary", "primary metric accuracy"),
        ("not finite", "accuracy is inf"),
        ("another mean", "not its value"),
        ("another count", "2 samples of accuracy, n is 3"),
        ("more than dense", "operations"),
        ("measures anything", "network of three inputs"),
    ],
)
def test_every_fault_of_a_task_is_seen(fault, message):
    model = nn.Linear(2, 2)
    model.known = True
    check_task(Toy(), model)
    with pytest.raises(ConformanceError, match=message):
        check_task(Toy(fault), model)


def test_every_fault_of_a_domain_is_seen(monkeypatch):
    model = nn.Linear(2, 2)

    def make(dataset=None, *, recipe=None, seed=0, device="cpu", model=None):
        if dataset not in (None, "toy"):
            raise TaskError(f"unknown data {dataset}")
        return Job([(torch.ones(1, 2), torch.zeros(1, dtype=torch.long))])

    monkeypatch.setitem(JOBS._entries, "toy", make)
    check_domain("toy", model)
    for broken, message in (
        (lambda dataset=None, model=None: make(dataset), "take no"),
        (lambda dataset=None, *, recipe=None, seed=0, device="", model=None: make(), "nobody knows"),
    ):
        monkeypatch.setitem(JOBS._entries, "toy", broken)
        with pytest.raises(ConformanceError, match=message):
            check_domain("toy", model)
    monkeypatch.setitem(JOBS._entries, "toy", make)
    with pytest.raises(ConformanceError, match="cannot be trained"):
        check_domain("toy", model.requires_grad_(False))
    monkeypatch.setitem(FINETUNERS._entries, "toy", "no_such_module:Finetune")
    with pytest.raises(zoo.errors.ConfigError, match="no_such_module"):
        check_domain("toy", model)
