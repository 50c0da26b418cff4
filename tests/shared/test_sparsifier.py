"""The one loop: the whole grid of its axes, exact sparsity over a schedule, regrowth, resume, and clear
refusals."""

from __future__ import annotations

import copy
import functools
import itertools
import math

import pytest
import torch
from torch import nn

from zoo.shared.errors import BudgetError, MaskError, PatternError, ScheduleError
from zoo.shared.masks import Mask, MaskSet, masks_of, set_masks
from zoo.shared.masks.patterns import NM, Block, Group, Unstructured, Whole
from zoo.shared.pruning import scores
from zoo.shared.pruning.budgets import (
    BUDGETS,
    ErdosRenyi,
    Floor,
    Global,
    Knapsack,
    SensitivityWeighted,
    Uniform,
    kept_count,
)
from zoo.shared.pruning.regrow import SET, RigL
from zoo.shared.pruning.schedules import Cosine, Cubic, Exponential, Linear, OneShot, Steps
from zoo.shared.pruning.scores import SCORES, ScoreContext
from zoo.shared.pruning.sparsifier import Sparsifier, prunable_parameters, sparsify


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 8)
    )


WEIGHTS = ["0.weight", "3.weight", "5.weight"]
NUMEL = 288 + 576 + 256


def batch_of(seed: int) -> torch.Tensor:
    return torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(seed))


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - 1).square().mean()


BATCHES = [batch_of(1), batch_of(2)]


def train(model, optimizer, sparsifier, steps: int, start: int = 0) -> list[bool]:
    changed = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_fn(model, batch_of(step)).backward()
        optimizer.step()
        changed.append(sparsifier.step())
        assert sparsifier.masks.lost_zeros(model) == []
    return changed


@functools.cache
def measured() -> dict[str, dict[str, torch.Tensor]]:
    model = net()
    return {
        "grads": scores.collect_gradients(model, loss_fn, BATCHES),
        "hessian_gradients": scores.collect_hessian_gradients(model, loss_fn, BATCHES),
        "activations": scores.collect_activations(model, BATCHES),
        "hessians": scores.collect_hessians(model, BATCHES),
    }


PATTERNS = ["unstructured", "2:4", "block2x2", "channel0", "whole"]
SCHEDULES = {
    "one-shot": OneShot(0.5),
    "late": OneShot(0.5, end=2),
    "linear": Linear(0.5, end=4),
    "cubic": Cubic(0.5, end=4),
    "cosine": Cosine(0.5, end=3),
    "exponential": Exponential(0.5, end=4),
    "steps": Steps(((1, 0.25), (3, 0.5))),
}
ALL_BUDGETS = {
    **BUDGETS,
    "floor": lambda: Floor(Global(), kept=1),
    "sensitivity": lambda: SensitivityWeighted({"0.weight": 2.0, "3.weight": 1.0, "5.weight": 1.5}),
    "knapsack": lambda: Knapsack(densities=(0.0, 0.25, 0.5, 0.75)),
}


def exact(pattern: str, budget: str) -> bool:
    """Single weights and N:M meet the total exactly; slices may fall short, a knapsack bounds the cost."""
    return pattern in ("unstructured", "2:4") and budget != "knapsack"


@pytest.mark.parametrize("score", sorted(SCORES))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_shot_over_the_grid(pattern, score):
    model = net()
    for budget, make in ALL_BUDGETS.items():
        if pattern == "whole" and budget == "floor":
            continue  # half of the weights cannot hold one unit of each of three tensors
        twin = copy.deepcopy(model)
        context = ScoreContext(**measured())
        options = {"score": score, "budget": make(), "context": context, "names": WEIGHTS}
        masks = sparsify(twin, sparsity=0.5, pattern=pattern, **options)
        assert list(masks) == WEIGHTS and masks_of(twin) is masks
        assert masks.lost_zeros(twin) == []
        kept = sum(mask.kept for mask in masks.values())
        assert kept == 560 if exact(pattern, budget) else kept <= 560


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_training_over_the_grid(pattern, schedule):
    pairs = list(itertools.product(sorted(SCORES), ["global", "uniform", "erk", "knapsack"]))
    # Every third pair here, a different third from one schedule to the next; one-shot covers them all.
    for score, budget in pairs[sorted(SCHEDULES).index(schedule) % 3 :: 3]:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        plan = SCHEDULES[schedule]
        with Sparsifier(
            model,
            optimizer,
            schedule=plan,
            pattern=pattern,
            score=score,
            budget=ALL_BUDGETS[budget](),
            context=ScoreContext(**measured()),
        ) as sparsifier:
            train(model, optimizer, sparsifier, 5)
            kept = sum(mask.kept for mask in sparsifier.masks.values())
        assert kept == 560 if exact(pattern, budget) else kept <= 560
        assert sparsifier.finished


