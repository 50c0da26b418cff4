"""Digests of code, state and data: what changes a result changes them, what cannot be seen gives none."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from zoo.shared.store.identity import code_digest, data_digest, state_digest

MODEL = """
import torch
from torch import nn
from {helper} import sign
SCALE = 1.0

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.edges = "kept"
        with torch.no_grad():
            self.linear.weight.fill_(1.0)
            self.linear.bias.fill_(0.0)

    def forward(self, x):
        return sign(self.linear(x)) * SCALE
"""


@pytest.fixture
def net(tmp_path, monkeypatch, request):
    """Writes a model's file and its helper's, and imports them under names of this test alone."""
    helper, name = (f"{part}_{abs(hash(request.node.name))}" for part in ("helper", "net"))
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(sign: str = "x", model: str = MODEL):
        (tmp_path / f"{helper}.py").write_text(f"def sign(x):\n    return {sign}\n")
        (tmp_path / f"{name}.py").write_text(model.format(helper=helper))
        for old in (helper, name):
            sys.modules.pop(old, None)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield write
    for old in (helper, name):
        sys.modules.pop(old, None)


def test_code_of_the_model_and_of_a_helper_counts(net):
    first = code_digest(net("x").Net)
    assert len(first) == 64
    assert code_digest(net("x").Net) == first
    assert code_digest(net("-x").Net) != first  # only the helper differs
    assert code_digest(net("x", MODEL + "\n# a remark\n").Net) != first


def test_code_that_is_not_in_a_file_is_unknown(net):
    class Local(nn.Module):
        pass

    assert code_digest(Local) == ""
    assert code_digest(eval("lambda x: x")) == ""
    namespace = {"__name__": "typed_in", "nn": nn}
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return -x\n", namespace)
    assert code_digest(namespace["Typed"]) == ""


def test_code_that_was_replaced_or_edited_is_unknown(net, monkeypatch):
    module = net("x")
    before = code_digest(module.Net)
    monkeypatch.setattr(module.Net, "forward", lambda self, x: -x)
    assert code_digest(module.Net) != before
    monkeypatch.undo()
    helper = sys.modules[module.sign.__module__]
    monkeypatch.setattr(helper, "sign", lambda x: -x)
    assert code_digest(module.Net) == ""
    monkeypatch.undo()
    assert code_digest(module.Net) == before
    file = Path(module.__file__)
    file.write_text(file.read_text().replace("* SCALE", "* -SCALE"))  # what runs is still the old text
    assert code_digest(module.Net) == ""


def test_a_constant_that_was_set_at_run_time_counts(net, monkeypatch):
    module = net("x")
    before = code_digest(module.Net)
    monkeypatch.setattr(module, "SCALE", -1.0)
    assert code_digest(module.Net) not in ("", before)


def _states(model):
    yield "a tensor", lambda: model.linear.weight.data.mul_(2)
    yield "numpy", lambda: model.linear.weight.detach().numpy().fill(3)
    yield "an attribute", lambda: setattr(model, "edges", "whole")
    yield "a buffer of no state dict", lambda: model.register_buffer("b", torch.ones(1), persistent=False)
    yield "a tie", lambda: setattr(model, "other", model.linear)
    yield "a hook", lambda: model.register_forward_hook(print)
    yield "a forward of its own", lambda: setattr(model, "forward", functools.partial(torch.mul, 2))
    yield "a wrapper", lambda: setattr(model, "linear", nn.Sequential(model.linear))


def test_everything_that_a_model_holds_counts(net):
    model = net("x").Net()
    seen = [state_digest(model)]
    for what, change in _states(model):
        change()
        seen.append(state_digest(model))
        assert seen[-1] not in seen[:-1], what
        assert len(seen[-1]) == 64, what
    model.train()
    same = state_digest(model)
    assert state_digest(model.eval()) == same  # who measures sets the mode


def test_state_that_cannot_be_seen_is_unknown(net):
    model = net("x").Net()
    model.forward = eval("lambda x: -x")
    assert state_digest(model) == ""
    model = net("x").Net()
    model.draw = np.random.default_rng(0)
    assert state_digest(model) == ""


def test_data_count_bit_for_bit(tmp_path):
    x = torch.tensor([1.0, float("nan")])
    assert data_digest(x) == data_digest(x.clone())
    assert data_digest(x) != data_digest(x.double())
    assert data_digest(torch.tensor([0.0])) != data_digest(torch.tensor([-0.0]))
    assert data_digest(x.reshape(2, 1)) != data_digest(x)
    assert data_digest(torch.arange(6).reshape(2, 3).T) == data_digest(
        torch.arange(6).reshape(2, 3).T.clone()
    )
    assert data_digest({"a": 1}, "b") != data_digest({"a": "1"}, "b") != data_digest({"a": 1}, b"b")
    assert data_digest(["a", "b"]) != data_digest(["ab", ""])
    assert data_digest({1, 2, 3}) == data_digest({3, 2, 1})
    assert data_digest(np.array([object()])) == ""
    file = tmp_path / "data.txt"
    file.write_text("one")
    before = data_digest(file), data_digest(tmp_path)
    file.write_text("two")
    assert data_digest(file) != before[0] and data_digest(tmp_path) != before[1]


def test_the_zoo_is_followed_into_its_helpers():
    from zoo.shared.store.sources import sources_of

    names = set(sources_of(state_digest))
    assert {"zoo.shared.store.identity", "zoo.shared.store.io", "torch", "python"} <= names
    assert "zoo.shared.store" not in names  # a package that is only on the way
