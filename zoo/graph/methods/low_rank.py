"""Low rank by imitating outputs: linear layers and embedding tables as products of two thin ones.

Yu et al., "Unified Low-rank Compression Framework for Click-through Rate Prediction", KDD 2024 (Atomic
Feature Mimicking): of all maps y^ = P y + c of rank r, the projection on the first r principal components
of a layer's outputs y = W x + b is nearest to them on the data. It folds into two layers,

    y^ = U (U^T W x) + U U^T b + (I - U U^T) E[y],

and a table D becomes (D - E[y]) U, of r columns, with the map U^T and the bias E[y] behind it. A
decomposition of W itself (`by="weights"`, the control) does not know which inputs occur.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.methods.contract import Sparsified, required, stated_options
from zoo.methods.training import run_model
from zoo.shared.errors import MaskError
from zoo.shared.masks import MaskSet, masks_of
from zoo.shared.measure.activations.calibrate import Tap, calibrate
from zoo.shared.measure.activations.statistics import Gram, Moments
from zoo.shared.measure.modes import eval_mode
from zoo.shared.structure.relatives import check_finite, copied
from zoo.shared.train import Job
from zoo.shared.train.device import brought_back, device_of


def thin_rank(module: nn.Linear | nn.Embedding, ratio: float) -> int:
    """The rank at which the factors of a layer have so many times fewer values; of a table, whose rows are so
    many times shorter. 0 where the factors would not be smaller."""
    rows, columns = module.weight.shape
    wanted = columns if isinstance(module, nn.Embedding) else rows * columns / (rows + columns)
    rank = max(1, int(wanted / ratio))
    return rank if rank * (rows + columns) < rows * columns and rank < min(rows, columns) else 0


def candidates(model: nn.Module) -> dict[str, nn.Linear | nn.Embedding]:
    """Linear layers and tables whose weight nobody shares or reads but by calling them."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if name
        and (type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None))
        and uses[id(module.weight)] == 1
    }


def pair(module: nn.Linear | nn.Embedding, rank: int) -> nn.Sequential:
    """Two thin modules, not initialised, in place of one."""
    given: dict[str, Any] = {"device": module.weight.device, "dtype": module.weight.dtype}
    if isinstance(module, nn.Linear):
        first: nn.Module = nn.Linear(module.in_features, rank, bias=False, **given)
        return nn.Sequential(first, nn.Linear(rank, module.out_features, **given))
    first = nn.Embedding(module.num_embeddings, rank, module.padding_idx, **given)
    return nn.Sequential(first, nn.Linear(rank, module.embedding_dim, **given))