def test_gradual_magnitude_pruning_is_exact_at_every_update_and_nested():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    schedule = Cubic(0.9, end=11, start=2)
    with Sparsifier(model, optimizer, schedule=schedule, every=3) as sparsifier:
        before = sparsifier.masks
        for step in range(1, 15):
            changed = train(model, optimizer, sparsifier, 1, step)[0]
            assert changed == (step in (3, 6, 9, 11))
            if changed:
                kept = sum(mask.kept for mask in sparsifier.masks.values())
                assert kept == kept_count(NUMEL, schedule(step))
                assert all(not (m.keep & ~before[n].keep).any() for n, m in sparsifier.masks.items()), (
                    "nested"
                )
                before = sparsifier.masks
        assert sum(mask.kept for mask in sparsifier.masks.values()) == kept_count(NUMEL, 0.9) == 112


@pytest.mark.parametrize("every", [1, 4, 7, 100])
def test_the_last_value_is_met_whatever_the_interval(every):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Sparsifier(model, optimizer, schedule=Cosine(0.77, end=10), every=every) as sparsifier:
        train(model, optimizer, sparsifier, 12)
        assert sum(mask.kept for mask in sparsifier.masks.values()) == kept_count(NUMEL, 0.77)


def test_random_pruning_is_nested_and_seeded():
    def run(seed: int) -> MaskSet:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with Sparsifier(
            model, optimizer, schedule=Linear(0.8, end=4), score="random", seed=seed
        ) as sparsifier:
            seen = sparsifier.masks
            for step in range(4):
                train(model, optimizer, sparsifier, 1, step)
                assert (seen & sparsifier.masks).equal(sparsifier.masks)
                seen = sparsifier.masks
        return seen

    assert run(3).equal(run(3)) and not run(3).equal(run(4))


def test_nm_goes_through_the_steps_between():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsifier = Sparsifier(model, optimizer, schedule=Linear(0.75, end=3), pattern="1:4")
    seen = [sparsifier.masks["5.weight"].pattern]
    with sparsifier:
        for step in range(3):
            train(model, optimizer, sparsifier, 1, step)
            seen.append(sparsifier.masks["5.weight"].pattern)
    assert seen == [NM(4, 4), NM(3, 4), NM(2, 4), NM(1, 4)]
    # convolutions along the input channels
    assert sparsifier.masks["0.weight"].pattern == NM(1, 4, dim=1)


@pytest.mark.parametrize(
    "regrow", [RigL(end=30, fraction=0.6), SET(end=30, fraction=0.6), RigL(end=30, fraction=1.0)]
)
@pytest.mark.parametrize(
    "pattern", ["unstructured", NM(2, 4, dim=1), Block(2, 2), Group(0)], ids=lambda pattern: str(pattern)
)
def test_regrowth_keeps_every_count(regrow, pattern):
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with Sparsifier(
        model, optimizer, sparsity=0.5, pattern=pattern, score="random", budget="erk", regrow=regrow, every=2
    ) as sparsifier:
        start = sparsifier.masks
        counts = {name: mask.kept for name, mask in start.items()}
        for step in range(8):
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            old = sparsifier.masks
            changed = train(model, optimizer, sparsifier, 1, step)[0]
            assert changed == (step % 2 == 1)
            assert {name: mask.kept for name, mask in sparsifier.masks.items()} == counts
            for name, mask in sparsifier.masks.items() if changed else ():
                parameter = dict(model.named_parameters())[name]
                grown = mask.keep & ~old[name].keep
                assert (parameter[grown] == 0).all() and (
                    optimizer.state[parameter]["exp_avg"][grown] == 0
                ).all()
                returned = mask.keep & old[name].keep
                if returned.any():
                    assert not torch.equal(parameter[returned], before[name][returned]), (
                        "the step itself was made"
                    )
        assert not sparsifier.masks.equal(start)


