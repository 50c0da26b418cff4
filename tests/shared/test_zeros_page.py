"""docs/zeros.md line by line: what keeps zeros, what loses them, for a step or for good, what is refused."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrizations, vector_to_parameters

import zoo
from zoo.shared.errors import MaskError, OptimizerStateError
from zoo.shared.masks import Mask, MaskSet, masks_of
from zoo.shared.masks.foreign import masks_from_zeros

ROOT = Path(__file__).parents[2]
KEPT, NEXT, LOST, REFUSED = "kept", "until the next step", "lost", "refused"
INPUTS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def drops(seed: int = 0) -> MaskSet:
    generator = torch.Generator().manual_seed(seed)
    return MaskSet({"0.weight": Mask(torch.rand(8, 6, generator=generator) < 0.4)})


MASKS = drops()


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)


def train(model, optimizer, steps=2, forward=None):
    for _ in range(steps):
        optimizer.zero_grad()
        (forward or model)(INPUTS).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()


def sparse():
    model = network()
    with MASKS.attach(model):
        return model


def after(change: Callable, prepare: Callable = lambda model: model) -> str:
    """What a change does to the zeros of a model whose masks are attached."""
    model = prepare(network())
    optimizer = adam(model)
    try:
        with MASKS.attach(model, optimizer):
            change(model)
            if not MASKS.lost_zeros(model):
                train(model, optimizer)
                return LOST if MASKS.lost_zeros(model) else KEPT
            train(model, optimizer, 1)
            return LOST if MASKS.lost_zeros(model) else NEXT
    except (MaskError, OptimizerStateError):
        return REFUSED


def holds(model, masks=MASKS) -> str:
    return LOST if masks.lost_zeros(model) else KEPT


def is_held(function: Callable) -> Callable[[], str]:
    """A case from a function that returns a model whose zeros count."""
    return lambda: holds(function())


DENSE = network(1).state_dict()


def lbfgs():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters())

    def closure():
        loss = model(INPUTS).square().mean()
        loss.backward()
        return loss

    with pytest.raises(OptimizerStateError, match="register_optimizer_state"), MASKS.attach(model, optimizer):
        optimizer.step(closure)
    return REFUSED


def other_optimizer(moments: bool):
    model = network()
    optimizer = adam(model)
    if moments:
        train(model, optimizer)
    with MASKS.attach(model):
        train(model, optimizer)
    return model


def clipped(model):
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            torch.utils.checkpoint.checkpoint(model, INPUTS, use_reentrant=False).square().mean().backward()


def sparse_embedding():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True))
    masks = MaskSet({"0.weight": Mask(torch.rand(5, 4) < 0.5)})
    with pytest.raises(MaskError, match="sparse=False"), masks.attach(model):
        model(torch.tensor([1, 2])).sum().backward()
    return REFUSED


def data(model):
    model[0].weight.data.copy_(DENSE["0.weight"])
    model[0].weight.data = DENSE["0.weight"].clone()


def vectors(model):
    vector_to_parameters(parameters_to_vector(model.parameters()) + 1, model.parameters())
    model[0].reset_parameters()
    nn.init.normal_(model[0].weight)


def replace(model):
    model[0].weight = nn.Parameter(DENSE["0.weight"].clone())


def compiled():
    model = network()
    optimizer = adam(model)
    with MASKS.attach(torch.compile(model, backend="eager"), optimizer):
        train(model, optimizer, forward=torch.compile(model, backend="eager"))
    return model


def copied():
    with MASKS.attach(model := network(), adam(model)):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert all(masks_of(one).equal(MASKS) for one in copies)
    train(copies[0], optimizer := adam(copies[0]), 0)
    with masks_of(copies[0]).attach(copies[0], optimizer):
        train(copies[0], optimizer)
    return copies[0]


def trained(model):
    train(model, adam(model))
    return model


def loaded():
    model = network(2)
    model.load_state_dict(sparse().state_dict())
    assert masks_of(model) is None and masks_from_zeros(model).equal(MASKS)
    return model


def averaged(early: bool):
    model = network()
    average = torch.optim.swa_utils.AveragedModel(model) if early else None
    if average is not None:
        average.update_parameters(model)
    with MASKS.attach(model, optimizer := adam(model)):
        average = average or torch.optim.swa_utils.AveragedModel(model)
        for _ in range(2):
            train(model, optimizer, 1)
            average.update_parameters(model)
    return average


def mean(other: MaskSet):
    first, second = network(3), network(4)
    MASKS.apply_(first)
    other.apply_(second)
    second.load_state_dict({k: (v + second.state_dict()[k]) / 2 for k, v in first.state_dict().items()})
    return second


def sparsified():
    model = sparse()
    zoo.sparsify(model, sparsity=0.2)
    with masks_of(model).attach(model, optimizer := adam(model)):
        train(model, optimizer)
    return model


def fused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).eval()
    model[1].running_var.uniform_(0.5, 2)
    masks = zoo.sparsify(model, sparsity=0.5)
    model[0] = nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    return holds(model, masks)


def product_of(change: Callable) -> str:
    """Whether zeros of the stored weight are zeros of what multiplies."""
    layer = sparse()[0]
    return KEPT if bool((change(layer)[~MASKS["0.weight"].keep] == 0).all()) else LOST


def standardised(layer):
    weight = layer.weight
    return (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)


#: The first column of a line -> what is seen.
CASES: dict[str, Callable[[], str]] = {
    "a step of the optimiser that was given to `attach`": lambda: after(lambda model: None),
    "LBFGS, or an optimiser with state of unknown meaning": lbfgs,
    "a step of an optimiser that was made anew and not given": is_held(lambda: other_optimizer(False)),
    "a step of an optimiser with moments from before, not given": is_held(lambda: other_optimizer(True)),
    "clipped or accumulated gradients, autocast, checkpointing": lambda: after(clipped),
    "an embedding with `sparse=True`": sparse_embedding,
    "`model.load_state_dict(dense)`": lambda: after(lambda model: model.load_state_dict(DENSE)),
    "`model[0].load_state_dict(dense)`, a part of the model": lambda: after(
        lambda model: model[0].load_state_dict({k[2:]: v for k, v in DENSE.items() if k[0] == "0"})
    ),
    "`p.data.copy_(dense)`, `p.data = dense`": lambda: after(data),
    "`vector_to_parameters`, `reset_parameters`, `nn.init`": lambda: after(vectors),
    "`model.load_state_dict(dense, assign=True)`": lambda: after(
        lambda model: model.load_state_dict({k: v.clone() for k, v in DENSE.items()}, assign=True)
    ),
    "`layer.weight = nn.Parameter(dense)`": lambda: after(replace),
    "`model.to(dtype)`, `model.half()`": lambda: after(lambda model: model.half().to(torch.float32)),
    "`torch.compile(model)`, before or after": is_held(compiled),
    "`copy.deepcopy(model)`, `pickle`": is_held(copied),
    "training a copy, or a model with masks that nobody attached": is_held(
        lambda: trained(copy.deepcopy(sparse()))
    ),
    "`model.state_dict()` into another object of the class": is_held(loaded),
    "training what was loaded so": is_held(lambda: trained(loaded())),
    "`AveragedModel(model)`, moving averages": is_held(lambda: averaged(False)),
    "an average that began before pruning": is_held(lambda: averaged(True)),
    "the mean of two models with the same masks": is_held(lambda: mean(MASKS)),
    "the mean of two models with other masks": is_held(lambda: mean(drops(1))),
    "a second `zoo.sparsify` of a sparse model": is_held(sparsified),
    "`torch.nn.utils.fuse_conv_bn_eval`, folded norms": fused,
    "`weight_norm` on a sparse layer": lambda: product_of(
        lambda layer: parametrizations.weight_norm(layer).weight
    ),
    "weight standardisation, (w - mean) / std in the forward pass": lambda: product_of(standardised),
}


def lines() -> dict[str, tuple[str, str]]:
    """The page's lines: what is done -> what it says of the zeros, and the last column."""
    text = ROOT.joinpath("docs/zeros.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.*?) ?\|$", text, re.MULTILINE)
    return {first: (second, third) for first, second, third in rows if first != "what you do"}


@pytest.mark.parametrize("what", CASES)
def test_a_line_of_the_page_is_what_is_seen(what):
    assert CASES[what]() == lines()[what][0]


def test_every_line_has_its_case_or_names_the_file_of_its_test():
    for what, (_, note) in lines().items():
        named = re.findall(r"`(tests/[\w/]+\.py)`", note)
        assert (what in CASES) or named, what
        assert all(ROOT.joinpath(name).is_file() for name in named)
    assert set(CASES) <= set(lines())
