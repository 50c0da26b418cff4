"""Training from scratch: dropout, teachers, the best weights on held-out text, going on after a stop."""

from __future__ import annotations

import pytest
import torch

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.errors import ConfigError
from zoo.llm import makers
from zoo.llm.data import Corpus
from zoo.llm.data.tokenization import make_tokenizer, packaged, token_stream
from zoo.llm.makers import dense, new_model
from zoo.llm.models.dropout import residual_dropout
from zoo.llm.train import held_out_loss, next_token_loss, window_loss
from zoo.shared.errors import TrainingError
from zoo.shared.train import Distillation, Fit

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "intermediate_size": 32,
    "layers": 2,
    "heads": 2,
    "context": 32,
    "tokenizer": "shakespeare",
}
STEPS = {"steps": 80, "batch": 8, "window": 16, "lr": 3e-2}


def row(**options):
    """A tiny recipe."""
    shared = {"architecture": "llm/llama", "arguments": SHAPE, "dataset": "small", "recipe": STEPS}
    return Row("llm/tiny", "", "", maker="llm/dense", options=options, **shared)


PLAIN, DROPPED, PUPIL = row(), row(dropout=0.2, best=True), row(distillation=2.0)


@pytest.fixture
def small(monkeypatch):
    """A text that is soon learnt by heart, whose validation part is mostly another text."""
    line = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. "
    other = "The slings and arrows of outrageous fortune, or to take arms against a sea of troubles. "
    made = Corpus("small", "", "", "", (line * 8,), (other * 5 + line,), (other,))
    monkeypatch.setattr(makers, "corpus", lambda name: made)
    return made


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_dropout_lasts_as_long_as_its_context_and_is_off_in_eval_mode():
    model, ids = new_model(PLAIN, 0), torch.arange(12)[None]
    plain = logits(model.eval(), ids)
    with residual_dropout(model, 0.5):
        assert torch.equal(logits(model, ids), plain)
        model.train()
        torch.manual_seed(0)
        seen = []
        handle = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        first, second = logits(model, ids), logits(model, ids)
        handle.remove()
        assert not torch.allclose(first, second)
        # Where embedding and all branches are dropped nothing is left: 2^-5 of the entries.
        assert 0.005 < float((seen[0] == 0).float().mean()) < 0.08
    assert torch.equal(logits(model, ids), plain)
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match="probability below 1"), residual_dropout(model, share):
            pass


def test_the_divergence_from_a_teacher_is_that_of_the_definition():
    one, other = new_model(PLAIN, 0).eval(), new_model(PUPIL, 1).eval()
    batch = torch.arange(26).view(2, 13)
    one.requires_grad_(False)
    plain = float(window_loss(one, batch))
    assert float(Distillation(one, output=2.0)(window_loss, one, batch)) == pytest.approx(plain, abs=1e-6)
    p, q = (logits(m, batch[:, :-1]).double().log_softmax(-1) for m in (other, one))
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    total = float(Distillation(other, output=2.0)(window_loss, one, batch))
    assert total - plain == pytest.approx(2 * float(wanted), rel=1e-3)


def test_held_out_loss_is_the_mean_over_whole_windows():
    model, tokens = new_model(PLAIN, 0).eval(), torch.arange(70)
    own = logits(model, tokens[:64].view(4, 16))
    wanted = next_token_loss(own, tokens[1:65].view(4, 16))
    assert held_out_loss(model, tokens, 16, batch=3) == pytest.approx(float(wanted), rel=1e-5)


def test_the_weights_of_the_lowest_validation_loss_are_kept(small, tmp_path):
    last = dense(PLAIN, 0, None, Work(tmp_path / "last")).model
    made = dense(DROPPED, 0, None, Work(tmp_path / "best"))
    best = made.model
    tokens = token_stream(small.validation, packaged("shakespeare"))
    assert held_out_loss(best, tokens, 16) < held_out_loss(last, tokens, 16) - 0.3  # it overfits by far
    assert made.hyperparameters["validation_loss"] == pytest.approx(held_out_loss(best, tokens, 16))
    train = token_stream(small.train, packaged("shakespeare"))
    assert held_out_loss(last, train, 16) < 1.0
    assert held_out_loss(best, tokens, 16) < held_out_loss(new_model(DROPPED, 0), tokens, 16) - 0.1


@pytest.mark.parametrize(("recipe", "seed"), [(DROPPED, 0), (PUPIL, 1)])
def test_an_interrupted_training_ends_with_the_same_bits(recipe, seed, small, tmp_path, monkeypatch):
    teacher = dense(PLAIN, 0, None, Work(tmp_path / "teacher")).model if recipe is PUPIL else None
    whole = dense(recipe, seed, teacher, Work(tmp_path / "whole")).model
    advance = Fit._make_step

    def killed(fit, group):
        if fit.step == 33:
            raise KeyboardInterrupt
        advance(fit, group)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Fit, "_make_step", killed)
        dense(recipe, seed, teacher, Work(tmp_path / "parts"))
    steps = []

    def watched(fit, group):
        steps.append(fit.step)
        advance(fit, group)

    monkeypatch.setattr(Fit, "_make_step", watched)
    resumed = dense(recipe, seed, teacher, Work(tmp_path / "parts")).model
    assert steps[0] == 25, "it goes on from its checkpoint"
    for (key, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), key


def test_a_device_that_is_not_there_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has the device that should be missing")
    with pytest.raises(TrainingError, match="no device 'cuda'"):
        dense(PLAIN, 0, None, Work(tmp_path, "cuda"))


def test_a_packaged_tokenizer_is_made_again():
    text = "Now is the winter of our discontent"
    again = make_tokenizer("shakespeare")
    assert again.encode(text, add_special_tokens=False).ids == packaged("shakespeare")(text).input_ids[:]