def hand_mask(regrow, weight, keep, gradient, step=0, pattern=None) -> torch.Tensor:
    mask = Mask(torch.tensor(keep, dtype=torch.bool), pattern)
    context = ScoreContext(grads={"w": torch.tensor(gradient)}, generator=torch.Generator().manual_seed(0))
    return regrow.update("w", mask, torch.tensor(weight), context, step).keep.int()


def test_rigl_by_hand():
    weight, keep = [0.1, -5.0, 2.0, 0.3, 0.0, 0.0, 0.0, 0.0], [1, 1, 1, 1, 0, 0, 0, 0]
    # half of four dropped (0.1 and 0.3); the two largest gradients of the rest are at 6 and 4
    got = hand_mask(RigL(end=10, fraction=0.5), weight, keep, [0.0, 9, 9, 0.1, 2, 0, -3, 1])
    assert got.tolist() == [0, 1, 1, 0, 1, 0, 1, 0]
    # a just-dropped weight returns if its gradient is among the largest
    got = hand_mask(RigL(end=10, fraction=0.5), weight, keep, [-9.0, 0, 0, 0.1, 2, 0, 0, 0])
    assert got.tolist() == [1, 1, 1, 0, 1, 0, 0, 0]
    # cosine: a quarter at half time, nothing at the end
    assert RigL(end=10, fraction=0.5).fraction_at(5) == pytest.approx(0.25)
    assert RigL(end=10, fraction=0.5).fraction_at(10) == 0
    # 2:4 stays 2:4, each group grows for itself
    got = hand_mask(
        RigL(end=10, fraction=0.5), weight, [1, 1, 0, 0] * 2, [0.0, 0, 1, 9, 0, 0, 7, 1], 0, NM(2, 4)
    )
    assert got.view(2, 4).sum(1).tolist() == [2, 2]


def test_set_by_hand():
    # one of two positives (0.1) and one of two negatives (-0.2) go, whatever their sizes against each other
    weight, keep = [0.1, 0.9, -5.0, -0.2, 0.0, 0.0], [1, 1, 1, 1, 0, 0]
    got = hand_mask(SET(end=10, fraction=0.5), weight, keep, [0.0] * 6)
    assert got[1] == 1 and got[2] == 1 and int(got.sum()) == 4
    drawn = set()
    for seed in range(20):
        context = ScoreContext(generator=torch.Generator().manual_seed(seed))
        mask = SET(end=10, fraction=0.5).update(
            "w", Mask(torch.tensor(keep, dtype=torch.bool)), torch.tensor(weight), context, 0
        )
        drawn.add(tuple(mask.keep.int().tolist()))
    assert len(drawn) > 2, "growth is random"


def test_dense_gradients_are_captured_only_on_the_step_before_an_update():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    captured = []
    with Sparsifier(model, optimizer, sparsity=0.5, regrow=RigL(end=100), every=4) as sparsifier:
        for step in range(9):
            loss_fn(model, batch_of(step)).backward()
            captured.append(bool(sparsifier.handle._enforcer._dense_gradients))
            optimizer.step()
            sparsifier.step()
    assert captured == [step % 4 == 3 for step in range(9)]


