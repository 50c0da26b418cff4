"""CHESS, CATS, TEAL and the oracle: thresholds by hand, what they have in common, and what they refuse."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from zoo.errors import ConfigError, DataError
from zoo.llm.data.tokenization import remember
from zoo.llm.gate_statistics import channel_spread, gate_statistics
from zoo.llm.methods import teal
from zoo.llm.methods.cats import Cats, cats_thresholds
from zoo.llm.methods.chess import Chess, chess_thresholds
from zoo.llm.methods.teal import Teal, greedy_thresholds, input_histograms, uniform_thresholds
from zoo.llm.models.blocks import find_blocks
from zoo.llm.models.thresholds import (
    ThresholdedLinear,
    attach,
    detach,
    held_out_shares,
    skipped_share,
    thresholds_of,
)
from zoo.llm.oracle import attach_oracle, detach_oracle
from zoo.shared.errors import BudgetError
from zoo.shared.measure.activations import ActivationError


def windows(count: int, length: int = 24, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(96, (1, length), generator=generator) for _ in range(count)]


def activations(llama, ids, module: str, output: bool = True) -> torch.Tensor:
    """What one module puts out (or takes in), as rows."""
    seen = []
    target = llama.get_submodule(module)
    handle = (
        target.register_forward_hook(lambda m, a, out: seen.append(out))
        if output
        else target.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    )
    with torch.no_grad():
        for one in ids:
            llama(one)
    handle.remove()
    return torch.cat([one.flatten(0, -2) for one in seen])


def kth(values: torch.Tensor, share: float) -> float:
    return float(values.flatten().sort().values[int(values.numel() * share) - 1])


def test_chess_thresholds_are_those_of_the_paper(llama):
    """Two chunks of two windows per sweep; T and tau are means over chunks, the score has the mean square."""
    first, second, s = windows(4), windows(4, seed=2), 0.4
    found = chess_thresholds(gate_statistics(llama, first, second, (s,), chunk=2), s)
    for i in range(2):
        mlp, attention = f"model.layers.{i}.mlp", f"model.layers.{i}.self_attn"
        m = activations(llama, first, f"{mlp}.up_proj").square().mean(0)
        chunks = [activations(llama, second[j : j + 2], f"{mlp}.act_fn") for j in (0, 2)]
        score = sum(kth(g.square() * m, s) for g in chunks) / 2
        torch.testing.assert_close(found[f"{mlp}.act_fn"], (score / m).sqrt(), atol=0, rtol=1e-4)
        for projection in ("q_proj", "o_proj"):
            inputs = [
                activations(llama, first[j : j + 2], f"{attention}.{projection}", output=False)
                for j in (0, 2)
            ]
            tau = sum(kth(x.abs(), s) for x in inputs) / 2
            assert float(found[f"{attention}.{projection}"]) == pytest.approx(tau, rel=1e-5)
    assert len(found) == 6, "keys and values read the dense input"


def test_cats_is_one_threshold_on_the_activated_gate(llama):
    text = windows(4)
    found = cats_thresholds(gate_statistics(llama, text, (), (0.7,), chunk=4), 0.7)
    g = activations(llama, text, "model.layers.1.mlp.act_fn")
    assert float(found["model.layers.1.mlp.act_fn"]) == pytest.approx(kth(g.abs(), 0.7), rel=1e-6)
    attach(llama, found)
    assert [row["ffn"] for row in held_out_shares(llama, text)] == pytest.approx([0.7, 0.7], abs=0.01)


def test_chess_is_cats_where_the_statistic_is_constant(llama):
    """u_i = c for every channel: with W_up = 0 and a bias of c the mean square is c^2."""
    for block in find_blocks(llama):
        block.up.weight.data.zero_()
        block.up.bias = torch.nn.Parameter(torch.full((64,), 0.7))
    text = windows(4)
    statistics = gate_statistics(llama, text, text, (0.3, 0.6), chunk=2)
    for share in (0.3, 0.6):
        chess, cats = chess_thresholds(statistics, share, "none"), cats_thresholds(statistics, share)
        assert chess.keys() == cats.keys()
        for name, tau in cats.items():
            # the mean of squares of k-th values is not the square of their mean
            torch.testing.assert_close(chess[name], tau.expand(64), atol=0, rtol=2e-3)
    one = gate_statistics(llama, text, text, (0.3,), chunk=4)
    dense = copy.deepcopy(llama)
    outputs = []
    for found in (chess_thresholds(one, 0.3, "none"), cats_thresholds(one, 0.3)):
        attach(llama, found)
        with torch.no_grad():
            outputs.append(llama(text[0]).logits)
        detach(llama)
    torch.testing.assert_close(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], dense(text[0]).logits)
    assert channel_spread(one[0].mean_square) == pytest.approx(1.0)


def test_a_dead_up_channel_has_an_infinite_threshold(llama):
    llama.model.layers[0].mlp.up_proj.weight.data[5] = 0
    text = windows(4)
    t = chess_thresholds(gate_statistics(llama, text, text, (0.5,)), 0.5)["model.layers.0.mlp.act_fn"]
    assert math.isinf(float(t[5])) and not torch.isnan(t).any() and int(torch.isinf(t).sum()) == 1
    llama.model.layers[0].mlp.up_proj.weight.data.zero_()
    t = chess_thresholds(gate_statistics(llama, text, text, (0.5,)), 0.5)["model.layers.0.mlp.act_fn"]
    assert torch.isinf(t).all()


def test_attention_has_its_own_share(llama):
    text = windows(8)
    statistics = gate_statistics(llama, text, text, (0.5, 0.25))
    attach(llama, chess_thresholds(statistics, 0.5, "all", 0.25))
    for row in held_out_shares(llama, text):
        assert row["ffn"] == pytest.approx(0.5, abs=0.02)
        assert [row[part] for part in "qkvo"] == pytest.approx([0.25] * 4, abs=0.02)


def test_the_gate_error_falls_from_cats_over_chess_to_the_oracle(llama):
    """Where channels differ in E[u^2]; the oracle knows u."""
    block = find_blocks(llama)[0]
    block.up.weight.data *= torch.linspace(0.2, 3, 64)[:, None]
    text, held = windows(8), activations(llama, windows(4, seed=5), "model.layers.0.mlp", output=False)
    statistics = gate_statistics(llama, text, text, (0.5,))
    with torch.no_grad():
        dense, errors = block.mlp(held), []
        for found in (cats_thresholds(statistics, 0.5), chess_thresholds(statistics, 0.5, "none")):
            attach(llama, found)
            errors.append(float((block.mlp(held) - dense).square().sum()))
            detach(llama)
        attach_oracle(llama, 0.5)
        errors.append(float((block.mlp(held) - dense).square().sum()))
        detach_oracle(llama)
        assert torch.equal(block.mlp(held), dense)
    assert errors[0] > 1.1 * errors[1] > 1.1 * errors[2] > 0


def test_teal_raises_the_projection_that_harms_least(llama, monkeypatch):
    """A change of q costs nothing here and one of anything else something: up to 2 % only q is raised."""
    text = windows(6)

    def error(block, wanted):
        parts = block.module.named_modules()
        layers = {name: part for name, part in parts if isinstance(part, ThresholdedLinear)}
        return sum(float(part.threshold.threshold) for name, part in layers.items() if "q_proj" not in name)

    monkeypatch.setattr(teal, "_error", error)
    found = greedy_thresholds(llama, text[:2], input_histograms(llama, text), (0.02,))[0.02]
    raised = {name for name, threshold in found.items() if float(threshold) > 0}
    assert raised == {name for name in found if "q_proj" in name}


def test_teal_shares_out_its_budget(llama):
    text = windows(6)
    histograms = input_histograms(llama, text)
    before = copy.deepcopy(llama.state_dict())
    found = greedy_thresholds(llama, text[:2], histograms, (0.3, 0.5))
    assert not thresholds_of(llama) and all(torch.equal(v, before[n]) for n, v in llama.state_dict().items())
    shares = {}
    for target, thresholds in {**found, 0.6: uniform_thresholds(histograms, 0.6)}.items():
        assert len(thresholds) == 14
        attach(llama, thresholds)
        report = held_out_shares(llama, text)
        shares[target] = skipped_share(report)
        if target == 0.5:  # the search gives projections different shares
            assert max(report[0][p] for p in "qkvo") - min(report[0][p] for p in "qkvo") > 0.02 or (
                report[0]["down"] - report[0]["gate"] > 0.05
            )
        detach(llama)
    for target, share in shares.items():
        assert share == pytest.approx(target, abs=0.03)


@pytest.fixture
def readable(make_llama):
    """A random model with a packaged tokenizer."""
    from zoo.llm.data.tokenization import folder, packaged

    tokenizer = packaged(sorted(path.stem for path in folder().glob("*.json"))[0])
    model = make_llama(vocab=len(tokenizer))
    remember(model, tokenizer)
    return model


SMALL = {"text": "embedded", "windows": 4, "length": 32}


@pytest.mark.parametrize(
    "method,names", [(Chess(**SMALL), 6), (Cats(**SMALL), 2), (Teal(**SMALL, step=0.5), 14)]
)
def test_methods_leave_thresholds_and_extras(readable, method, names):
    made = method.sparsify(readable)
    assert made.model is readable and not made.masks
    assert {f"thresholds/{name}" for name in thresholds_of(readable)} == set(made.extras)
    assert len(made.extras) == names
    if isinstance(method, Chess):
        assert made.hyperparameters["attention_sparsity"] == 0.25, "half in a narrow model"
    with pytest.raises(ConfigError, match="thresholds already"):
        method.sparsify(readable)


@pytest.mark.parametrize("method", [Chess, Cats, Teal])
@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, float("nan")])
def test_sparsities_outside_are_refused(method, sparsity):
    with pytest.raises(BudgetError, match="strictly between 0 and 1"):
        method(sparsity=sparsity).sparsify(torch.nn.Identity())


def test_refusals(readable, llama):
    with pytest.raises(BudgetError, match="attention_sparsity"):
        Chess(attention_sparsity=1.0).sparsify(readable)
    with pytest.raises(ConfigError, match="budget is"):
        Teal(budget="best").sparsify(readable)
    from zoo.llm.data.calibration import random_windows

    with pytest.raises(DataError, match="5 tokens, a window 9"):
        random_windows(torch.arange(5), 1, 9, 0)
    llama.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ActivationError, match="layers.1.mlp.up_proj.*NaN"):
        gate_statistics(llama, windows(2), windows(2), (0.5,))
