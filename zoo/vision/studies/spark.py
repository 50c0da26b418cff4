"""`zoo reproduce spark`: pre-training without labels against training from scratch, and what masking does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.names import check_known
from zoo.shared.measure.modes import eval_mode
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.train import Checkpoint, Recipe, device_named
from zoo.studies.cells import CellCache
from zoo.studies.figures import Columns, Grid, mean_of
from zoo.studies.options import StudyOptions
from zoo.studies.study import BAR, Arm, Claim, Study, Tuned
from zoo.studies.tables import Table, Verdict
from zoo.studies.tuning import at_best
from zoo.studies.verdict import mean_cell
from zoo.studies.view import NotRunError, Row, Rows, Value, View
from zoo.vision.data import SOURCES, Images, correct, load_images
from zoo.vision.domain import image_job
from zoo.vision.models import ResNet
from zoo.vision.spark.encoder import Execution, SparKEncoder, occupancy
from zoo.vision.spark.masking import draw_cells, kept_cells
from zoo.vision.spark.modules import VisibleConv2d
from zoo.vision.spark.objective import SparK
from zoo.vision.spark.pretraining import fresh_spark, held_out_loss, mixed_precision, pretraining, resumed
from zoo.vision.spark.probe import fit_head
from zoo.vision.studies.common import content

WELL_BELOW = 0.8  # "well below 1.0": a prediction of zero costs (p - 1) / p
#: Arms that pre-train: scales of the decoder (0: all) and the execution.
ARMS: dict[str, tuple[int, Execution]] = {
    "SparK": (0, "auto"),
    "no re-masking": (0, "plain"),
    "single scale": (1, "auto"),
}
SCRATCH, GAIN = "scratch", "gain over scratch, few labels minus all"
#: Channels, height and width of an image.
SHAPES = {"digits": (1, 8, 8), "cifar10-jpeg": (3, 32, 32)}
#: What is usual, for each set in the order of `SHAPES`.
USUAL: dict[str, tuple[Any, Any]] = {
    "depth": (8, 20),
    "width": (16, 32),
    "cell": (4, 4),
    "ratio": (0.5, 0.6),
    "decoder": (32, 128),
    "pretrain_epochs": (30, 60),
    "pretrain_lr": (3e-3, 2e-3),
    "pretrain_batch": (64, 512),
    "batch": (32, 256),
    "few": (100, 2000),
    "few_epochs": (60, 120),
    "all_epochs": (15, 15),
}
_TUNING = ("few", "few_epochs", "all_epochs", "batch", "test_images")


@dataclass(frozen=True)
class SparKOptions(StudyOptions):
    """Options; a number left at 0 is the usual one for the images.

    Args:
        dataset: digits or cifar10-jpeg.
        arms: scratch, SparK, no re-masking, single scale; by default all.
        device: where to train: cpu, cuda or cuda:1, say.
        pretrain_epochs, pretrain_batch: passes over the images without labels, and images per step.
        pretrain_lr: peak of its learning rate.
        few: how many images have a label in the first fine-tuning; all have one in the second.
        few_epochs, all_epochs: passes of either.
        batch: images per step of fine-tuning.
        lrs: peaks of the learning rate of fine-tuning; each arm takes the one with the best validation
            accuracy over seeds.
        cell: side of a hidden square.
        ratio: share of hidden cells.
        depth, width: of the network.
        decoder: width of the decoder at the coarsest map, which costs the most of a pre-training.
        train_images, test_images: the first so many; 0 takes all.
    """

    dataset: str = "digits"
    arms: tuple[str, ...] = (SCRATCH, *ARMS)
    device: str = "cpu"
    pretrain_epochs: int = 0
    pretrain_batch: int = 0
    pretrain_lr: float = 0.0
    few: int = 0
    few_epochs: int = 0
    all_epochs: int = 0
    batch: int = 0
    lrs: tuple[float, ...] = (0.03, 0.1)
    cell: int = 0
    ratio: float = 0.0
    depth: int = 0
    width: int = 0
    decoder: int = 0
    train_images: int = 0
    test_images: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_known("image set", [self.dataset], SHAPES)
        check_known("arm", self.arms, (SCRATCH, *ARMS))
        device_named(self.device)

    def full(self) -> SparKOptions:
        """With the usual numbers for those that are 0."""
        place = list(SHAPES).index(self.dataset)
        return replace(self, **{k: getattr(self, k) or usual[place] for k, usual in USUAL.items()})

    def levels(self) -> tuple[str, str]:
        """How many labels, in words."""
        return f"{self.full().few:,} labels", "all labels"

    def images(self, labels: int = 0) -> Images:
        """The images; the first so many with labels."""
        data, count = load_images(self.dataset), labels or self.train_images
        return data.subset(count) if count else data

    def model(self, seed: int) -> ResNet:
        """The network with fresh weights."""
        full = self.full()
        made: Any = reinitialised(ResNet(full.depth, full.width, channels=SHAPES[self.dataset][0]), seed)
        return made

    def spark(self, arm: str, seed: int) -> SparK:
        """Encoder and decoder of an arm with fresh weights."""
        full, (_, height, width) = self.full(), SHAPES[self.dataset]
        return fresh_spark(self.model(seed), (height, width), full.cell, full.decoder, seed, *ARMS[arm])

    def cells(self) -> int:
        """Cells of an image."""
        _, height, width = SHAPES[self.dataset]
        return (height // self.full().cell) * (width // self.full().cell)


def pretrained(options: SparKOptions, arm: str, seed: int, cells: CellCache) -> tuple[SparK, Row]:
    """A pre-trained arm and its figures: the loss on held-out images before and after."""
    full = options.full()
    case = {"arm": arm, "seed": seed, "what": "weights of the pre-training"}
    key = {k: v for k, v in STUDY.key(full, case).items() if k not in _TUNING}

    def compute() -> tuple[Row, dict[str, Tensor]]:
        data, spark = full.images().to(full.device), full.spark(arm, seed).to(full.device)
        recipe = Recipe(full.pretrain_epochs, full.pretrain_lr, full.pretrain_batch, 0.0, optimizer="adam")
        before = held_out_loss(spark, data, data.val, full.ratio)
        checkpoint = Checkpoint(cells.folder / f"{cells.path(key).stem}-checkpoint", key)
        fit = resumed(pretraining(spark, data, recipe, full.ratio, seed), checkpoint)
        figures = {
            "before": before,
            "after": held_out_loss(spark, data, data.val, full.ratio),
            "execution": str(spark.execution),
            "seconds": fit.cost.seconds,
            "device": full.device,
        }
        checkpoint.remove()
        return figures, spark.state_dict()

    found, weights = cells.tensors(key, compute)
    spark = full.spark(arm, seed)
    spark.load_state_dict(weights)
    return spark.eval(), found


def start(options: SparKOptions, arm: str, seed: int, cells: CellCache) -> ResNet:
    """The encoder of an arm with the fresh head of a network, or all fresh."""
    model = options.model(seed)
    if arm != SCRATCH:
        encoder = pretrained(options, arm, seed, cells)[0].encoder
        own = {k: v for k, v in model.state_dict().items() if k.startswith(encoder.trunk.head)}
        model.load_state_dict({**encoder.export(), **own})
    return model


def _right(model: ResNet, data: Images, count: int) -> Row:
    right = correct(model, data, data.test.take(torch.arange(count or len(data.test), device=data.device)))
    return {"accuracy": float(right.double().mean()), "images": len(right)}


def measure(make: None, options: SparKOptions, case: Row, cells: CellCache) -> Row | list[Row]:
    """A pre-training, a linear probe, a fine-tuning, or the occupancy of a fresh network."""
    full, arm, seed = options.full(), case["arm"], case["seed"]
    if case["what"] == "occupancy":
        return occupancies(full)
    if case["what"] == "pre-training":
        return pretrained(full, arm, seed, cells)[1]
    model, data = start(full, arm, seed, cells), full.images(case["labels"])
    if case["what"] == "probe":
        fit_head(model, data)
        return _right(model, data, full.test_images)
    recipe = Recipe(case["epochs"], case["lr"], full.batch, 5e-4)
    data = data.to(full.device)
    job = image_job(data, recipe, seed, full.device).replace(loss=classification_loss)
    fit = job.fit(model.to(full.device), macs=lambda: 0.0).run()
    validation = float(correct(model, data, data.val).double().mean())
    made = {"validation": validation, "seconds": fit.cost.seconds, "device": full.device}
    return {**_right(model, data, full.test_images), **made}


def classification_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy, with the products in bfloat16 on a GPU."""
    images, labels = batch
    with mixed_precision(images):
        logits = model(images)
    return F.cross_entropy(logits.float(), labels)