def test_movement_lets_dropped_weights_return():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 1.0]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsifier = Sparsifier(model, optimizer, schedule=Steps(((2, 0.5), (3, 0.5))), score="movement")
    with sparsifier:
        for gradient in ([1.0, 2.0, -1.0, -2.0], [0.0, 0.0, 0.0, 0.0]):
            (model.weight * torch.tensor([gradient])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            sparsifier.step()
        # moving away from zero (-w g > 0) is what is kept
        assert sparsifier.masks["weight"].keep.tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("score", ["magnitude", "movement", "random"])
def test_a_resumed_run_continues_as_it_would_have(score, tmp_path):
    def make():
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        sparsifier = Sparsifier(
            model,
            optimizer,
            schedule=Cubic(0.8, end=9),
            score=score,
            regrow=RigL(end=14, fraction=0.4),
            every=2,
        )
        return model, optimizer, sparsifier

    model, optimizer, sparsifier = make()
    train(model, optimizer, sparsifier, 5)
    torch.save(
        [model.state_dict(), optimizer.state_dict(), sparsifier.state_dict()], tmp_path / "checkpoint.pt"
    )
    train(model, optimizer, sparsifier, 9, start=5)
    again, other, resumed = make()
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for target, state in zip((again, other, resumed), states, strict=True):
        target.load_state_dict(state)
    train(again, other, resumed, 9, start=5)
    assert resumed.masks.equal(sparsifier.masks) and resumed.step_count == sparsifier.step_count
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_closing_leaves_a_clean_sparse_model():
    model = net()
    keys = list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Sparsifier(model, optimizer, sparsity=0.9) as sparsifier:
        train(model, optimizer, sparsifier, 1)
    assert list(model.state_dict()) == keys and not any(p._backward_hooks for p in model.parameters())
    assert masks_of(model) is sparsifier.masks


def test_without_an_optimizer_step_re_zeroes():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss_fn(model, batch_of(0)).backward()
    optimizer.step()
    with Sparsifier(model, sparsity=0.9) as sparsifier:
        train(model, optimizer, sparsifier, 3)


def test_sparsify_goes_on_from_a_sparse_model():
    model = net()
    first = sparsify(model, sparsity=0.5, names=["0.weight"])
    with torch.no_grad():
        model[0].bias += 1
    second = sparsify(model, sparsity=0.8)
    assert (first["0.weight"] & second["0.weight"]).equal(second["0.weight"])
    assert sum(mask.kept for mask in second.values()) == kept_count(NUMEL, 0.8)
    third = sparsify(model, sparsity=0.9, names=["5.weight"])
    assert third["0.weight"].equal(second["0.weight"]) and third["5.weight"].kept == kept_count(256, 0.9)
    assert third.lost_zeros(model) == []


def test_sparsify_refuses_a_model_whose_masks_are_held():
    model = net()
    with Sparsifier(model, sparsity=0.5), pytest.raises(MaskError, match="already attached to '0.weight'"):
        sparsify(model, sparsity=0.8)


def test_nan_gradients_in_regrowth_are_named():
    context = ScoreContext(grads={"w": torch.tensor([0.0, torch.nan, 0.0])})
    with pytest.raises(PatternError, match="'w': 1 of 3 scores are NaN"):
        RigL(end=5).update("w", Mask(torch.tensor([True, False, False])), torch.ones(3), context, 0)


def test_measured_scores_from_batches():
    for score in ("snip", "taylor", "grasp", "movement"):
        assert sparsify(net(), sparsity=0.5, score=score, batches=BATCHES, loss_fn=loss_fn).sparsity() == 0.5
    for score in ("wanda", "obs"):
        masks = sparsify(net(), sparsity=0.5, score=score, batches=BATCHES, forward=lambda m, b: m(2 * b))
        assert masks.sparsity() == 0.5
    with pytest.raises(MaskError, match="needs a loss"):
        sparsify(net(), sparsity=0.5, score="snip", batches=BATCHES)
    with pytest.raises(MaskError, match="SNIP needs grads of '0.weight'"):
        sparsify(net(), sparsity=0.5, score="snip")


def test_lamp_with_the_global_budget_never_empties_a_layer():
    model = net()
    with torch.no_grad():
        model[5].weight *= 1e-6
    assert sparsify(copy.deepcopy(model), sparsity=0.9)["5.weight"].kept == 0
    assert sparsify(model, sparsity=0.9, score="lamp")["5.weight"].kept > 0


def test_names_globs_and_functions():
    assert prunable_parameters(net()) == WEIGHTS
    assert list(sparsify(net(), sparsity=0.5, names=["?.weight"])) == [
        "0.weight",
        "1.weight",
        "3.weight",
        "5.weight",
    ]
    assert list(sparsify(net(), sparsity=0.5, names=["5.*", "0.weight"])) == [
        "0.weight",
        "5.weight",
        "5.bias",
    ]
    assert list(sparsify(net(), sparsity=0.5, names=lambda n, p: p.dim() == 4)) == ["0.weight", "3.weight"]
    assert list(sparsify(net(), sparsity=0.5, names="5.weight")) == ["5.weight"]
    with pytest.raises(MaskError, match="'5.weigt'; did you mean '5.weight'"):
        sparsify(net(), sparsity=0.5, names=["5.weigt"])
    with pytest.raises(MaskError, match="choose some with names="):
        sparsify(nn.BatchNorm1d(3), sparsity=0.5)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, math.nan])
