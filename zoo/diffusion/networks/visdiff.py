"""VisDiff: a polygon from its visibility graph, through a signed distance field.

Moorthy, Chao and Isler, VisDiff: SDF-Guided Polygon Generation for Visibility Reconstruction and Recognition,
arXiv 2410.05530. A diffusion model conditioned on the graph, a transformer over the rows of its adjacency,
makes the polygon's signed distances on a grid; among points at equal steps along their zero line, with
features of the grid, attention finds which are vertices and how far they are off. Both are trained at once
on errors of distances and vertices and on a visibility that is differentiable: a pair sees each other where
the largest distance along its segment is negative.

Differs from the paper in: a transformer over patches for the U-Net; the flow-matching schedule of this zoo;
the network estimates the clean field; a polygon's pose is fixed by its first vertex; vertices are picked
among the line's points and numbered from where the given graph fits best.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from zoo.diffusion.flows import TIMES, between
from zoo.diffusion.networks.base import STEPS, USUAL, NetworkTask, PaperNetwork, sine_cosine, transformer
from zoo.diffusion.networks.polygons import (
    EDGE,
    aligned,
    border,
    draw_polygons,
    f1,
    is_simple,
    rasterised,
    require_simple,
    traced,
    visibility,
)
from zoo.diffusion.sampling import sample
from zoo.errors import ConfigError, DataError
from zoo.harness.tasks import Progress, TaskResult, register_task
from zoo.shared.train import Drawn, Job, Recipe

VERTICES, CONTOUR = 10, 64
SCALE = 2.0  # of distances within the network, which makes their deviation about 0.6
SHARP = 20.0  # logits of visibility per distance
PLACED, CORNERS, SEEN = 4.0, 0.1, 0.1  # weights beside the error of the distances


class GraphEncoder(nn.Module):
    """Tokens of the vertices: rows of the adjacency, each from its own vertex on, through transformer blocks.

    Args:
        vertices: of the polygons.
        width, depth: of the blocks.
    """

    def __init__(self, vertices: int, width: int, depth: int) -> None:
        super().__init__()
        ring = torch.arange(vertices)
        self.register_buffer("order", (ring[:, None] + ring[1:]) % vertices, persistent=False)
        self.into = nn.Linear(vertices - 1, width)
        self.places = nn.Parameter(0.02 * torch.randn(vertices, width))
        self.blocks = transformer(width, depth)

    def forward(self, graphs: Bool[Tensor, "n v v"]) -> Float[Tensor, "n v width"]:
        order: Any = self.order
        h = self.into(graphs.to(self.places.dtype).gather(2, order.expand(len(graphs), -1, -1)) - 0.5)
        h = h + self.places
        for block in self.blocks:
            h = block(h)
        return h


class Extractor(nn.Module):
    """Which points of a field's zero line are vertices, and by how much they are off.

    Args:
        width, depth: of the blocks.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width // 2, 3, 2, 1), nn.SiLU(), nn.Conv2d(width // 2, width, 3, padding=1)
        )
        self.points, self.places = nn.Linear(6, width), nn.Parameter(0.02 * torch.randn(CONTOUR, width))
        self.blocks = transformer(width, depth, cross_attention_dim=width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 3)

    def forward(
        self, field: Float[Tensor, "n 1 s s"], contour: Float[Tensor, "n p 2"], tokens: Float[Tensor, "n v w"]
    ) -> tuple[Float[Tensor, "n p"], Float[Tensor, "n p 2"]]:
        """(logits of being a vertex, the points moved to where the vertex is)."""
        shifts = [contour.roll(1, 1) - contour, contour.roll(-1, 1) - contour]
        h = self.points(torch.cat([contour, *(10 * shift for shift in shifts)], -1)) + self.places
        h = h + looked_up(self.features(field), contour).transpose(1, 2)
        for block in self.blocks:
            h = block(h, encoder_hidden_states=tokens)
        logits, away = self.out(self.norm(h)).split([1, 2], -1)
        return logits[..., 0], contour + 0.1 * away


def corners(
    logits: Float[Tensor, "n p"], points: Float[Tensor, "n p 2"], count: int
) -> Float[Tensor, "n count 2"]:
    """The points with the highest logits, no two of them neighbours, in the line's order."""
    left, size = logits.clone(), logits.shape[1]
    chosen = []
    for _ in range(count):
        chosen.append(best := left.argmax(1))
        for step in (-1, 0, 1):
            left.scatter_(1, ((best + step) % size)[:, None], -torch.inf)
    return taken(points, torch.stack(chosen, 1).sort(1).values)


def taken(points: Float[Tensor, "n p 2"], places: Int[Tensor, "n v"]) -> Float[Tensor, "n v 2"]:
    """Points by their places."""
    return points.gather(1, places[..., None].expand(-1, -1, 2))


