"""`zoo reproduce quick-selection`: are chosen features real, and what does sparse storage save."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from zoo.errors import DataError
from zoo.methods.quick_selection import QuickSelection, SparseLinear, standardised, step, strongest
from zoo.studies.cells import CellCache
from zoo.studies.figures import Columns, Curves, mean_of
from zoo.studies.options import StudyOptions
from zoo.studies.study import BAR, Arm, Claim, Study, above
from zoo.studies.tables import Verdict
from zoo.studies.view import Row, Value, View

OURS, LATE, STATIC = "QuickSelection", "strength after regrowth", "mask that stays"
DENSE, VARIANCE, RANDOM, ALL = "dense autoencoder", "largest variance", "random", "all features"
MADE, NOISY = "made", "digits and noise"
TITLES = {MADE: "500 made features, 20 real", NOISY: "digits with 200 columns of noise", "COIL20": "COIL-20"}
WIDE = "10,000 features"


@dataclass(frozen=True)
class SelectionOptions(StudyOptions):
    """Options.

    Args:
        tables: made, digits and noise, and the names of files in $ZOO_DATA/feature-selection.
        hidden: units of the autoencoder; the dense one of 10,000 features has 1,000.
        epochs: of an autoencoder.
        wide: features of the comparison of cost.
    """

    tables: tuple[str, ...] = (MADE, NOISY, "Isolet", "COIL20")
    hidden: int = 200
    epochs: int = 40
    wide: int = 10_000


class DenseLinear(nn.Module):
    """What the sparse layer is compared with: x [inputs, b] to [outputs, b]."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn(outputs, inputs, generator=generator) / inputs**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        return self.values @ x + self.bias


@functools.cache
def table(name: str) -> tuple[Tensor, Tensor, int, int]:
    """Values [n, features], classes, how many of the first features are real (0: nobody knows), and how many
    are chosen."""
    from sklearn.datasets import load_digits, make_classification

    generator = torch.Generator().manual_seed(0)
    if name == MADE:
        made = {"n_informative": 5, "n_redundant": 15, "n_clusters_per_class": 16, "shuffle": False}
        x, y = make_classification(2000, 500, random_state=0, **made)
        return torch.from_numpy(x).float(), torch.from_numpy(y), 20, 20
    if name == NOISY:
        bunch = load_digits()
        pixels = torch.from_numpy(bunch.data).float()
        pixels = pixels[:, varied(pixels)]
        noise = torch.randn(len(pixels), 200, generator=generator)
        return (
            torch.cat([standardised(pixels), noise], 1),
            torch.from_numpy(bunch.target),
            pixels.shape[1],
            20,
        )
    from scipy.io import loadmat

    path = Path(os.environ.get("ZOO_DATA", "$ZOO_DATA"), "feature-selection", f"{name}.mat")
    if not path.exists():
        raise DataError(f"{path} is not there. Set ZOO_DATA to the folder with feature-selection/.")
    stored = loadmat(path)
    x = torch.from_numpy(np.asarray(stored["X"], np.float32))
    return x[:, varied(x)], torch.from_numpy(np.asarray(stored["Y"]).ravel().astype(np.int64)), 0, 20


def varied(x: Tensor) -> Tensor:
    """Which columns have another value than their most frequent one in a twentieth of the rows."""
    return (x != x.mode(0).values).double().mean(0) > 0.05


def dense_layers(x: Tensor, method: QuickSelection) -> tuple[DenseLinear, DenseLinear]:
    """Both layers of a dense autoencoder, trained alike."""
    generator = torch.Generator().manual_seed(method.seed)
    clean = standardised(x)
    noisy = (clean + method.noise * torch.randn(clean.shape, generator=generator)).T.contiguous()
    layers, optimizer = dense_pair(len(noisy), method.hidden, generator, method)
    for _ in range(method.epochs):
        for rows in torch.randperm(len(x), generator=generator).split(method.batch):
            step(layers, noisy[:, rows], clean.T[:, rows], optimizer, generator)
    first, second = layers
    return first, second


