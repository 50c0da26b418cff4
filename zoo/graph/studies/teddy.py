"""`zoo reproduce teddy`: TEDDY beside random edges, the reversed score, magnitude weights, UGS and dense.

Levels are those of the released schedule. Everything that a comparison shares is shared: initial weights,
teacher (the dense run of the seed), recipe, counts of kept edges and weights. Times are processor seconds of
the trainings alone. TEDDY's edges are the same for every seed, so its spread holds no variance of the edge
set.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch_geometric.data import Data

from zoo.errors import ConfigError
from zoo.graph.data import load_graph
from zoo.graph.models import GAT, GCN, GIN, GraphModel
from zoo.graph.teddy import Order, released_level, ticket_mask
from zoo.graph.train import (
    Best,
    Constraint,
    FixedMasks,
    L0Ball,
    accuracy_of,
    graph_job,
    graph_recipe,
    train_best,
)
from zoo.graph.ugs import UGSConfig, ugs
from zoo.names import check_known
from zoo.studies.cells import CellCache
from zoo.studies.figures import Curves, Grid, when
from zoo.studies.options import StudyOptions
from zoo.studies.study import BAR, Arm, Claim, Study
from zoo.studies.tables import Verdict
from zoo.studies.view import Row, Value, View

ARCHITECTURES: dict[str, Callable[..., GraphModel]] = {"gcn": GCN, "gin": GIN, "gat": GAT}
EDGES, WEIGHTS = "edges 30 %", "weights 90 %"
BARE = ", no distillation"
# Arms at every level, and those at the main levels only; the rest where a verdict needs them.
LEVEL_ARMS = ("teddy", f"teddy{BARE}", "random", f"random{BARE}")
MAIN_ARMS = ("reversed", "magnitude weights")
TAUGHT = "ugs, distilled"
CURVES = (*LEVEL_ARMS, *MAIN_ARMS, "ugs", TAUGHT)


@dataclass(frozen=True)
class TeddyOptions(StudyOptions):
    """Options of the study.

    Args:
        architectures: which of gcn, gin, gat.
        datasets: the first one gets all levels and UGS.
        levels: levels k of the released schedule (1 to 20) for the first data set.
        main_levels: levels with the reversed score and magnitude weights, too; the only ones of the other
            data sets.
        ugs_seeds: how many seeds for UGS, which trains 20 rounds for each; 0 leaves it out.
        epochs: epochs per training.
        hidden: width of the hidden layer (the paper has 512; a run takes a quarter of the time with 128).
        distillation: lambda of the distilled arms.
        arms: which; by default all.
    """

    may_be_none: ClassVar[tuple[str, ...]] = ("ugs_seeds", "arms")
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    datasets: tuple[str, ...] = ("cora", "citeseer")
    levels: tuple[int, ...] = (3, 5, 10, 15, 20)
    main_levels: tuple[int, ...] = (10, 20)
    seeds: int = 5
    ugs_seeds: int = 5
    epochs: int = 200
    hidden: int = 128
    distillation: float = 1.0
    arms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_known("architecture", self.architectures, ARCHITECTURES)
        check_known("arm", self.arms, ARMS)
        if wrong := [k for k in (*self.levels, *self.main_levels) if not 1 <= k <= 20]:
            raise ConfigError(f"Levels go from 1 to 20. Received: {wrong[0]}.")
        if self.hidden < 8 or self.hidden % 8:
            raise ConfigError(
                f"hidden must be a multiple of 8, the number of GAT's heads. Received: {self.hidden}."
            )


@dataclass(frozen=True)
class Way:
    """One way to a sparse model.

    Args:
        edges: the order in which edges go, or None for the whole graph.
        weights: projection on the l0 ball at each step; magnitude of the trained dense weights, then rewound
            and trained with that mask; or dense.
        distilled: whether the dense run's logits are distilled.
    """

    edges: Order | None
    weights: Literal["l0", "magnitude", "dense"]
    distilled: bool


@dataclass(frozen=True)
class Rival:
    """UGS with the rates that were released for it, or with TEDDY's rates and its distillation in every
    training."""

    as_teddy: bool


def new_model(architecture: str, data: Data, hidden: int, seed: int) -> GraphModel:
    """A freshly initialised model for this graph; sets torch's seed, on which initialisation and dropout
    depend.

    Args:
        architecture: gcn, gat or gin.
        data: features and labels give the widths of input and output.
        hidden: width of the hidden layer; GAT divides it by its 8 heads.
        seed: of the initial weights and of everything random after them.
    """
    torch.manual_seed(seed)
    inputs, classes = data.x.shape[1], int(data.y.max()) + 1
    check_known("architecture", [architecture], ARCHITECTURES)
    width = hidden // 8 if architecture == "gat" else hidden
    return ARCHITECTURES[architecture](inputs, width, classes)


def loops_count(architecture: str) -> bool:
    """Whether self-loops are added before scoring and count among the entries: TEDDY does so for GAT."""
    return architecture == "gat"


def edge_mask(architecture: str, data: Data, sparsity: float, order: Order | None, seed: int) -> Tensor:
    """The kept entries of an arm; random draws depend on the seed, TEDDY's do not."""
    if order is None or sparsity == 0:
        return torch.ones(data.edge_index.shape[1], dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    loops = loops_count(architecture)
    nodes = int(data.num_nodes)
    return ticket_mask(
        data.edge_index, nodes, sparsity, add_self_loops=loops, order=order, generator=generator
    )


def measure(make: Way | Rival | None, options: TeddyOptions, case: Row, cells: CellCache) -> Row | list[Row]:
    """One run of an arm; of UGS all levels."""
    data = load_graph(case["dataset"])
    if case["arm"] == "dense":
        return dense_run(options, data, case, cells)[0]
    if isinstance(make, Rival):
        return ugs_run(make, options, data, case, cells)
    assert make is not None
    needs_dense = make.distilled or make.weights == "magnitude"
    dense, teacher = dense_run(options, data, case, cells) if needs_dense else ({"seconds": 0.0}, {})
    edge_sparsity, weight_sparsity = _sparsities(case["level"])
    keep = edge_mask(case["architecture"], data, edge_sparsity, make.edges, case["seed"])
    model = new_model(case["architecture"], data, options.hidden, case["seed"])
    start = time.process_time()
    constraint = _constraint(model, make, weight_sparsity, teacher)
    job = graph_job(
        model,
        data,
        graph_recipe(options.epochs),
        keep=keep,
        teacher=teacher["logits"] if make.distilled else None,
        distillation=case["lambda"] if make.distilled else 0.0,
        seed=case["seed"],
    )
    best = train_best(model, job, constraint)
    seconds = time.process_time() - start + dense["seconds"]
    total = sum(p.numel() for p in model.parameters())
    kept = sum(int(m.sum()) for m in best.masks.values()) if best.masks else total
    return _figures(best, data, seconds, int(keep.sum()), kept)


def dense_run(
    options: TeddyOptions, data: Data, case: Row, cells: CellCache
) -> tuple[Row, dict[str, Tensor]]:
    """The dense model of this seed: its figures, and logits and weights for the other arms."""
    place = {name: case[name] for name in ("dataset", "architecture", "seed")}
    key = STUDY.key(options, {**place, "arm": "dense", "level": "dense"}) | {"what": "teacher"}

    def compute() -> tuple[Row, dict[str, Tensor]]:
        model = new_model(case["architecture"], data, options.hidden, case["seed"])
        start = time.process_time()
        best = train_best(model, graph_job(model, data, graph_recipe(options.epochs), seed=case["seed"]))
        seconds = time.process_time() - start
        weights = sum(p.numel() for p in model.parameters())
        figures = _figures(best, data, seconds, data.edge_index.shape[1], weights)
        return figures, {"logits": best.logits, **{f"weights/{k}": v for k, v in best.weights.items()}}

    return cells.tensors(key, compute)


def ugs_run(make: Rival, options: TeddyOptions, data: Data, case: Row, cells: CellCache) -> list[Row]:
    """All levels of UGS for one seed."""
    config, taught = UGSConfig.released(case["dataset"], options.epochs), {}
    if make.as_teddy:
        usual = graph_recipe()
        config = dataclasses.replace(config, lr=usual.lr, weight_decay=usual.weight_decay)
        logits = dense_run(options, data, case, cells)[1]["logits"]
        taught = {"teacher": logits, "distillation": case["lambda"]}
    model = new_model(case["architecture"], data, options.hidden, case["seed"])
    levels = tuple(int(name[1:]) for name in case["level"].split())
    loops = loops_count(case["architecture"])
    found = ugs(model, data, config, levels, self_loops_count=loops, **taught)
    rows = []
    for k, level in found.items():
        kept = sum(int(m.sum()) for m in level.best.masks.values())
        figures = _figures(level.best, data, level.seconds, int(level.keep.sum()), kept)
        rows.append({"level": f"k{k}", **figures})
    return rows


def _sparsities(level: str) -> tuple[float, float]:
    """Shares of edges and of weights that a level drops."""
    named = {EDGES: (0.3, 0.0), WEIGHTS: (0.0, 0.9), "dense": (0.0, 0.0)}
    return named.get(level) or released_level(int(level.partition(",")[0][1:]))


def _constraint(model: GraphModel, way: Way, sparsity: float, dense: dict[str, Tensor]) -> Constraint | None:
    if way.weights == "dense" or sparsity == 0:
        return None
    ball = L0Ball.for_sparsity(model, sparsity)
    if way.weights == "l0":
        return ball
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.data.copy_(dense[f"weights/{name}"])
    fixed = FixedMasks(ball(model))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(initial[name])
    fixed(model)
    return fixed


def _figures(best: Best, data: Data, seconds: float, entries: int, weights: int) -> Row:
    return {
        "test": accuracy_of(best.logits, data.y, data.test_mask.nonzero().flatten()),
        "val": best.val_accuracy,
        "epoch": best.epoch,
        "seconds": seconds,
        "edges_kept": entries,
        "weights_kept": weights,
    }


def cases(options: TeddyOptions) -> Iterator[Row]:
    """The runs of the arms that are asked for, the most informative first."""
    return (case for case in _cases(options) if not options.arms or case["arm"] in options.arms)


def _cases(options: TeddyOptions) -> Iterator[Row]:
    for dataset in options.datasets:
        first = dataset == options.datasets[0]
        levels = options.levels if first else options.main_levels
        for seed in range(options.seeds):
            for architecture in options.architectures:
                place = {"dataset": dataset, "architecture": architecture, "seed": seed}
                for arm, level, weight in _arms(options, levels, first):
                    rest = {} if arm == "dense" else {"lambda": weight}
                    yield {**place, "arm": arm, "level": level, **rest}
        for seed in range(options.ugs_seeds if first else 0):
            for architecture in options.architectures:
                place = {"dataset": dataset, "architecture": architecture, "seed": seed}
                level = " ".join(f"k{k}" for k in levels)
                yield {**place, "arm": "ugs", "level": level}
                yield {**place, "arm": TAUGHT, "level": level, "lambda": options.distillation}


def _arms(options: TeddyOptions, levels: tuple[int, ...], first: bool) -> Iterator[tuple[str, str, float]]:
    weight = options.distillation
    yield "dense", "dense", weight
    yield "dense, distilled", "dense", weight
    for k in levels:
        for arm in LEVEL_ARMS + (MAIN_ARMS if k in options.main_levels else ()):
            yield arm, f"k{k}", weight
    for arm in ("teddy", "random", "reversed"):  # the order of the score alone: weights dense
        yield f"{arm}{BARE}", EDGES, weight
    if first:
        yield "l0 weights", WEIGHTS, weight
        for other in (0.1, 10.0):
            yield "teddy", f"k10, lambda {other:g}", other


def _levels(view: View) -> list[str]:
    found = [level for level in view.levels() if level.startswith("k") and "," not in level]
    return sorted(found, key=lambda level: int(level[1:]))


def _columns(view: View) -> list[str]:
    others = (EDGES, WEIGHTS, "k10, lambda 0.1", "k10, lambda 10")
    present = view.levels()
    return ["dense", *_levels(view), *(level for level in others if level in present)]


def _heading(view: View, level: str) -> str:
    teddy, dense = view.chosen("teddy", level), view.chosen("dense", "dense")
    if level not in _levels(view) or not teddy or not dense:
        return level
    one, dropped = teddy[0], 1 - teddy[0]["edges_kept"] / dense[0]["edges_kept"]
    weights = 100 * one["weights_kept"] / max(row["weights_kept"] for row in view.rows)
    return f"{level} ({100 * dropped:.0f} / {100 - weights:.0f} %)"


def _note(view: View) -> str:
    seeds = {arm: len({row["seed"] for row in view.rows if row["arm"] == arm}) for arm in view.arms()}
    most = max(seeds.values())
    fewer = "".join(f"; {arm}: {count}" for arm, count in seeds.items() if count != most)
    dense = view.chosen("dense", "dense")
    entries = f"; {dense[0]['edges_kept']} directed entries" if dense else ""
    return f"{most} seeds{fewer}. Level k: share of edges dropped / of weights zero{entries}."


def _first(view: View) -> bool:
    return view.where["dataset"] == view.options.datasets[0]


def facts(view: View) -> list[Verdict]:
    """What the highest level costs TEDDY and UGS."""
    claim = "{where}: the highest level costs less training than UGS"
    published = "one training instead of twenty rounds"
    if not _first(view) or not _levels(view):
        return []
    teddy, other = (view.values(arm, _levels(view)[-1], SECONDS) for arm in ("teddy", "ugs"))
    if not teddy or not other:
        return [view.fact(claim, published, "", None)]
    ours, theirs = statistics.fmean(teddy), statistics.fmean(other)
    measured = f"{ours:.1f} s with the teacher against {theirs:.0f} s, {theirs / ours:.0f} times less"
    return [view.fact(claim, published, measured, ours < theirs)]


def claims(options: TeddyOptions) -> list[Claim]:
    """What the order of the edges is worth, what distillation is, and the whole method against UGS."""
    only, bare = {"dataset": options.datasets[0]}, f"teddy{BARE}"
    levels = tuple(f"k{k}" for k in sorted({*options.levels, *options.main_levels}))
    mean: dict[str, Any] = {"at": levels, "mean": True}
    matter, score = "the score finds the edges that matter", "30 % of the edges dropped by TEDDY's score beat"
    same = "TEDDY beats random edges with the same distillation, mean over levels"
    without = "without distillation TEDDY's edges beat random ones, mean over levels"
    ugs, surpasses = (
        "TEDDY in one training beats UGS, mean over levels",
        "significantly surpasses iterative methods",
    )
    equal = "TEDDY in one training beats UGS with the same rates and distillation, mean over levels"
    bare_ugs = "TEDDY without distillation beats UGS, mean over levels"
    five = "TEDDY at level 5 is not below dense minus 1 point"
    top = "TEDDY at level 20 is 5 points above random edges without distillation"
    l0 = "90 % of the weights zero by l0 projection cost at most 1 point"
    found = [
        Claim(f"{score} the reversed order by 2 points", BAR, bare, f"reversed{BARE}", 2.0, (EDGES,)),
        Claim(f"{score} random ones", matter, bare, f"random{BARE}", 0.0, (EDGES,)),
        Claim(same, matter, "teddy", "random", **mean),
        Claim(without, matter, bare, f"random{BARE}", **mean),
        Claim("distillation adds to TEDDY, mean over levels", "helps", "teddy", bare, **mean),
        Claim(ugs, surpasses, "teddy", "ugs", **mean, only=only),
        Claim(equal, surpasses, "teddy", TAUGHT, **mean, only=only),
        Claim(bare_ugs, "not stated", bare, "ugs", **mean, only=only),
        Claim(five, BAR, "teddy", "dense", -1.0, ("k5",), only=only),
        Claim(top, BAR, "teddy", f"random{BARE}", 5.0, ("k20",), only=only),
        Claim(l0, BAR, "l0 weights", "dense", -1.0, (WEIGHTS,), only=only),
    ]
    return [dataclasses.replace(claim, text=f"{{where}}: {claim.text}") for claim in found]


def data(options: TeddyOptions, where: Row) -> list[Any]:
    """What the digest of a graph is taken of."""
    graph = load_graph(where["dataset"])
    return [graph.x, graph.edge_index, graph.y, graph.train_mask, graph.val_mask, graph.test_mask]


SECONDS = Value("seconds", 1.0)
ARMS = {
    "dense": Arm(flat=True),
    "dense, distilled": Arm(Way(None, "dense", True), flat=True),
    "teddy": Arm(Way("teddy", "l0", True)),
    f"teddy{BARE}": Arm(Way("teddy", "l0", False)),
    "random": Arm(Way("random", "l0", True)),
    f"random{BARE}": Arm(Way("random", "l0", False)),
    "reversed": Arm(Way("reversed", "l0", True)),
    "magnitude weights": Arm(Way(None, "magnitude", False)),
    f"reversed{BARE}": Arm(Way("reversed", "l0", False)),
    "l0 weights": Arm(Way(None, "l0", False)),
    "ugs": Arm(Rival(as_teddy=False), control=f"random{BARE}"),
    TAUGHT: Arm(Rival(as_teddy=True), control="random"),
}
STUDY = Study(
    "teddy",
    "TEDDY: graph lottery tickets from degrees, in one training",
    "Hyunjin Seo, Jihun Yun, Eunho Yang: TEDDY: Trimming Edges with Degree-based Discrimination Strategy, "
    "ICLR 2024",
    TeddyOptions,
    ARMS,
    cases,
    measure,
    papers=(1,),
    claims=claims,
    value=Value("test"),
    varies=(
        "architectures",
        "datasets",
        "levels",
        "main_levels",
        "seeds",
        "ugs_seeds",
        "distillation",
        "arms",
    ),
    data=data,
    by=("dataset", "architecture"),
    titles={
        "gcn": "GCN",
        "gin": "GIN",
        "gat": "GAT",
        "cora": "Cora",
        "citeseer": "CiteSeer",
        "cs": "Coauthor-CS",
        "pubmed": "PubMed",
    },
    facts=facts,
    tables=[
        Grid("{where}: test accuracy in %", _note, levels=_columns, columns=_heading),
        when(
            _first,
            Grid(
                "{where}: processor seconds of training to reach a level",
                value=SECONDS,
                arms=("dense", *CURVES),
                levels=_levels,
            ),
        ),
    ],
    plots=[
        when(
            _first,
            Curves(
                "accuracy-{slug}",
                "{where}: accuracy against the level of sparsity",
                "level k: 1 - 0.95^k of the edges and 1 - 0.9^k of the weights dropped",
                "test accuracy [%]",
                CURVES,
                lambda level: int(level[1:]),
                _levels,
                ("dense", "dense, distilled"),
            ),
        ),
        when(
            _first,
            Curves(
                "time-{slug}",
                "{where}: accuracy against total training time",
                "processor time of all trainings needed [s]",
                "test accuracy [%]",
                ("teddy", f"teddy{BARE}", "magnitude weights", "ugs", TAUGHT),
                SECONDS,
                _levels,
                ("dense",),
                log_x=True,
                points=True,
            ),
        ),
    ],
    notes=lambda options: [
        "Accuracy is that of the test nodes at the epoch of best validation accuracy, in percent: mean ± "
        "sample standard deviation over seeds. Verdicts rest on the seeds: the nodes of a graph are "
        "neighbours, so that a test over nodes as if they were independent would promise too much.",
        "Times are processor seconds of all trainings that an arm needs, on one thread: TEDDY and the "
        "distilled arms one dense training and one of their own; UGS every round before the level.",
        "Magnitude weights and l0 weights keep all edges: they show what the weights alone cost. GAT counts "
        "self-loops among the entries, as TEDDY does, so that it loses more edges at the same level.",
        "Published numbers could not be had; the paper's claim is that TEDDY significantly surpasses "
        "iterative methods.",
        "UGS runs with the rates released for GCN, whatever the architecture, and is not distilled; 'ugs, "
        "distilled' has TEDDY's rates and its distillation in every training, and is the rival that counts.",
        "No arm was tuned here: rates and decays are those that the papers released.",
        "UGS does not beat random edges of equal number: what TEDDY is above it says little of TEDDY's "
        "edges. Of these the comparisons with random edges tell, whose smallest visible difference is 0.6 to "
        "2 points.",
    ],
)