def occupancies(options: SparKOptions, images: int = 64) -> list[Row]:
    """Share of non-zero sites after each convolution of a fresh network in eval mode (whose norms keep a zero
    a zero), with masks and without."""
    data, (channels, *size) = options.images(), SHAPES[options.dataset]
    encoder = SparKEncoder(options.model(0), (size[0], size[1]), options.cell, channels)
    given = data.normalised(data.train.images[:images])
    cells = draw_cells(len(given), encoder.grid, options.ratio, torch.Generator().manual_seed(0))
    layers = [
        name
        for name, module in encoder.model.named_modules()
        if isinstance(module, VisibleConv2d) and module.kernel_size != (1, 1)
    ]
    rows = []
    with eval_mode(encoder):
        for label, mode in (("re-masked", "masked"), ("not re-masked", "plain")):
            shares = occupancy(encoder, given, cells, layers, mode)  # type: ignore[arg-type]
            rows += [
                {"arm": label, "layer": k, "share": share} for k, share in zip(layers, shares, strict=True)
            ]
    return rows


def cases(options: SparKOptions) -> Iterator[Row]:
    """Every pre-training and fine-tuning (the ablations' with few labels only), seed by seed."""
    full = options.full()
    kept_cells(full.cells(), full.ratio)
    for seed in range(options.seeds):
        for arm in options.arms:
            own = {"arm": arm, "seed": seed}
            if arm != SCRATCH:
                yield {"what": "pre-training", **own}
            for labels in (full.few, 0):
                yield {"what": "probe", **own, "labels": labels}
            for lr in options.lrs:
                yield {"what": "fine-tuning", **own, "labels": full.few, "epochs": full.few_epochs, "lr": lr}
                if arm in (SCRATCH, "SparK"):
                    yield {"what": "fine-tuning", **own, "labels": 0, "epochs": full.all_epochs, "lr": lr}
    yield {"what": "occupancy", "arm": "re-masked", "seed": 0}


