"""DSVT: the partition, and the backbone on real frames against the released algorithm with padded sets."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from zoo.shared.bench import Bound, Cell, Goal, Later, main
from zoo.vision.lidar.data import real_frame
from zoo.vision.lidar.detector import ENCODERS
from zoo.vision.lidar.dsvt import DSVT
from zoo.vision.lidar.partition import partition
from zoo.vision.lidar.set_attention import places
from zoo.vision.lidar.voxelise import Grid, VoxelEncoder, voxelise

BUDGET = 0.030  # seconds for the partition of 100,000 voxels
LIMIT, PADDED = f"{1e3 * BUDGET:.0f} ms of work", "padded"
FRAMES = {
    "nuScenes": ("lidar-nuscenes-1", "sample_ca9a282c", [-54.0, -54, -5, 54, 54, 3], [0.3, 0.3, 8.0]),
    "KITTI": ("lidar-kitti-mini", "000008", [0.0, -39.68, -3, 69.12, 39.68, 1], [0.32, 0.32, 4.0]),
}
# The released settings: sets of 90 in windows of 30 for nuScenes, of 36 in windows of 12 and 24 for Waymo.
SETTINGS = {
    "nuScenes": {
        "window_shape": [[30, 30, 1]],
        "set_info": [[90, 4]],
        "hybrid_factor": [1, 1, 1],
        "shifts_list": [[[0, 0, 0], [15, 15, 0]]],
    },
    "KITTI": {
        "window_shape": [[12, 12, 1]],
        "set_info": [[36, 4]],
        "hybrid_factor": [2, 2, 1],
        "shifts_list": [[[0, 0, 0], [6, 6, 0]]],
    },
}


def work_for(seconds: float) -> None:
    """Keep one core busy."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def padded_sets(
    coords: Tensor, window: list[int], shift: list[int], tau: int
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The released algorithm: windows by `unique`, ranks by sorting, tau slots for every set.

    Returns:
        (x, y, z) of each voxel in its window, and voxel [sets, tau] and mask of repeats for both axes.
    """
    place = coords[:, [3, 2, 1]] + torch.tensor(shift)
    box, local = place // torch.tensor(window), place % torch.tensor(window)
    cells = torch.cat([coords[:, :1], box], 1)
    _, of_window, count = torch.unique(cells, dim=0, return_inverse=True, return_counts=True)
    sets = (count + tau - 1) // tau
    first = count.cumsum(0) - count
    of_set = torch.arange(len(count)).repeat_interleave(sets)
    number = torch.arange(len(of_set)) - (sets.cumsum(0) - sets)[of_set]
    slot = number[:, None] * tau + torch.arange(tau)
    share = count[of_set].double() / (sets[of_set] * tau).double()
    # The double falls short of whole numbers.
    rank = torch.floor(slot.double() * share[:, None] + 1e-9).long()
    x, y, z = local.unbind(1)
    found = []
    for key in ((y * window[0] + x) * window[2] + z, (x * window[1] + y) * window[2] + z):
        order = (of_window * (key.max() + 1) + key).argsort()
        index = order[first[of_set][:, None] + rank]
        mask = torch.zeros_like(index, dtype=torch.bool)
        mask[:, 1:] = index[:, 1:] == index[:, :-1]
        found.append((index, mask))
    return local, found


def padded_layer(layer: Any, x: Tensor, position: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """An encoder layer that attends over all slots, as the released code does."""
    inner = layer.win_attn
    values, where = x[index], position[index]
    attended = inner.self_attn(values + where, values + where, values, mask)[0]
    y = torch.zeros_like(x)
    y[index.flatten()] = attended.flatten(0, 1)
    t = inner.norm1(x + y)
    t = inner.norm2(t + inner.linear2(torch.nn.functional.gelu(inner.linear1(t))))
    return layer.norm(x + t)


def padded_backbone(model: DSVT, x: Tensor, coords: Tensor) -> Tensor:
    """The one-stage backbone with padded sets and an embedding per voxel."""
    config = model.config
    base, tau = config.window_shape[0], config.set_info[0][0]
    cut = []
    for shift in range(2):
        window = [w * f if shift else w for w, f in zip(base, config.hybrid_factor, strict=True)]
        local, lists = padded_sets(coords, window, list(config.shifts_list[0][shift]), tau)
        where = (local - torch.tensor(window) / 2)[:, :2]
        cut.append((where, lists))
    blocks: Any = model.stage_0
    for number, block in enumerate(blocks):
        where, lists = cut[number % 2]
        out = x
        for axis in range(2):
            embed: Any = model.input_layer.posembed_layers[0][number][axis]  # type: ignore[index]
            position = embed.position_embedding_head(where)
            out = padded_layer(block.encoder_list[axis], out, position, *lists[axis])
        norms: Any = model.residual_norm_stage_0
        x = norms[number](out + x)
    return x


class FrameProblem:
    """A real frame through point layers and backbone."""

    def __init__(self, name: str, width: int) -> None:
        folder, frame, bounds, voxel = FRAMES[name]
        self.grid = Grid.of(bounds, voxel)
        points = real_frame(folder, frame).points
        self.points = torch.cat([torch.zeros(len(points), 1), points], 1)
        torch.manual_seed(0)
        options = {**SETTINGS[name], "d_model": [width], "nhead": [8], "dim_feedforward": [2 * width]}
        model = ENCODERS["dsvt"](self.grid, width, options)
        assert isinstance(model, DSVT)
        self.model, self.vfe = model.eval(), VoxelEncoder(4, [width, width], self.grid).eval()
        torch.testing.assert_close(self.ours(), self.padded(), atol=1e-3, rtol=1e-3)
        self.voxels = len(voxelise(self.points, self.grid, 1).coords)

    def run(self, backbone: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            voxels = voxelise(self.points, self.grid, 1)
            return backbone(self.vfe(voxels), voxels.coords)

    def ours(self) -> Tensor:
        return self.run(lambda x, coords: self.model(x, coords, 1)[0])

    def padded(self) -> Tensor:
        return self.run(lambda x, coords: padded_backbone(self.model, x, coords))

    def bound(self) -> Bound:
        """Products that nobody can leave out: four projections and two of the hidden layer per voxel and
        layer."""
        width = self.model.width
        layers = 2 * self.model.config.set_info[0][1]
        weights = sum(p.numel() for p in self.model.parameters())
        return Bound(4 * (weights + 2 * layers * self.voxels * width), 16 * layers * self.voxels * width**2)


def partition_cell(count: int, labels: dict[str, object]) -> Cell:
    """The first partition of Waymo's grid with so many voxels: windows, both set lists, and their layouts."""
    side, window, tau = 468, [12, 12, 1], 36
    cells = torch.randperm(side * side, generator=torch.Generator().manual_seed(0))[:count]
    coords = torch.stack([torch.zeros_like(cells), torch.zeros_like(cells), cells // side, cells % side], 1)

    def ours() -> None:
        cut = partition(coords, (side, side, 1), 1, window, [0, 0, 0], tau)
        for sets in cut.sets:
            sets.ragged()
        places(cut.local, window, False)

    peers = {LIMIT: lambda: work_for(BUDGET), PADDED: lambda: padded_sets(coords, window, [0, 0, 0], tau)}
    # Coordinates in, two orders and places out.
    goal = Goal(1, over=(LIMIT,)) if count == 100_000 else None
    return Cell(labels, ours, peers, Bound(8 * count * (4 + 2 + 2 + 3), 0), goal)


def frame_cell(name: str, width: int, labels: dict[str, object]) -> Cell:
    problem = FrameProblem(name, width)
    goal = Goal(2, over=(PADDED,)) if (name, width) == ("nuScenes", 128) else None
    labels = {**labels, "voxels": problem.voxels}
    return Cell(labels, problem.ours, {PADDED: problem.padded}, problem.bound(), goal)


def cells(quick: bool, threads: int) -> Iterator[Later]:
    for count in (100_000,) if quick else (10_000, 100_000, 200_000):
        labels: dict[str, object] = {"what": "partition", "voxels": count}
        yield Later(labels, functools.partial(partition_cell, count, labels))
    if "ZOO_DATA" not in os.environ:
        print("ZOO_DATA is not set: the real frames and the goal about them are left out", file=sys.stderr)
        return
    frames = (("nuScenes", 128), ("nuScenes", 64), ("KITTI", 128))
    for name, width in frames[:1] if quick else frames:
        labels = {"what": "backbone forward", "frame": name, "width": width}
        yield Later(labels, functools.partial(frame_cell, name, width, labels))


if __name__ == "__main__":
    sys.exit(
        main(
            "sets without padding against padded ones",
            cells,
            block_seconds=0.1,
        )
    )