def test_sparsity_out_of_range(sparsity):
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BudgetError, match="must lie in"):
        sparsify(model, sparsity=sparsity)
    with pytest.raises((BudgetError, ScheduleError)):
        Sparsifier(model, schedule=OneShot(sparsity))
    assert masks_of(model) is None and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, BudgetError, "sparsity is needed"),
        ({"sparsity": 0.9, "pattern": "2:4"}, BudgetError, "2:4.* fixes the sparsity at 0.5; received 0.9"),
        ({"sparsity": 0.5, "pattern": "4:2"}, PatternError, "1 <= n <= m"),
        (
            {"sparsity": 0.4, "pattern": "3:5"},
            PatternError,
            "'0.weight'.*multiple of 5.*leave this tensor out",
        ),
        ({"sparsity": 0.4, "pattern": Block(3, 3)}, PatternError, "'0.weight'.*3x3 tiles"),
        ({"sparsity": 0.4, "pattern": {"0.weight": Unstructured()}}, PatternError, "one pattern per chosen"),
        (
            {"sparsity": 0.5, "score": "magnitud"},
            MaskError,
            "unknown score 'magnitud'; did you mean 'magnitude'",
        ),
        ({"sparsity": 0.5, "budget": "globl"}, BudgetError, "unknown budget 'globl'; did you mean 'global'"),
        ({"sparsity": 0.999, "budget": Floor(Uniform(), kept=50)}, BudgetError, "lower the sparsity"),
    ],
)
def test_bad_requests(arguments, error, message):
    with pytest.raises(error, match=message):
        sparsify(net(), **arguments)


def test_nan_weights_are_named():
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(PatternError, match="1 of 576 scores of '3.weight' are NaN"):
        sparsify(model, sparsity=0.5)


def test_bad_sparsifiers():
    with pytest.raises(ScheduleError, match="ends at sparsity 0.8, but sparsity=0.9"):
        Sparsifier(net(), sparsity=0.9, schedule=Cubic(0.8, end=5))
    with pytest.raises(ScheduleError, match="at least 1 step"):
        Sparsifier(net(), sparsity=0.9, every=0)
    with pytest.raises(ScheduleError, match="0 <= fraction <= 1"):
        RigL(end=10, fraction=1.5)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        Sparsifier(model, optimizer, schedule=Linear(0.2, end=4, initial=0.6)) as sparsifier,
        pytest.raises(ScheduleError, match="lowers the sparsity from 0.6 to 0.5 at step 1"),
    ):
        train(model, optimizer, sparsifier, 2)


