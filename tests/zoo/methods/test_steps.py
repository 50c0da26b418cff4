"""The defining step of each method, computed by hand: a sign or a polarity turned round fails here."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.methods.bip import BiP, total_gradient
from zoo.methods.iss_p import ISSP
from zoo.methods.jackpots import MARGIN, LotteryJackpot
from zoo.methods.magnitude import MagnitudePruning
from zoo.methods.mask_sparsity import l1, to_go
from zoo.methods.pgf import ProgressiveFlow, frame_patterns
from zoo.methods.soups import SparseSoup
from zoo.methods.sr_ste import SparseRefined
from zoo.methods.tickets import LotteryTicket
from zoo.shared.learned.constraints import DecayingSTE, PatternSTE
from zoo.shared.masks import masks_of
from zoo.shared.masks.patterns import NM
from zoo.shared.pruning.choose import magnitude_masks
from zoo.shared.pruning.sparsifier import sparsify
from zoo.shared.structure.relatives import reinitialised


class OneRow(nn.Module):
    """y = sum_i w_i x_i, of which every gradient is known."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.row = nn.Linear(len(weights), 1, bias=False)
        with torch.no_grad():
            self.row.weight.copy_(torch.tensor([weights]))

    def forward(self, x):
        return self.row(x)


def output(model: nn.Module, batch) -> torch.Tensor:
    """A loss that is the output itself: dL/dz_i is x_i."""
    return model(batch[0]).mean()


def row_job(job_of, x: list[float], **recipe):
    batch = (torch.tensor([x]), torch.zeros(1))
    fields = {"momentum": 0.0, "weight_decay": 0.0, "epochs": 1, "warmup": 0.0, "decay": "constant", **recipe}
    job = job_of(**{k: v for k, v in fields.items()})
    return type(job)([batch], loss=output, recipe=job.recipe, seed=0)


def test_bip_moves_scores_along_the_total_gradient():
    # g = (2, -3), w = (0.5, 1), m = (1, 0), 1/gamma = 0.1: (w - m g / gamma) g = (1 - 0.4, -3 - 0)
    w, m, g = torch.tensor([0.5, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([2.0, -3.0])
    found = total_gradient(w * g, m * g, 0.1)
    torch.testing.assert_close(found, torch.tensor([0.6, -3.0]))


def test_bip_makes_that_step(job_of):
    """Scores |w| = (0.5, 0.4), half kept, dL/dz = (1, -1): 0.5 - 0.1 (0.5 - 5) = 0.95 and 0.4 + 0.1 0.4."""
    made = BiP(0.5, mask_lr=0.1, implicit=5.0).sparsify(
        OneRow(0.5, 0.4), row_job(job_of, [1.0, -1.0], lr=0.0)
    )
    assert made.masks["row.weight"].keep.tolist() == [[True, False]]
    # Without the implicit gradient 0.5 - 0.45 * 0.5 falls below 0.4 + 0.45 * 0.4: the signs decide the mask.
    made = BiP(0.5, mask_lr=0.45, implicit=0.0).sparsify(
        OneRow(0.5, 0.4), row_job(job_of, [1.0, -1.0], lr=0.0)
    )
    assert made.masks["row.weight"].keep.tolist() == [[False, True]]
    made = BiP(0.5, mask_lr=0.45, implicit=5.0).sparsify(
        OneRow(0.5, 0.4), row_job(job_of, [1.0, -1.0], lr=0.0)
    )
    assert made.masks["row.weight"].keep.tolist() == [[True, False]]


class TwoRows(nn.Module):
    """The sum of two rows over the halves of x."""

    def __init__(self, a: list[float], b: list[float]) -> None:
        super().__init__()
        self.a, self.b = OneRow(*a).row, OneRow(*b).row

    def forward(self, x):
        return self.a(x[:, :2]) + self.b(x[:, 2:])


def test_bip_shares_its_budget_out_anew(job_of):
    """Scores (1, 0.9) and (0.1, 0.2) keep the first row; 0.2 + 0.45 * 0.2 * 10 = 1.1 then takes the place of
    0.9."""
    model = TwoRows([1.0, 0.9], [0.1, 0.2])
    made = BiP(0.5, mask_lr=0.45, implicit=0.0).sparsify(model, row_job(job_of, [0, 0, 0, -10.0], lr=0.0))
    assert {name: mask.keep.tolist() for name, mask in made.masks.items()} == {
        "a.weight": [[True, False]],
        "b.weight": [[False, True]],
    }


def test_jackpots_start_with_kept_weights_ahead_by_the_margin(job_of):
    """Scores 1 and 0.99 move by -lr w dL/dz: -lr and +lr for w = (1, -0.9), x = (1, 1 / 0.9)."""
    x = [1.0, 1 / 0.9]
    start = LotteryJackpot(0.5).sparsify(OneRow(1.0, -0.9), row_job(job_of, x, lr=0.0))
    assert start.masks["row.weight"].keep.tolist() == [[True, False]]
    assert MARGIN == 0.01
    for lr, kept in ((0.4 * MARGIN, [True, False]), (0.6 * MARGIN, [False, True])):
        made = LotteryJackpot(0.5).sparsify(OneRow(1.0, -0.9), row_job(job_of, x, lr=lr))
        assert made.masks["row.weight"].keep.tolist() == [kept], "a swap needs half the margin from each"
        assert torch.equal(made.model.row.weight, torch.tensor([[1.0, -0.9]]) * torch.tensor([kept]))


@pytest.mark.traced
def test_mask_sparsity_penalises_the_channels_that_go():
    from zoo.shared.structure.groups import trace_groups

    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1))
    groups = trace_groups(model, (torch.zeros(1, 1, 2, 2),))
    keep = {"0.weight": torch.tensor([True, False, True])}
    where = to_go(groups, model, keep, {"1.weight": None})
    assert where["1.weight"].tolist() == [False, True, False]
    scales = {"1.weight": torch.tensor([1.0, -2.0, 4.0])}
    assert float(l1(scales, where)) == 2.0 and float(l1(scales, None)) == 7.0


