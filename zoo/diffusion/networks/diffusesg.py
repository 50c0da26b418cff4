"""DiffuseSG: diffusion on scene graphs, boxes and relations together.

Xu et al., Joint Generative Modeling of Scene Graphs and Images via Diffusion Models, arXiv 2401.01130.
Classes and relations are binary digits of -1 and 1 beside boxes in [-1, 1]; the graph is an N x N image whose
entry (i, j) holds the relation i -> j and both nodes; EDM preconditioning, noise on what is valid only, and
beside the squared errors a generalised-IoU loss of the boxes.

Differs from the paper in: a plain transformer (diffusers) over the entries, with FiLM, for the shifted-window
U-Net; no self-conditioning; the IoU loss is not EDM-weighted (it shrinks like the error, not like its square,
so that in a short training the weights of the lowest noise levels would be all that is learned); Heun's
method as it is (the reference evaluates its correction at the old point), without churn. The graphs here are
drawn: their relations follow from their boxes, so that agreement can be counted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from zoo.diffusion.networks.base import STEPS, USUAL, NetworkTask, PaperNetwork, sine_cosine, transformer
from zoo.errors import ConfigError, DataError
from zoo.harness.tasks import Progress, TaskResult, register_task
from zoo.shared.train import Drawn, Job, Recipe

CLASSES, RELATIONS, MOST = 6, ("none", "left of", "above", "inside"), 6
SIGMA_DATA = 0.5
LOW, HIGH, RHO = 0.002, 80.0, 7.0


def to_bits(category: Int[Tensor, "*n"], count: int) -> Float[Tensor, "*n bits"]:
    """Binary digits in -1 and 1, the lowest first.

    Raises:
        ConfigError: fewer than two categories.
        DataError: a category outside 0..count - 1.
    """
    places = torch.arange(bits_of(count), device=category.device)
    if category.numel() and not 0 <= int(category.min()) <= int(category.max()) < count:
        raise DataError(
            f"categories are 0 to {count - 1}; received {int(category.min())} to {int(category.max())}"
        )
    return (category[..., None] >> places & 1).float() * 2 - 1


def from_bits(values: Float[Tensor, "*n bits"], count: int) -> Int[Tensor, "*n"]:
    """The category of the digits' signs, at most count - 1."""
    places = 2 ** torch.arange(bits_of(count), device=values.device)
    return ((values > 0).long() * places).sum(-1).clamp(max=count - 1)


def bits_of(count: int) -> int:
    """How many binary digits a category takes.

    Raises:
        ConfigError: fewer than two categories.
    """
    if count < 2:
        raise ConfigError(f"a category needs at least two values; received {count}")
    return math.ceil(math.log2(count))


