"""Training from scratch: dropout, teachers, the best weights on held-out text, going on after a stop."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import ConfigError
from zoo.llm import pretrain
from zoo.llm.data import Corpus
from zoo.llm.data.tokenization import packaged
from zoo.llm.models.dropout import residual_dropout
from zoo.llm.pretrain import Recipe, held_out_loss, new_model
from zoo.llm.train import TrainConfig, distillation, next_token_loss, token_stream

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 16,
    "intermediate_size": 32,
    "layers": 2,
    "heads": 2,
    "context": 32,
    "tokenizer": "shakespeare",
}
STEPS = TrainConfig(steps=80, batch=8, window=16, lr=3e-2)
RECIPES = {
    "plain": Recipe("", "small", SHAPE, STEPS),
    "dropped": Recipe("", "small", SHAPE, STEPS, dropout=0.2, best=True),
    "pupil": Recipe("", "small", SHAPE, STEPS, teacher="plain", distillation=2.0, seed=1),
}


@pytest.fixture
def small(monkeypatch):
    """Tiny recipes on a text that is soon learnt by heart, whose validation part is another text."""
    line = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer. "
    other = "The slings and arrows of outrageous fortune, or to take arms against a sea of troubles. "
    made = Corpus("small", "", "", "", (line * 8,), (other * 2,), (other,))
    monkeypatch.setattr(pretrain, "corpus", lambda name: made)
    monkeypatch.setattr(pretrain, "RECIPES", RECIPES)
    return made


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_dropout_lasts_as_long_as_its_context_and_is_off_in_eval_mode():
    model, ids = new_model(RECIPES["plain"]), torch.arange(12)[None]
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
    one, other = new_model(RECIPES["plain"]).eval(), new_model(RECIPES["pupil"]).eval()
    batch = torch.arange(26).view(2, 13)
    own = logits(one, batch[:, :-1])
    assert float(distillation(one, 2.0)(own, batch)) == pytest.approx(0.0, abs=1e-6)
    p, q = (logits(m, batch[:, :-1]).double().log_softmax(-1) for m in (other, one))
    wanted = (p.exp() * (p - q)).sum(-1).mean()
    assert float(distillation(other, 2.0)(own, batch)) == pytest.approx(2 * float(wanted), rel=1e-4)


def test_held_out_loss_is_the_mean_over_whole_windows():
    model, tokens = new_model(RECIPES["plain"]).eval(), torch.arange(70)
    own = logits(model, tokens[:64].view(4, 16))
    wanted = next_token_loss(own, tokens[1:65].view(4, 16))
    assert held_out_loss(model, tokens, 16, batch=3) == pytest.approx(float(wanted), rel=1e-5)


def test_the_weights_of_the_lowest_validation_loss_are_kept(small, tmp_path):
    last, _ = pretrain.train("plain", tmp_path)
    best, _ = pretrain.train("dropped", tmp_path)
    tokens = token_stream(small.validation, packaged("shakespeare"))
    assert held_out_loss(best, tokens, 16) < held_out_loss(last, tokens, 16) - 0.5  # it overfits by far
    train = token_stream(small.train, packaged("shakespeare"))
    assert held_out_loss(last, train, 16) < 1.0
    assert held_out_loss(best, tokens, 16) < held_out_loss(new_model(RECIPES["dropped"]), tokens, 16)


@pytest.mark.parametrize("name", ["dropped", "pupil"])
def test_an_interrupted_training_ends_with_the_same_bits(name, small, tmp_path):
    whole, seconds = pretrain.train(name, tmp_path / "whole")
    pretrain.train(name, tmp_path / "parts", until=33, every=10)
    resumed, _ = pretrain.train(name, tmp_path / "parts")
    for (key, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), key
    again, more = pretrain.train(name, tmp_path / "whole")  # finished: nothing is repeated
    assert torch.equal(again.lm_head.weight, whole.lm_head.weight) and more < seconds + 1
    assert seconds > 0


def test_a_device_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has the device that should be missing")
    with pytest.raises(ConfigError, match="no device 'cuda'"):
        pretrain.main(pretrain.Pretrain(models=("shakespeare",), device="cuda"))
