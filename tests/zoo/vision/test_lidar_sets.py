"""Voxels, windows, rotated sets, and attention within them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zoo.errors import ConfigError, DataError
from zoo.vision.lidar.dsvt import DSVT, DSVTConfig
from zoo.vision.lidar.partition import Sets, partition
from zoo.vision.lidar.set_attention import AttentionPooling, PositionEmbedding, places, set_attention
from zoo.vision.lidar.voxelise import Grid, VoxelEncoder, segment_max, voxelise

GRID = Grid.of([-8, -8, -2, 8, 8, 2], [0.5, 0.5, 4])


def some_voxels(count: int, size: tuple[int, int, int], batch: int = 2, seed: int = 0) -> torch.Tensor:
    """Distinct voxels (batch, z, y, x) in no order."""
    generator = torch.Generator().manual_seed(seed)
    nx, ny, nz = size
    cells = torch.randperm(batch * nx * ny * nz, generator=generator)[:count]
    return torch.stack([cells // (nx * ny * nz), cells // (nx * ny) % nz, cells // nx % ny, cells % nx], 1)


def some_points(count: int = 500, seed: int = 0, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    place = (torch.rand(count, 3, generator=generator) - 0.5) * torch.tensor([17.0, 17, 4.5])
    frame = torch.randint(batch, (count, 1), generator=generator).float()
    return torch.cat([frame, place, torch.rand(count, 1, generator=generator)], 1)


def paper_sets(window: torch.Tensor, key: torch.Tensor, tau: int) -> list[set[int]]:
    """The sets by the paper's formula, one window after another."""
    found = []
    for number in window.unique().tolist():
        rows = (window == number).nonzero().squeeze(1)
        rows = rows[key[rows].argsort()]
        n, sets = len(rows), math.ceil(len(rows) / tau)
        for j in range(sets):
            ranks = [(j * tau + t) * n // (sets * tau) for t in range(tau)]
            found.append({int(rows[rank]) for rank in ranks})
    return found


@pytest.mark.parametrize("tau", [1, 2, 3, 5, 36])
@pytest.mark.parametrize(
    ("window", "shift"), [((4, 4, 1), (0, 0, 0)), ((6, 4, 2), (3, 2, 0)), ((8, 8, 4), (4, 4, 2))]
)
def test_sets_are_those_of_the_paper_disjoint_and_covering(tau, window, shift):
    size = (12, 10, 4)
    coords = some_voxels(300, size)
    cut = partition(coords, size, 2, window, shift, tau)
    place = coords[:, [3, 2, 1]] + torch.tensor(shift)
    box = place // torch.tensor(window)
    number = (coords[:, 0] * 100 + box[:, 2]) * 10_000 + box[:, 1] * 100 + box[:, 0]
    local = place % torch.tensor(window)
    assert torch.equal(cut.local, local)
    x, y, z = local.unbind(1)
    keys = ((y * window[0] + x) * window[2] + z, (x * window[1] + y) * window[2] + z)
    for sets, key in zip(cut.sets, keys, strict=True):
        pieces = [set(piece.tolist()) for piece in sets.order.tensor_split(sets.start[1:-1])]
        assert pieces == paper_sets(number, key, tau)
        assert sorted(sets.order.tolist()) == list(range(len(coords)))
        assert int(sets.start.diff().max()) <= tau and int(sets.start.diff().min()) >= 1


def test_layouts_put_every_voxel_in_one_slot():
    cut = partition(some_voxels(200, (12, 10, 4)), (12, 10, 4), 2, (4, 4, 4), (0, 0, 0), 5)
    for sets in cut.sets:
        of_set = torch.empty_like(sets.order)
        of_set[sets.order] = torch.arange(len(sets.start) - 1).repeat_interleave(sets.start.diff())
        for layout in (sets.ragged(), sets.padded()):
            assert torch.equal(layout.rows[layout.place], torch.arange(200))
            first = 0
            for count, length, used in layout.buckets:
                rows = layout.rows[first : first + count * length].view(count, length)
                assert bool((of_set[rows] == of_set[rows[:, :1]]).all())
                assert used is None or int(used.sum()) == 200
                first += count * length
            assert first == len(layout.rows)
        assert len(sets.ragged().rows) == 200  # no padding at all


def test_partition_refuses():
    coords = some_voxels(50, (12, 10, 4))
    with pytest.raises(DataError, match="there twice .1 duplicates.; merge"):
        partition(torch.cat([coords, coords[:1]]), (12, 10, 4), 2, (4, 4, 4), (0, 0, 0), 5)
    with pytest.raises(DataError, match="lies outside of 1 grids"):
        partition(coords, (12, 10, 4), 1, (4, 4, 4), (0, 0, 0), 5)
    for window, shift, tau in [
        ((4, 4), (0, 0), 5),
        ((4, 4, 0), (0, 0, 0), 5),
        ((4, 4, 4), (5, 0, 0), 5),
        ((4, 4, 4), (0, 0, 0), 0),
    ]:
        with pytest.raises(ConfigError, match="make no|give three"):
            partition(coords, (12, 10, 4), 2, window, shift, tau)


def dense_attention(
    attention: nn.MultiheadAttention, x: torch.Tensor, pos: torch.Tensor, members: list[set[int]]
):
    """torch's own module on one set after another."""
    out = torch.empty_like(x)
    for member in members:
        rows = torch.tensor(sorted(member))
        query = (x + pos)[rows][None]
        out[rows] = attention(query, query, x[rows][None])[0][0]
    return out


@pytest.mark.parametrize("form", ["ragged", "padded"])
def test_set_attention_is_full_attention_within_each_set(form):
    torch.manual_seed(0)
    coords = some_voxels(120, (12, 10, 1))
    cut = partition(coords, (12, 10, 1), 2, (6, 5, 1), (0, 0, 0), 7)
    attention = nn.MultiheadAttention(16, 4, batch_first=True).double()
    x, pos = torch.randn(2, 120, 16, dtype=torch.float64).unbind(0)
    for sets in cut.sets:
        members = [set(piece.tolist()) for piece in sets.order.tensor_split(sets.start[1:-1])]
        found = set_attention(attention, x, pos, getattr(sets, form)())
        torch.testing.assert_close(found, dense_attention(attention, x, pos, members))


def test_up_to_tau_voxels_attend_to_their_whole_window():
    torch.manual_seed(0)
    coords = some_voxels(60, (12, 10, 1))
    cut = partition(coords, (12, 10, 1), 2, (6, 5, 1), (0, 0, 0), 30)
    window = coords[:, 0] * 100 + coords[:, 2] // 5 * 10 + coords[:, 3] // 6
    members = [set((window == w).nonzero().squeeze(1).tolist()) for w in window.unique()]
    attention = nn.MultiheadAttention(16, 4, batch_first=True).double()
    x, pos = torch.randn(2, 60, 16, dtype=torch.float64).unbind(0)
    expected = dense_attention(attention, x, pos, members)
    for sets in cut.sets:
        torch.testing.assert_close(set_attention(attention, x, pos, sets.ragged()), expected)


def small(**changes) -> DSVT:
    options = {
        "sparse_shape": (24, 24, 1),
        "window_shape": ((6, 6, 1),),
        "set_info": ((5, 2),),
        "d_model": (16,),
        "nhead": (4,),
        "dim_feedforward": (32,),
        "shifts_list": (((0, 0, 0), (3, 3, 0)),),
        **changes,
    }
    torch.manual_seed(0)
    model = DSVT(DSVTConfig(**options)).eval()
    for module in model.modules():  # statistics that are not those of a fresh norm
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return model


def voxel_model(**changes) -> DSVT:
    """Three stages that pool z by 4 and by 2."""
    options = {
        "sparse_shape": (24, 24, 8),
        "window_shape": ((6, 6, 8), (6, 6, 2), (6, 6, 1)),
        "set_info": ((5, 1),) * 3,
        "d_model": (16,) * 3,
        "nhead": (4,) * 3,
        "dim_feedforward": (32,) * 3,
        "shifts_list": (((0, 0, 0), (3, 3, 0)),) * 3,
        "downsample_stride": ((1, 1, 4), (1, 1, 2)),
    }
    return small(**{**options, **changes})


@pytest.mark.parametrize("make", [small, voxel_model])
def test_the_order_of_voxels_permutes_the_output_only(make):
    model = make()
    coords = some_voxels(150, model.config.sparse_shape)
    x = torch.randn(150, 16)
    order = torch.randperm(150)
    with torch.no_grad():
        first, at = model(x, coords, 2)
        second, moved = model(x[order], coords[order], 2)
    strides = torch.tensor([8 * 24 * 24, 24 * 24, 24, 1])
    by_place, by_moved_place = ((c * strides).sum(1).argsort() for c in (at, moved))
    torch.testing.assert_close(first[by_place], second[by_moved_place], atol=1e-5, rtol=1e-5)


def test_shifting_by_windows_permutes_the_output_only():
    model = small(sparse_shape=(48, 48, 1))
    coords = some_voxels(150, (24, 24, 1))
    x = torch.randn(150, 16)
    moved = coords + torch.tensor([0, 0, 12, 24])  # multiples of both windows, 6 and 12
    with torch.no_grad():
        torch.testing.assert_close(model(x, coords, 2)[0], model(x, moved, 2)[0], atol=1e-6, rtol=1e-6)
        other = model(x, coords + torch.tensor([0, 0, 5, 0]), 2)[0]
        assert float((model(x, coords, 2)[0] - other).abs().max()) > 1e-3


def test_no_gradient_crosses_a_window_in_one_layer():
    model = small()
    coords = some_voxels(150, (24, 24, 1))
    x = torch.randn(150, 16, requires_grad=True)
    cut = partition(coords, (24, 24, 1), 2, (6, 6, 1), (0, 0, 0), 5)
    window = coords[:, 0] * 100 + coords[:, 2] // 6 * 10 + coords[:, 3] // 6
    layer, embed = model.stage_0[0].encoder_list[0], model.input_layer.posembed_layers[0][0][0]
    out = layer(x, embed(places(cut.local, (6, 6, 1), False), x.dtype), cut.sets[0].ragged())
    mine = window == window[0]
    (grad,) = torch.autograd.grad(out[mine].square().sum(), x)
    assert float(grad[~mine].abs().max()) == 0
    assert float(grad[mine].abs().min()) > 0


def test_frames_do_not_see_each_other():
    model = voxel_model()
    coords, x = some_voxels(200, (24, 24, 8)), torch.randn(200, 16)
    with torch.no_grad():
        both, at = model(x, coords, 2)
        mine = coords[:, 0] == 0
        alone, _ = model(x[mine], coords[mine], 1)
        last, place = model(x[mine], coords[mine], 3)  # empty frames change nothing
    torch.testing.assert_close(both[at[:, 0] == 0], alone, atol=1e-5, rtol=1e-5)
    assert torch.equal(last, alone) and int(place[:, 0].max()) == 0


def test_pooling_sees_only_voxels_that_are_there():
    torch.manual_seed(0)
    pool = AttentionPooling(16, 4)
    zeros = AttentionPooling(16, 4, zeros=True)
    zeros.load_state_dict(pool.state_dict())
    x, group, place = torch.randn(5, 16) - 1, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1, 3, 0, 1, 2])
    out = pool(x, group, place, 2)
    for index in range(2):
        rows = (group == index).nonzero().squeeze(1)
        key = x[rows] + pool.pos_embedding[place[rows]]
        query = x[rows].amax(0, keepdim=True)
        attended = pool.self_attn(query[None], key[None], x[rows][None])[0][0]
        torch.testing.assert_close(out[index], pool.norm(query + attended)[0], atol=1e-5, rtol=1e-5)
    assert float((zeros(x, group, place, 2) - out).detach().abs().max()) > 0.01
    full = torch.randn(4, 16), torch.zeros(4, dtype=torch.int64), torch.arange(4)
    torch.testing.assert_close(zeros(*full, 1), pool(*full, 1))  # the same where no place is empty


