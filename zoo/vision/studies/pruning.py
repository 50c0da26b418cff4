"""`zoo reproduce pruning-benchmark`: every unstructured method on one dense start, with equal epochs.

All arms of a seed share initial weights, data order and recipe. Those that prune a trained network start from
the same dense one and get `epochs` more; those that train sparse from the start get the epochs of both. A
verdict rests on the seeds; the tables by image see the variance of the test set instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

from zoo.errors import ConfigError
from zoo.methods.bip import BiP
from zoo.methods.dynamic_sparse import DynamicSparse
from zoo.methods.jackpots import LotteryJackpot
from zoo.methods.magnitude import MagnitudePruning
from zoo.methods.random_pruning import RandomPruning, Ratio
from zoo.methods.soups import SparseSoup
from zoo.methods.tickets import LotteryTicket
from zoo.names import check_known
from zoo.shared.pruning.budgets import check_sparsity
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.train import Cost, Recipe, device_named
from zoo.studies.cells import CellCache
from zoo.studies.figures import BySample, Columns, Curves, Grid, mean_of
from zoo.studies.options import StudyOptions
from zoo.studies.study import BAR, Arm, Claim, Study, grid
from zoo.studies.tables import Plot, Table
from zoo.studies.verdict import mean_cell
from zoo.studies.view import Row, Rows, Value, View
from zoo.vision.data import SOURCES, Images, Split, load_images
from zoo.vision.models import Classifier, ConvNet, ResNet, pretrained_resnet
from zoo.vision.studies import common

WIDTH_SPARSITY = 0.9  # at which the gap of random pruning to dense is followed over widths
DENSE, LONGER, LEADER, CHANCE = "dense", "dense, trained on", "global magnitude", "random mask"
ERK, GAP = "random, ERK", "gap that closes"
FLOOR = 0.0005
MAIN_ARMS = (LEADER, "global magnitude, floor", "uniform magnitude", CHANCE)
# As many curves as a plot has distinct colours; as points what differs in cost, which allocations hardly do.
CURVES = (LEADER, "uniform magnitude", "LAMP", CHANCE, "BiP", ERK, "RigL")
MOVED = ("SET", "RigL", "lottery ticket")
POINTS = (LEADER, "uniform magnitude", CHANCE, "jackpot", "BiP", "soup of 3", "random, uniform", ERK, *MOVED)


@dataclass(frozen=True)
class PruningOptions(StudyOptions):
    """Options of the benchmark; the defaults are those for digits.

    Args:
        dataset: digits (a small convolutional net), cifar10-jpeg or cifar10-true (ResNet-20).
        arms: which; by default all.
        sparsities: shares of zeros.
        outer: further shares of zeros, at which only global magnitude, its minimum threshold, uniform
            magnitude and the random mask are run.
        width: of the network; 0 for the usual one (ResNet-20's 16; 1 for the small net).
        widths: factors of it at which random pruning is compared with dense.
        dense_epochs: epochs of the dense start.
        epochs: epochs of every arm after it; arms from fresh weights get both together.
        lr: peak learning rate of training from fresh weights; half of it is that of fine-tuning.
        batch: images per step.
        train_images: use the first so many training images; 0 for all.
        test_images: use the first so many test images; 0 for all.
        pretrained: start from the published ResNet-20 in ZOO_DATA, which was trained on true pixels, so that
            `dense_epochs` count for arms from fresh weights only; its own training is not in the cost.
        device: where to train: cpu, cuda or cuda:1, say. Start the command several times at once and the
            processes divide the work; cells are the same on every device.
    """

    may_be_none: ClassVar[tuple[str, ...]] = ("widths",)
    dataset: str = "digits"
    arms: tuple[str, ...] = ()
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95, 0.98)
    outer: tuple[float, ...] = ()
    width: float = 0.0
    widths: tuple[float, ...] = (0.5, 2.0)
    dense_epochs: int = 12
    epochs: int = 6
    lr: float = 0.1
    batch: int = 64
    train_images: int = 0
    test_images: int = 0
    pretrained: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_known("image set", [self.dataset], SOURCES)
        check_known("arm", self.arms, ARMS)
        for sparsity in self.levels:
            check_sparsity(sparsity)
        if self.pretrained and (self.dataset != "cifar10-true" or self.width not in (0, 16) or self.widths):
            raise ConfigError(
                "the pretrained ResNet-20 has width 16 and saw true pixels: use --dataset cifar10-true, the "
                "usual width, and --widths without values"
            )
        if self.width < 0 or min(self.widths, default=1) <= 0:
            raise ConfigError(f"widths are positive; received {self.width} and {self.widths}")

    @property
    def levels(self) -> tuple[float, ...]:
        """All shares of zeros, rising."""
        return tuple(sorted({*self.sparsities, *self.outer}))

    def model(self, seed: int, factor: float = 1.0) -> Classifier:
        """The network with fresh weights, at a multiple of the width."""
        if self.dataset == "digits":
            usual: Classifier = ConvNet().wider((self.width or 1.0) * factor)
        else:
            usual = ResNet(20, round((self.width or 16.0) * factor))
        return reinitialised(usual.to(self.device), seed)

    def images(self) -> Images:
        """The images that train and test it."""
        data = load_images(self.dataset)
        if self.train_images:
            data = data.subset(self.train_images)
        if self.test_images:
            kept = Split(data.test.images[: self.test_images], data.test.labels[: self.test_images])
            data = replace(data, test=kept)
        return data.to(self.device)


def measure(make: Any, options: PruningOptions, case: Row, cells: CellCache) -> Row:
    """One run of an arm; the cost of what starts from the dense network includes that of the dense one."""
    images, seed, level = options.images(), case["seed"], case["level"]
    tuned = Recipe(options.epochs, options.lr / 2, options.batch)
    if from_scratch(case["arm"]):
        recipe = Recipe(options.dense_epochs + options.epochs, options.lr, options.batch)
        if case["arm"] == "lottery ticket":  # each round is as long as the dense training: the cost says so
            recipe = replace(recipe, epochs=options.dense_epochs)
        start = options.model(seed, case["width"])
        made, cost = common.made(make(sparsity=level), start, images, recipe, seed)
        return common.figures(made, images, cost)
    dense, before = dense_start(options, case, cells)
    if case["arm"] == DENSE:
        return before
    if case["arm"] == LONGER:
        made, cost = common.trained(dense, images, tuned, seed)
    else:
        if case["arm"] == "jackpot":
            tuned = replace(tuned, lr=0.1)
        if case["arm"] == "soup of 3":  # in two phases, or in one where there is one epoch only
            make = partial(make, phases=min(2, options.epochs))
        made, cost = common.made(make(sparsity=level), dense, images, tuned, seed)
    found = common.figures(made, images, cost)
    total = {key: found[key] + before[key] for key in ("flops", "seconds")}
    return {**found, **total, "own_flops": found["flops"], "own_seconds": found["seconds"]}


def from_scratch(arm: str) -> bool:
    """Whether an arm trains fresh weights: the dense training is no part of its cost."""
    return arm in MOVED or arm.startswith("random, ")


def dense_start(options: PruningOptions, case: Row, cells: CellCache) -> tuple[Classifier, Row]:
    """The dense network of a seed, and its figures."""
    key = STUDY.key(options, {**case, "arm": DENSE, "level": 0.0}) | {"what": "weights"}

    def compute() -> tuple[Row, dict[str, Any]]:
        images, seed = options.images(), case["seed"]
        if options.pretrained:
            model: Classifier = pretrained_resnet().to(options.device)
            cost = Cost()
        else:
            recipe = Recipe(options.dense_epochs, options.lr, options.batch)
            model, cost = common.trained(options.model(seed, case["width"]), images, recipe, seed)
        return common.figures(model, images, cost), model.state_dict()

    found, weights = cells.tensors(key, compute)
    model = options.model(case["seed"], case["width"])
    model.load_state_dict(weights)
    return model, found


def cases(options: PruningOptions) -> Iterator[Row]:
    """All runs, every seed of a level before the next level."""
    device_named(options.device)
    yield from ({**c, "width": 1.0} for c in grid(ARMS, [0.0], options.seeds, [DENSE, LONGER]))
    arms = options.arms or tuple(arm for arm in ARMS if arm not in (DENSE, LONGER))
    main = [arm for arm in arms if arm in MAIN_ARMS]
    for level in options.levels:
        chosen = arms if level in options.sparsities else main
        yield from ({**c, "width": 1.0} for c in grid(ARMS, [level], options.seeds, chosen) if chosen)
    for width in options.widths:
        yield from grid(ARMS, [0.0], options.seeds, [LONGER], width=width)
        yield from grid(ARMS, [WIDTH_SPARSITY], options.seeds, [ERK, LEADER], width=width)


def _at(arm: str, width: float) -> str:
    """What an arm is called at a multiple of the usual width."""
    return arm if width == 1.0 else f"{arm}, width {width:g}"


def _gap(width: float) -> tuple[tuple[str, Any], tuple[str, Any]]:
    """What the dense network and random pruning are called in the comparison of widths."""
    return (_at(LONGER, width), None), (_at(ERK, width), WIDTH_SPARSITY)


def with_gaps(rows: Rows, options: PruningOptions) -> Rows:
    """The rows with the width in the arm's name, and how much the gap of random pruning to dense closes from
    the narrowest network to the widest."""
    widths = sorted({row["width"] for row in rows})
    found = [{**row, "arm": _at(row["arm"], row["width"])} for row in rows]
    if len(widths) < 2:
        return found
    (dense, sparse), (wide, sparse_wide) = _gap(widths[0]), _gap(widths[-1])
    closes = View(STUDY, found, options, {}).contrast([dense, sparse_wide], [sparse, wide])
    level = f"width {widths[0]:g} to {widths[-1]:g}"
    more = [{"arm": GAP, "level": level, "seed": s, "accuracy": v / 100} for s, v in closes.items()]
    return [*found, *more]


def _usual(view: View) -> list[str]:
    return [arm for arm in view.arms() if arm in ARMS and arm not in (DENSE, LONGER)]


def _empty(view: View, arm: str, level: Any) -> str:
    most = max((row["empty_layers"] for row in view.chosen(arm, level)), default=0)
    return f" ({most} layers empty)" if most and arm in _usual(view) else ""


def _levels(view: View) -> tuple[float, ...]:
    return view.options.levels


def by_image(against: str, view: View) -> Table | None:
    """Differences from an arm with the test images as the sample, where the rows say which are right."""
    if not all("correct" in row for row in view.rows if row["arm"] != GAP):
        return None
    title, note = f"Against {against}, paired by image", "Points, 95 % interval over test images."
    made = BySample(against, lambda row: 100 * common.unpacked(row), title, note, _usual, _levels)
    return made(view)


def widths(view: View) -> Table | None:
    """Random pruning over widths."""
    factors, body = sorted({row["width"] for row in view.rows if "width" in row}), []
    for width in factors:
        dense, sparse = _gap(width)
        gap = mean_cell(list(view.contrast([dense], [sparse]).values()))
        body.append([f"{width:g}", view.cell(*dense), view.cell(*sparse), gap])
    columns = ["width factor", "dense", "random, ERK, 90 % zeros", "gap (points)"]
    return Table("Random pruning over widths", columns, body) if len(factors) > 1 else None


def cost_plot(view: View) -> Plot | None:
    """Accuracy against training cost, at 95 % zeros if that was run."""
    level = 0.95 if 0.95 in view.options.levels else view.options.levels[-1]
    return Curves(
        "cost",
        f"Accuracy at {level:.0%} zeros against total training cost, {view.options.dataset}",
        "training cost (GFLOPs)",
        "test accuracy (%)",
        POINTS,
        Value("flops", 1e-9),
        [level],
        log_x=True,
        points=True,
        alt="One point per method: what it reaches and what it costs, dense start included.",
    )(view)


def protocol(options: PruningOptions) -> str:
    """What was trained on what, in a sentence."""
    count = sum(p.numel() for p in options.model(0).parameters())
    usual = 1.0 if options.dataset == "digits" else 16.0
    net = "ResNet-20" if options.dataset != "digits" else "a net of four convolutions"
    images = f"{options.train_images:,} training images" if options.train_images else "all training images"
    tested = f"the first {options.test_images:,} test images" if options.test_images else "all test images"
    start = f"dense start of {options.dense_epochs} epochs"
    if options.pretrained:
        start = "published weights as the dense start (their training is not in the cost)"
    return (
        f"{SOURCES[options.dataset].title}: {net} (width {options.width or usual:g}, {count:,} parameters), "
        f"{images}, {tested}; {start}, {options.epochs} more epochs for every arm, batch {options.batch}, "
        f"{options.seeds} seeds."
    )


def claims(options: PruningOptions) -> list[Claim]:
    """Those at 90 and 95 %, the repair at the highest level, the gap over widths."""
    between = tuple(level for level in options.levels if 0.9 <= level <= 0.95)
    floor, uniform = "global magnitude, floor", "uniform magnitude"
    repairs = "the minimum threshold repairs what the global one loses at {level}"
    found = [
        Claim(
            "global magnitude is a point or more above uniform at {level}", BAR, LEADER, uniform, 1.0, between
        ),
        Claim(repairs, "layers collapse without it (abstract)", floor, LEADER, at=options.levels[-1:]),
    ]
    found = [replace(claim, papers=(52,)) for claim in found]
    trained = "a jackpot, whose weights are never trained, beats a trained random mask"
    at = tuple(level for level in between if level in (0.9, 0.95))
    for first, second, text, published, papers in (
        (ERK, "random, uniform", "ERK random is above uniform random", BAR, (9,)),
        (ERK, "random, SNIP ratio", "ERK random is above the SNIP ratio", "they tie", (9,)),
        ("BiP", LEADER, "BiP is above one-shot global magnitude", "above IMP in most settings", (54,)),
        ("BiP", "global magnitude, gradual", "BiP is above gradual magnitude", "above IMP in most", (54,)),
        ("jackpot", CHANCE, trained, BAR, (49,)),
        ("lottery ticket", ERK, "a lottery ticket beats a random one", "tickets win (paper)", ()),
        ("RigL", ERK, "moving the mask (RigL) beats holding it", "above static (abstract)", ()),
        ("soup of 3", LEADER, "a soup is above one network of one-shot pruning", "above its members", (28,)),
        (LEADER, CHANCE, f"{LEADER} beats a random mask of equal budget", BAR, (52,)),
        ("LAMP", CHANCE, "LAMP beats a random mask of equal budget", BAR, (52,)),
        (ERK, CHANCE, f"{ERK} beats a random mask of equal budget", BAR, (9,)),
    ):
        if at:
            found.append(Claim(f"{text} at {{level}}", published, first, second, at=at, papers=papers))
    closes = "the gap of random pruning to dense closes from {level}"
    return [*found, Claim(closes, "it closes (abstract)", GAP, papers=(9,))]


_RATIOS: dict[str, Ratio] = {
    "uniform": "uniform",
    "uniform+": "uniform+",
    "ER": "er",
    "ERK": "erk",
    "ERK+": "erk+",
}
ARMS = {
    DENSE: Arm(flat=True),
    LONGER: Arm(flat=True),
    LEADER: Arm(MagnitudePruning, control=CHANCE),
    "global magnitude, floor": Arm(partial(MagnitudePruning, floor=FLOOR)),
    "global magnitude, gradual": Arm(partial(MagnitudePruning, gradual=True), control=CHANCE),
    "uniform magnitude": Arm(partial(MagnitudePruning, allocation="uniform"), control=CHANCE),
    "ERK magnitude": Arm(partial(MagnitudePruning, allocation="erk")),
    "LAMP": Arm(partial(MagnitudePruning, allocation="lamp")),
    CHANCE: Arm(partial(MagnitudePruning, allocation="uniform", score="random")),
    "random mask, ERK": Arm(partial(MagnitudePruning, allocation="erk", score="random")),
    "jackpot": Arm(LotteryJackpot),
    "BiP": Arm(BiP),
    "soup of 3": Arm(SparseSoup),
    **{f"random, {name}": Arm(partial(RandomPruning, ratio=ratio)) for name, ratio in _RATIOS.items()},
    "random, SNIP ratio": Arm(partial(RandomPruning, ratio="snip")),
    "random, GraSP ratio": Arm(partial(RandomPruning, ratio="grasp")),
    "SET": Arm(partial(DynamicSparse, growth="set")),
    "RigL": Arm(partial(DynamicSparse, growth="rigl")),
    "lottery ticket": Arm(LotteryTicket),
}
STUDY = Study(
    "pruning-benchmark",
    "Unstructured pruning methods on one dense start, with equal epochs",
    "Gupta et al., arXiv 2209.14624 (global magnitude); Liu et al., ICLR 2022 (random pruning); Frankle et "
    "al., ICML 2020 (tickets); Zhang et al., arXiv 2104.08700 (jackpots); Zhang et al., NeurIPS 2022 (BiP); "
    "Zimmer et al., ICLR 2024 (soups); Evci et al., ICML 2020 (RigL); Mocanu et al. 2018 (SET)",
    PruningOptions,
    ARMS,
    cases,
    measure,
    claims=claims,
    value=Value(),
    varies=("arms", "sparsities", "outer", "seeds", "widths", "device"),
    data=lambda options, where: common.content(options.images()),
    prepare=with_gaps,
    tables=[
        Grid(
            "Accuracy (%)",
            lambda view: protocol(view.options),
            arms=lambda view: [arm for arm in view.arms() if arm in ARMS],
            levels=_levels,
            columns=lambda view, level: f"{level:.0%} zeros",
            mark=_empty,
        ),
        Columns(
            "Training cost in all",
            {"GFLOPs": mean_of("flops", "{:,.1f}", 1e-9), "seconds": mean_of("seconds", "{:,.0f}")},
            "Seconds of one processor thread, or of the wall on a GPU.",
            lambda view: [LONGER, *_usual(view)],
            lambda view: [view.options.levels[min(1, len(view.options.levels) - 1)]],
        ),
        partial(by_image, CHANCE),
        partial(by_image, LEADER),
        widths,
    ],
    plots=[
        Curves(
            "accuracy",
            lambda view: f"Accuracy against weights left, {view.options.dataset}",
            "weights kept (%)",
            "test accuracy (%)",
            CURVES,
            lambda level: round(100 * (1 - level), 6),
            _levels,
            (LONGER,),
            log_x=True,
        ),
        cost_plot,
    ],
    notes=lambda options: [
        protocol(options),
        "Accuracy is that of the test images in percent, mean ± sample standard deviation over seeds. Cost "
        "counts multiply-adds of forward and backward products (two operations each) with the kept weights "
        "only, dense weight gradients where a method needs them, and the dense start where there is one; "
        "zeros save no time.",
        "A lottery ticket's rounds are each as long as the dense training and a soup trains three networks: "
        "more than the equal epochs of the others, which the cost shows.",
        "No arm was tuned: each has its method's defaults and the recipe that all share.",
    ],
)
