"""One training step of an encoder, forward and backward, on visible sites against dense training.

Dense is the plain network on whole images, in the faster of torch's two layouts; masked dense is the
definition of SparK's encoder. Ours is what `auto` settles on, with cells drawn and rulebooks made anew in
each step. The bound counts the products at visible sites, three times for the passes of training.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from zoo.shared.bench import Bound, Cell, Goal, Later, main
from zoo.shared.measure.account import count
from zoo.vision.models import ResNet
from zoo.vision.spark.encoder import SparKEncoder, outputs_of
from zoo.vision.spark.masking import Choice, Visible, draw_cells

RATIO = 0.6
NEVER_SLOWER = 0.97  # of dense, up to what repeated measurements differ by

# (name, builder, side of the images, side of a cell, images per step, widest goal)
Case = tuple[str, Callable[[], nn.Module], int, int | None, int, float]
TIMM = importlib.util.find_spec("timm") is not None


def timm_model(name: str) -> nn.Module:
    from zoo.optional import import_timm

    return import_timm().create_model(name)


def cases(quick: bool) -> Iterator[Case]:
    for width in (16, 64) if quick else (16, 32, 64, 128):
        goal = 1.5 if width >= 64 else NEVER_SLOWER
        for cell in (4,) if quick else (4, 8):
            build = functools.partial(ResNet, 8, width)
            yield f"ResNet-8, width {width}", build, 32, cell, 32 if width < 128 else 16, goal
    if TIMM and not quick:
        for name, goal in (("resnet18", 1.5), ("resnet50", 1.5), ("convnext_atto", NEVER_SLOWER)):
            yield f"timm {name}", functools.partial(timm_model, name), 128, None, 8, goal


class Problem:
    """A network as a SparK encoder and as it is, on random images."""

    def __init__(self, build: Callable[[], nn.Module], side: int, cell: int | None, batch: int) -> None:
        torch.manual_seed(0)
        plain = build().train()
        self.encoder = SparKEncoder(plain, side, cell).train()
        self.images = torch.randn(batch, 3, side, side)
        self.generator = torch.Generator().manual_seed(0)
        last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
        self.dense = {
            "dense": (plain, self.images),
            "dense channels-last": (last, self.images.to(memory_format=torch.channels_last)),
        }
        self.choice = self.encoder.fastest(self.images, self.cells())
        everything = torch.ones(1, *self.encoder.grid, dtype=torch.bool)
        macs = count(self.encoder, (self.images[:1], everything, "masked")).total.macs
        kept = float(self.cells().double().mean())
        parameters = sum(p.numel() for p in self.encoder.encoder_parameters())
        self.bound = Bound(4 * 3 * parameters, round(3 * 2 * kept * macs * batch))

    def cells(self) -> Tensor:
        return draw_cells(len(self.images), self.encoder.grid, RATIO, self.generator)

    def step(self, choice: Choice) -> None:
        maps = self.encoder.stage_rows(self.images, Visible(self.cells(), *choice))
        torch.autograd.backward([one.mean() for one in maps])

    def dense_step(self, model: nn.Module, images: Tensor) -> None:
        trunk = self.encoder.trunk
        with outputs_of(model, trunk.stages) as maps:
            trunk.features(model, images)
        torch.autograd.backward([one.mean() for one in maps.values()])

    def cell(self, labels: dict[str, object], goal: float) -> Cell:
        labels["auto"] = self.choice.mode
        peers = {name: functools.partial(self.dense_step, *both) for name, both in self.dense.items()}
        over = tuple(peers)
        peers["masked dense"] = functools.partial(self.step, Choice("masked"))
        ours = functools.partial(self.step, self.choice)
        return Cell(labels, ours, peers, self.bound, Goal(goal, over=over))


def cells(quick: bool, threads: int) -> Iterator[Later]:
    for name, build, side, cell, batch, goal in cases(quick):
        labels: dict[str, object] = {"network": name, "cell": cell or 32, "images": f"{batch} of {side} px"}

        def make(
            build: Callable[[], nn.Module] = build,
            side: int = side,
            cell: int | None = cell,
            batch: int = batch,
            labels: dict[str, object] = labels,
            goal: float = goal,
        ) -> Cell:
            return Problem(build, side, cell, batch).cell(dict(labels), goal)

        yield Later(labels, make)


if __name__ == "__main__":
    if not TIMM:
        print("timm is not installed: its networks are left out", file=sys.stderr)
    sys.exit(main("training on visible sites against dense training", cells))