def test_the_embedding_follows_the_partition_unless_compat():
    fixed, compat = small(), small(compat=True)
    coords, x = some_voxels(150, (24, 24, 1)), torch.randn(150, 16)
    with torch.no_grad():
        assert not torch.allclose(fixed(x, coords, 2)[0], compat(x, coords, 2)[0], atol=1e-3)
        same = {"hybrid_factor": (1, 1, 1), "shifts_list": (((0, 0, 0), (0, 0, 0)),)}
        one, other = small(**same), small(**same, compat=True)
        torch.testing.assert_close(one(x, coords, 2)[0], other(x, coords, 2)[0])
    assert fixed.state_dict().keys() == compat.state_dict().keys()


def test_rotation_uses_the_other_axis():
    coords, x = some_voxels(150, (24, 24, 1)), torch.randn(150, 16)
    with torch.no_grad():
        assert not torch.allclose(small()(x, coords, 2)[0], small(rotate=False)(x, coords, 2)[0], atol=1e-4)


def test_embeddings_once_per_place_equal_those_per_voxel():
    embed = PositionEmbedding(2, 8).eval()
    where = places(torch.randint(6, (100, 3)) * torch.tensor([1, 1, 0]), (6, 6, 1), True)
    expected = embed.position_embedding_head(where.table[where.cell])
    torch.testing.assert_close(embed(where, torch.float32), expected)
    assert float(where.table.abs().max()) == pytest.approx(math.pi)
    with pytest.raises(ConfigError, match="single voxel"):
        embed.train()(places(torch.zeros(1, 3, dtype=torch.int64), (6, 6, 1), False), torch.float32)