def test_wrapped_models_and_existing_masks_of_other_tensors():
    model = net()
    set_masks(model, MaskSet({"0.bias": torch.arange(8) % 2 == 0}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Sparsifier(nn.DataParallel(model), optimizer, sparsity=0.5) as sparsifier:
        assert set(sparsifier.masks) == {"0.bias", *WEIGHTS}
        train(model, optimizer, sparsifier, 2)
    assert (model[0].bias[1::2] == 0).all()


def test_mixed_patterns_and_budgets_with_a_floor():
    patterns = {"0.weight": NM(2, 4, dim=1), "3.weight": Unstructured(), "5.weight": Whole()}
    masks = sparsify(net(), sparsity=0.5, pattern=patterns, budget=ErdosRenyi())
    assert {name: mask.pattern for name, mask in masks.items()} == patterns
    assert masks["0.weight"].kept == 144 and masks["5.weight"].kept in (0, 256)


def test_a_second_pruning_never_loosens_the_first():
    """Also where scores or regrowth may bring weights back: not those that were gone before."""
    regrow = {"regrow": RigL(end=30, fraction=0.6), "score": "random", "budget": "erk"}
    for options in ({"sparsity": 0.3}, {"schedule": Linear(0.7, end=3), "score": "movement"}, regrow):
        model = net()
        first = sparsify(model, sparsity=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        options = options if "schedule" in options else {"sparsity": 0.3, **options}
        with Sparsifier(model, optimizer, every=1, **options) as sparsifier:
            for step in range(4):
                train(model, optimizer, sparsifier, 1, step)
                assert (first & sparsifier.masks).equal(sparsifier.masks) and not first.lost_zeros(model)
        wanted = 0.5 if "schedule" not in options else 0.7
        assert sparsifier.masks.sparsity() >= wanted - 1e-3
    model = net()
    first = sparsify(model, sparsity=0.5)
    assert sparsify(model, sparsity=0.3).equal(first), "what is there is sparser already"
    assert sparsify(model, sparsity=0.3, pattern="channel0").sparsity() >= 0.5
    assert sparsify(model, pattern="2:4")["5.weight"].pattern == NM(2, 4), "sparser, and 2:4"
    set_masks(model, None)
    assert sparsify(model, sparsity=0.3).sparsity() == pytest.approx(0.3, abs=1e-3), "given up by name"


def test_patterns_skip_what_they_do_not_fit_and_say_so(caplog):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 8))
    masks = sparsify(model, pattern="2:4")
    assert list(masks) == ["1.weight", "3.weight"] and masks.sparsity() == 0.5
    assert "2:4 leaves out 1 of 3 tensors" in caplog.text and "0.weight (8, 3, 3, 3)" in caplog.text
    with Sparsifier(model, pattern="2:4") as sparsifier:
        assert list(sparsifier.masks) == ["1.weight", "3.weight"]
    with pytest.raises(PatternError, match="'0.weight'.*multiple of 4"):
        sparsify(model, pattern="2:4", names=["0.weight", "1.weight"])


def test_the_outputs_of_a_model_stay(caplog):
    """Of 50 % of the channels by global magnitudes, classes would be the first to go."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 10))
    masks = sparsify(copy.deepcopy(model), sparsity=0.5, pattern="channel0")
    assert list(masks) == ["0.weight"] and masks.sparsity() == 0.5
    assert "channel0 leaves out 2.weight, the last weight" in caplog.text
    assert list(sparsify(copy.deepcopy(model), sparsity=0.5, pattern="channel1")) == ["0.weight", "2.weight"]
    asked = sparsify(copy.deepcopy(model), sparsity=0.5, pattern="channel0", names=["2.weight"])
    assert asked["2.weight"].keep[:, 0].sum() == 5
    assert list(sparsify(nn.Sequential(nn.Linear(4, 4)), sparsity=0.5, pattern="channel0")) == ["0.weight"]


def test_channels_go_only_as_far_as_each_layer_keeps_one():
    model = net()
    with torch.no_grad():
        model[3].weight.mul_(1e-6)
    kept = sparsify(copy.deepcopy(model), sparsity=0.5, pattern="channel0", names=WEIGHTS)
    assert kept["3.weight"].keep.flatten(1).any(1).sum() == 1
    bare = sparsify(model, sparsity=0.5, pattern="channel0", names=WEIGHTS, budget=Global())
    assert bare["3.weight"].kept == 0


def test_nothing_grows_outside_of_what_it_may() -> None:
    """All of the kept moves: to the largest gradient but the one that an earlier mask dropped."""
    mask = Mask(torch.tensor([True, False, False, False]))
    context = ScoreContext(grads={"w": torch.tensor([0.0, -5.0, 9.0, 1.0])})
    within = torch.tensor([True, True, False, True])
    moved = RigL(end=10, fraction=1.0).update("w", mask, torch.ones(4), context, 0, within)
    assert moved.keep.tolist() == [False, True, False, False]


def test_a_tensor_of_which_nothing_is_left_is_named(caplog):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight.mul_(1e-3)
    sparsify(model, sparsity=0.5)
    assert "nothing is left of 1.weight" in caplog.text and "0.weight" not in caplog.text
    caplog.clear()
    sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), sparsity=0.5, budget="uniform")
    assert not caplog.text