def dense_strength(x: Tensor, method: QuickSelection) -> Tensor:
    """Sum of |w| over the connections of each input of a dense autoencoder, trained alike."""
    return dense_layers(x, method)[0].values.detach().abs().sum(0)


def dense_pair(features: int, hidden: int, generator: torch.Generator, method: QuickSelection) -> Any:
    """Two dense layers and their optimiser."""
    layers = DenseLinear(features, hidden, generator), DenseLinear(hidden, features, generator)
    parameters = [p for layer in layers for p in layer.parameters()]
    return layers, torch.optim.SGD(parameters, lr=method.lr, momentum=method.momentum)


def accuracy(x: Tensor, y: Tensor, chosen: Tensor, seed: int) -> float:
    """Of 50 extremely randomised trees on held-out rows, a third."""
    from sklearn.ensemble import ExtraTreesClassifier

    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(x) // 3], order[len(x) // 3 :]
    trees = ExtraTreesClassifier(50, random_state=seed).fit(x[train][:, chosen].numpy(), y[train].numpy())
    return float(trees.score(x[test][:, chosen].numpy(), y[test].numpy()))


def cost(arm: str, options: SelectionOptions, seed: int) -> Row:
    """Seconds of a step and bytes of weights, index, gradients and moments, of a wide autoencoder."""
    generator = torch.Generator().manual_seed(seed)
    method = QuickSelection()
    x = torch.randn(options.wide, method.batch, generator=generator)
    if arm == DENSE:
        layers, optimizer = dense_pair(options.wide, method.hidden, generator, method)
    else:
        sizes = (options.wide, method.hidden), (method.hidden, options.wide)
        layers = tuple(SparseLinear(a, b, method.density, generator) for a, b in sizes)
        parameters = [p for layer in layers for p in layer.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=method.lr, momentum=method.momentum)
    step(layers, x, x, optimizer, generator)
    times = []
    for _ in range(3):
        start = time.process_time()
        step(layers, x, x, optimizer, generator)
        times.append(time.process_time() - start)
    held = [t for layer in layers for t in (*layer.parameters(), *layer.buffers())]
    held += [p.grad for layer in layers for p in layer.parameters() if p.grad is not None]
    held += [state["momentum_buffer"] for state in optimizer.state.values()]
    return {"bytes": sum(t.numel() * t.element_size() for t in held), "seconds": min(times)}