def test_configurations_that_do_not_fit_are_refused():
    for changes, message in [
        ({"nhead": (3,)}, "d_model 16 is not a multiple of nhead 3"),
        ({"d_model": (16, 16)}, "window_shape has 1 stages"),
        ({"downsample_stride": ((1, 1, 4),)}, "one fewer"),
    ]:
        with pytest.raises(ConfigError, match=message):
            small(**changes)
    with pytest.raises(ConfigError, match="cannot be pooled"):
        voxel_model(sparse_shape=(24, 24, 6))
    with pytest.raises(DataError, match="voxels have 8 features, the backbone takes 16"):
        small()(torch.zeros(3, 8), some_voxels(3, (24, 24, 1)), 2)


def test_voxels_do_not_depend_on_the_order_of_points():
    points = some_points()
    torch.manual_seed(0)
    encoder = VoxelEncoder(4, [16, 24], GRID)
    found = []
    for order in (torch.arange(len(points)), torch.randperm(len(points))):
        voxels = voxelise(points[order], GRID, 2)
        found.append((voxels.coords, voxels.points, voxels.counts, encoder(voxels)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_voxels_by_hand():
    points = torch.tensor(
        [[1, -8.0, -8.0, 0, 0.5], [0, 7.9, 7.9, 0, 0.5], [1, -7.6, -7.9, 1.9, 0.5], [0, 8.0, 0, 0, 0]]
    )
    voxels = voxelise(points, GRID, 3)
    assert voxels.coords.tolist() == [[0, 0, 31, 31], [1, 0, 0, 0]]
    assert voxels.counts.tolist() == [1, 2] and voxels.batch_size == 3
    encoder = VoxelEncoder(4, [8], GRID)
    seen = []
    encoder.pfn_layers[0].linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoder(voxels)
    mean = torch.tensor([-7.8, -7.95, 0.95])
    row = seen[0][(voxels.points[:, 0] == -8.0).nonzero()[0, 0]]
    expected = torch.cat(
        [points[0, 1:], points[0, 1:4] - mean, points[0, 1:4] - torch.tensor([-7.75, -7.75, 0])]
    )
    torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


def test_points_that_cannot_be_voxels_are_refused():
    points = some_points(20)
    bad = points.clone()
    bad[7, 2] = math.nan
    with pytest.raises(
        DataError, match="1 of 20 points are NaN or infinite, the first in row 7; remove them"
    ):
        voxelise(bad, GRID, 2)
    with pytest.raises(DataError, match="none of 20 points lies between"):
        voxelise(points + 100 * torch.tensor([0.0, 1, 1, 1, 0]), GRID, 2)
    with pytest.raises(DataError, match="frames 0 to 1 of a batch of 1"):
        voxelise(points, GRID, 1)
    with pytest.raises(ConfigError, match="holds 32.*choose|choose bounds"):
        Grid.of([-8, -8, -2, 8.2, 8, 2], [0.5, 0.5, 4])
    with pytest.raises(DataError, match="points have 4 features, this network was made for 5"):
        VoxelEncoder(5, [8], GRID)(voxelise(points, GRID, 2))


def test_segment_maxima_and_their_gradients():
    values = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    segment = torch.randint(6, (40,)).sort().values
    segment[:6] = torch.arange(6)
    assert torch.autograd.gradcheck(lambda v: segment_max(v, segment, 6), (values,))
    tied = torch.tensor([[1.0], [1.0], [0.0]], requires_grad=True)
    segment_max(tied, torch.zeros(3, dtype=torch.int64), 1).sum().backward()
    assert tied.grad.tolist() == [[0.5], [0.5], [0.0]]


def test_sets_of_a_window_of_one_voxel():
    sets = partition(torch.tensor([[0, 0, 3, 4]]), (8, 8, 1), 1, (4, 4, 1), (0, 0, 0), 36).sets[0]
    assert isinstance(sets, Sets) and sets.start.tolist() == [0, 1]
    assert sets.ragged().rows.tolist() == [0] and sets.padded().rows.tolist() == [0] * 36