def at_best_rate(rows: Rows, options: SparKOptions) -> Rows:
    """The rows with the level in words, fine-tunings at their best rate only, what is no fine-tuning as an
    arm of its own, and by how much the gain over scratch shrinks from few labels to all."""
    few, full = options.levels()
    named = {options.full().few: few, 0: full, None: ""}
    rows = [{**row, "level": named[row.get("labels")]} for row in rows]
    found = at_best([row for row in rows if row["what"] == "fine-tuning"], "lr")
    found += [
        {**row, "arm": f"{row['what']} of {row['arm']}"} for row in rows if row["what"] != "fine-tuning"
    ]
    view, ours, scratch = View(STUDY, found, options, {}), "SparK", SCRATCH
    if {few, full} <= set(view.levels(ours)) & set(view.levels(scratch)):
        gains = view.contrast([(ours, few), (scratch, full)], [(scratch, few), (ours, full)])
        found += [{"arm": GAIN, "level": "", "seed": s, "accuracy": v / 100} for s, v in gains.items()]
    return found


def _cell(view: View, arm: str, level: str) -> str:
    runs = view.chosen(arm, level)
    return f"{view.cell(arm, level)} (rate {runs[0]['lr']:g})" if runs else ""


def _named(what: str) -> Any:
    return lambda view: [f"{what} of {arm}" for arm in view.options.arms]


def shares(view: View) -> Table:
    """Occupancy with masks and without."""
    arms = ("re-masked", "not re-masked")
    share = {arm: _shares(view, arm) for arm in arms}
    body = [[layer, *(f"{share[arm][layer]:.3f}" for arm in arms)] for layer in share[arms[0]]]
    return Table("Occupancy after each convolution", ["layer", *arms], body)


def _shares(view: View, arm: str) -> dict[str, float]:
    found = {row["layer"]: row["share"] for row in view.rows if row["arm"] == f"occupancy of {arm}"}
    if not found:
        raise NotRunError(f"occupancy of {arm}")
    return found


def facts(view: View) -> list[Verdict]:
    """How far the loss falls, and what masking does to the occupancy."""
    found = []
    if reached := view.values("pre-training of SparK", None, LOSS):
        claim, bar = "the loss on hidden cells falls well below 1.0", f"{BAR}: {WELL_BELOW:g} in every seed"
        found.append(view.fact(claim, bar, mean_cell(reached, 3), max(reached) <= WELL_BELOW))
    kept, grown = (list(_shares(view, arm).values()) for arm in ("re-masked", "not re-masked"))
    rising = all(b >= a for a, b in zip(grown, grown[1:], strict=False)) and grown[-1] > grown[0]
    # Measured on images of this set: a visible site whose sums are all exactly zero would count as empty.
    steady = max(kept) - min(kept) < 0.01
    claim = "without re-masking occupancy grows from layer to layer, with it it stays"
    measured = f"with: {kept[0]:.2f} to {kept[-1]:.2f}; without: {grown[0]:.2f} to {grown[-1]:.2f}"
    published = "the mask pattern is erased without (section 3.1)"
    return [*found, view.fact(claim, published, measured, rising and steady)]


