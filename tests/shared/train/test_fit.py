"""The training loop against steps by hand, and its resuming to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import zoo
from zoo.shared.errors import TrainingError
from zoo.shared.masks import MaskSet, set_masks
from zoo.shared.train import Checkpoint, Cost, Distillation, Fit, Job, Recipe, resume


def data(count: int = 24) -> TensorDataset:
    torch.manual_seed(3)
    inputs = torch.randn(count, 4)
    return TensorDataset(inputs, (inputs[:, 0] > 0).long())


def loader(batch: int = 4) -> DataLoader:
    return DataLoader(data(), batch_size=batch, shuffle=True)


def net(dropout: float = 0.3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 2))


def scalar_job(values: list[float], recipe: Recipe) -> tuple[nn.Module, Fit]:
    """A model of one weight w = 1 whose loss on a batch (a,) is a w."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    batches = [(torch.tensor([[value]]), torch.zeros(1)) for value in values]
    return model, Fit(model, batches, recipe, loss=lambda m, batch: m(batch[0]).sum(), macs=lambda: 0.0)


def equal(left: dict, right: dict) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left if name != "spent")


def test_sgd_steps_by_hand() -> None:
    # w = 1, gradients 2 then 4, lr 0.1 constant, momentum 0.5 with Nesterov, decay 0:
    # v = 2, w = 1 - 0.1 (2 + 0.5 * 2) = 0.7; v = 0.5 * 2 + 4 = 5, w = 0.7 - 0.1 (4 + 0.5 * 5) = 0.05
    recipe = Recipe(epochs=1, lr=0.1, weight_decay=0.0, momentum=0.5, warmup=0.0, decay="constant")
    model, fit = scalar_job([2.0, 4.0], recipe)
    seen = []
    fit.run(lambda: seen.append(round(model.weight.item(), 6)))
    assert seen == [0.7, 0.05] and fit.step == 2 and fit.epoch == 1 and fit.done
    assert fit.last_loss == pytest.approx(4.0 * 0.7)


def test_accumulation_descends_the_mean_and_counts_a_short_last_step() -> None:
    # steps of mean gradients (1 + 3) / 2 = 2 and 5: w = 1 - 0.1 * 2 = 0.8, then 0.8 - 0.1 * 5 = 0.3
    recipe = Recipe(
        epochs=1, lr=0.1, weight_decay=0.0, momentum=0.0, warmup=0.0, decay="constant", accumulate=2
    )
    model, fit = scalar_job([1.0, 3.0, 5.0], recipe)
    assert fit.run().step == 2 and fit.steps == 2
    assert model.weight.item() == pytest.approx(0.3)


def test_clip_penalty_and_average_by_hand() -> None:
    # gradient 4 + 2 (penalty) clipped to 3: w = 1 - 0.1 * 3 = 0.7, then 0.4;
    # the average of decay 1/2 from 1 on: 0.5 * 1 + 0.5 * 0.7 = 0.85, then 0.5 * 0.85 + 0.5 * 0.4 = 0.625
    recipe = Recipe(
        epochs=1, lr=0.1, weight_decay=0.0, momentum=0.0, warmup=0.0, decay="constant", clip=3.0, ema=0.5
    )
    model, _ = scalar_job([4.0, 4.0], recipe)
    batches = [(torch.tensor([[4.0]]), torch.zeros(1))] * 2
    fit = Fit(
        model,
        batches,
        recipe,
        loss=lambda m, b: m(b[0]).sum(),
        penalty=lambda: 2 * model.weight.sum(),
        macs=lambda: 0.0,
    )
    fit.run()
    assert model.weight.item() == pytest.approx(0.625)


def test_learning_rates_by_hand() -> None:
    linear = Recipe(lr=1.0, warmup=0.2, decay="linear")
    assert [linear.learning_rate(s, 10) for s in (0, 1, 2, 6, 9)] == pytest.approx([0.5, 1, 1, 0.5, 0.125])
    cosine = Recipe(lr=1.0, warmup=0.2, decay="cosine")
    assert cosine.learning_rate(2, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi * 1 / 9)))
    assert cosine.learning_rate(9, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi * 8 / 9)))
    assert Recipe(lr=1.0, warmup=0.0, decay="constant").learning_rate(0, 10) == 1.0


def test_groups_keep_their_share_of_the_learning_rate() -> None:
    model = nn.Linear(2, 2)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.05}]
    fit = Fit(model, [(torch.ones(1, 2), torch.zeros(1).long())] * 3, Recipe(1, lr=0.1), parameters=groups)
    rates = []
    fit.run(lambda: rates.append([g["lr"] for g in fit.optimizer.param_groups]))
    assert all(b == pytest.approx(a / 2) for a, b in rates)


