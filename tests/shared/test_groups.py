"""GroupMap: what is cut together, traced or declared, and penalties, gates and masks over it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.shared.errors import GroupError
from zoo.shared.learned.constraints import envelope_factors, group_soft_factors
from zoo.shared.learned.gates import HardConcrete, HardGate, harden
from zoo.shared.masks import MaskSet, set_masks
from zoo.shared.structure.groups import GroupMap, trace_groups
from zoo.shared.structure.groups.labels import FIXED, Unions, factor_shapes, reshape_labels
from zoo.shared.structure.surgery import cut


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class ResidualNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 5, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(5, 6, 3, padding=1)
        self.fc = nn.Linear(6 * 4, 3)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.conv2(F.relu(self.conv1(x)))
        return self.fc(torch.flatten(F.max_pool2d(x, 4), 1))


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 2))


def _places(groups: GroupMap, name: str) -> set[tuple[str, int, str]]:
    return {(member.name, member.dim, member.role) for member in groups[name].members}


class TestTracing:
    def test_residual_partners_norm_and_flattened_reader_go_together(self):
        groups = trace_groups(ResidualNet(), (torch.randn(2, 3, 8, 8),))
        assert set(groups) == {"stem.weight", "conv1.weight"}
        assert _places(groups, "conv1.weight") == {("conv1.weight", 0, "out"), ("conv2.weight", 1, "in")}
        assert _places(groups, "stem.weight") == {
            ("stem.weight", 0, "out"),
            ("stem.bias", 0, "out"),
            ("bn.weight", 0, "follow"),
            ("bn.bias", 0, "follow"),
            ("bn.running_mean", 0, "state"),
            ("bn.running_var", 0, "state"),
            ("conv1.weight", 1, "in"),
            ("conv2.weight", 0, "out"),
            ("conv2.bias", 0, "out"),
            ("fc.weight", 1, "in"),
        }
        (reader,) = [m for m in groups["stem.weight"].members if m.name == "fc.weight"]
        assert reader.index.tolist() == [list(range(4 * c, 4 * c + 4)) for c in range(6)]
        assert groups.frozen["fc.weight"] == "reaches the model's output"

    def test_concatenation_gives_each_producer_its_part_of_the_reader(self):
        class Cat(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(3, 4), nn.Linear(9, 2)

            def forward(self, x):
                return self.c(torch.cat([F.relu(self.b(x)), x, self.a(x)], dim=-1))

        groups = trace_groups(Cat(), (torch.randn(2, 3),))
        index = {name: next(m for m in f.members if m.role == "in").index for name, f in groups.items()}
        assert index["b.weight"].squeeze(1).tolist() == [0, 1, 2, 3]
        assert index["a.weight"].squeeze(1).tolist() == [7, 8]

    def test_layernorm_marks_the_family_inexact(self):
        class Stream(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(11, 6)
                self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)
                self.head = nn.Linear(6, 11)

            def forward(self, tokens):
                x = self.embed(tokens)
                x = x + self.down(F.gelu(self.up(self.norm(x))))
                return self.head(x)

        groups = trace_groups(Stream(), (torch.randint(11, (2, 5)),))
        assert not groups["embed.weight"].exact and groups["up.weight"].exact
        assert ("embed.weight", 1, "out") in _places(groups, "embed.weight")
        assert ("norm.weight", 0, "follow") in _places(groups, "embed.weight")

    def test_units_under_the_only_norm_group_go_singly_and_inexactly(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.Conv2d(8, 2, 1)).eval()
        x = torch.randn(2, 3, 4, 4)
        groups = trace_groups(model, (x,))
        assert groups["0.weight"].units == 8 and not groups["0.weight"].exact
        cut(model, groups, {"0.weight": torch.arange(8) < 3}, allow_inexact=True)
        assert (model[1].num_groups, model[1].num_channels) == (1, 3) and model(x).shape == (2, 2, 4, 4)

    def test_group_norm_and_grouped_convolution_give_whole_groups(self):
        net = nn.Sequential(
            nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(12, 2, 1)
        )
        groups = trace_groups(net, (torch.randn(2, 3, 5, 5),))
        family = groups["0.weight"]
        assert family.units == 2, "conv groups of 4 inputs hold two norm groups each"
        assert next(m for m in family.members if m.name == "2.weight").index.shape == (2, 6)

    def test_tied_weights_and_reused_modules_are_one_tensor(self):
        class Reused(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

            def forward(self, x):
                return self.b(self.a(F.relu(self.a(x))))

        groups = trace_groups(Reused(), (torch.randn(2, 4),))
        assert len(groups) == 0 and "a.weight" in groups.frozen, "the first call reads the model's input"

    def test_unknown_operations_freeze_what_enters_them(self):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

            def forward(self, x):
                return self.b(torch.cumsum(self.a(x), dim=-1))

        groups = trace_groups(Odd(), (torch.randn(2, 4),))
        assert len(groups) == 0 and "cumsum" in groups.frozen["a.weight"]
        with pytest.raises(KeyError, match="cumsum"):
            groups["a.weight"]

    def test_models_that_cannot_be_traced_are_refused_with_the_remedy(self):
        class Branching(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Linear(4, 4)

            def forward(self, x):
                return self.a(x) if x.sum() > 0 else x

        with pytest.raises(GroupError, match="declare"):
            trace_groups(Branching(), (torch.randn(2, 4),))
        with pytest.raises(GroupError, match="do not suit"):
            trace_groups(_mlp(), (torch.randn(2, 6),))

    def test_the_model_is_left_as_it_was(self):
        net = ResidualNet().train()
        before = {name: t.clone() for name, t in net.state_dict().items()}
        trace_groups(net, (torch.randn(2, 3, 8, 8),))
        assert net.training and all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


class TestLabels:
    @pytest.mark.parametrize(
        ("before", "after", "blocks"),
        [
            ((2, 6, 4), (2, 24), [([0], [0]), ([1, 2], [1])]),
            ((2, 5, 8), (2, 5, 2, 4), [([0], [0]), ([1], [1]), ([2], [2, 3])]),
            ((2, 6), (2, 6, 1, 1), [([0], [0]), ([1], [1]), ([], [2]), ([], [3])]),
        ],
    )
    def test_blocks_of_a_reshape(self, before, after, blocks):
        assert factor_shapes(before, after) == blocks

    def test_split_joins_heads_and_merge_repeats(self):
        unions = Unions()
        labels = unions.fresh(8)
        heads = reshape_labels({2: labels}, (2, 5, 8), (2, 5, 2, 4), unions, "")
        unit, fixed, _ = unions.resolve()
        assert unit[labels].tolist() == [unit[0]] * 4 + [unit[4]] * 4 and not fixed
        assert set(heads) == {2} and unit[heads[2]].tolist() == [unit[0], unit[4]]
        merged = reshape_labels(heads, (2, 5, 2, 4), (2, 5, 8), unions, "")
        assert unit[merged[2]].tolist() == unit[labels].tolist()

    def test_what_meets_fixed_is_fixed_with_the_reason(self):
        unions = Unions()
        labels = unions.fresh(3)
        other = labels.copy()
        other[1] = FIXED
        unions.join(labels, other, "pads")
        _, fixed, _ = unions.resolve()
        assert list(fixed.values()) == ["pads"] and len(fixed) == 1


class TestDeclare:
    families = {"hidden": [("0.weight", 0, "out"), ("0.bias", 0, "out"), ("2.weight", 1, "in")]}

    def test_equals_the_traced_family(self):
        net = _mlp()
        declared, traced = GroupMap.declare(net, self.families), trace_groups(net, (torch.randn(2, 5),))
        assert _places(declared, "hidden") == _places(traced, "0.weight")
        assert declared["hidden"].units == 7

    def test_units_divide_an_axis_in_blocks(self):
        net = nn.Sequential(nn.Linear(4, 12), nn.Linear(12, 2))
        entries = {"heads": [("0.weight", 0, "out"), ("1.weight", -1, "in")]}
        family = GroupMap.declare(net, entries, units={"heads": 3})["heads"]
        assert family.members[1].index.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]

    @pytest.mark.parametrize(
        ("families", "more", "match"),
        [
            ({"f": [("0.wieght", 0, "out")]}, {}, "no tensor '0.wieght'.*0.weight"),
            ({"f": [("0.weight", 2, "out")]}, {}, "no axis 2"),
            ({"f": [("0.weight", 0, "out")], "g": [("0.weight", -2, "out")]}, {}, "belongs to 'f'"),
            ({"f": [("0.weight", 0, "out"), ("2.weight", 0, "in")]}, {}, "4 entries.*7"),
            ({"f": [("0.weight", 0, "out")]}, {"units": {"f": 0}}, "multiple of 0"),
            ({"f": []}, {}, "no member"),
            ({"f": [("0.weight", 0, "out")]}, {"attributes": {"f": {"0.in_features": 1}}}, "not 1 \\* 7"),
        ],
    )
    def test_refusals(self, families, more, match):
        with pytest.raises(GroupError, match=match):
            GroupMap.declare(_mlp(), families, **more)


class TestPenaltiesAndScores:
    def setup_method(self):
        torch.manual_seed(1)
        self.net = ResidualNet()
        self.groups = trace_groups(self.net, (torch.randn(2, 3, 8, 8),))

    def test_norms_by_hand(self):
        norms = self.groups.norms(self.net)
        stem = torch.cat([self.net.stem.weight.flatten(1), self.net.stem.bias[:, None]], 1)
        second = torch.cat([self.net.conv2.weight.flatten(1), self.net.conv2.bias[:, None]], 1)
        torch.testing.assert_close(norms["stem.weight"], torch.cat([stem, second], 1).norm(dim=1))
        read = self.groups.norms(self.net, roles=("in",))["conv1.weight"]
        torch.testing.assert_close(read, self.net.conv2.weight.transpose(0, 1).flatten(1).norm(dim=1))
        assert self.groups.sizes(self.net)["stem.weight"].tolist() == [3 * 9 + 1 + 5 * 9 + 1] * 6

    def test_penalty_has_a_finite_gradient_at_a_zero_unit(self):
        with torch.no_grad():
            self.net.conv1.weight[2] = 0
        self.groups.penalty(self.net).backward()
        assert torch.isfinite(self.net.conv1.weight.grad).all() and not self.net.conv1.weight.grad[2].any()
        w = self.net.conv1.weight.detach()[0]
        torch.testing.assert_close(self.net.conv1.weight.grad[0], w / w.norm() * (6 * 9) ** 0.5)

    def test_group_prox_over_several_tensors(self):
        before = self.groups.norms(self.net)
        factors = {name: group_soft_factors(n.detach(), 0.5) for name, n in before.items()}
        self.groups.scale_(self.net, factors)
        for name, after in self.groups.norms(self.net).items():
            torch.testing.assert_close(after, (before[name] - 0.5).clamp(min=0))

    def test_envelope_prox_reaches_the_budget_by_repetition(self):
        for _ in range(60):
            norms = self.groups.norms(self.net)["stem.weight"].detach()
            self.groups.scale_(self.net, {"stem.weight": envelope_factors(norms, torch.ones(6), 2.0, 1.0)})
        assert int((self.groups.norms(self.net)["stem.weight"] > 0).sum()) == 2

    def test_any_score_is_summed_per_unit(self):
        scores = {"conv1.weight": torch.arange(5.0).view(5, 1, 1, 1).expand(5, 6, 3, 3)}
        sums = self.groups.sums(scores)
        assert sums["conv1.weight"].tolist() == [54.0 * c for c in range(5)] and not sums["stem.weight"].any()


class TestSelect:
    scores = {"a": torch.tensor([5.0, 1.0, 4.0]), "b": torch.tensor([0.5, 0.2]), "c": torch.tensor([4.0])}

    @pytest.mark.parametrize(
        ("kept", "expected"),
        [
            (3.0, {"a": [1, 0, 0], "b": [1, 0], "c": [1]}),  # the floors alone
            (4.0, {"a": [1, 0, 1], "b": [1, 0], "c": [1]}),
            (5.0, {"a": [1, 1, 1], "b": [1, 0], "c": [1]}),
            (6.0, {"a": [1, 1, 1], "b": [1, 1], "c": [1]}),
        ],
    )
    def test_table_by_hand(self, kept, expected):
        found = GroupMap([]).select(self.scores, kept)
        assert {name: units.int().tolist() for name, units in found.items()} == expected

    def test_what_costs_too_much_makes_room_for_what_is_worth_less(self):
        costs = {"a": torch.tensor([3.0, 1.0, 5.0]), "b": torch.tensor([2.0, 2.0]), "c": torch.tensor([1.0])}
        found = GroupMap([]).select(self.scores, 9.5, costs)  # 6 for the floors; 4.0 costs 5, 1.0 costs 1
        assert {name: units.int().tolist() for name, units in found.items()} == {
            "a": [1, 1, 0],
            "b": [1, 1],
            "c": [1],
        }
        with pytest.raises(GroupError, match="from 6 to 14"):
            GroupMap([]).select(self.scores, 5.9, costs)

    def test_refusals(self):
        for kept in (2.0, 7.0):
            with pytest.raises(GroupError, match="cannot be kept"):
                GroupMap([]).select(self.scores, kept)
        with pytest.raises(GroupError, match="no scores"):
            GroupMap([]).select({}, 1.0)


class TestMasks:
    def setup_method(self):
        torch.manual_seed(2)
        self.net = ResidualNet()
        self.groups = trace_groups(self.net, (torch.randn(2, 3, 8, 8),))
        self.keep = {
            "stem.weight": torch.tensor([True, False, True, True, False, True]),
            "conv1.weight": torch.tensor([False, True, True, False, True]),
        }

    def test_masks_cover_every_slice_and_come_back(self):
        masks = self.groups.masks(self.net, self.keep)
        assert set(masks) == {n for n, _ in self.net.named_parameters()} - {"fc.bias"}
        w = masks["conv1.weight"].keep
        outer = self.keep["conv1.weight"][:, None] & self.keep["stem.weight"][None, :]
        assert torch.equal(w, outer[:, :, None, None].expand_as(w))
        assert masks["bn.bias"].keep.tolist() == self.keep["stem.weight"].tolist()
        back = self.groups.keep_from_masks(masks)
        assert {name: u.tolist() for name, u in back.items()} == {n: u.tolist() for n, u in self.keep.items()}

    def test_filter_masks_alone_are_understood(self):
        filters = torch.ones(5, 6, 3, 3, dtype=torch.bool)
        filters[3] = False
        back = self.groups.keep_from_masks(MaskSet({"conv1.weight": filters}))
        assert {name: u.tolist() for name, u in back.items()} == {
            "conv1.weight": [True, True, True, False, True]
        }

    def test_one_of_two_residual_partners_is_not_enough(self):
        filters = torch.ones(6, 3, 3, 3, dtype=torch.bool)
        filters[0] = False
        assert self.groups.keep_from_masks(MaskSet({"stem.weight": filters})) == {}

    def test_refusals(self):
        for bad, match in [
            (torch.ones(5), "expected a bool vector of 6"),
            (torch.ones(4, dtype=torch.bool), "expected a bool vector of 6"),
            (torch.zeros(6, dtype=torch.bool), "all units would be cut"),
        ]:
            with pytest.raises(GroupError, match=match):
                self.groups.masks(self.net, {"stem.weight": bad})


class TestGroupGates:
    def test_gate_equals_gating_the_activation_and_hardens(self):
        net = ResidualNet().eval()
        groups = trace_groups(net, (torch.randn(2, 3, 8, 8),))
        x = torch.randn(2, 3, 8, 8)
        start = torch.tensor([3.0, -3.0, 3.0, 3.0, -3.0])
        with torch.no_grad():
            h = F.relu(net.bn(net.stem(x)))
            gated = F.relu(net.conv1(h)) * (start > 0).float()[:, None, None]
            expected = net.fc(torch.flatten(F.max_pool2d(h + net.conv2(gated), 4), 1))
        gate = groups.gate(net, "conv1.weight", lambda shape: HardGate(shape, init=start))
        torch.testing.assert_close(net(x), expected)
        net(x).sum().backward()
        assert bool((gate.logits.grad != 0).any())
        masks = harden(net)
        torch.testing.assert_close(net(x), expected)
        assert groups.keep_from_masks(masks)["conv1.weight"].tolist() == [True, False, True, True, False]

    def test_readers_share_one_sample_of_a_noisy_gate(self):
        net = ResidualNet()
        groups = trace_groups(net, (torch.randn(2, 3, 8, 8),))
        gate = groups.gate(net, "stem.weight", HardConcrete)
        with torch.no_grad():
            gate.logits.fill_(0.0)
        ratio1 = (net.conv1.weight / net.conv1.parametrizations.weight.original)[0, :, 0, 0]
        ratio2 = (net.fc.weight / net.fc.parametrizations.weight.original)[0, ::4]
        torch.testing.assert_close(ratio1, ratio2)
        assert len(set(ratio1.tolist())) > 1

    def test_masks_carried_before_survive(self):
        net = _mlp()
        groups = trace_groups(net, (torch.randn(2, 5),))
        old = MaskSet({"2.weight": torch.rand(4, 7) > 0.5})
        old.apply_(net)
        set_masks(net, old)
        groups.gate(net, "0.weight", lambda shape: HardGate(shape, init=torch.tensor([-1.0] + [1.0] * 6)))
        masks = harden(net)
        assert torch.equal(masks["2.weight"].keep[:, 1:], old["2.weight"].keep[:, 1:])
        assert not masks["2.weight"].keep[:, 0].any()