def test_patterns_tighten_at_equal_frames():
    assert frame_patterns(NM(1, 16), "stepwise") == [(15, 16), (8, 16), (4, 16), (2, 16), (1, 16)]
    assert frame_patterns(NM(2, 4), "geometric") == [(16, 32), (8, 16), (4, 8), (2, 4)]
    gate = PatternSTE(NM(2, 8, 1))
    method, seen = ProgressiveFlow(pattern="2:8", flow="stepwise", decay_share=0.6), []
    for step in range(20):
        method.progress([gate], step, 20)
        seen.append(gate.pattern.n)
    # 7:8, 4:8, 2:8 in thirds of the first 12 steps, and the final pattern for the last 8
    assert seen == [7] * 4 + [4] * 4 + [2] * 12


def test_flows_fade_from_one_to_zero():
    for flow, halfway in (("decay-linear", 0.5), ("decay-exp", 0.1)):
        gate = DecayingSTE(NM(2, 8, 1))
        method, betas = ProgressiveFlow(pattern="2:8", flow=flow, decay_share=0.5), []
        for step in range(21):
            method.progress([gate], step, 20)
            betas.append(gate.beta)
        assert betas[0] == 1 and betas[5] == pytest.approx(halfway) and betas[10:] == [0.0] * 11


def test_sr_ste_pulls_masked_weights_to_zero(job_of):
    """One step from w: w - lr (g + decay w) where masked, w - lr g where kept."""
    start = reinitialised(OneRow(*range(4)), 0).row.weight.detach()
    method = SparseRefined(pattern="2:4", names=("row.weight",), decay=0.5)
    gate = method.gate(NM(2, 4, 1))
    weight = start.clone().requires_grad_()
    gate(weight).sum().backward()
    pulled = torch.where(gate.keep(start), 0.0, 0.5 * start)
    torch.testing.assert_close(weight.grad, 1 + pulled)


def test_a_ticket_goes_back_to_the_early_weights(net, job_of):
    seen = []
    job = watched(
        job_of(epochs=2), lambda m: seen.append({n: p.detach().clone() for n, p in m.named_parameters()})
    )
    made = LotteryTicket(0.5, rounds=1, rewind=1).sparsify(net, job)
    early, again = (
        seen[3],
        seen[6],
    )  # the second epoch's start: of the dense training, and of the round after it
    assert not torch.equal(seen[5]["3.weight"], early["3.weight"])
    for name, mask in made.masks.items():
        assert torch.equal(again[name], early[name] * mask.keep)
    with pytest.raises(ConfigError, match="rewind"):
        LotteryTicket(0.5, rewind=2).sparsify(net, job)


def watched(job, watch):
    """The job, with `watch(model)` before each of its steps."""

    def loss(model, batch):
        watch(model)
        return job.loss(model, batch)

    return job.replace(loss=loss)


def test_rounds_of_a_ticket_begin_where_it_was_rewound_to(net, job_of):
    steps = []
    job = watched(job_of(epochs=2), steps.append)
    LotteryTicket(0.5, rounds=2, rewind=1).sparsify(net, job)
    assert (
        len(steps) == 6 + 2 * 3
    )  # of three batches an epoch: the dense training, and the second epoch twice