@dataclass(frozen=True)
class SceneGraphs:
    """Graphs of at most N nodes, those of each first in its rows.

    Attributes:
        classes: [n, N]; 0 where there is no node.
        boxes: [n, N, 4] (centre x, centre y, width, height) in [0, 1]; 0 where there is no node.
        relations: [n, N, N], i -> j; 0 for none.
        counts: [n], nodes of each graph.

    Raises:
        DataError: boxes outside [0, 1], a count outside 1..N, or a class, box or relation of a node that is
            not there.
    """

    classes: Tensor
    boxes: Tensor
    relations: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        most = self.classes.shape[1]
        if len(self.counts) and not 1 <= int(self.counts.min()) <= int(self.counts.max()) <= most:
            raise DataError(
                f"a graph here has 1 to {most} nodes; received {int(self.counts.min())} to "
                f"{int(self.counts.max())}"
            )
        if not bool(torch.isfinite(self.boxes).all()) or self.boxes.min() < 0 or self.boxes.max() > 1:
            raise DataError(
                f"boxes lie in [0, 1]; received {float(self.boxes.min()):g} to {float(self.boxes.max()):g}"
            )
        if bool((self.classes[~self.flags] != 0).any()) or bool((self.boxes[~self.flags] != 0).any()):
            raise DataError(
                "a class or a box stands where no node is: a graph's nodes are the first of its rows. Sort "
                "them to the front, count them, and leave the other rows 0"
            )
        if bool((self.relations[~self.pairs] != 0).any()):
            raise DataError("a relation of a node that is not there, or of a node to itself; leave it 0")

    @property
    def flags(self) -> Bool[Tensor, "n N"]:
        """Which nodes are there."""
        return torch.arange(self.classes.shape[1], device=self.counts.device) < self.counts[:, None]

    @property
    def pairs(self) -> Bool[Tensor, "n N N"]:
        """Which ordered pairs of different nodes are there."""
        both = self.flags[:, :, None] & self.flags[:, None, :]
        return both & ~torch.eye(both.shape[1], dtype=torch.bool, device=both.device)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: Any) -> SceneGraphs:
        return SceneGraphs(*(getattr(self, field.name)[index] for field in dataclasses.fields(self)))

    def agreement(self) -> Float[Tensor, " n"]:
        """Of each graph the share of its relations that its boxes have; NaN where it has no relation."""
        stated = self.relations != 0
        agree = stated & (self.relations == relations_of(self.boxes, self.pairs))
        return agree.sum((1, 2)).double() / stated.sum((1, 2)).double()

    def triplets(self) -> Float[Tensor, " kinds"]:
        """Shares of (class, relation, class) among all relations."""
        i, j, k = (self.relations != 0).nonzero().T
        kind = (self.classes[i, j] * len(RELATIONS) + self.relations[i, j, k]) * CLASSES + self.classes[i, k]
        counts = torch.bincount(kind, minlength=CLASSES**2 * len(RELATIONS)).double()
        return counts / counts.sum().clamp(min=1)


def relations_of(boxes: Float[Tensor, "n N 4"], pairs: Bool[Tensor, "n N N"]) -> Int[Tensor, "n N N"]:
    """What boxes say: i inside j; else i left of j (their x do not overlap); else i above j; else none."""
    low, high = corners(boxes)
    a, b = (low[:, :, None], high[:, :, None]), (low[:, None], high[:, None])
    inside = ((a[0] >= b[0]) & (a[1] <= b[1])).all(-1)
    before = a[1] <= b[0]
    found = torch.where(inside, 3, torch.where(before[..., 0], 1, torch.where(before[..., 1], 2, 0)))
    return found * pairs


def corners(boxes: Float[Tensor, "*n 4"]) -> tuple[Float[Tensor, "*n 2"], Float[Tensor, "*n 2"]]:
    """Lower and upper corners (x, y) of boxes by centre and size."""
    half = boxes[..., 2:] / 2
    return boxes[..., :2] - half, boxes[..., :2] + half


def draw_graphs(n: int, generator: torch.Generator) -> SceneGraphs:
    """Graphs of 3 to 6 nodes: large classes at first, small ones of which a part lies in a large one."""
    counts = torch.randint(3, MOST + 1, (n,), generator=generator)
    classes = torch.randint(CLASSES, (n, MOST), generator=generator)
    classes[:, 0] = classes[:, 0] % 2  # the first node is large
    # Sizes by class: 0 and 1 large and wide or tall, the others small.
    base = torch.tensor([[0.6, 0.3], [0.3, 0.6], [0.12, 0.12], [0.2, 0.1], [0.1, 0.2], [0.15, 0.15]])
    size = base[classes] * (0.8 + 0.4 * torch.rand(n, MOST, 2, generator=generator))
    centre = size / 2 + (1 - size) * torch.rand(n, MOST, 2, generator=generator)
    host = torch.cat([centre[:, :1], size[:, :1]], -1)
    room = host[..., 2:] - size
    held = host[..., :2] + (torch.rand(n, MOST, 2, generator=generator) - 0.5) * 0.9 * room
    within = (classes > 1) & (torch.rand(n, MOST, generator=generator) < 0.5) & (room > 0).all(-1)
    centre = torch.where(within[..., None], held, centre)
    there = torch.arange(MOST) < counts[:, None]
    boxes = torch.cat([centre, size], -1).clamp(0, 1) * there[..., None]
    empty = SceneGraphs(classes * there, boxes, torch.zeros(n, MOST, MOST, dtype=torch.long), counts)
    return dataclasses.replace(empty, relations=relations_of(boxes, empty.pairs))


