"""`zoo reproduce random-search`: does choosing among random sub-networks pay, and does a gradient search."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from zoo.methods.contract import default_recipe
from zoo.methods.random_search import RandomSearch
from zoo.methods.training import example_of
from zoo.shared.learned.gates import HardConcrete
from zoo.shared.masks.topk import topk_mask
from zoo.shared.structure.groups import trace_groups
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.structure.surgery import cut
from zoo.shared.train import Job, Recipe
from zoo.studies.cells import CellCache
from zoo.studies.figures import Columns, Curves, mean_of
from zoo.studies.study import Arm, Study, above, grid
from zoo.studies.view import Row, Value
from zoo.vision.data import accuracy
from zoo.vision.models import MLP
from zoo.vision.studies import common
from zoo.vision.studies.small import SmallOptions

ONE, UNTRAINED, SHORT = "one random choice", "best of 200 untrained", "best of 8 after an epoch"
GATES, FREE, DENSE = "learned gates", "learned gates, free widths", "all units"
SEARCH = 8  # epochs of the gates, as many as the eight short trainings have together


@dataclass(frozen=True)
class SearchOptions(SmallOptions):
    """Options.

    Args:
        levels: shares of the hidden units that go.
        epochs: of the training of what was found.
    """

    seeds: int = 8
    train_images: int = 1000
    levels: tuple[float, ...] = (0.5, 0.9, 0.97)
    epochs: int = 10

    def mlp(self) -> MLP:
        """Two hidden layers of 128 units."""
        return MLP(int(self.images().train.images[0].numel()), (128, 128))


def by_gates(model: nn.Module, level: float, job: Job, free: bool) -> nn.Module:
    """As differentiable search does it (DARTS): a stochastic gate at each unit is trained with the weights,
    the units with the most open gates are kept, and what is left is trained from the first weights.

    Args:
        model: with fresh weights.
        level: share of the units that go; of each layer, unless `free`.
    """
    searched = reinitialised(model, job.seed)
    groups = trace_groups(searched, example_of(job))
    gates = {name: groups.gate(searched, name, HardConcrete) for name in groups}
    fit = job.fit(searched, epochs=SEARCH)

    def resample() -> None:
        for gate in gates.values():
            if isinstance(gate, HardConcrete):
                gate.resample()

    fit.run(resample)
    scores = {name: gate.logits.detach() for name, gate in gates.items()}
    made = reinitialised(model, job.seed)
    kept = {name: len(score) - int(level * len(score)) for name, score in scores.items()}
    if free:
        keep: dict[str, Tensor] = groups.select(scores, sum(kept.values()))
    else:
        keep = {name: topk_mask(score, kept[name]) for name, score in scores.items()}
    cut(made, trace_groups(made, example_of(job)), keep)
    job.fit(made).run()
    return made.eval()


def measure(make: Any, options: SearchOptions, case: Row, cells: CellCache) -> Row:
    """Accuracy of the network that was found, and the cost with the search."""
    images, seed, start = options.images(), case["seed"], time.process_time()
    job = options.job(Recipe(**{**default_recipe(RandomSearch), "epochs": options.epochs}), seed)
    model: nn.Module = reinitialised(options.mlp(), seed)
    if isinstance(make, RandomSearch):
        model = replace(make, sparsity=case["level"]).sparsify(model, job).model
    elif case["arm"] == DENSE:
        job.fit(model).run()
    else:
        model = by_gates(model, case["level"], job, case["arm"] == FREE)
    found = {"accuracy": accuracy(model, images, images.test), "seconds": time.process_time() - start}
    return found | {"parameters": sum(p.numel() for p in model.parameters())}


ARMS = {
    DENSE: Arm(flat=True),
    ONE: Arm(RandomSearch(candidates=1)),
    UNTRAINED: Arm(RandomSearch(candidates=200)),
    SHORT: Arm(RandomSearch(candidates=8, short=1)),
    GATES: Arm(),
    FREE: Arm(),
}
STUDY = Study(
    "random-search",
    "Random search as the baseline of sparse architecture search",
    "Oldewage et al., 2024, arXiv 2403.08265",
    SearchOptions,
    ARMS,
    lambda options: [
        *grid(ARMS, [0.0], options.seeds, [DENSE]),
        *grid(ARMS, options.levels, options.seeds, [ONE, UNTRAINED, SHORT, GATES, FREE]),
    ],
    measure,
    papers=(36,),
    claims=lambda options: [
        above(ONE, UNTRAINED, -1.0, "neither better nor faster (abstract)", at=options.levels),
        above(SHORT, GATES, -1.0, at=options.levels),
        above(FREE, SHORT, 0.0, at=options.levels[1:]),
        above(ONE, DENSE, -1.0, "much survives (abstract)", at=options.levels[:1]),
    ],
    data=lambda options, where: common.content(options.images()),
    tables=[
        Columns(
            "What was found, trained",
            {
                "accuracy (%)": Value(),
                "parameters": mean_of("parameters", "{:,.0f}"),
                "seconds, search included": mean_of("seconds", "{:.2f}"),
            },
            arms=[DENSE, ONE, UNTRAINED, SHORT, GATES, FREE],
            levels=lambda view: list(view.options.levels),
            heading="units removed",
        )
    ],
    plots=[
        Curves(
            "accuracy",
            "Accuracy of sub-networks that were searched for",
            "hidden units left (%)",
            "test accuracy (%)",
            [ONE, UNTRAINED, SHORT, GATES, FREE],
            x=lambda level: round(100 * (1 - level), 6),
            levels=lambda view: list(view.options.levels),
            references=(DENSE,),
            log_x=True,
        )
    ],
    notes=lambda options: [
        f"{options.dataset} at half its size, {options.train_images:,} training images, a perceptron of two "
        f"times 128 hidden units, {options.epochs} epochs for every network that is kept. Short trainings "
        f"are judged on validation images; they and the gates have {SEARCH} epochs of search each. All arms "
        "but one remove the same share of each layer. Nothing was tuned.",
    ],
)
