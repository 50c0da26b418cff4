"""ITER: plan, choice and balance by hand, refinement that keeps what it trusts, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("diffusers", reason="the extra `diffusion` is not installed")

from zoo.diffusion.data import load_pictures  # noqa: E402
from zoo.diffusion.networks.iter import (  # noqa: E402
    Enlarged,
    Iter,
    _most,
    autoencoder_loss,
    balance,
    degrade,
    planned_tokens,
    refinement_loss,
)
from zoo.errors import ConfigError  # noqa: E402
from zoo.shared.train import Recipe  # noqa: E402


@pytest.fixture
def model() -> Iter:
    return Iter.fresh(0, side=8, scale=2, factor=2, codes=8, width=16, depth=1).eval()


def test_the_plan_by_hand() -> None:
    """(1 - cos(pi i / 2T)) of 100 positions, T = 4: 0, 7, 29, 61, and all at the end."""
    assert [planned_tokens(i, 4, 100) for i in range(5)] == [0, 7, 29, 61, 100]


def test_the_largest_of_each_row_by_its_own_count() -> None:
    score = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.7]])
    chosen = _most(score, torch.tensor([2, 1]))
    assert chosen.tolist() == [[False, True, True], [True, False, False]]
    assert not _most(score, torch.tensor([0, 0])).any()


def test_the_balance_by_hand() -> None:
    """Of 3 wrong and 1 right the effective numbers are 1 + b + b^2 and 1: the rare kind weighs more."""
    weights = balance(torch.tensor([[True, False, False, False]]))
    b = 0.9999
    wrong, right = 1 / (1 + b + b * b), 1.0
    want = torch.tensor([wrong, right]) * 2 / (wrong + right)
    torch.testing.assert_close(weights, want)
    assert weights[1] > weights[0]


def test_trusted_tokens_stay_and_trust_skips_steps(model, monkeypatch) -> None:
    small = torch.randn(3, 1, 4, 4)
    first = model.predict(small)
    scores = torch.full((3, 16), 0.1)
    scores[0] = 0.9  # all trusted: no step
    scores[1, :8] = 0.9  # half of them
    monkeypatch.setattr(model, "rightness", lambda tokens, _: scores[: len(tokens)].clone())
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    inner = model.refined

    def refined(tokens, kept, seen):
        calls.append((kept.clone(), seen.clone()))
        return inner(tokens, kept, seen)

    monkeypatch.setattr(model, "refined", refined)
    tokens, taken = model.refine(small, steps=8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tokens[0], first[0]) and torch.equal(tokens[1, :8], first[1, :8])
    planned = [planned_tokens(i, 8, 16) for i in range(1, 8)]
    assert taken[0] == 0
    assert taken[1] == sum(p > 8 for p in planned) and taken[2] == sum(p > 0 for p in planned)
    # What S0 looks like to R: distrusted tokens are masked (code 8), in the last call as in the first.
    assert (calls[0][1] == 8).all() and calls[0][0].sum() == planned[1] * len(calls[0][0])
    # A threshold of 0 trusts everything, one of 1 nothing.
    assert model.refine(small, threshold=0.0)[1].sum() == 0
    assert (model.refine(small, threshold=1.0)[1] == sum(p > 0 for p in planned)).all()


def test_chances_are_those_of_the_evaluation(model, monkeypatch) -> None:
    """A token with all the chance is kept first, whatever the draw; the random control does not ask."""
    scores = torch.full((200, 16), 1e-6)
    scores[:, 5] = 0.4
    small = torch.randn(1, 1, 4, 4).expand(200, -1, -1, -1)
    monkeypatch.setattr(model, "rightness", lambda tokens, _: scores[: len(tokens)].clone())
    monkeypatch.setattr(model, "refined", lambda tokens, kept, seen: kept_at.append(kept.clone()) or logits)
    logits = torch.zeros(200, 16, 8)
    shares = {}
    for chooser in ("evaluation", "random"):
        kept_at: list[torch.Tensor] = []
        model.refine(small, steps=5, chooser=chooser, generator=torch.Generator().manual_seed(0))
        shares[chooser] = float(kept_at[0][:, 5].double().mean())
    assert shares["evaluation"] > 0.99 and shares["random"] < 0.25


def test_the_loss_reaches_every_net_but_the_autoencoder(model) -> None:
    torch.manual_seed(0)
    images = load_pictures("digits").train[:8]
    before = model.autoencoder.quantiser.usage.clone()
    refinement_loss(model.train(), (degrade(images, 2), images)).backward()
    assert model.autoencoder.training and torch.equal(before, model.autoencoder.quantiser.usage)
    for name, p in model.named_parameters():
        touched = p.grad is not None and bool(p.grad.abs().sum() > 0)
        assert touched is not name.startswith("autoencoder."), name


def test_training_in_two_stages(model) -> None:
    images = load_pictures("digits").test[:100]
    small = degrade(images, 2, 0.1)

    @torch.no_grad()
    def losses() -> list[float]:
        torch.manual_seed(0)
        batches = (autoencoder_loss, (images,)), (refinement_loss, (small, images))
        return [float(loss(model.eval(), batch)) for loss, batch in batches]

    before = losses()
    model.learn("digits", recipe=Recipe(steps=12, lr=5e-3, batch=24, optimizer="adamw", weight_decay=0.0))
    after = losses()
    assert after[0] < before[0] and after[1] < before[1]
    again = model(small[:3])
    assert torch.equal(again, model(small[:3])) and again.shape == (3, 1, 8, 8)
    assert math.isfinite(Enlarged().evaluate(model).metrics["psnr"].value)
    assert Enlarged().flops(model).dense > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(1, 1, 5, 4)), r"\(1, 4, 4\); received \(1, 5, 4\).*reflect-pad"),
        (lambda m: m.refine(torch.zeros(1, 1, 4, 4), steps=0), "received 0"),
        (lambda m: m.refine(torch.zeros(1, 1, 4, 4), threshold=1.5), "received 8 and 1.5"),
        (lambda m: m.decode(torch.full((1, 16), 8)), "0 to 7; received 16 from 8 to 8"),
        (lambda m: m.decode(torch.zeros(1, 15, dtype=torch.long)), "16 tokens .*received 15"),
        (lambda m: Iter(side=9), "received side 9"),
        (lambda m: Iter(factor=3), "factor is 2 or 4"),
    ],
)
def test_what_is_refused(model, call, message) -> None:
    with pytest.raises(ConfigError, match=message):
        call(model)