@pytest.mark.parametrize("optimizer", ["sgd", "Adam", "AdamW", "RMSprop", "NAdam", "adagrad"])
@pytest.mark.parametrize("changes", [{}, {"accumulate": 2, "ema": 0.9, "clip": 1.0, "select": "best"}])
def test_resumed_within_an_epoch_equals_uninterrupted(tmp_path, optimizer: str, changes: dict) -> None:
    recipe = Recipe(epochs=3, lr=0.01, optimizer=optimizer, **changes)
    scores = {"score": lambda m: -float(m[0].weight.detach().abs().sum())}

    def fit() -> Fit:
        return Fit(net(), loader(), recipe, **scores)

    whole = resume(fit(), Checkpoint(tmp_path / "a", {}), every_steps=4)
    stopped, file = fit(), Checkpoint(tmp_path / "b", {"run": 1})

    class Killed(Exception):
        pass

    def kill() -> None:
        if stopped.step == 5:
            raise Killed

    with pytest.raises(Killed):
        resume(stopped, file, every_steps=4, after_step=kill)
    torch.manual_seed(99)  # another process has another random state
    again = resume(fit(), file, every_steps=4)
    assert again.step == whole.step == whole.steps
    assert equal(again.state(), whole.state())
    assert again.spent.flops == whole.spent.flops > 0


@pytest.mark.parametrize(("last", "kept"), [(False, 6), (True, 12)])
def test_the_last_state_is_kept_if_that_is_asked_for(tmp_path, last: bool, kept: int) -> None:
    fit, file = Fit(net(), loader(), Recipe(epochs=2, lr=0.1)), Checkpoint(tmp_path, {})
    resume(fit, file, every_steps=fit.steps_per_epoch, last=last)
    stored, again = file.read(), Fit(net(), loader(), Recipe(epochs=2, lr=0.1))
    assert stored is not None and fit.step == 12
    again.load_state(stored[0])
    assert again.step == kept


def test_a_step_at_the_end_of_an_epoch_is_kept_with_its_score(tmp_path) -> None:
    recipe = Recipe(epochs=2, lr=0.1, select="best")
    scores = iter([2.0, 1.0])
    fit = Fit(net(), loader(), recipe, score=lambda _: next(scores))
    file = Checkpoint(tmp_path, {})
    resume(fit, file, every_steps=fit.steps_per_epoch)
    stored = file.read()
    assert stored is not None and stored[0]["best_score"].tolist() == [6.0, 2.0]
    assert fit.best is not None and fit.best.step == fit.steps_per_epoch == 6
    assert torch.equal(fit.model[0].weight, fit.best.state["0.weight"])


def test_last_of_equal_scores_wins() -> None:
    fit = Fit(net(), loader(), Recipe(epochs=3, select="best"), score=lambda _: 1.0).run()
    assert fit.best is not None and fit.best.step == fit.steps


def test_scores_between_epochs() -> None:
    scores = iter([1.0, 3.0, 2.0])
    fit = Fit(net(), loader(), Recipe(steps=5, select="best", score_every=2), score=lambda _: next(scores))
    assert fit.run().best is not None and fit.best.step == 4 and next(scores, None) is None


def test_a_run_stops_at_a_step_and_goes_on() -> None:
    whole = Fit(net(), loader(), Recipe(epochs=2)).run()
    parts = Fit(net(), loader(), Recipe(epochs=2))
    assert parts.run(until_step=4).step == 4 and not parts.done
    assert equal(parts.run().state(), whole.state())


def test_steps_instead_of_epochs() -> None:
    fit = Fit(net(), loader(), Recipe(steps=8)).run()
    assert fit.step == 8 and fit.done and fit.epoch == 1  # six steps are a pass


def test_masks_hold_and_averages_respect_them() -> None:
    model = net()
    keep = torch.ones(8, 4, dtype=torch.bool)
    keep[::2] = False
    masks = MaskSet({"0.weight": keep})
    masks.apply_(model)
    set_masks(model, masks)
    job = Job(loader(), recipe=Recipe(epochs=2, ema=0.9, optimizer="adam"))
    job.fit_masked(model)
    assert not masks.lost_zeros(model) and job.cost.flops > 0


def test_public_job_trains_an_own_model_on_an_own_loader() -> None:
    model = net(0.0)
    samples = data()

    def score(m: nn.Module) -> float:
        with torch.no_grad():
            return float((m(samples.tensors[0]).argmax(1) == samples.tensors[1]).double().mean())

    job = zoo.Job(loader(), score=score, recipe=zoo.Recipe(epochs=20, lr=0.1, select="best"))
    before = score(model.eval())
    job.fit(model).run()
    assert score(model.eval()) > max(before, 0.9)
    assert len(job.sample(2)) == 2 and torch.equal(job.sample(1)[0][0], job.sample(1)[0][0])
    assert not torch.equal(job.sample(1)[0][0], job.sample(1, 5)[0][0])
    assert job.replace(cost=Cost()).cost.flops == 0