class VisDiff(PaperNetwork):
    """The field's diffusion model and the extractor of vertices.

    Args:
        vertices: of the polygons.
        side, patch: of the field and of the model's patches, in points.
        width, depth: of all transformers.
    """

    usual = dataclasses.replace(USUAL, steps=500, batch=32, weight_decay=0.0, ema=0.98)

    def __init__(
        self, vertices: int = VERTICES, side: int = 24, patch: int = 3, width: int = 32, depth: int = 2
    ) -> None:
        super().__init__()
        if side % patch or width % 4 or vertices < 4:
            raise ConfigError(
                f"side must be a multiple of patch, width of 4, vertices 4 or more; received "
                f"{side}, {patch}, {width} and {vertices}"
            )
        self.vertices, self.side, self.patch, self.width = vertices, side, patch, width
        self.graph = GraphEncoder(vertices, width, depth)
        self.into = nn.Conv2d(1, width, patch, patch)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = transformer(width, depth + 1, cross_attention_dim=width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, patch**2)
        self.last = nn.Conv2d(1, 1, 3, padding=1)
        self.extractor = Extractor(width, depth)
        self.scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMES)

    def encode(self, graphs: Tensor) -> Float[Tensor, "n v width"]:
        """Tokens of visibility graphs.

        Raises:
            DataError: graphs that are not [n, v, v] of 0 and 1 with the network's v, not symmetric, with a
                vertex that sees itself, or without an edge of the border.
        """
        size = self.vertices
        if graphs.dim() != 3 or graphs.shape[1:] != (size, size):
            raise DataError(f"graphs are [n, {size}, {size}] for this network; received {list(graphs.shape)}")
        if not bool(((graphs == 0) | (graphs == 1)).all()) or not torch.equal(graphs, graphs.mT):
            raise DataError("a visibility graph is symmetric, of 0 and 1")
        if bool(graphs.diagonal(dim1=1, dim2=2).any()):
            raise DataError("a vertex does not see itself; leave the diagonal 0")
        if not bool(graphs.bool()[:, border(size).to(graphs.device)].all()):
            raise DataError("neighbours on the border see each other: the graph lacks one of these edges")
        tokens: Tensor = self.graph(graphs.bool())
        return tokens

    def estimate(
        self, x: Float[Tensor, "n 1 s s"], sigmas: Float[Tensor, " n"], tokens: Float[Tensor, "n v w"]
    ) -> Float[Tensor, "n 1 s s"]:
        """The clean field in a noisy one."""
        h = self.into(x)
        line = torch.arange(h.shape[-1], device=h.device).to(h)
        places = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).flatten(0, 1)
        when = 10 * sigmas.to(h)[:, None].expand(-1, 2)
        h = h.flatten(2).transpose(1, 2) + sine_cosine(places, self.width)
        h = h + self.time(sine_cosine(when, self.width))[:, None]
        for block in self.blocks:
            h = block(h, encoder_hidden_states=tokens)
        patches = self.out(self.norm(h)).transpose(1, 2)
        out: Tensor = self.last(F.fold(patches, self.side, self.patch, stride=self.patch))
        return out

    def denoise(self, x: Tensor, times: Tensor, condition: Tensor) -> Tensor:
        """The velocity noise - field, from the estimate; the condition is the graph's tokens."""
        sigmas = times / TIMES
        return (x - self.estimate(x, sigmas, condition)) / sigmas.view(-1, 1, 1, 1).clamp(min=1e-3)

    def forward(
        self,
        x: Float[Tensor, "n 1 s s"],
        sigmas: Float[Tensor, " n"],
        graphs: Bool[Tensor, "n v v"],
        contour: Float[Tensor, "n p 2"],
    ) -> tuple[Float[Tensor, "n 1 s s"], Float[Tensor, "n p"], Float[Tensor, "n p 2"]]:
        """(the clean field, what `Extractor` makes of it and the contour)."""
        tokens = self.encode(graphs)
        field = self.estimate(x, sigmas, tokens)
        return field, *self.extractor(field, contour, tokens)

    def extract(
        self, field: Float[Tensor, "n 1 s s"], graphs: Tensor, tokens: Float[Tensor, "n v w"]
    ) -> Float[Tensor, "n v 2"]:
        """The vertices of fields, numbered as fits the graphs best."""
        logits, points = self.extractor(field, traced(field, CONTOUR), tokens)
        return aligned(corners(logits, points, self.vertices), graphs.bool())

    @torch.no_grad()
    def reconstruct(
        self, graphs: Tensor, *, steps: int = 10, generator: torch.Generator | None = None
    ) -> Float[Tensor, "n v 2"]:
        """Polygons with these visibility graphs, one sample each.

        Args:
            graphs: [n, v, v], see `encode`.
            steps: of the sampler.
            generator: of the noise.
        """
        tokens = self.encode(graphs)
        noise = torch.randn((len(graphs), 1, self.side, self.side), generator=generator).to(tokens)
        return self.extract(sample(self, noise, tokens, steps=steps), graphs, tokens)

    def make_job(
        self, dataset: str, *, recipe: Recipe | None = None, seed: int = 0, device: str | torch.device = "cpu"
    ) -> Job:
        if dataset != "polygons":
            raise DataError(f"Unknown polygons {dataset!r}. There are: polygons.")
        used = recipe or self.usual
        pool = learned_from(polygons("train", self.vertices), self.side)

        def draw(n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
            chosen = torch.randint(len(pool[0]), (n,), generator=generator)
            true, fields, graphs, contours = (part[chosen] for part in pool)
            sigmas = torch.rand(n, generator=generator)
            noisy = between(fields, torch.randn(fields.shape, generator=generator), sigmas)
            return noisy, sigmas, graphs, contours, fields, true

        return Job(Drawn(draw, used.batch, STEPS, 4), polygon_loss, recipe=used, seed=seed, device=device)


@functools.lru_cache(maxsize=4)
def polygons(part: str, vertices: int = VERTICES) -> Float[Tensor, "n v 2"]:
    """The drawn polygons: 3,000 to train on, 200 others for `test`."""
    count, seed = (3000, 0) if part == "train" else (200, 1)
    return draw_polygons(count, vertices, torch.Generator().manual_seed(seed))


def learned_from(given: Float[Tensor, "n v 2"], side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(polygons, fields as the network has them, visibility graphs, points along the fields' zero lines).

    Raises:
        DataError: a polygon that crosses itself.
    """
    require_simple(given)
    fields = torch.cat([rasterised(part, side) for part in given.split(500)])
    graphs = torch.cat([visibility(part) for part in given.split(500)])
    return given, SCALE * fields, graphs, traced(fields, CONTOUR)


def looked_up(field: Float[Tensor, "n C s s"], points: Float[Tensor, "n m 2"]) -> Float[Tensor, "n C m"]:
    """Bilinear values of a grid over -EDGE to EDGE at points (x, y)."""
    found = F.grid_sample(field, points[:, None] / EDGE, padding_mode="border", align_corners=True)
    return found[:, :, 0]


def between_vertices(vertices: Float[Tensor, "n v 2"], steps: int = 7) -> Float[Tensor, "n m 2"]:
    """Points on the segments of all pairs that are no neighbours, pair after pair."""
    first, second = unknown_pairs(vertices.shape[1])
    share = (torch.arange(steps, device=vertices.device) + 1) / (steps + 1)
    start, end = vertices[:, first, None], vertices[:, second, None]
    return (start + share[:, None] * (end - start)).flatten(1, 2)


def unknown_pairs(vertices: int) -> tuple[Tensor, ...]:
    """Indices (i, j), i < j, of the pairs that are no neighbours."""
    return torch.where((~border(vertices)).triu(1))


def sight_loss(distances: Float[Tensor, "n m"], graphs: Bool[Tensor, "n v v"]) -> Float[Tensor, " n"]:
    """Cross-entropy of the visibility that the distances at `between_vertices` give, per graph."""
    first, second = unknown_pairs(graphs.shape[1])
    known = graphs[:, first, second].to(distances)
    largest = distances.unflatten(1, (known.shape[1], -1)).amax(-1)
    return F.binary_cross_entropy_with_logits(-SHARP * largest, known, reduction="none").mean(1)


def polygon_loss(model: nn.Module, batch: Any) -> Float[Tensor, ""]:
    """Squared error of the field + (1 - sigma)^2 (4 that of the vertices, from the points nearest to them,
    + 0.1 cross-entropy of which points these are + 0.1 `sight_loss`)."""
    *inputs, fields, true = batch
    _, sigmas, graphs, contour = inputs
    made, logits, points = model(*inputs)
    nearest = torch.cdist(true, contour).argmin(-1)
    placed = taken(points, nearest)
    error = PLACED * (placed - true).square().mean((1, 2))
    known = torch.zeros_like(logits).scatter(1, nearest, 1.0)
    error = error + CORNERS * F.binary_cross_entropy_with_logits(logits, known, reduction="none").mean(1)
    error = error + SEEN * sight_loss(looked_up(made, between_vertices(placed))[:, 0] / SCALE, graphs)
    return F.mse_loss(made, fields) + ((1 - sigmas).square() * error).mean()


@register_task
class VisiblePolygons(NetworkTask):
    """200 visibility graphs of polygons that were not trained on, one sample each from fixed noise.

    Metrics: `f1` of the pairs that see each other, neighbours not counted; `simple`, the share of polygons
    that do not cross themselves.
    """

    name, primary, network = "diffusion/visible-polygons", "f1", VisDiff
    count: ClassVar[int] = 200

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Reconstruct and compare."""
        network = self.fitting(model)
        graphs = visibility(polygons("test", network.vertices)[: self.count])
        made = network.reconstruct(graphs, generator=torch.Generator().manual_seed(0))
        samples = {
            "f1": f1(visibility(made), graphs).tolist(),
            "simple": is_simple(made).double().tolist(),
        }
        return TaskResult.from_samples(samples, hashlib.sha256(b"polygons/200").hexdigest()[:16])

    def example(self, model: Any) -> tuple[Tensor, ...]:
        """One noisy field with its graph and contour."""
        _, field, graph, contour = learned_from(polygons("test", model.vertices)[:1], model.side)
        return field, torch.ones(1), graph, contour
