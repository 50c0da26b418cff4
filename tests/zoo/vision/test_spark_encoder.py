"""SparK's encoder: one definition, several executions, and nothing hidden that gets in."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.vision.models import ConvNet, ResNet
from zoo.vision.spark.encoder import SparKEncoder, occupancy
from zoo.vision.spark.masking import Choice, Visible, draw_cells, kept_cells
from zoo.vision.spark.modules import VisibleAvgPool2d, VisibleBatchNorm2d, VisibleMaxPool2d
from zoo.vision.spark.objective import SparK, hidden_loss, normalised_patches, patches, unpatched

EXECUTIONS = ("masked", "grid", "pairs")


@pytest.fixture(scope="module")
def prototype() -> SparKEncoder:
    return SparKEncoder(ResNet(8, 4), 16).double()


@pytest.fixture
def encoder(prototype) -> SparKEncoder:
    return copy.deepcopy(prototype).train()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, draw_cells(3, (4, 4), 0.6, generator)


# ---- cells ----


@pytest.mark.parametrize(
    ("cells", "ratio", "kept"), [(49, 0.6, 20), (16, 0.6, 6), (4, 0.5, 2), (64, 0.6, 26)]
)
def test_kept_cells_round_as_the_paper_does(cells, ratio, kept):
    assert kept_cells(cells, ratio) == kept


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 0.999, 0.001])
def test_ratios_that_hide_nothing_or_everything_are_refused(ratio):
    with pytest.raises(ConfigError, match="mask ratio"):
        kept_cells(16, ratio)


def test_each_image_shows_the_same_number_of_cells_and_other_ones():
    cells = draw_cells(200, (4, 4), 0.6, torch.Generator().manual_seed(1))
    assert (cells.flatten(1).sum(1) == 6).all()
    frequency = cells.flatten(1).double().mean(0)
    assert frequency.min() > 0.2 and frequency.max() < 0.6  # 6/16, no cell preferred


def test_planes_and_sites_agree_at_every_resolution():
    visible = Visible(draw_cells(2, (4, 4), 0.6, torch.Generator().manual_seed(0)))
    for side in (4, 8, 16):
        plane, sites = visible.plane(side, side), visible.sites(side, side)
        assert torch.equal(plane.flatten().nonzero()[:, 0], sites.flat)
        x = torch.randn(2, 3, side, side)
        rows = visible.gather(x)
        assert visible.sites_of(rows).shape == (side, side)
        assert torch.equal(visible.scatter(rows), x * plane)
    with pytest.raises(ConfigError, match="does not divide"):
        visible.plane(6, 6)
    with pytest.raises(ConfigError, match="rows"):
        visible.sites_of(torch.zeros(7, 1, 1, 1))


# ---- executions ----


def by_definition(model: ResNet, images: torch.Tensor, cells: torch.Tensor) -> list[torch.Tensor]:
    """The maps of a network in which every layer's output is multiplied by the mask and norms take masked
    moments, written out with plain functions."""

    def mask(x):
        factor = x.shape[2] // cells.shape[1]
        return cells.repeat_interleave(factor, 1).repeat_interleave(factor, 2)[:, None].to(x.dtype)

    def conv(layer, x):
        y = nn.functional.conv2d(x, layer.weight, stride=layer.stride, padding=layer.padding)
        return y * mask(y)

    def norm(layer, x):
        m = mask(x)
        mean = (x * m).sum((0, 2, 3), keepdim=True) / m.sum()
        var = ((x - mean).square() * m).sum((0, 2, 3), keepdim=True) / m.sum()
        scale, shift = layer.weight.view(1, -1, 1, 1), layer.bias.view(1, -1, 1, 1)
        return ((x - mean) / (var + layer.eps).sqrt() * scale + shift) * m

    x = norm(model.bn1, conv(model.conv1, images * mask(images))).relu()
    maps = []
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            inner = norm(block.bn1, conv(block.conv1, x)).relu()
            inner = norm(block.bn2, conv(block.conv2, inner))
            if inner.shape != x.shape:
                extra = (inner.shape[1] - x.shape[1]) // 2
                x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra))
            x = (inner + x).relu()
        maps.append(x)
    return maps


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_every_execution_is_the_definition(encoder, batch, execution):
    def weighted(maps):
        return sum((m * torch.linspace(-1, 1, m.numel(), dtype=m.dtype).view_as(m)).sum() for m in maps)

    with torch.no_grad():  # norms of fresh networks would hide their scales' gradients
        for parameter in encoder.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    parameters = encoder.encoder_parameters()
    expected = by_definition(encoder.model, *batch)
    gradients = torch.autograd.grad(weighted(expected), parameters)
    maps = encoder(*batch, execution)
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(torch.autograd.grad(weighted(maps), parameters), gradients)


def test_all_executions_give_the_same_maps_and_gradients(encoder, batch):
    results = []
    for execution in (*EXECUTIONS, Choice("mixed", frozenset({"layer2.0.conv1", "layer3.0.conv2"}))):
        trial = copy.deepcopy(encoder)
        maps = trial(*batch, execution)
        sum((m * torch.linspace(-1, 1, m.numel()).view_as(m)).sum() for m in maps).backward()
        gradients = [p.grad for p in trial.encoder_parameters()]
        assert all(g is not None for g in gradients)
        statistics = [b for name, b in trial.named_buffers() if "running" in name]
        results.append([*maps, *gradients, *statistics])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_gradient_of_the_images_is_zero_where_hidden(encoder, batch, execution):
    images, cells = batch
    images.requires_grad_()
    encoder(images, cells, execution)[-1].square().sum().backward()
    plane = Visible(cells).plane(16, 16).expand_as(images)
    assert (images.grad[~plane] == 0).all()
    assert (images.grad[plane] != 0).any()


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_hidden_pixels_cannot_influence_the_encoder(encoder, batch, execution):
    images, cells = batch
    plane = Visible(cells).plane(16, 16)
    other = torch.where(plane, images, 1e6 * torch.randn_like(images))
    for first, second in zip(
        copy.deepcopy(encoder)(images, cells, execution), encoder(other, cells, execution), strict=True
    ):
        assert torch.equal(first, second)


def test_plain_execution_does_leak(encoder, batch):
    """The ablation: without masks between the layers, what one cell shows reaches the hidden ones."""
    images, cells = batch
    last = encoder(images, cells, "plain")[-1]
    hidden = ~Visible(cells).plane(*last.shape[-2:]).expand_as(last)
    assert (last[hidden] != 0).any()
    assert all(
        (m[~Visible(cells).plane(*m.shape[-2:]).expand_as(m)] == 0).all()
        for m in encoder(images, cells, "masked")
    )


def test_auto_picks_an_execution_that_gives_the_same(encoder, batch):
    trial = copy.deepcopy(encoder)
    choice = trial.fastest(*batch)
    assert choice.mode in ("masked", "grid", "mixed")
    assert Choice.parse(str(choice)) == choice
    torch.testing.assert_close(trial(*batch), encoder(*batch, "masked"))


def test_occupancy_stays_with_masks_and_grows_without(encoder, batch):
    layers = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1"]
    share = float(batch[1].double().mean())
    encoder.eval()
    assert occupancy(encoder, *batch, layers, "masked") == pytest.approx([share] * 4)
    grown = occupancy(encoder, *batch, layers, "plain")
    assert share < grown[0] < grown[1] < grown[2] <= grown[3]


def test_threads_do_not_see_each_others_cells(encoder, batch):
    """Two threads run one encoder, each with its own cells, many times."""
    encoder.eval()
    images, cells = batch
    masks = [cells, cells.flip(1)]
    expected = [encoder(images, mask, "grid")[-1] for mask in masks]
    wrong = []

    def work(index: int) -> None:
        for _ in range(15):
            if not torch.equal(encoder(images, masks[index], "grid")[-1], expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- layers ----


@pytest.mark.parametrize("mode", ["masked", "grid"])
def test_batch_norm_sees_visible_sites_only(encoder, mode):
    visible = Visible(draw_cells(4, (4, 4), 0.6, torch.Generator().manual_seed(2)), mode)
    x = 3 + 2 * torch.randn(4, 5, 8, 8, dtype=torch.float64)
    norm = VisibleBatchNorm2d(5).double()
    norm.context = encoder.context
    with encoder.context.looking_at(visible):
        given = visible.gather(x) if visible.rows else x * visible.plane(8, 8)
        y = norm(given)
    sites = visible.gather(x)[:, :, 0, 0]
    mean, var = sites.mean(0), sites.var(0, unbiased=False)
    expected = (sites - mean) / (var + norm.eps).sqrt()
    rows = y if visible.rows else visible.gather(y)
    torch.testing.assert_close(rows[:, :, 0, 0], expected)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * sites.var(0))  # n / (n - 1)
    if not visible.rows:
        assert (y[~visible.plane(8, 8).expand_as(y)] == 0).all()


@pytest.mark.parametrize("kind", [VisibleMaxPool2d, VisibleAvgPool2d])
def test_pools_count_visible_sites_only_in_every_execution(encoder, kind):
    cells = draw_cells(2, (4, 4), 0.6, torch.Generator().manual_seed(3))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64) - 2  # mostly negative: zeros must not win
    pool = kind(3, 2, 1)
    pool.context = encoder.context
    results = []
    for mode in EXECUTIONS:
        visible = Visible(cells, mode)
        with encoder.context.looking_at(visible):
            y = pool(visible.gather(x) if visible.rows else x * visible.plane(8, 8))
        results.append(visible.scatter(y) if visible.rows else y)
    plane = visible.plane(8, 8)
    image, row, column = (int(v) for v in Visible(cells).sites(4, 4).indices[0])
    window = [
        x[image, :, i, j]
        for i in range(2 * row - 1, 2 * row + 2)
        for j in range(2 * column - 1, 2 * column + 2)
        if 0 <= i < 8 and 0 <= j < 8 and plane[image, 0, i, j]
    ]
    by_hand = torch.stack(window)
    by_hand = by_hand.amax(0) if kind is VisibleMaxPool2d else by_hand.mean(0)
    for result in results:
        torch.testing.assert_close(result, results[0])
        torch.testing.assert_close(result[image, :, row, column], by_hand)


def test_a_layer_outside_of_its_encoder_says_so(encoder):
    with pytest.raises(ConfigError, match="outside"):
        encoder.model.conv1(torch.zeros(1, 3, 16, 16, dtype=torch.float64))


# ---- export ----


def test_exported_weights_load_strictly_and_compute_the_same(batch):
    plain = ResNet(8, 4)
    encoder = SparKEncoder(plain, 16)
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    encoder(batch[0].float(), batch[1], "grid")
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())  # the model stays as it is
    fresh = ResNet(8, 4)
    fresh.load_state_dict(encoder.export(), strict=True)
    assert type(fresh.conv1) is nn.Conv2d
    assert not torch.equal(fresh.bn1.running_mean, before["bn1.running_mean"])
    everything = torch.ones(3, 4, 4, dtype=torch.bool)
    encoder.eval()
    with torch.no_grad():
        whole = encoder(batch[0].float(), everything, "masked")[-1].mean((2, 3))
        torch.testing.assert_close(fresh.linear(whole), fresh.eval()(batch[0].float()))


# ---- loss ----


def test_patches_by_hand():
    images = torch.arange(32.0).view(1, 2, 4, 4)
    cut = patches(images, (2, 2))
    assert cut[0, 0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]  # row, column, channel
    assert torch.equal(unpatched(cut, 2, 2), images)
    normed, mean, root = normalised_patches(cut)
    values = cut[0, 0, 1]
    torch.testing.assert_close(normed[0, 0, 1], (values - values.mean()) / (values.var() + 1e-6).sqrt())
    torch.testing.assert_close(normed * root + mean, cut)


def test_the_loss_is_that_of_hidden_cells():
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    cells = draw_cells(2, (2, 2), 0.5, torch.Generator().manual_seed(0))
    target = unpatched(normalised_patches(patches(images, (2, 2)))[0], 3, 4)
    plane = Visible(cells).plane(8, 8)
    assert hidden_loss(target, images, cells).item() == pytest.approx(0, abs=1e-6)
    wrong_where_visible = torch.where(plane, 7.0, target)
    assert hidden_loss(wrong_where_visible, images, cells).item() == pytest.approx(0, abs=1e-6)
    zero = hidden_loss(torch.zeros_like(images), images, cells).item()
    assert zero == pytest.approx(47 / 48, rel=1e-4)  # (p - 1) / p of the unbiased variance
    shifted = torch.where(plane, target, target + 2)
    assert hidden_loss(shifted, images, cells).item() == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("scales", [0, 1])
def test_reconstruction_keeps_what_is_visible(encoder, batch, scales):
    spark = SparK(encoder, 8, scales, "grid").double()
    assert len(spark.decoder.densify) == (3 if scales == 0 else 1)
    filled = spark.reconstruct(*batch)
    plane = Visible(batch[1]).plane(16, 16).expand_as(filled)
    torch.testing.assert_close(filled[plane], batch[0][plane])
    assert (filled[~plane] != batch[0][~plane]).all()


# ---- refusals ----


class Squeezing(ResNet):
    """A network whose features are scaled by their mean over all sites."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.layer2.append(Gate())


