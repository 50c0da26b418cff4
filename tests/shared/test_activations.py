"""Streaming statistics against numpy on the concatenated data, the calibration runner, and thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from zoo.shared.errors import BudgetError
from zoo.shared.measure.activations import (
    ActivationError,
    ActivationThreshold,
    Gram,
    MagnitudeHistogram,
    Moments,
    Tap,
    calibrate,
    channel_thresholds,
    counting_sparsity,
    realised_sparsity,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _pieces(dtype=torch.float32, offset=0.0) -> list[torch.Tensor]:
    return [
        (torch.randn(n, 5) * torch.tensor([1e-3, 1.0, 7.0, 50.0, 0.0]) + offset).to(dtype)
        for n in (1, 17, 300, 64)
    ]


class TestMoments:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_equal_numpy_on_the_concatenation(self, dtype):
        pieces = _pieces(dtype)
        moments = Moments()
        for piece in pieces:
            moments.update(piece)
        data = torch.cat(pieces).double().numpy()
        np.testing.assert_allclose(moments.mean(), data.mean(0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(moments.variance(), data.var(0), rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(moments.second_moment(), (data**2).mean(0), rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(moments.norm(), np.linalg.norm(data, axis=0), rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(moments.maximum(), np.abs(data).max(0))
        assert moments.count == len(data) == 382

    def test_a_large_mean_does_not_cancel_the_variance(self):
        pieces = _pieces(torch.float64, offset=1e7)
        moments = Moments()
        for piece in pieces:
            moments.update(piece)
        np.testing.assert_allclose(moments.variance()[1], torch.cat(pieces)[:, 1].numpy().var(), rtol=1e-7)

    def test_order_and_empty_pieces_do_not_matter(self):
        pieces = _pieces()
        forward, backward = Moments(), Moments()
        for piece in pieces:
            forward.update(piece)
        for piece in [torch.zeros(0, 5), *reversed(pieces)]:
            backward.update(piece)
        np.testing.assert_allclose(forward.variance(), backward.variance(), rtol=1e-12)

    def test_refuses_to_answer_without_data(self):
        with pytest.raises(BudgetError, match="no rows"):
            Moments().mean()
        with pytest.raises(BudgetError, match="no rows"):
            Gram().sum()


class TestGram:
    @pytest.mark.parametrize(
        ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
    )
    def test_equals_numpy_on_the_concatenation(self, dtype, rtol):
        pieces = _pieces(dtype)
        gram = Gram()
        for piece in pieces:
            gram.update(piece)
        data = torch.cat(pieces).double().numpy()
        scale = np.sqrt(np.outer(np.diag(data.T @ data), np.diag(data.T @ data))) + 1e-30
        assert (
            np.abs(gram.sum().numpy() - data.T @ data).max(initial=0, where=scale > 1e-20)
            <= rtol * scale.max()
        )
        np.testing.assert_allclose(gram.mean() * 382, gram.sum())


class TestMagnitudeHistogram:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("share", [0.001, 0.25, 0.5, 0.93, 1.0])
    def test_one_sweep_encloses_and_two_are_exact(self, dtype, share):
        pieces = _pieces(dtype)
        ordered = np.sort(np.abs(torch.cat(pieces).float().numpy()).ravel())
        k = max(1, int(len(ordered) * share))
        histogram = MagnitudeHistogram()
        for piece in pieces:
            histogram.update(piece)
        low, high = histogram.bounds(k)
        assert low <= ordered[k - 1] <= high
        assert high <= low * (1 + 2**-13) or high < 1e-37
        assert histogram.kth(k) == pytest.approx(ordered[k - 1], rel=2**-13, abs=1e-37)
        second = histogram.narrow(k)
        for piece in reversed(pieces):
            second.update(piece)
        assert second.value() == ordered[k - 1]

    def test_refusals(self):
        histogram = MagnitudeHistogram()
        histogram.update(torch.randn(3, 2))
        for k in (0, 7):
            with pytest.raises(BudgetError, match=r"\[1, 6\]"):
                histogram.kth(k)
        second = histogram.narrow(2)
        second.update(torch.randn(2, 2))
        with pytest.raises(BudgetError, match="repeat the data"):
            second.value()


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 4)
        self.unused = nn.Linear(1, 1)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).flatten(2).transpose(1, 2))


class TestCalibrate:
    def test_taps_see_inputs_and_outputs_as_rows(self):
        net, batches = _Net(), [torch.randn(n, 2, 6, 6) for n in (3, 5)]
        images, rows, outputs, gram = Moments(), Moments(), Moments(), Gram()
        taps = [
            Tap("conv", [images], channel_dim=1),
            Tap("fc", [rows, gram]),
            Tap("fc", [outputs], where="output"),
        ]
        assert calibrate(net, batches, taps) == 2
        data = torch.cat(batches)
        np.testing.assert_allclose(images.mean(), data.double().mean((0, 2, 3)), rtol=1e-10)
        net.eval()
        with torch.no_grad():
            hidden = net.norm(net.conv(data)).flatten(2).transpose(1, 2)
            np.testing.assert_allclose(rows.mean(), hidden.double().mean((0, 1)), rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(
                outputs.mean(), net.fc(hidden).double().mean((0, 1)), rtol=1e-4, atol=1e-6
            )
        assert rows.count == 8 * 16 == gram.count and images.count == 8 * 36

    def test_model_is_left_as_it_was(self):
        net = _Net().train()
        net.fc.eval()
        running = net.norm.running_mean.clone()
        calibrate(net, [torch.randn(2, 2, 6, 6)], [Tap("fc", [Moments()])])
        assert net.training and not net.fc.training and torch.equal(net.norm.running_mean, running)
        assert not net.fc._forward_pre_hooks and not net.fc._forward_hooks

    @pytest.mark.parametrize(
        "batch", [(torch.randn(2, 4),), [torch.randn(2, 4)], {"input": torch.randn(2, 4)}]
    )
    def test_kinds_of_batches(self, batch):
        net, moments = nn.Linear(4, 2), Moments()
        calibrate(net, [batch], [Tap("", [moments])])
        assert moments.count == 2
        calibrate(net, [7], [Tap("", [moments])], forward=lambda m, seed: m(torch.ones(seed, 4)))
        assert moments.count == 9

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_bad_activations_are_refused_with_module_and_batch(self, bad):
        net = _Net()
        batches = [torch.randn(2, 2, 6, 6), torch.full((2, 2, 6, 6), bad)]
        with pytest.raises(ActivationError, match=r"^fc: 96 of 96 values at its input .* batch 2"):
            calibrate(net, batches, [Tap("fc", [Moments()])])
        assert not net.fc._forward_pre_hooks and net.training

    def test_refusals(self):
        net, x = _Net(), torch.randn(1, 2, 6, 6)
        with pytest.raises(ActivationError, match="no module 'fcc'"):
            calibrate(net, [x], [Tap("fcc", [])])
        with pytest.raises(ActivationError, match="never called.*unused"):
            calibrate(net, [x], [Tap("unused", [])])
        with pytest.raises(ActivationError, match="no batch"):
            calibrate(net, [], [Tap("fc", [])])


class TestThresholds:
    def test_channel_thresholds_by_hand(self):
        t = channel_thresholds(4.0, torch.tensor([1.0, 4.0, 0.0]))
        assert t.tolist() == [2.0, 1.0, float("inf")]
        zero = channel_thresholds(0.0, torch.tensor([1.0, 0.0]))
        assert zero.tolist() == [0.0, float("inf")], "a dead channel is infinite even at T = 0"
        for score, m in [(-1.0, torch.ones(2)), (float("nan"), torch.ones(2)), (1.0, -torch.ones(2))]:
            with pytest.raises(BudgetError, match="channel_thresholds"):
                channel_thresholds(score, m)

    def test_thresholding_by_score_and_by_channel_is_the_same(self):
        g, u = torch.randn(400, 6).double(), torch.randn(400, 6).double() * torch.tensor([0.1, 1, 2, 3, 0, 5])
        m = u.square().mean(0)
        score = g.square() * m
        kth = float(score.flatten().kthvalue(int(score.numel() * 0.5)).values)
        kept = ActivationThreshold(channel_thresholds(kth, m))(g) != 0
        assert torch.equal(kept[:, m > 0], (score > kth)[:, m > 0]) or int((kept ^ (score > kth)).sum()) <= 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_strict_comparison_in_the_dtype_of_x(self, dtype):
        x = torch.tensor([[-0.3, 0.3, 0.31, 0.0, -2.0]], dtype=dtype)
        t = float(x[0, 1])
        assert (ActivationThreshold(t)(x) != 0).tolist() == [[False, False, True, False, True]]
        assert torch.equal(ActivationThreshold(0.0)(x), x)

    def test_infinite_channels_are_dropped_and_nan_is_not_hidden(self):
        module = ActivationThreshold(torch.tensor([0.5, float("inf")]))
        x = torch.tensor([[1.0, 1e30], [float("nan"), float("inf")], [0.5, -3.0]])
        y = module(x)
        assert not y[:, 1].any() and y[0, 0] == 1 and torch.isnan(y[1, 0]) and y[2, 0] == 0

    def test_gradient_flows_through_kept_entries_only(self):
        x = torch.tensor([0.1, 2.0, -3.0], requires_grad=True)
        ActivationThreshold(1.0)(x).sum().backward()
        assert x.grad.tolist() == [0.0, 1.0, 1.0]

    def test_realised_sparsity_counts_zeros(self):
        net = nn.Sequential(
            nn.Linear(4, 8), ActivationThreshold(0.4), nn.Linear(8, 8), ActivationThreshold(torch.rand(8))
        )
        with counting_sparsity(net):
            first = (net[1](net[0](x := torch.randn(50, 4))) == 0).float().mean()
        assert net[1].seen == 400 and float(first) == pytest.approx(net[1].dropped / 400)
        with pytest.raises(BudgetError, match="3 saw no activations"):
            realised_sparsity(net)
        with counting_sparsity(net):
            net(x), net(x)
        shares = realised_sparsity(net)
        assert shares["1"] == pytest.approx(float(first)) and set(shares) == {"1", "3"} and net[3].seen == 800
        net(x)
        assert net[3].seen == 800, "outside the context nothing is counted"
        assert set(net.state_dict()) >= {"1.threshold", "3.threshold"}

    def test_refusals(self):
        for bad in (-1.0, float("nan"), torch.tensor([1.0, -0.5]), torch.ones(2, 2)):
            with pytest.raises(BudgetError, match="ActivationThreshold"):
                ActivationThreshold(bad)
        with pytest.raises(BudgetError, match="no thresholds"):
            realised_sparsity(nn.Linear(2, 2))
