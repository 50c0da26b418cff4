"""QuickSelection (Atashgahi et al., Machine Learning 2022): features by the strength of a sparse autoencoder.

A denoising autoencoder of two layers whose weights exist as compressed rows only: no dense weight, gradient
or moment is ever in memory. After each epoch the weights nearest zero are dropped and as many grow at random
(SET); inputs that matter collect connections. What the released code does beside the paper is kept: strengths
are read after the last drop and before its regrowth, so that random newcomers do not count; noise is drawn
once; decay is outside the learning rate (zahraatashgahi/QuickSelection, train_sparse_DAE.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from zoo.errors import ConfigError, DataError
from zoo.shared.masks.topk import topk_mask
from zoo.shared.ops.csr import entry_rows
from zoo.shared.ops.spmm import spmm

DECAY, DROPOUT = 1e-5, 0.2


class SparseLinear(nn.Module):
    """A linear layer whose weight [outputs, inputs] is compressed rows: x [inputs, b] to [outputs, b].

    Args:
        inputs, outputs: sizes.
        density: expected connections over inputs + outputs (epsilon of Erdős and Rényi).
        generator: draws connections and values.

    Raises:
        ConfigError: more connections than the dense layer has.
    """

    def __init__(self, inputs: int, outputs: int, density: float, generator: torch.Generator) -> None:
        super().__init__()
        wanted = round(density * (inputs + outputs))
        if not 0 < wanted <= inputs * outputs:
            raise ConfigError(
                f"{wanted} connections of density {density:g} do not fit a layer of {inputs} to {outputs}: "
                f"choose a density below {inputs * outputs / (inputs + outputs):.3g}"
            )
        self.inputs, self.outputs = inputs, outputs
        drawn = torch.randint(inputs * outputs, (wanted,), generator=generator).unique()
        self.crow: Tensor
        self.col: Tensor
        self.register_buffer("crow", torch.empty(outputs + 1, dtype=torch.int32))
        self.register_buffer("col", torch.empty(len(drawn), dtype=torch.int32))
        self._place(drawn)
        self.values = nn.Parameter(torch.randn(len(drawn), generator=generator) / 10)
        self.bias = nn.Parameter(torch.zeros(outputs, 1))

    @property
    def flat(self) -> Int[Tensor, " entries"]:
        """Row-major positions of the connections, rising."""
        return entry_rows(self.crow) * self.inputs + self.col.long()

    def _place(self, flat: Int[Tensor, " entries"]) -> None:
        """Connect these positions, which rise. New tensors, since products keep what they derive from old."""
        counts = torch.bincount(flat // self.inputs, minlength=self.outputs)
        self.crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        self.col = (flat % self.inputs).int()

    def forward(self, x: Float[Tensor, "inputs b"]) -> Float[Tensor, "outputs b"]:
        return spmm(self.crow, self.col, x, self.values) + self.bias

    def strength(self, kept: Bool[Tensor, " entries"] | None = None) -> Float[Tensor, " inputs"]:
        """Sum of |w| over an input's connections; over the kept ones only."""
        values = self.values.detach().abs()
        values = values if kept is None else values * kept
        return torch.zeros(self.inputs).index_add_(0, self.col.long(), values)

    def survivors(self, fraction: float) -> Bool[Tensor, " entries"]:
        """The connections without the fraction of positive and of negative ones that are nearest zero."""
        alive = torch.zeros(len(self.values), dtype=torch.bool)
        for side in (self.values > 0, self.values <= 0):
            count = int(side.sum())
            size = torch.where(side, self.values.detach().abs(), -1.0)
            alive |= topk_mask(size, count - int(fraction * count))
        return alive

    @torch.no_grad()
    def regrow(
        self, alive: Bool[Tensor, " entries"], momentum: Tensor | None, generator: torch.Generator
    ) -> None:
        """Put random new connections, N(0, 0.1^2) and without momentum, in the place of the dropped ones."""
        old, count = self.flat[alive], int((~alive).sum())
        taken = old
        while len(taken) < len(old) + count:  # free places, without a tensor of all of them
            draws = (self.inputs * self.outputs, (2 * (len(old) + count - len(taken)) + 8,))
            more = torch.randint(*draws, generator=generator).unique()
            more = more[~torch.isin(more, taken)]
            more = more[torch.randperm(len(more), generator=generator)][: len(old) + count - len(taken)]
            taken = torch.cat([taken, more])
        order = taken.argsort()
        fresh = torch.randn(count, generator=generator) / 10
        self.values.copy_(torch.cat([self.values[alive], fresh])[order])
        if momentum is not None:
            momentum.copy_(torch.cat([momentum[alive], torch.zeros(count)])[order])
        self._place(taken[order])