def test_gradual_cuts_end_at_three_fifths_of_the_steps(job_of):
    """A cubic ramp to 5 of 10 zeros in 6 steps: 0.5 (1 - (1 - t / 6)^3) of 10 weights."""
    zeros = []
    job = row_job(job_of, [0.0] * 10, lr=0.01, steps=10)
    job = watched(job, lambda model: zeros.append(int((model.row.weight == 0).sum())))
    MagnitudePruning(0.5, gradual=True).sparsify(OneRow(*range(1, 11)), job)
    assert zeros == [0, 2, 3, 4, 4, 4, 5, 5, 5, 5]


@pytest.mark.parametrize(("choice", "zeros"), [("iss-p", False), ("iht", True)])
def test_soft_shrinkage_leaves_weights_a_way_back(choice, zeros, net, job_of):
    found = []
    job = watched(job_of(epochs=2, batch=24), lambda model: found.append(bool((model[3].weight == 0).any())))
    ISSP(0.5, choice=choice, shrink_share=0.5).sparsify(net, job)
    assert found == [False, zeros, True, True]


def test_a_greedy_soup_begins_with_the_best_and_takes_what_helps(job):
    """Of weights 10, 1 and 3 by -|w - 2|: 1, then the mean 2 of 1 and 3; 14 / 3 with 10 is worse."""
    members = [OneRow(weight) for weight in (10.0, 1.0, 3.0)]
    scored = job.replace(score=lambda model: -abs(float(model.row.weight.detach()) - 2))
    soup = SparseSoup(0.8, soup="greedy", recalibrate=False).average(members, scored)
    assert float(soup.row.weight.detach()) == 2.0


def test_members_of_a_soup_take_the_rates_in_turn(job_of):
    """Gradients are 1: after a step of SGD each has moved by its rate, 0.1 times its factor."""
    soup = SparseSoup(0.5, members=3, phases=1, rates=(1.0, 0.5), recalibrate=False)
    model = OneRow(3.0, 2.0)
    sparsify(model, sparsity=0.5)
    job = row_job(job_of, [1.0, 1.0], lr=0.1, steps=1)
    moved = [3.0 - float(member.row.weight.detach()[0, 0]) for member in soup.retrained(model, job, 1)]
    assert moved[0] == pytest.approx(2 * moved[1]) and moved[0] == pytest.approx(moved[2]) and moved[0] > 0
    with pytest.raises(ConfigError, match="rates are positive factors"):
        SparseSoup(0.5, rates=()).sparsify(model, job)


def test_a_soup_is_the_average_of_members_with_one_mask(net, job):
    method = SparseSoup(0.8, members=2, phases=1, recalibrate=False)
    sparsify(net, sparsity=0.8)
    members = method.retrained(net, job, 1)
    soup = method.average(members, job)
    assert not torch.equal(members[0][11].weight, members[1][11].weight)
    torch.testing.assert_close(soup[11].weight, (members[0][11].weight + members[1][11].weight) / 2)
    assert masks_of(soup).equal(masks_of(net)) and not masks_of(soup).lost_zeros(soup)
    greedy = SparseSoup(0.8, soup="greedy").average(members, job)
    assert job.score(greedy) >= max(job.score(member) for member in members)
    with pytest.raises(ConfigError, match="needs a score"):
        SparseSoup(0.8, soup="greedy").average(members, job.replace(score=None))


def test_the_minimum_threshold_keeps_every_layer_alive(net, job):
    with torch.no_grad():
        net[3].weight.mul_(1e-3)  # a layer that one global threshold empties
    bare, floored = (MagnitudePruning(0.9, floor=floor).sparsify(net, job).masks for floor in (0.0, 0.01))
    total = sum(mask.numel for mask in bare.values())
    assert bare["3.weight"].kept == 0
    assert all(mask.kept >= min(mask.numel, int(0.01 * total)) for mask in floored.values())
    assert floored.sparsity() == bare.sparsity()


def test_magnitude_without_a_job_cuts_at_once(net):
    before = copy.deepcopy(net.state_dict())
    made = MagnitudePruning(0.8).sparsify(net)
    assert made.masks.equal(magnitude_masks(net, 0.8)) and masks_of(net) is None
    for name, mask in made.masks.items():
        assert torch.equal(made.model.get_parameter(name), before[name] * mask.keep)
    with pytest.raises(ConfigError, match="needs a job"):
        MagnitudePruning(0.8, gradual=True).sparsify(net)