def claims(options: SparKOptions) -> list[Claim]:
    """What pre-training is to give with few labels."""
    at = options.levels()[:1]
    points = "above other pre-training by about a point on ImageNet"
    tuned = "fine-tuning a SparK network on {level} is above training from scratch"
    probe = "a linear probe on SparK's frozen features is above one on those of fresh weights"
    ablated, table = "SparK is above the ablation '%s' at {level}", "above (ablation table)"
    return [
        Claim(tuned, points, "SparK", SCRATCH, at=at),
        Claim(probe, BAR, "probe of SparK", f"probe of {SCRATCH}", at=at),
        Claim("the gain shrinks from few labels to all", BAR, GAIN),
        *(Claim(ablated % arm, table, "SparK", arm, at=at) for arm in ("no re-masking", "single scale")),
    ]


def protocol(options: SparKOptions) -> str:
    """What was trained on what, in a sentence or two."""
    full, cells = options.full(), options.cells()
    count = sum(p.numel() for p in options.model(0).parameters())
    images = f"{options.train_images:,}" if options.train_images else "all"
    hidden = cells - kept_cells(cells, full.ratio)
    return (
        f"{SOURCES[options.dataset].title}: ResNet-{full.depth} (width {full.width}, {count:,} parameters), "
        f"{hidden} of {cells} cells of {full.cell}x{full.cell} hidden; pre-training on {images} training "
        f"images without labels, {full.pretrain_epochs} epochs, Adam, batch {full.pretrain_batch}, peak rate "
        f"{full.pretrain_lr:g}; fine-tuning and training from scratch alike: SGD, batch {full.batch}, "
        f"{full.few:,} labels for {full.few_epochs} epochs or all for {full.all_epochs}, peak rate the "
        f"better of {', '.join(f'{lr:g}' for lr in options.lrs)} on the validation images; {options.seeds} "
        "seeds, each with a pre-training of its own."
    )


LOSS = Value("after", 1.0, 3)
_RATE = Tuned("peak rate of fine-tuning", "validation images", "lrs")
STUDY = Study(
    "spark",
    "SparK: masked-image pre-training of a convnet on its visible sites",
    "Tian et al., Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling. ICLR "
    "2023.",
    SparKOptions,
    {arm: Arm(tuned=_RATE) for arm in (SCRATCH, *ARMS)},
    cases,
    measure,
    papers=(63,),
    claims=claims,
    varies=("arms", "seeds", "device", "lrs"),
    data=lambda options, where: content(options.images()),
    facts=facts,
    prepare=at_best_rate,
    tables=[
        Grid(
            "Test accuracy (%)",
            lambda view: protocol(view.options),
            _cell,
            lambda view: view.options.arms,
            lambda view: view.options.levels(),
        ),
        Grid(
            "Test accuracy of a linear probe on frozen features (%)",
            arms=_named("probe"),
            levels=lambda view: view.options.levels(),
        ),
        Columns(
            "Loss on hidden cells of held-out images",
            {
                "before": Value("before", 1.0, 3),
                "after": LOSS,
                "seconds": mean_of("seconds", "{:,.0f}"),
                "execution": lambda view, arm, _: view.chosen(arm)[0]["execution"].split()[0],
            },
            arms=_named("pre-training"),
        ),
        shares,
    ],
    notes=lambda options: [
        protocol(options),
        "Accuracy is that of the test images in percent at the last epoch, mean ± sample standard deviation "
        "over seeds. The loss is that of hidden cells of validation images; predicting zero everywhere costs "
        "(p - 1) / p for cells of p values.",
        "A linear probe is a ridge regression of the classes on frozen features; from scratch on those of "
        "fresh weights.",
        "Fine-tuning has neither the paper's layer-wise decay of the rate nor its mixup.",
        "Not run: `zoo reproduce spark --dataset cifar10-jpeg --arms scratch SparK --pretrain-epochs 6 "
        "--few 1000 --few-epochs 100 --all-epochs 2 --batch 64 --lrs 0.03 0.1 0.3 --depth 8 --width 32 "
        "--decoder 64`; by the seconds of width 16 it takes some 11 hours on one thread.",
        "Occupancy is the share of non-zero sites after each convolution of a fresh network in eval mode.",
    ],
)