@functools.lru_cache(maxsize=4)
def graphs(part: str) -> SceneGraphs:
    """The drawn graphs: 4,000 to train on, 500 others for `test`."""
    count, seed = (4000, 0) if part == "train" else (500, 1)
    return draw_graphs(count, torch.Generator().manual_seed(seed))


def independent(train: SceneGraphs, n: int, generator: torch.Generator) -> SceneGraphs:
    """Graphs whose classes, boxes and relations are drawn each by itself from training graphs."""

    def drawn(values: Tensor, shape: tuple[int, ...]) -> Tensor:
        return values[torch.randint(len(values), shape, generator=generator)]

    counts = drawn(train.counts, (n,))
    classes = drawn(train.classes[train.flags], (n, MOST))
    boxes = drawn(train.boxes[train.flags], (n, MOST))
    flags = torch.arange(MOST) < counts[:, None]
    bare = SceneGraphs(
        classes * flags, boxes * flags[..., None], torch.zeros(n, MOST, MOST, dtype=torch.long), counts
    )
    return dataclasses.replace(
        bare, relations=drawn(train.relations[train.pairs], (n, MOST, MOST)) * bare.pairs
    )


def giou(first: Float[Tensor, "*n 4"], second: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Generalised intersection over union of boxes, pair by pair, from -1 to 1; corners clamped to [0, 1]."""
    a, b = ([part.clamp(0, 1) for part in corners(one)] for one in (first, second))
    area = [(high - low).clamp(min=0).prod(-1) for low, high in (a, b)]
    shared = (torch.minimum(a[1], b[1]) - torch.maximum(a[0], b[0])).clamp(min=0).prod(-1)
    hull = (torch.maximum(a[1], b[1]) - torch.minimum(a[0], b[0])).clamp(min=0).prod(-1).clamp(min=1e-6)
    union = (area[0] + area[1] - shared).clamp(min=1e-6)
    return shared / union - (hull - union).clamp(min=0) / hull


class DiffuseSG(PaperNetwork):
    """The denoiser of graphs.

    Args:
        width, depth: of the transformer.
        box_loss: weight of the generalised-IoU loss; 0 for none.
    """

    usual = dataclasses.replace(USUAL, steps=900, batch=32, weight_decay=0.0, ema=0.99)
    node_channels: ClassVar[int] = bits_of(CLASSES) + 4
    edge_channels: ClassVar[int] = bits_of(len(RELATIONS))

    def __init__(self, width: int = 48, depth: int = 3, box_loss: float = 1.0) -> None:
        super().__init__()
        self.width, self.box_loss = width, box_loss
        self.into = nn.Linear(self.edge_channels + 2 * self.node_channels + 1, width)
        self.noise = nn.Sequential(nn.Linear(width, width), nn.SiLU())
        self.film = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.blocks = transformer(width, depth)
        self.norm = nn.LayerNorm(width)
        self.edge_out = nn.Linear(width, self.edge_channels)
        self.node_out = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Linear(width, self.node_channels)
        )

    def forward(
        self,
        nodes: Float[Tensor, "n N C"],
        edges: Float[Tensor, "n N N E"],
        sigma: Float[Tensor, " n"],
        flags: Bool[Tensor, "n N"],
    ) -> tuple[Float[Tensor, "n N C"], Float[Tensor, "n N N E"]]:
        """The clean graph by EDM's preconditioning, c_skip x + c_out F(c_in x, ln(sigma) / 4).

        Args:
            nodes, edges: noisy, 0 where nothing is valid.
            sigma: noise level of each graph.
            flags: which nodes are there.
        """
        skip, out, into = preconditioning(sigma)
        n, most = flags.shape
        pairs = flags[:, :, None] & flags[:, None, :]
        x, e = (into.view(-1, *[1] * (v.dim() - 1)) * v for v in (nodes, edges))
        own = torch.eye(most, device=x.device).expand(n, -1, -1)[..., None]
        row, column = x[:, :, None].expand(-1, -1, most, -1), x[:, None].expand(-1, most, -1, -1)
        h = self.into(torch.cat([e, row, column, own], -1)).flatten(1, 2)
        level = 25 * sigma.log()  # 100 c_noise: the embedding's frequencies are made for steps of about one
        angles = torch.stack([level, level], -1)
        when = self.noise(sine_cosine(angles, self.width))
        mask = torch.where(pairs.flatten(1), 0.0, -1e4)[:, None].to(h)
        for film, block in zip(self.film, self.blocks, strict=True):
            scale, shift = film(when)[:, None].chunk(2, -1)
            h = block(h * (1 + scale) + shift, attention_mask=mask)
        h = self.norm(h).unflatten(1, (most, most)) * pairs[..., None]
        valid = pairs & ~torch.eye(most, dtype=torch.bool, device=h.device)
        mean = h.sum(2) / flags.sum(1).clamp(min=1)[:, None, None]
        made = self.node_out(mean), self.edge_out(h)
        return (
            (skip.view(-1, 1, 1) * nodes + out.view(-1, 1, 1) * made[0]) * flags[..., None],
            (skip.view(-1, 1, 1, 1) * edges + out.view(-1, 1, 1, 1) * made[1]) * valid[..., None],
        )

    @torch.no_grad()
    def generate(
        self, counts: Int[Tensor, " n"], *, steps: int = 20, generator: torch.Generator | None = None
    ) -> SceneGraphs:
        """Graphs with so many nodes, by Heun's method from noise of level 80.

        Args:
            counts: nodes of each.
            steps: of the sampler, two evaluations each.
            generator: of the noise.

        Raises:
            ConfigError: a count outside 1..6, or fewer than two steps.
        """
        if not len(counts) or not 1 <= int(counts.min()) <= int(counts.max()) <= MOST or steps < 2:
            raise ConfigError(
                f"a graph has 1 to {MOST} nodes and takes 2 steps or more; received {counts.tolist()[:8]} "
                f"and {steps}"
            )
        flags = torch.arange(MOST) < counts[:, None]
        pairs = flags[:, :, None] & flags[:, None, :] & ~torch.eye(MOST, dtype=torch.bool)
        shapes = (*flags.shape, self.node_channels), (*pairs.shape, self.edge_channels)
        masks = flags[..., None].float(), pairs[..., None].float()
        x = [HIGH * torch.randn(s, generator=generator) * m for s, m in zip(shapes, masks, strict=True)]
        ramp = torch.arange(steps) / (steps - 1)
        levels = (HIGH ** (1 / RHO) + ramp * (LOW ** (1 / RHO) - HIGH ** (1 / RHO))) ** RHO
        for now, then in zip(levels.tolist(), [*levels.tolist()[1:], 0.0], strict=True):
            slope = self._slope(x, now, flags)
            moved = [v + (then - now) * s for v, s in zip(x, slope, strict=True)]
            if then > 0:
                second = self._slope(moved, then, flags)
                mean = [(a + b) / 2 for a, b in zip(slope, second, strict=True)]
                moved = [v + (then - now) * s for v, s in zip(x, mean, strict=True)]
            x = moved
        return decoded(x[0], x[1], counts)

    def _slope(self, x: list[Tensor], sigma: float, flags: Tensor) -> list[Tensor]:
        clean = self(x[0], x[1], torch.full((len(flags),), sigma), flags)
        return [(v - c.clamp(-1, 1)) / sigma for v, c in zip(x, clean, strict=True)]

    def make_job(
        self, dataset: str, *, recipe: Recipe | None = None, seed: int = 0, device: str | torch.device = "cpu"
    ) -> Job:
        if dataset != "scene-graphs":
            raise DataError(f"Unknown graphs {dataset!r}. There are: scene-graphs.")
        used, train = recipe or self.usual, graphs("train")
        nodes, edges = encoded(train)
        flags, pairs = train.flags, train.pairs

        def draw(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
            chosen = torch.randint(len(train), (n,), generator=generator)
            sigma = (1.2 * torch.randn(n, generator=generator) - 1.2).exp()
            clean = nodes[chosen], edges[chosen]
            masks = flags[chosen][..., None], pairs[chosen][..., None]
            noisy = [
                c + sigma.view(-1, *[1] * (c.dim() - 1)) * torch.randn(c.shape, generator=generator) * m
                for c, m in zip(clean, masks, strict=True)
            ]
            return (*noisy, sigma, flags[chosen], *clean)

        return Job(Drawn(draw, used.batch, STEPS, 4), graph_loss, recipe=used, seed=seed, device=device)


def preconditioning(sigma: Float[Tensor, " n"]) -> tuple[Tensor, Tensor, Tensor]:
    """EDM's (c_skip, c_out, c_in) with sigma_data 0.5."""
    total = sigma**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, SIGMA_DATA * sigma / total.sqrt(), 1 / total.sqrt()


def encoded(given: SceneGraphs) -> tuple[Float[Tensor, "n N C"], Float[Tensor, "n N N E"]]:
    """Nodes (digits of the class, box) and edges (digits of the relation) in [-1, 1]; 0 where nothing is."""
    nodes = torch.cat([to_bits(given.classes, CLASSES), 2 * given.boxes - 1], -1) * given.flags[..., None]
    return nodes, to_bits(given.relations, len(RELATIONS)) * given.pairs[..., None]


def decoded(nodes: Tensor, edges: Tensor, counts: Tensor) -> SceneGraphs:
    """The graphs of nodes and edges, see `encoded`; boxes are clamped to [0, 1]."""
    flags = torch.arange(nodes.shape[1]) < counts[:, None]
    split = bits_of(CLASSES)
    boxes = ((nodes[..., split:] + 1) / 2).clamp(0, 1) * flags[..., None]
    classes = from_bits(nodes[..., :split], CLASSES) * flags
    bare = SceneGraphs(classes, boxes, torch.zeros(edges.shape[:3], dtype=torch.long), counts)
    return dataclasses.replace(bare, relations=from_bits(edges, len(RELATIONS)) * bare.pairs)


def graph_loss(model: nn.Module, batch: Any) -> Float[Tensor, ""]:
    """EDM-weighted squared errors of valid nodes and edges + the boxes' 1 - GIoU, means over valid ones."""
    *inputs, nodes, edges = batch
    network: Any = getattr(model, "module", model)
    made = model(*inputs)
    sigma, flags = inputs[2], inputs[3]
    weight = (sigma**2 + SIGMA_DATA**2) / (SIGMA_DATA * sigma) ** 2
    count = flags.sum(1).to(weight)
    pairs = (count * (count - 1)).clamp(min=1)
    error = (made[0] - nodes).square().mean(-1).sum(1) / count
    error = weight * (error + (made[1] - edges).square().mean(-1).sum((1, 2)) / pairs)
    if network.box_loss:
        boxes = [(v[..., bits_of(CLASSES) :] + 1) / 2 for v in (made[0], nodes)]
        error = error + network.box_loss * ((1 - giou(*boxes)) * flags).sum(1) / count
    return error.mean()


@register_task
class Agreement(NetworkTask):
    """400 graphs with the sizes of test graphs, by 20 Heun steps from fixed noise.

    Metrics: `agreement`, the share of the relations that the graph's own boxes have (of graphs without
    relations 0); `relations`, how many a graph has.
    """

    name, primary, network = "diffusion/scene-graphs", "agreement", DiffuseSG
    count: ClassVar[int] = 400

    def direction(self, metric: str) -> int:
        """Agreement is better high; more relations are not better by themselves."""
        return 1

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Generate and count."""
        counts = graphs("test").counts[: self.count]
        made = self.fitting(model).generate(counts, generator=torch.Generator().manual_seed(0))
        samples = {
            "agreement": made.agreement().nan_to_num(0.0).tolist(),
            "relations": (made.relations != 0).sum((1, 2)).double().tolist(),
        }
        return TaskResult.from_samples(samples, hashlib.sha256(b"scene-graphs/400").hexdigest()[:16])

    def example(self, model: Any) -> tuple[Tensor, ...]:
        """One noisy graph."""
        nodes, edges = encoded(graphs("test")[:1])
        return nodes, edges, torch.ones(1), graphs("test")[:1].flags
