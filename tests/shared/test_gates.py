"""Gates: unbiased or straight-through gradients as their formulas say, exact counts, and hardening."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from zoo.shared.errors import BudgetError, MaskError
from zoo.shared.learned.constraints import DecayingSTE
from zoo.shared.learned.gates import (
    GumbelCategorical,
    GumbelTopK,
    HardConcrete,
    HardGate,
    SigmoidPolar,
    TokenGate,
    TopKGate,
    UnitGate,
    gate_weight,
    gumbel_categorical,
    gumbel_top_k,
    hard_step,
    harden,
    polarization,
    top_k_gate,
)
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.masks.patterns import NM, Unstructured

SAMPLES = 40_000
SIGMAS = 4.5  # two-sided probability of a false alarm: 7e-6 per comparison


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _within(samples: torch.Tensor, expected: torch.Tensor | float) -> bool:
    """Whether the mean of `samples` along axis 0 lies within SIGMAS standard errors of what is expected."""
    error = samples.std(0) / math.sqrt(len(samples))
    return bool(((samples.mean(0) - expected).abs() <= SIGMAS * error + 1e-7).all())


class TestHardConcrete:
    logits = torch.tensor([-4.0, -1.0, 0.0, 0.7, 3.0], dtype=torch.float64)

    def _gate(self, n: int | None = None) -> HardConcrete:
        start = self.logits if n is None else self.logits.expand(n, -1)
        return HardConcrete(tuple(start.shape), init=start)

    def test_expected_l0_against_monte_carlo(self):
        values = self._gate(SAMPLES)().detach()
        assert _within((values > 0).double(), self._gate().open_probability().detach())
        assert float(self._gate().expected_l0().detach()) == pytest.approx(
            float((values > 0).double().mean(0).sum()), abs=0.05
        )

    def test_gradient_is_unbiased_for_the_expected_loss(self):
        """d/d logits E[(z - 0.3)^2] from samples against the same expectation by quadrature over the
        noise."""

        def loss(z):
            return (z - 0.3).square()

        many = self._gate(SAMPLES)
        loss(many()).sum().backward()
        grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        for index in range(5):
            exact = HardConcrete((1,), init=self.logits[index : index + 1])
            quadrature = HardConcrete((200_000,), init=self.logits[index].expand(200_000))
            loss(quadrature.sample(grid)).mean().backward()
            assert _within(many.logits.grad[:, index], float(quadrature.logits.grad.sum()))
            assert exact.logits.shape == (1,)

    def test_eval_value_is_equation_13_without_noise(self):
        gate = self._gate().eval()
        s = 1 / (1 + torch.exp(-self.logits))
        torch.testing.assert_close(gate().detach(), (1.2 * s - 0.1).clamp(0, 1))
        assert torch.equal(gate(), gate())
        assert gate.keep().tolist() == [False, True, True, True, True]

    def test_extreme_noise_and_saturated_gates(self):
        gate = HardConcrete((2,), init=0.0)
        assert gate.sample(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]
        closed = HardConcrete((3,), init=-50.0)
        closed().sum().backward()
        assert torch.isfinite(closed.logits.grad).all()

    def test_resample_fixes_the_noise_until_the_next_call(self):
        gate = HardConcrete((50,), init=0.0)
        assert not torch.equal(gate(), gate())
        gate.resample()
        first = gate()
        assert torch.equal(first, gate())
        gate.resample()
        assert not torch.equal(first, gate())

    @pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"gamma": 0.1}, {"zeta": 0.9}])
    def test_refusals(self, bad):
        with pytest.raises(BudgetError, match="HardConcrete"):
            HardConcrete((2,), **bad)
        with pytest.raises(MaskError, match="init has shape"):
            HardConcrete((2,), init=torch.zeros(3))


class TestStraightThroughGates:
    def test_hard_step_forward_and_gradient(self):
        z = torch.tensor([-1.5, -0.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
        g = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
        value = hard_step(z)
        assert value.tolist() == [0.0, 1.0, 1.0, 1.0]
        (value * g).sum().backward()
        s = 1 / (1 + torch.exp(-z.detach()))
        torch.testing.assert_close(z.grad, g * s * (1 - s))

    def test_top_k_by_hand_with_ties(self):
        score = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0], requires_grad=True)
        g = torch.arange(5.0)
        value = top_k_gate(score, 2, Unstructured())
        assert value.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]
        (value * g).sum().backward()
        assert torch.equal(score.grad, g)

    def test_score_gradient_of_a_gated_weight_is_g_times_w(self):
        linear = nn.Linear(6, 4, bias=False)
        w = linear.weight.detach().clone()
        gate = gate_weight(linear, "weight", TopKGate((4, 6), 0.5, init=w.abs()))
        x = torch.randn(9, 6)
        linear(x).sum().backward()
        g = torch.ones(4, 9) @ x
        torch.testing.assert_close(gate.logits.grad, g * w)
        assert int(gate.keep().sum()) == 12 and gate.logits.data_ptr() != w.data_ptr()

    def test_ranking_by_magnitude_and_pattern(self):
        start = torch.tensor([[-3.0, 1.0, 2.0, -0.5]])
        assert TopKGate((1, 4), 0.5, init=start)().tolist() == [[0.0, 1.0, 1.0, 0.0]]
        assert TopKGate((1, 4), 0.5, init=start, magnitude=True)().tolist() == [[1.0, 0.0, 1.0, 0.0]]
        gate = TopKGate((4, 8), 0.5, init=torch.randn(4, 8), pattern=NM(1, 4))
        assert bool((gate().view(4, 2, 4).sum(-1) == 1).all())
        with pytest.raises(BudgetError, match=r"\[0, 1\)"):
            TopKGate((2,), 1.0, init=0.0)

    def test_hard_gate_opens_and_closes(self):
        gate = HardGate((3,), init=torch.tensor([-0.1, 0.0, 0.1]))
        assert gate.keep().tolist() == [False, True, True]


class TestSigmoidPolar:
    def test_penalty_by_hand_and_zero_only_if_polar(self):
        assert float(polarization(torch.tensor([0.5, 0.0]))) == 0.125
        assert float(polarization(torch.tensor([1.0, 0.0]))) == 0.0

    def test_the_penalty_polarises_and_eval_rounds(self):
        gate = SigmoidPolar((4,), init=torch.tensor([-0.5, -0.1, 0.1, 0.5]))
        optimizer = torch.optim.Adam(gate.parameters(), lr=0.1)
        for _ in range(200):
            optimizer.zero_grad()
            gate.polarization().backward()
            optimizer.step()
        soft = gate().detach()
        gate.eval()
        assert gate().tolist() == [0.0, 0.0, 1.0, 1.0]
        torch.testing.assert_close(soft, gate(), atol=0.02, rtol=0)

    def test_refuses_a_bad_temperature(self):
        with pytest.raises(BudgetError, match="temperature"):
            SigmoidPolar((2,), temperature=0.0)


class TestGumbel:
    def test_first_choice_follows_the_softmax(self):
        logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
        choices = gumbel_categorical(logits.expand(SAMPLES, -1)).detach()
        assert _within(choices.double().round(), torch.softmax(logits, 0).double())
        torch.testing.assert_close(choices.sum(-1), torch.ones(SAMPLES))

    def test_pairs_are_sampled_without_replacement(self):
        """P({i, j}) = p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j), the Plackett-Luce law."""
        p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
        chosen = gumbel_top_k(p.log().expand(SAMPLES, -1), 2).detach().round()
        left_out = (1 - chosen).double()
        pairs = [(1, 2), (0, 2), (0, 1)]
        expected = torch.stack([p[i] * p[j] / (1 - p[i]) + p[i] * p[j] / (1 - p[j]) for i, j in pairs])
        assert _within(left_out, expected)

    def test_gradient_is_that_of_the_softmax(self):
        logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
        g = torch.randn(5, 7, dtype=torch.float64)
        value = gumbel_top_k(logits, 3, temperature=0.5, noisy=False)
        (value * g).sum().backward()
        twin = logits.detach().clone().requires_grad_()
        (torch.softmax(torch.log_softmax(twin, -1) / 0.5, -1) * g).sum().backward()
        torch.testing.assert_close(logits.grad, twin.grad)
        assert torch.equal(value.detach().round().sum(-1), torch.full((5,), 3.0, dtype=torch.float64))

    def test_modules_are_noisy_in_training_only(self):
        gate = GumbelTopK((200,), 50)
        assert not torch.equal(gate(), gate())
        gate.eval()
        assert gate().tolist() == [1.0] * 50 + [0.0] * 150  # equal logits: the lower index
        one = GumbelCategorical((4, 3), init=torch.eye(4, 3)).eval()
        assert one().argmax(-1).tolist() == [0, 1, 2, 0] and int(one().sum()) == 4

    def test_refusals(self):
        with pytest.raises(BudgetError, match=r"k must lie in \[1, 4\]"):
            GumbelTopK((4,), 5)
        with pytest.raises(BudgetError, match="k must lie"):
            gumbel_top_k(torch.zeros(4), 0)
        with pytest.raises(BudgetError, match="temperature"):
            gumbel_top_k(torch.zeros(4), 1, temperature=0.0)


class TestUnitGates:
    def test_unit_gate_scales_the_axis(self):
        x = torch.randn(2, 3, 4, 4)
        gate = HardGate((3,), init=torch.tensor([1.0, -1.0, 1.0]))
        y = UnitGate(gate, 1)(x)
        assert torch.equal(y[:, [0, 2]], x[:, [0, 2]]) and not y[:, 1].any()

    def test_token_gate_counts_per_row_and_never_chooses_padding(self):
        valid = torch.tensor([[True] * 8, [True] * 3 + [False] * 5, [True] + [False] * 7])
        for training in (True, False):
            gate = TokenGate(5, ratio=0.5).train(training)
            x = torch.randn(3, 8, 5)
            y, gates = gate(x, valid)
            assert gates.detach().round().sum(1).tolist() == [4.0, 1.0, 1.0]
            assert not gates.detach()[~valid].any()
            torch.testing.assert_close(y, x * gates.unsqueeze(-1))
        (y.sum()).backward()
        assert torch.isfinite(gate.score.weight.grad).all() and bool((gate.score.weight.grad != 0).any())

    def test_token_gate_refusals(self):
        with pytest.raises(BudgetError, match="ratio"):
            TokenGate(4, 0.0)
        with pytest.raises(BudgetError, match="no valid token"):
            TokenGate(4, 0.5)(torch.randn(1, 3, 4), torch.zeros(1, 3, dtype=torch.bool))


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


class TestHarden:
    @pytest.mark.parametrize("kind", ["hard_concrete", "top_k", "hard", "polar", "rows", "decaying"])
    def test_equals_eval_forward_and_keeps_objects_and_names(self, kind):
        net = _net()
        names = list(net.state_dict())
        before = {name: p for name, p in net.named_parameters()}
        optimizer = torch.optim.Adam(net.parameters())
        noise = torch.randn(8, 6)
        gates = {
            "hard_concrete": lambda: HardConcrete((8, 6), init=3 * noise),
            "top_k": lambda: TopKGate((8, 6), 0.6, init=noise),
            "hard": lambda: HardGate((8, 6), init=noise),
            "polar": lambda: SigmoidPolar((8, 6), init=noise),
            "rows": lambda: HardConcrete((8,), init=4 * noise[:, 0]),
        }
        if kind == "decaying":
            parametrize.register_parametrization(net[0], "weight", DecayingSTE(NM(2, 3), beta=0.5))
        else:
            gate_weight(net[0], "weight", gates[kind](), dim=0 if kind == "rows" else None)
        x = torch.randn(4, 6)
        expected = net.eval()(x).detach()
        effective = net[0].weight.detach().clone()
        net.train()
        masks = harden(net)
        assert torch.equal(net(x), expected), "folded weights, train or eval mode"
        assert torch.equal(net[0].weight, effective)
        assert list(net.state_dict()) == names and not parametrize.is_parametrized(net[0])
        assert all(p is before[name] for name, p in net.named_parameters())
        assert set(masks) == {"0.weight"} and masks_of(net) is masks
        assert torch.equal(masks["0.weight"].keep, effective != 0) and 0 < masks["0.weight"].sparsity < 1
        net(x).sum().backward()
        optimizer.step()
        assert not torch.equal(net[0].weight, effective), "the optimiser built before still trains the weight"
        plain = _net()
        plain.load_state_dict(net.state_dict())

    def test_copies_harden_alike_and_frozen_weights_stay_frozen(self):
        net = _net()
        net[0].weight.requires_grad_(False)
        gate_weight(net[0], "weight", TopKGate((8, 6), 0.5, init=torch.randn(8, 6)))
        twin = copy.deepcopy(net)
        first = harden(net)
        assert torch.equal(twin[0].weight, net[0].weight), "the copy is still gated"
        assert first.equal(harden(twin)) and not net[0].weight.requires_grad

    def test_intersects_with_masks_carried_before(self):
        from zoo.shared.masks import set_masks

        net = _net()
        old = MaskSet({"0.weight": torch.rand(8, 6) > 0.3, "2.weight": torch.rand(3, 8) > 0.5})
        old.apply_(net)
        set_masks(net, old)
        gate_weight(net[0], "weight", TopKGate((8, 6), 0.5, init=torch.randn(8, 6)))
        masks = harden(net)
        assert set(masks) == {"0.weight", "2.weight"}
        assert not (masks["0.weight"].keep & ~old["0.weight"].keep).any()
        assert masks.lost_zeros(net) == []

    def test_closed_gates_zero_even_a_nan_weight(self):
        net = _net()
        with torch.no_grad():
            net[0].weight[0, 0] = float("nan")
        start = torch.ones(8, 6)
        start[0, 0] = -1
        gate_weight(net[0], "weight", HardGate((8, 6), init=start))
        harden(net)
        assert float(net[0].weight.detach()[0, 0]) == 0.0

    def test_refusals(self):
        with pytest.raises(MaskError, match="no weight gates"):
            harden(_net())
        with pytest.raises(MaskError, match="not \\(8, 6\\)"):
            gate_weight(_net()[0], "weight", HardGate((6, 8)))
        net = _net()
        gate_weight(net[0], "weight", HardGate((8, 6)))
        parametrize.register_parametrization(net[0], "weight", nn.Identity())
        with pytest.raises(MaskError, match="2 parametrisations"):
            harden(net)
