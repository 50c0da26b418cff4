"""DASS: an architecture search in which every operation is as sparse as in the network that is wanted.

Mousavi, Loni, Alibeigi, Daneshtalab, "DASS: Differentiable Architecture Search for Sparse Neural Networks",
2023. The search of DARTS (Liu et al. 2019: every edge of a cell is a mix of operations, weighted by a
softmax that is trained on other images than the weights) in three stages: all dense; then only scores that
choose the weights which stay, a share of each layer; then weights and mix again, under those masks, so that
the mix is that of sparse operations. Of each node the two edges with the strongest operation stay.

Differs from the paper: first-order steps, cells of two nodes, five operations (no 5 x 5 ones).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.methods.training import second_stream
from zoo.shared.learned.search import gate_all
from zoo.shared.pruning.budgets import check_sparsity
from zoo.shared.pruning.inventory import inventory
from zoo.shared.structure.relatives import seeded
from zoo.shared.train import Job

OPERATIONS = ("none", "skip", "pool", "separable", "dilated")
NODES = 2  # of a cell, after its two inputs
EDGES = [(source, node) for node in range(NODES) for source in range(2 + node)]
Genotype = dict[str, dict[int, str]]  # normal and reduction: edge -> operation


class Nothing(nn.Module):
    """Zeros, of the size that a stride leaves."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return torch.zeros_like(x[:, :, :: self.stride, :: self.stride])


def operation(name: str, width: int, stride: int) -> nn.Module:
    """An operation between maps of one width."""
    if name == "none":
        return Nothing(stride)
    if name == "skip":
        return nn.Identity() if stride == 1 else nn.AvgPool2d(2)
    if name == "pool":
        return nn.Sequential(nn.MaxPool2d(3, stride, 1), nn.BatchNorm2d(width, affine=False))
    apart = 2 if name == "dilated" else 1
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride, apart, apart, width, bias=False),
        nn.Conv2d(width, width, 1, bias=False),
        nn.BatchNorm2d(width),
    )


class Cell(nn.Module):
    """Nodes that sum what their edges bring; the output joins them.

    Args:
        width: of all maps.
        reduction: whether edges from the inputs halve the map.
        chosen: operation by edge; None for the mix of all.
    """

    def __init__(self, width: int, reduction: bool, chosen: Mapping[int, str] | None) -> None:
        super().__init__()
        self.edges = nn.ModuleDict()
        for number, (source, _) in enumerate(EDGES):
            stride = 2 if reduction and source < 2 else 1
            names = OPERATIONS if chosen is None else [chosen[number]] if number in chosen else []
            if names:
                self.edges[str(number)] = nn.ModuleList(operation(name, width, stride) for name in names)
        self.join = nn.Sequential(nn.Conv2d(NODES * width, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, first: Tensor, second: Tensor, mix: Float[Tensor, "edges operations"] | None) -> Tensor:
        states = [first, second]
        for node in range(NODES):
            total = None
            for number, (_, target) in enumerate(EDGES):
                if target == node and str(number) in self.edges:
                    made: list[Tensor] = [op(states[EDGES[number][0]]) for op in self.edges[str(number)]]  # type: ignore[attr-defined]
                    out = (
                        made[0] if mix is None else sum(w * m for w, m in zip(mix[number], made, strict=True))
                    )
                    total = out if total is None else total + out
            assert total is not None  # two edges of each node stay
            states.append(total)
        joined: Tensor = self.join(torch.cat(states[2:], 1))
        return joined


class CellNet(nn.Module):
    """A stem, a normal cell, a reduction, a normal cell, and a linear layer.

    Args:
        width: of all maps.
        classes: of images with three channels.
        genotype: chosen operations; None for the search.
    """

    def __init__(self, width: int = 8, classes: int = 10, genotype: Genotype | None = None) -> None:
        super().__init__()
        self.kinds = ("normal", "reduction", "normal")
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))
        self.cells = nn.ModuleList(
            Cell(width, kind == "reduction", None if genotype is None else genotype[kind])
            for kind in self.kinds
        )
        self.linear = nn.Linear(width, classes)
        self.alphas = nn.ParameterDict()
        if genotype is None:
            for kind in ("normal", "reduction"):
                self.alphas[kind] = nn.Parameter(1e-3 * torch.randn(len(EDGES), len(OPERATIONS)))

    def forward(self, x: Float[Tensor, "b channels h w"]) -> Float[Tensor, "b classes"]:
        first = second = self.stem(x)
        for kind, cell in zip(self.kinds, self.cells, strict=True):
            mix = self.alphas[kind].softmax(1) if kind in self.alphas else None
            out = cell(first, second, mix)
            # After a reduction the older map is as large as before; the new one takes its place.
            first, second = (out if out.shape[2:] != second.shape[2:] else second), out
        out = self.linear(second.mean((2, 3)))
        return out

    def genotype(self) -> Genotype:
        """For each node the two edges whose strongest operation (`none` apart) weighs most, with it."""
        found: Genotype = {}
        for kind, alpha in self.alphas.items():
            weight = alpha.detach().softmax(1)[:, 1:]
            best, which = weight.max(1)
            chosen: dict[int, str] = {}
            for node in range(NODES):
                own = [number for number, (_, target) in enumerate(EDGES) if target == node]
                for number in sorted(own, key=lambda n: -float(best[n]))[:2]:
                    chosen[number] = OPERATIONS[1 + int(which[number])]
            found[kind] = chosen
        return found