@dataclass
class Selected:
    """What a training found: strength of every feature, and the autoencoder.

    Attributes:
        strength: after the last drop, before its regrowth.
        final: of the finished autoencoder.
        layers: encoder and decoder.
    """

    strength: Float[Tensor, " features"]
    final: Float[Tensor, " features"]
    layers: tuple[SparseLinear, SparseLinear]

    def best(self, count: int) -> Int[Tensor, " count"]:
        """The strongest features, in their order.

        Raises:
            ConfigError: more than there are.
        """
        return strongest(self.strength, count)


def strongest(strength: Float[Tensor, " features"], count: int) -> Int[Tensor, " count"]:
    """Indices of the `count` largest, rising.

    Raises:
        ConfigError: none, or more than there are.
    """
    if not 1 <= count <= len(strength):
        raise ConfigError(f"{count} of {len(strength)} features cannot be chosen")
    return topk_mask(strength, count).nonzero()[:, 0]


@dataclass
class QuickSelection:
    """Choose features of unlabelled data.

    Args:
        hidden: units of the autoencoder.
        density: connections of each layer over its inputs + outputs.
        moved: share of the connections that is dropped and grown after each epoch; 0 keeps the mask.
        noise: deviation of the noise on standardised inputs.
        epochs, batch, lr, momentum: of the training by SGD.
        seed: of everything that is drawn.
    """

    hidden: int = 1000
    density: float = 13.0
    moved: float = 0.2
    noise: float = 0.2
    epochs: int = 10
    batch: int = 100
    lr: float = 0.01
    momentum: float = 0.9
    seed: int = 0

    def fit(self, x: Float[Tensor, "n features"]) -> Selected:
        """Train on the rows of a table.

        Raises:
            DataError: values that are not finite, or a column without spread.
            ConfigError: a density that does not fit.
        """
        generator = torch.Generator().manual_seed(self.seed)
        clean = standardised(x)
        noisy = (clean + self.noise * torch.randn(clean.shape, generator=generator)).T.contiguous()
        clean = clean.T.contiguous()
        encoder = SparseLinear(len(clean), self.hidden, self.density, generator)
        decoder = SparseLinear(self.hidden, len(clean), self.density, generator)
        layers = (encoder, decoder)
        parameters = [p for layer in layers for p in layer.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum)
        strength = encoder.strength()
        for epoch in range(self.epochs):
            for rows in torch.randperm(len(x), generator=generator).split(self.batch):
                step(layers, noisy[:, rows], clean[:, rows], optimizer, generator)
            alive = [layer.survivors(self.moved) for layer in layers]
            if epoch == self.epochs - 1:
                break  # the last epoch is not followed by a drop
            strength = encoder.strength(alive[0])
            for layer, kept in zip(layers, alive, strict=True):
                state = optimizer.state[layer.values].get("momentum_buffer")
                layer.regrow(kept, state, generator)
        return Selected(strength if self.moved else encoder.strength(), encoder.strength(), layers)


def step(
    layers: tuple[SparseLinear, SparseLinear],
    noisy: Float[Tensor, "features b"],
    clean: Float[Tensor, "features b"],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> float:
    """One descent on half the squared error of the reconstruction; the loss before it."""
    optimizer.zero_grad()
    inner = layers[0](noisy).sigmoid()
    kept = torch.rand(inner.shape, generator=generator) >= DROPOUT
    loss = (layers[1](inner * kept) - clean).square().mean(1).sum() / 2
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for layer in layers:
            layer.values.mul_(1 - DECAY)
    return float(loss.detach())


def standardised(x: Float[Tensor, "n features"]) -> Float[Tensor, "n features"]:
    """Columns of mean 0 and deviation 1.

    Raises:
        DataError: NaN or infinity, or a constant column, by number.
    """
    if x.dim() != 2 or not bool(x.isfinite().all()):
        raise DataError(f"features are a finite table [rows, features]; received {tuple(x.shape)}")
    spread = x.std(0)
    if bool((spread == 0).any()):
        raise DataError(f"column {int((spread == 0).nonzero()[0])} is constant; leave it out")
    return (x - x.mean(0)) / spread
