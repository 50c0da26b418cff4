"""`zoo reproduce teddy`: TEDDY beside random edges, the reversed score, magnitude weights, UGS and dense.

Levels are those of the released schedule. Everything that a comparison shares is shared: initial weights,
teacher, recipe, counts of kept edges and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch_geometric.data import Data

from zoo.errors import ConfigError
from zoo.graph import verdicts
from zoo.graph.arms import ARCHITECTURES, Setting, arm_run, dense_run, levels_of, ugs_run
from zoo.graph.data import load_graph
from zoo.harness.experiments import CellCache, Experiment, ExperimentResult

# Arms that are run at every level, and those that are run at the main levels only; the rest where a verdict
# needs them.
LEVEL_ARMS = ("teddy", "teddy, no distillation", "random", "random, no distillation")
MAIN_ARMS = ("reversed", "magnitude weights")


@dataclass(frozen=True)
class TeddyConfig:
    """Options of the experiment.

    Args:
        architectures: which of gcn, gin, gat.
        datasets: the first one gets all levels and UGS.
        levels: levels k of the released schedule (1 to 20) for the first data set.
        main_levels: levels with the reversed score and magnitude weights, too; the only ones of the other
            data sets.
        seeds: how many seeds, from 0.
        ugs_seeds: how many seeds for UGS, which trains 20 rounds for each; 0 leaves it out.
        epochs: epochs per training.
        hidden: width of the hidden layer (the paper has 512; a run takes a quarter of the time with 128).
        distillation: lambda of the distilled arms.
    """

    architectures: tuple[str, ...] = ARCHITECTURES
    datasets: tuple[str, ...] = ("cora", "citeseer")
    levels: tuple[int, ...] = (3, 5, 10, 15, 20)
    main_levels: tuple[int, ...] = (10, 20)
    seeds: int = 5
    ugs_seeds: int = 5
    epochs: int = 200
    hidden: int = 128
    distillation: float = 1.0

    def __post_init__(self) -> None:
        if unknown := [name for name in self.architectures if name not in ARCHITECTURES]:
            raise ConfigError(f"Unknown architecture {unknown[0]!r}. There are: {', '.join(ARCHITECTURES)}.")
        if wrong := [k for k in (*self.levels, *self.main_levels) if not 1 <= k <= 20]:
            raise ConfigError(f"Levels go from 1 to 20. Received: {wrong[0]}.")
        if not self.datasets or not self.levels or self.seeds < 1 or self.ugs_seeds < 0 or self.epochs < 1:
            raise ConfigError("datasets and levels must not be empty; seeds and epochs must be at least 1.")
        if self.hidden < 8 or self.hidden % 8:
            raise ConfigError(
                f"hidden must be a multiple of 8, the number of GAT's heads. Received: {self.hidden}."
            )

    def levels_for(self, dataset: str) -> tuple[int, ...]:
        """The levels run on a data set."""
        return self.levels if dataset == self.datasets[0] else self.main_levels


@dataclass(frozen=True)
class Job:
    """One cell: an arm (or dense, or UGS) of one architecture, data set, level and seed."""

    setting: Setting
    arm: str
    seed: int
    level: str = ""
    sparsities: tuple[float, float] = (0.0, 0.0)
    distillation: float = 1.0
    ugs_levels: tuple[int, ...] = ()

    def run(self, data: Data, cells: CellCache) -> list[dict[str, Any]]:
        """The cell's results as flat rows."""
        base = {
            "dataset": self.setting.dataset,
            "architecture": self.setting.architecture,
            "arm": self.arm,
            "seed": self.seed,
        }
        if self.arm == "ugs":
            found = ugs_run(self.setting, data, self.ugs_levels, self.seed, cells)
            return [{**base, "level": f"k{k}", **values} for k, values in found.items()]
        if self.arm == "dense":
            return [{**base, "level": "dense", **dense_run(self.setting, data, self.seed, cells)}]
        values = arm_run(self.setting, data, self.arm, self.sparsities, self.seed, cells, self.distillation)
        return [{**base, "level": self.level, "lambda": self.distillation, **values}]


def jobs(config: TeddyConfig) -> Iterator[Job]:
    """All cells, the most informative first."""
    for dataset in config.datasets:
        settings = [Setting(a, dataset, config.epochs, config.hidden) for a in config.architectures]
        for seed in range(config.seeds):
            for setting in settings:
                yield from _jobs_of_seed(config, setting, seed)
        if dataset == config.datasets[0]:
            for seed in range(config.ugs_seeds):
                for setting in settings:
                    yield Job(setting, "ugs", seed, ugs_levels=config.levels_for(dataset))


def _jobs_of_seed(config: TeddyConfig, setting: Setting, seed: int) -> Iterator[Job]:
    weight = config.distillation
    yield Job(setting, "dense", seed)
    yield Job(setting, "dense, distilled", seed, "dense", distillation=weight)
    first = setting.dataset == config.datasets[0]
    for k, sparsities in levels_of(config.levels_for(setting.dataset)).items():
        for arm in LEVEL_ARMS + (MAIN_ARMS if k in config.main_levels else ()):
            yield Job(setting, arm, seed, f"k{k}", sparsities, weight)
    for arm in (
        "teddy",
        "random",
        "reversed",
    ):  # the order of the score alone: weights dense, no distillation
        yield Job(setting, f"{arm}, no distillation", seed, "edges 30 %", (0.3, 0.0), weight)
    if first:
        yield Job(setting, "l0 weights", seed, "weights 90 %", (0.0, 0.9), weight)
        for other in (0.1, 10.0):
            yield Job(setting, "teddy", seed, f"k10, lambda {other:g}", levels_of((10,))[10], other)


class TeddyExperiment(Experiment):
    """TEDDY's comparison on small citation graphs and the digits."""

    name: ClassVar[str] = "teddy"
    title: ClassVar[str] = "TEDDY: graph lottery tickets from degrees, in one training"
    paper: ClassVar[str] = (
        "Hyunjin Seo, Jihun Yun, Eunho Yang: TEDDY: Trimming Edges with Degree-based Discrimination "
        "Strategy, ICLR 2024"
    )
    config_class: ClassVar[type] = TeddyConfig

    def run(
        self, config: TeddyConfig, cells: CellCache, progress: Callable[..., None] | None = None
    ) -> ExperimentResult:
        """Run what is missing and sum up."""
        work = list(jobs(config))
        graphs = {dataset: load_graph(dataset) for dataset in config.datasets}
        rows: list[dict[str, Any]] = []
        for done, job in enumerate(work, start=1):
            rows += job.run(graphs[job.setting.dataset], cells)
            if progress is not None:
                progress(
                    done, len(work), f"{job.setting.architecture} {job.setting.dataset} {job.arm} {job.level}"
                )
        entries = {name: int(graph.edge_index.shape[1]) for name, graph in graphs.items()}
        return verdicts.summarise(rows, config.datasets, config.architectures, entries)