def test_epochs_differ_and_the_outer_random_state_stays() -> None:
    job, model = Job(loader(24)), net()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second = (next(job.batches.draw(torch.Generator().manual_seed(s)))[0] for s in (0, 1))
    assert not torch.equal(first, second) and torch.equal(first.sort(0)[0], second.sort(0)[0])
    job.fit(model).run()
    assert torch.equal(torch.get_rng_state(), state)


def test_decay_of_matrices_only() -> None:
    model = nn.Linear(2, 2)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    recipe = Recipe(
        1, lr=0.1, weight_decay=0.5, optimizer="adamw", decayed="matrices", warmup=0.0, decay="constant"
    )
    Fit(model, [(torch.ones(1, 2),)], recipe, loss=lambda m, b: 0 * m(b[0]).sum(), macs=lambda: 0.0).run()
    assert torch.allclose(model.weight, start["weight"] * 0.95) and torch.equal(model.bias, start["bias"])


def test_autocast_keeps_weights_in_single_precision() -> None:
    seen = []

    def loss(model, batch):
        out = model(batch[0])
        seen.append(out.dtype)
        return out.float().square().mean()

    model = nn.Linear(4, 2)
    Fit(model, loader(), Recipe(1, autocast="bfloat16"), loss=loss).run()
    assert set(seen) == {torch.bfloat16} and model.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(epochs=0), "epochs must be at least 1; received 0"),
        (lambda: Recipe(lr=math.nan), "lr must be finite and not negative; received nan"),
        (lambda: Recipe(ema=1.0), "ema must be from 0 up to 1; received 1.0"),
        (lambda: Recipe(optimizer="lbfgs"), "optimizer is one of .*adamw.*; received 'lbfgs'"),
        (lambda: Recipe(decay="steep"), "decay is one of .*; received 'steep'"),
        (lambda: Fit(net(), loader(), Recipe(options={"beta": 1})), "torch.optim.SGD refuses"),
        (lambda: Fit(net(), [], Recipe()), "the data have no batch"),
        (lambda: Job(iter([1])), "received list_iterator"),
        (lambda: Job(loader(), device="gpu"), "'gpu' is no device"),
        (lambda: Job(loader(), device="xpu"), "no device 'xpu'"),
        (lambda: Job(loader(), device="meta"), "'meta' is no device"),
        (lambda: Job(loader(), device="cuda:99"), "no device 'cuda:99'"),
        (lambda: Fit(net(), loader(), Recipe(select="best")), "needs a score"),
        (lambda: Job(loader()).fit(net(), batch=2), "batch=2 cannot be met"),
        (lambda: Fit(nn.ReLU(), loader(), Recipe()), "empty parameter list"),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        make()


def test_a_lost_loss_and_a_lying_length_are_named() -> None:
    with pytest.raises(TrainingError, match="the loss became nan at step 0"):
        Fit(net(), loader(), Recipe(), loss=lambda m, b: m(b[0]).sum() * math.nan).run()

    class Short(list):
        def __len__(self) -> int:
            return 4

    with pytest.raises(TrainingError, match="gave 2 steps in epoch 1 where their length promises 4"):
        Fit(net(), Short([tuple(data()[:4])] * 2), Recipe()).run()


def test_states_of_other_runs_are_refused() -> None:
    state = Fit(net(), loader(), Recipe(ema=0.9)).state()
    with pytest.raises(TrainingError, match="another ema"):
        Fit(net(), loader(), Recipe()).load_state(state)
    with pytest.raises(TrainingError, match="lacks 'bias'"):
        Fit(nn.BatchNorm1d(4), loader(), Recipe()).load_state(state)


def test_unknown_inputs_are_not_counted_but_trained() -> None:
    batches = [{"x": torch.ones(2, 4), "y": torch.zeros(2).long()}]
    fit = Fit(
        net(), batches, Recipe(1), loss=lambda m, b: nn.functional.cross_entropy(m(b["x"]), b["y"])
    ).run()
    assert fit.done and math.isnan(fit.cost.flops)


def test_distillation_is_part_of_the_step() -> None:
    teacher = net(0.0)
    job = Job(loader(), distil=Distillation(teacher, task=0.0, output=1.0), recipe=Recipe(40, lr=0.2))
    student = nn.Linear(4, 2)
    x = data().tensors[0]
    gap = (student(x).softmax(1) - teacher(x).softmax(1)).abs().mean().item()
    job.fit(student).run()
    assert (student(x).softmax(1) - teacher(x).softmax(1)).abs().mean().item() < gap / 2