def random_genotype(seed: int) -> Genotype:
    """Two edges of each node and their operations by chance."""
    with seeded(seed):
        net = CellNet(2)
        for alpha in net.alphas.values():
            alpha.data = torch.rand_like(alpha)
        return net.genotype()


@dataclass(frozen=True)
class DASS:
    """How an architecture is searched.

    Attributes:
        sparsity: of the convolutions in the last stage, from 0 up to 1.
        stages: epochs dense, of scores, and under the masks; (n, 0, 0) is DARTS.
        rate: of scores, by SGD.
        mix_rate: of the mix, by Adam.
        width: of maps.
    """

    sparsity: float = 0.9
    stages: tuple[int, int, int] = (4, 2, 4)
    rate: float = 0.1
    mix_rate: float = 3e-3
    width: int = 8

    def search(self, weights: Job, mix: Job) -> tuple[Genotype, CellNet]:
        """The architecture, and the network that was searched.

        Args:
            weights: images that train weights and scores, and how.
            mix: other images, for the mix.

        Raises:
            BudgetError: a sparsity outside [0, 1).
            ConfigError: no dense stage, or only one of the others.
        """
        check_sparsity(self.sparsity)
        dense, scored, sparse = self.stages
        if dense < 1 or min(scored, sparse) < 0 or (scored > 0) != (sparse > 0):
            raise ConfigError(
                f"a search has a dense stage, and both or none of the others; received epochs {self.stages}"
            )
        with seeded(weights.seed):
            net = CellNet(self.width)
        alphas = list(net.alphas.values())
        own = [p for name, p in net.named_parameters() if not name.startswith("alphas")]
        upper = torch.optim.Adam(alphas, lr=self.mix_rate, betas=(0.5, 0.999), weight_decay=1e-3)
        other = second_stream(mix)

        def mix_step() -> None:
            net.zero_grad()
            mix.loss(net, next(other)).backward()
            upper.step()
            net.zero_grad()

        weights.fit(net, parameters=own, epochs=dense, macs=lambda: 0.0).run(mix_step)
        if scored:
            scores = self._scored(net)
            weights.fit(net, parameters=scores, epochs=scored, lr=self.rate, macs=lambda: 0.0).run()
            for score in scores:
                score.requires_grad_(False)
            weights.fit(net, parameters=own, epochs=sparse, macs=lambda: 0.0).run(mix_step)
        return net.genotype(), net

    def _scored(self, net: CellNet) -> list[nn.Parameter]:
        """Scores on the weights of all convolutions, which keep one weight of each at least."""
        weights = {
            w.name: net.get_parameter(w.name) for w in inventory(net).reached if w.name.startswith("cells")
        }
        start = {
            name: (6 / w[0].numel()) ** 0.5 * w.detach().abs() / w.detach().abs().max().clamp(min=1e-12)
            for name, w in weights.items()
        }
        kept = {name: max(1, round((1 - self.sparsity) * w.numel())) for name, w in weights.items()}
        return [gate.logits for gate in gate_all(net, start, kept).values()]


def counted(genotype: Genotype) -> dict[str, int]:
    """How often each operation was chosen."""
    names = [name for chosen in genotype.values() for name in chosen.values()]
    return {name: names.count(name) for name in OPERATIONS[1:]}