class Gate(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x.mean((2, 3), keepdim=True))


def test_a_network_that_mixes_sites_unseen_is_found_out():
    with pytest.raises(ConfigError, match="layer2.*mixes hidden and visible"):
        SparKEncoder(Squeezing(), 16)


class OtherConv(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.GroupNorm(2, 4), "GroupNorm"),
        (OtherConv(4, 4, 3), "subclass"),
        (nn.SyncBatchNorm(4), "subclass"),
        (nn.AdaptiveAvgPool2d(1), "AdaptiveAvgPool2d"),
    ],
)
def test_layers_without_a_visible_counterpart_are_refused(layer, message):
    model = ResNet(8, 4)
    model.layer1.append(layer)
    with pytest.raises(ConfigError, match=rf"layer1\.1.*{message}"):
        SparKEncoder(model, 16)


@pytest.mark.parametrize(
    ("size", "cell", "message"),
    [
        (18, None, "halve"),
        (16, 6, "multiple"),
        (20, 8, "multiple"),
        (4, None, "one cell"),
        (2, None, "halve"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(size, cell, message):
    with pytest.raises(ConfigError, match=message):
        SparKEncoder(ResNet(8, 4), size, cell)


def test_other_models_and_inputs_are_refused(encoder, batch):
    with pytest.raises(ConfigError, match="ConvNet"):
        SparKEncoder(ConvNet(), 8)
    with pytest.raises(ConfigError, match="channels"):
        SparKEncoder(ResNet(8, 4), 16, channels=1)
    with pytest.raises(ConfigError, match="received"):
        encoder(batch[0][:, :, :8], batch[1])
    with pytest.raises(ConfigError, match="no cell of the batch"):
        encoder(batch[0], torch.zeros_like(batch[1]), "grid")
    with pytest.raises(ConfigError, match="multiple of 4"):
        SparK(encoder, 6)
    with pytest.raises(ConfigError, match="scales"):
        SparK(encoder, 8, 4)