def measure(make: Any, options: SelectionOptions, case: Row, cells: CellCache) -> Row:
    """Share of real features among the chosen ones, and the accuracy of trees on them."""
    arm, seed = case["arm"], case["seed"]
    if case["table"] == WIDE:
        return cost(arm, options, seed)
    x, y, real, count = table(case["table"])
    train = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[len(x) // 3 :]
    start = time.process_time()
    if isinstance(make, QuickSelection):
        found = replace(make, hidden=options.hidden, epochs=options.epochs, seed=seed).fit(x[train])
        strength = found.final if arm == LATE else found.strength
    elif arm == DENSE:
        strength = dense_strength(x[train], QuickSelection(options.hidden, epochs=options.epochs, seed=seed))
    elif arm == VARIANCE:
        strength = x[train].var(0)
    else:
        strength = torch.rand(x.shape[1], generator=torch.Generator().manual_seed(seed))
    seconds = time.process_time() - start
    chosen = strongest(strength, x.shape[1] if arm == ALL else count)
    row: Row = {"accuracy": accuracy(x, y, chosen, seed), "seconds": seconds}
    return row | ({"real": float((chosen < real).double().mean())} if real else {})


def cases(options: SelectionOptions) -> Iterator[Row]:
    """All arms on each table, and the cost of a wide autoencoder."""
    for name in options.tables:
        for arm in ARMS:
            yield from ({"table": name, "arm": arm, "level": name, "seed": s} for s in range(options.seeds))
    for arm in (OURS, DENSE):
        yield from ({"table": WIDE, "arm": arm, "level": WIDE, "seed": s} for s in range(options.seeds))


def facts(view: View) -> list[Verdict]:
    """Bytes and time of the wide autoencoders."""
    if view.where["table"] != WIDE:
        return []
    bytes_, seconds = (
        view.mean(DENSE, None, Value(n, 1.0)) / view.mean(OURS, None, Value(n, 1.0))
        for n in ("bytes", "seconds")
    )
    return [
        view.fact(f"{WIDE}: {what} 10x {how} than of the dense autoencoder", said, f"{x:.1f}x", x >= 10)
        for what, how, said, x in (
            ("bytes of weights, index, gradients and moments", "fewer", "less memory (abstract)", bytes_),
            ("a step of training", "faster", "less time (abstract)", seconds),
        )
    ]


REAL = Value("real", 100.0, 1)
_known = [{"table": MADE}, {"table": NOISY}]
_classes = [{"table": "Isolet"}, {"table": "COIL20"}]
ARMS = {
    OURS: Arm(QuickSelection(), control=RANDOM),
    LATE: Arm(QuickSelection()),
    STATIC: Arm(QuickSelection(moved=0.0)),
    DENSE: Arm(),
    VARIANCE: Arm(),
    RANDOM: Arm(),
    ALL: Arm(),
}
STUDY = Study(
    "quick-selection",
    "QuickSelection: features by the strength of a sparse autoencoder",
    "Atashgahi et al., Machine Learning 111 (2022), arXiv 2012.00560",
    SelectionOptions,
    ARMS,
    cases,
    measure,
    papers=(19,),
    by=("table",),
    titles=TITLES,
    varies=("seeds", "tables"),
    claims=[
        *(
            claim
            for only in _known
            for claim in (
                Claim(
                    "{where}: more than 80 % of the chosen features are real",
                    BAR,
                    OURS,
                    bar=80.0,
                    value=REAL,
                    only=only,
                ),
                above(OURS, STATIC, 0.0, "evolution finds them", value=REAL, only=only),
                above(RANDOM, STATIC, -20.0, "it is at chance", value=REAL, only=only),
                above(OURS, LATE, 0.0, "read before regrowth (released code)", value=REAL, only=only),
            )
        ),
        *(
            claim
            for only in (*_known, *_classes)
            for claim in (above(OURS, RANDOM, only=only), above(OURS, VARIANCE, only=only))
        ),
    ],
    data=lambda options, where: [] if where["table"] == WIDE else list(table(where["table"])),
    facts=facts,
    tables=[
        Columns(
            "{where}",
            {
                "real features (%)": REAL,
                "accuracy of trees (%)": Value(),
                "seconds of choosing": mean_of("seconds", "{:.3f}"),
                "bytes held": mean_of("bytes", "{:,.0f}"),
            },
        )
    ],
    overall=[
        Curves(
            "real",
            "Real features among those chosen, 20 of 500 and of 264",
            "accuracy of trees on them (%)",
            "real features (%)",
            [OURS, LATE, STATIC, DENSE, VARIANCE, RANDOM],
            x=Value(),
            levels=[MADE, NOISY],
            value=REAL,
            points=True,
            alt="A point per arm and table with columns of noise.",
        )
    ],
    notes=lambda options: [
        f"Autoencoders of {options.hidden} units, {options.epochs} epochs of batches of 100, the method's "
        "defaults otherwise; two thirds of the rows choose and train 50 extremely randomised trees, the rest "
        "tests them. No labels are seen in choosing, and nothing was tuned. 20 features are chosen of each "
        "table (Isolet is a fifth of it). The dense autoencoder has the same loop, without dropped "
        "connections.",
        "Of Isolet and COIL-20 50 were chosen at first, as in the paper: there random ones did as well as "
        "any, as many features say the same.",
    ],
)
