"""`zoo reproduce consensus`: blocks that gates agree to leave out, removed after one training."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from zoo.methods.consensus import Consensus, blocks_of, polarised, shares_of, unwrap_gates
from zoo.methods.contract import default_recipe
from zoo.shared.bench import compare, threads
from zoo.shared.structure.averaging import recalibrate_norms
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.structure.surgery import drop_layers
from zoo.shared.train import Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Columns, Curves, mean_of
from zoo.studies.study import Arm, Claim, Study, above, grid
from zoo.studies.tables import Verdict
from zoo.studies.view import Row, Value, View
from zoo.vision.data import accuracy
from zoo.vision.models import ResNet
from zoo.vision.studies import common
from zoo.vision.studies.small import SmallOptions, whole

OURS, LOOSE, RANDOM, DENSE = "polarised gates", "gates without polarisation", "random blocks", "all blocks"


@dataclass(frozen=True)
class ConsensusOptions(SmallOptions):
    """Options.

    Args:
        sparsity: share of the gated blocks that is to go.
        width: of the ResNet-20.
        epochs: of every training.
    """

    dataset: str = "cifar10-jpeg"
    train_images: int = 1500
    test_images: int = 1000
    sparsity: float = 0.5
    width: int = 8
    epochs: int = 7

    def resnet(self) -> ResNet:
        """ResNet-20, of whose nine blocks seven keep the shape of their input."""
        return ResNet(20, self.width, channels=3 if self.dataset.startswith("cifar10") else 1)


def measure(make: Any, options: ConsensusOptions, case: Row, cells: CellCache) -> Row:
    """Accuracy with gates and without, what is left, and the time of a forward pass against all blocks."""
    images, seed = options.images(), case["seed"]
    recipe = Recipe(**{**default_recipe(Consensus), "epochs": options.epochs, "lr": 0.1})
    job = options.job(recipe, seed)
    row: Row = {}
    start = reinitialised(options.resnet(), seed)
    if isinstance(make, Consensus):
        model = replace(make, sparsity=options.sparsity).train(start, job)
        shares = shares_of(model, job, len(job.batches))
        row = {"dynamic": accuracy(model, images, images.test), "polarised": polarised(list(shares.values()))}
        removed = unwrap_gates(model, shares)
        recalibrate_norms(model, (x for x, _ in job.sample(20)))
        row |= {"blocks": len(shares) - len(removed), "shares": [round(s, 3) for s in shares.values()]}
    else:
        model, names = start, list(blocks_of(start, job.sample(1)[0], job))
        if case["arm"] == RANDOM:
            order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
            gone = [names[i] for i in order[: round(options.sparsity * len(names))]]
            drop_layers(model, gone)
            names = [name for name in names if name not in gone]
        job.fit(model).run()
        row = {"blocks": len(names)}
    x, _ = whole(images, "test")
    with threads(1), torch.inference_mode():
        pair = {"dense": options.resnet().eval(), "cut": copy.deepcopy(model).eval()}
        calls = {name: partial(one, x[:64]) for name, one in pair.items()}
        times = compare(calls, rounds=5, block_seconds=0.05)
    speed = times["dense"].median / times["cut"].median
    parameters = sum(p.numel() for p in model.parameters())
    found = {"accuracy": accuracy(model, images, images.test), "speed": speed, "parameters": parameters}
    found |= {"flops": job.cost.flops, "seconds": job.cost.seconds}
    if "dynamic" in row:
        row["loss"] = row["dynamic"] - found["accuracy"]
    return row | found


def facts(view: View) -> list[Verdict]:
    """That the gates agree, and that the smaller network is faster."""
    agreed = view.mean(OURS, None, Value("polarised", 100.0))
    speed = view.mean(OURS, None, Value("speed", 1.0))
    blocks = view.mean(OURS, None, Value("blocks", 1.0))
    return [
        view.fact(
            "95 % of the gates agree on 98 % of the images", "zero penalty", f"{agreed:.0f} %", agreed >= 95
        ),
        view.fact(
            "half of the gated blocks go, and the network is faster by more than 1.2x",
            "50 % of the connections go (abstract)",
            f"{blocks:.1f} of 7 blocks stay, {speed:.2f}x",
            blocks <= 4 and speed > 1.2,
        ),
    ]


LOSS = Value("loss", 100.0, 1, lower=True)
ARMS = {
    OURS: Arm(Consensus(), control=RANDOM),
    LOOSE: Arm(Consensus(polarise=0.0)),
    RANDOM: Arm(),
    DENSE: Arm(),
}
STUDY = Study(
    "consensus",
    "Consensus sub-networks: polarised gates in one training",
    "Li et al., ECML PKDD 2023, arXiv 2302.10798",
    ConsensusOptions,
    ARMS,
    lambda options: grid(ARMS, ["half of the blocks"], options.seeds),
    measure,
    papers=(37,),
    claims=[
        above(OURS, DENSE, -1.0, "less than 1 % below (abstract)"),
        above(OURS, LOOSE, 0.0, "gates become a consensus (abstract)"),
        above(OURS, RANDOM),
        Claim("freezing loses no more than 0.3 points", "one pass (title)", OURS, "", -0.3, value=LOSS),
        above(OURS, LOOSE, 0.0, "gates become a consensus (abstract)", value=LOSS),
    ],
    data=lambda options, where: common.content(options.images()),
    facts=facts,
    tables=[
        Columns(
            "One training, then half of the blocks removed",
            {
                "accuracy with gates (%)": Value("dynamic"),
                "accuracy, cut (%)": Value(),
                "lost by freezing": LOSS,
                "gates that agree (%)": Value("polarised"),
                "blocks of 7": mean_of("blocks", "{:.1f}"),
                "parameters": mean_of("parameters", "{:,.0f}"),
                "times faster": Value("speed", 1.0, 2),
                "seconds of training": mean_of("seconds", "{:.1f}"),
            },
            "Times faster: a forward pass of 64 images on one thread, against all blocks. Nothing is "
            "fine-tuned after the cut; the statistics of norms are measured anew.",
        )
    ],
    plots=[
        Curves(
            "speed",
            "Accuracy after one training against measured speed",
            "times faster than all blocks",
            "test accuracy (%)",
            x=Value("speed", 1.0),
            levels=["half of the blocks"],
            points=True,
            alt="A point per arm.",
        )
    ],
    notes=lambda options: [
        f"{options.dataset} at 16x16, {options.train_images:,} training images, ResNet-20 of width "
        f"{options.width}, {options.epochs} epochs for every arm, the weights of both penalties 1: nothing "
        "was tuned. Random blocks are removed before the training.",
        "Nothing can be told of accuracy here: in so short a training half of the blocks are worth as much "
        "as all of them, and seeds differ by up to 7 points, so that a difference of 1 point would take more "
        "than a hundred seeds.",
    ],
)