def factor(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Put pairs, not initialised, in the places of linear layers and tables, in place."""
    for name, rank in ranks.items():
        found: Any = model.get_submodule(name)
        model.set_submodule(name, pair(found, rank))


def components(covariance: Float[Tensor, "y y"], rank: int) -> Float[Tensor, "y rank"]:
    """The eigenvectors of the largest eigenvalues."""
    return torch.linalg.eigh(covariance)[1][:, -rank:].flip(1)


@torch.no_grad()
def imitate(
    module: nn.Linear | nn.Embedding,
    basis: Float[Tensor, "y rank"],
    mean: Float[Tensor, " y"],
) -> nn.Sequential:
    """The pair whose outputs are those of the module, projected on a basis around the mean."""
    made: Any = pair(module, basis.shape[1])
    weight = module.weight.double()
    rest = mean - basis @ (basis.T @ mean)
    if isinstance(module, nn.Linear):
        made[0].weight.copy_(basis.T @ weight)
        bias = module.bias.double() if module.bias is not None else torch.zeros_like(mean)
        made[1].bias.copy_(basis @ (basis.T @ bias) + rest)
    else:
        made[0].weight.copy_((weight - mean) @ basis)
        made[1].bias.copy_(mean)
    made[1].weight.copy_(basis)
    return made


@torch.no_grad()
def decompose(module: nn.Linear | nn.Embedding, rank: int) -> nn.Sequential:
    """The pair nearest to the weight itself (singular value decomposition)."""
    made: Any = pair(module, rank)
    linear = isinstance(module, nn.Linear)
    weight = module.weight.double() if linear else module.weight.double().T
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    first = values[:rank, None].sqrt() * v[:rank]
    made[0].weight.copy_(first if linear else first.T)
    made[1].weight.copy_(u[:, :rank] * values[:rank].sqrt())
    bias = module.bias if isinstance(module, nn.Linear) else None
    made[1].bias.copy_(torch.zeros_like(made[1].bias) if bias is None else bias)
    return made


@dataclass
class LowRank:
    """Make linear layers and embedding tables so many times smaller, by their outputs on data."""

    needs_job: ClassVar[bool] = True
    recipe: ClassVar[Mapping[str, Any]] = {"epochs": 1, "lr": 1e-3, "optimizer": "adam", "weight_decay": 0.0}

    ratio: float = 4.0
    """Values of a layer over those of its two factors, columns of a table over those it keeps; above 1. What
    this does not make smaller stays as it is."""

    by: Literal["outputs", "weights", "random"] = "outputs"
    """What is approximated: the outputs, the weight itself, or the outputs in a random basis."""

    batches: int = 32
    """Batches on which outputs are measured."""

    tune: bool = True
    """Whether to train afterwards, by the job's recipe."""

    def sparsify(self, model: nn.Module, job: Job | None = None) -> Sparsified:
        """A thinner relative of `model`, which stays as it is; there are no masks.

        Raises:
            ConfigError: a ratio that is not above 1, a model without a layer or table that it makes smaller.
            MaskError: the model carries masks.
            DataError: fewer outputs than a rank.
        """
        if not 1 < self.ratio < float("inf"):
            raise ConfigError(f"the ratio must be above 1; received {self.ratio}")
        job = required(job, self)
        if masks_of(model):
            raise MaskError("low-rank factors would fill the zeros that the model's masks hold")
        check_finite(model)
        made = copied(model).to(job.device)
        chosen = self._chosen(made, job)
        if not chosen:
            raise ConfigError(
                f"{type(model).__name__} runs no linear layer or table of its own that a rank makes "
                f"{self.ratio:g} times smaller"
            )
        before = sum(p.numel() for p in made.parameters())
        for name, module in self._pairs(made, chosen, job).items():
            made.set_submodule(name, module)
        if self.tune:
            job.fit(made, macs=lambda: 0.0).run()
        made = brought_back(made, device_of(model)).eval()
        facts = {"ranks": chosen, "parameters": [before, sum(p.numel() for p in made.parameters())]}
        arguments = getattr(made, "current_arguments", None)
        return Sparsified(
            made,
            MaskSet({}),
            hyperparameters={**stated_options(self, job), **facts},
            arguments=arguments() if callable(arguments) else None,
        )

    def _chosen(self, model: nn.Module, job: Job) -> dict[str, int]:
        """Ranks of the modules that a batch runs."""
        called: set[str] = set()
        found = {n: thin_rank(m, self.ratio) for n, m in candidates(model).items()}
        handles = [
            model.get_submodule(n).register_forward_hook(lambda m, i, o, n=n: called.add(n)) for n in found
        ]
        try:
            with torch.no_grad(), eval_mode(model):
                for batch in job.sample(1):
                    job.loss(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return {name: rank for name, rank in found.items() if rank and name in called}

    def _pairs(self, model: nn.Module, ranks: Mapping[str, int], job: Job) -> dict[str, nn.Sequential]:
        modules: Any = {name: model.get_submodule(name) for name in ranks}
        if self.by == "weights":
            return {name: decompose(modules[name], rank) for name, rank in ranks.items()}
        statistics = {name: (Moments(), Gram()) for name in ranks}
        taps = [Tap(name, (_Wide(both),), "output") for name, both in statistics.items()]
        calibrate(model, job.sample(self.batches), taps, run_model(job))
        generator = torch.Generator().manual_seed(job.seed)
        made = {}
        for name, (moments, gram) in statistics.items():
            if moments.count <= ranks[name]:
                raise DataError(f"{name} has {moments.count} outputs, too few for rank {ranks[name]}")
            mean = moments.mean()
            basis = components(gram.mean() - torch.outer(mean, mean), ranks[name])
            if self.by == "random":
                basis = torch.linalg.qr(torch.randn(basis.shape, generator=generator).to(basis))[0]
            made[name] = imitate(modules[name], basis, mean)
        return made


class _Wide:
    """Moments and Gram matrix of outputs in float64, as a covariance is a small difference of large sums."""

    def __init__(self, both: tuple[Moments, Gram]) -> None:
        self.both = both

    def update(self, rows: Float[Tensor, "rows features"]) -> None:
        for accumulator in self.both:
            accumulator.update(rows.double())
