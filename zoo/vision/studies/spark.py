"""`zoo reproduce spark`: pre-training without labels against training from scratch, and what masking does."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.names import suggestion
from zoo.shared.measure.modes import eval_mode
from zoo.shared.store.identity import data_digest
from zoo.shared.structure.relatives import reinitialised
from zoo.shared.train import Checkpoint, Fit, Recipe, device_named
from zoo.studies.cells import CellCache
from zoo.studies.digests import code_digest
from zoo.studies.study import BAR, Arm, Claim, Study, Tuned
from zoo.studies.tables import Outcome, Plot, Series, Table, Verdict
from zoo.studies.verdict import deviation, mean_cell
from zoo.studies.view import Row, Rows, Value, View
from zoo.vision.data import SOURCES, Images, correct, load_images
from zoo.vision.domain import image_job
from zoo.vision.models import ResNet
from zoo.vision.spark.encoder import Execution, SparKEncoder, occupancy
from zoo.vision.spark.masking import Choice, draw_cells, kept_cells
from zoo.vision.spark.modules import VisibleConv2d
from zoo.vision.spark.objective import SparK
from zoo.vision.spark.pretraining import held_out_loss, mixed_precision, pretraining
from zoo.vision.spark.probe import fit_head
from zoo.vision.studies.common import content

WELL_BELOW = 0.8  # "well below 1.0": a prediction of zero costs (p - 1) / p


#: Arms that pre-train: scales of the decoder (0: all) and the execution.
ARMS: dict[str, tuple[int, Execution]] = {
    "SparK": (0, "auto"),
    "no re-masking": (0, "plain"),
    "single scale": (1, "auto"),
}
SCRATCH = "scratch"
#: Channels, height and width of an image.
SHAPES = {"digits": (1, 8, 8), "cifar10-jpeg": (3, 32, 32)}


@dataclass(frozen=True)
class Setting:
    """What all arms share.

    Args:
        dataset: name of the images.
        depth, width: of the CIFAR ResNet.
        cell: side of a cell.
        ratio: share of hidden cells.
        decoder: width of the decoder at the coarsest map.
        pretrain_epochs, pretrain_lr, pretrain_batch: of pre-training with Adam.
        batch: images per step of fine-tuning with SGD.
        weight_decay: of fine-tuning.
        train_images, test_images: the first so many; 0 takes all.
    """

    dataset: str
    depth: int
    width: int
    cell: int
    ratio: float
    decoder: int
    pretrain_epochs: int
    pretrain_lr: float
    pretrain_batch: int
    batch: int
    weight_decay: float
    train_images: int = 0
    test_images: int = 0

    def data(self) -> Images:
        """The images."""
        data = load_images(self.dataset)
        return data.subset(self.train_images) if self.train_images else data

    def model(self, seed: int) -> ResNet:
        """The network with fresh weights."""
        model = reinitialised(ResNet(self.depth, self.width, channels=SHAPES[self.dataset][0]), seed)
        if not isinstance(model, ResNet):
            raise ConfigError(f"a ResNet was expected, not {type(model).__name__}")
        return model

    def spark(self, arm: str, seed: int) -> SparK:
        """Encoder and decoder of an arm with fresh weights."""
        channels, *size = SHAPES[self.dataset]
        scales, execution = ARMS[arm]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = SparKEncoder(self.model(seed), (size[0], size[1]), self.cell, channels)
            return SparK(encoder, self.decoder, scales, execution)

    def key(self, code: Any, **rest: Any) -> Row:
        """A cell's key: what decides it, and digests of code and data."""
        digests = {"code": code_digest(code), "data": _content(self.dataset)}
        return {"study": "spark", **asdict(self), **digests, **rest}


@dataclass(frozen=True)
class Tuning:
    """A fine-tuning.

    Args:
        labels: how many training images have one; 0 for all.
        epochs: passes over them.
        lr: peak of the learning rate.
    """

    labels: int
    epochs: int
    lr: float


def pretrained(
    setting: Setting, arm: str, seed: int, cells: CellCache, device: str = "cpu"
) -> tuple[SparK, Row]:
    """A pre-trained arm and its figures: the loss on held-out images before and after, by epoch."""
    key = setting.key(pretrained, arm=arm, seed=seed, what="pre-training")

    def compute() -> tuple[Row, dict[str, Tensor]]:
        data = setting.data().to(device)
        spark = setting.spark(arm, seed).to(device)
        recipe = Recipe(
            setting.pretrain_epochs, setting.pretrain_lr, setting.pretrain_batch, 0.0, optimizer="adam"
        )
        fit = pretraining(spark, data, recipe, setting.ratio, seed)
        checkpoint = Checkpoint(cells.folder / f"{cells.path(key).stem}-checkpoint", key)
        losses = {"0": held_out_loss(spark, data, data.val, setting.ratio)}
        if (stored := checkpoint.read()) is not None:
            fit.load_state(stored[0])
            spark.execution = Choice.parse(stored[1]["execution"])
            losses = {k.partition("/")[2]: float(v) for k, v in stored[0].items() if k.startswith("loss/")}
            fit.cost.seconds = float(stored[0]["seconds"])
        every = max(1, setting.pretrain_epochs // 10)

        def on_epoch(fit: Fit) -> None:
            if fit.epoch % every == 0 or fit.epoch == setting.pretrain_epochs:
                losses[str(fit.epoch)] = held_out_loss(spark, data, data.val, setting.ratio)
                kept = {f"loss/{k}": torch.tensor(v, dtype=torch.float64) for k, v in losses.items()}
                seconds = torch.tensor(fit.cost.seconds, dtype=torch.float64)
                facts = {"execution": str(spark.execution)}
                checkpoint.write({**fit.state(), **kept, "seconds": seconds}, facts)

        fit.run(on_epoch=on_epoch)
        figures = {"losses": losses, "execution": str(spark.execution), "seconds": fit.cost.seconds}
        return {**figures, "device": device}, spark.state_dict()

    found, weights = cells.tensors(key, compute)
    spark = setting.spark(arm, seed)
    spark.load_state_dict(weights)
    return spark.eval(), found


def tuned(
    setting: Setting, arm: str, tuning: Tuning, seed: int, cells: CellCache, device: str = "cpu"
) -> tuple[ResNet, Row]:
    """A network fine-tuned from an arm, or trained from fresh weights, and its figures on the test images."""
    key = setting.key(tuned, arm=arm, seed=seed, what="fine-tuning", **asdict(tuning))
    if arm == SCRATCH:  # nothing of the pre-training decides it
        key = {k: v for k, v in key.items() if not k.startswith("pretrain") and k not in _ENCODER_ONLY}

    def compute() -> tuple[Row, dict[str, Tensor]]:
        model = start(setting, arm, seed, cells, device)
        data = setting.data()
        data = (data.subset(tuning.labels) if tuning.labels else data).to(device)
        model.to(device)
        recipe = Recipe(tuning.epochs, tuning.lr, setting.batch, setting.weight_decay)
        job = image_job(data, recipe, seed, device).replace(loss=classification_loss)
        fit = job.fit(model, macs=lambda: 0.0).run()
        test = data.test.take(torch.arange(setting.test_images or len(data.test), device=device))
        right = correct(model, data, test)
        figures = {
            "accuracy": float(right.double().mean()),
            "images": len(right),
            "validation": float(correct(model, data, data.val).double().mean()),
            "seconds": fit.cost.seconds,
            "device": device,
        }
        return figures, model.state_dict()

    found, weights = cells.tensors(key, compute)
    model = setting.model(seed)
    model.load_state_dict(weights)
    return model.eval(), found


def start(setting: Setting, arm: str, seed: int, cells: CellCache, device: str) -> ResNet:
    """The encoder of an arm with the fresh head of a network, or all fresh."""
    model = setting.model(seed)
    if arm != SCRATCH:
        spark = pretrained(setting, arm, seed, cells, device)[0]
        head = spark.encoder.trunk.head
        own = {k: v for k, v in model.state_dict().items() if k.startswith(head)}
        model.load_state_dict({**spark.encoder.export(), **own})
    return model


def probed(setting: Setting, arm: str, labels: int, seed: int, cells: CellCache, device: str) -> Row:
    """Test accuracy of a linear probe on the frozen features of an arm; those of fresh weights from "
    "scratch."""
    model, data = start(setting, arm, seed, cells, device), setting.data()
    fit_head(model, data.subset(labels) if labels else data)
    test = data.test.take(torch.arange(setting.test_images or len(data.test)))
    return {"accuracy": float(correct(model, data, test).double().mean()), "images": len(test)}


_ENCODER_ONLY = ("cell", "ratio", "decoder")


def classification_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy, with the products in bfloat16 on a GPU."""
    images, labels = batch
    with mixed_precision(images):
        logits = model(images)
    return F.cross_entropy(logits.float(), labels)


@functools.cache
def _content(dataset: str) -> str:
    return data_digest(content(load_images(dataset)))[:16]


#: What is usual for each set: network, cells, labels.
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "depth": 8,
        "width": 16,
        "cell": 4,
        "ratio": 0.5,
        "decoder": 32,
        "pretrain_epochs": 30,
        "pretrain_lr": 3e-3,
        "pretrain_batch": 64,
        "batch": 32,
        "few": 100,
        "few_epochs": 60,
        "all_epochs": 15,
    },
    "cifar10-jpeg": {
        "depth": 20,
        "width": 32,
        "cell": 4,
        "ratio": 0.6,
        "decoder": 128,
        "pretrain_epochs": 60,
        "pretrain_lr": 2e-3,
        "pretrain_batch": 512,
        "batch": 256,
        "few": 2000,
        "few_epochs": 120,
        "all_epochs": 15,
    },
}


@dataclass(frozen=True)
class SparKOptions:
    """Options; a number left at 0 is the usual one for the images.

    Args:
        dataset: digits or cifar10-jpeg.
        arms: scratch, SparK, no re-masking, single scale; by default all.
        seeds: which.
        device: where to train: cpu, cuda or cuda:1, say.
        pretrain_epochs, pretrain_batch: passes over the images without labels, and images per step.
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
    seeds: tuple[int, ...] = (0, 1, 2)
    device: str = "cpu"
    pretrain_epochs: int = 0
    pretrain_batch: int = 0
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
        if self.dataset not in DEFAULTS:
            raise ConfigError(f"Unknown image set {self.dataset!r}. {suggestion(self.dataset, DEFAULTS)}")
        for arm in self.arms:
            if arm not in (SCRATCH, *ARMS):
                raise ConfigError(f"Unknown arm {arm!r}. {suggestion(arm, (SCRATCH, *ARMS))}")
        if not self.arms or not self.seeds or not self.lrs:
            raise ConfigError("give at least one arm, one seed and one learning rate")
        device_named(self.device)

    def value(self, name: str) -> Any:
        """An option, or what is usual for the images."""
        return getattr(self, name, 0) or DEFAULTS[self.dataset][name]

    def setting(self) -> Setting:
        """What the arms share."""
        names = (
            "depth",
            "width",
            "cell",
            "ratio",
            "decoder",
            "pretrain_epochs",
            "pretrain_lr",
            "pretrain_batch",
            "batch",
        )
        return Setting(
            self.dataset,
            **{name: self.value(name) for name in names},
            weight_decay=5e-4,
            train_images=self.train_images,
            test_images=self.test_images,
        )

    def tunings(self, arm: str) -> Iterator[Tuning]:
        """The fine-tunings of an arm: with few labels, and but for the ablations with all."""
        for lr in self.lrs:
            yield Tuning(self.value("few"), self.value("few_epochs"), lr)
            if arm in (SCRATCH, "SparK"):
                yield Tuning(0, self.value("all_epochs"), lr)


def occupancies(setting: Setting, images: int = 64) -> list[dict[str, Any]]:
    """Share of non-zero sites after each convolution of a fresh network in eval mode (whose norms keep a zero
    a zero), with masks and without."""
    data = setting.data()
    shape = data.train.images.shape
    encoder = SparKEncoder(setting.model(0), (shape[2], shape[3]), setting.cell, shape[1])
    shown = data.normalised(data.train.images[:images])
    cells = draw_cells(len(shown), encoder.grid, setting.ratio, torch.Generator().manual_seed(0))
    layers = [
        name
        for name, module in encoder.model.named_modules()
        if isinstance(module, VisibleConv2d) and module.kernel_size != (1, 1)
    ]
    rows = []
    with eval_mode(encoder):
        for label, mode in (("re-masked", "masked"), ("not re-masked", "plain")):
            shares = occupancy(encoder, shown, cells, layers, mode)  # type: ignore[arg-type]
            for depth, (layer, share) in enumerate(zip(layers, shares, strict=True), start=1):
                rows.append({"arm": label, "layer": layer, "depth": depth, "share": share})
    return rows


def _cells_of(setting: Setting) -> int:
    _, height, width = SHAPES[setting.dataset]
    return (height // setting.cell) * (width // setting.cell)


def protocol(config: SparKOptions) -> str:
    """What was trained on what, in a sentence or two."""
    setting = config.setting()
    count = sum(p.numel() for p in setting.model(0).parameters())
    images = f"{config.train_images:,}" if config.train_images else "all"
    cells = _cells_of(setting)
    hidden = cells - kept_cells(cells, setting.ratio)
    return (
        f"{SOURCES[config.dataset].title}: ResNet-{setting.depth} (width {setting.width}, {count:,} "
        f"parameters), {hidden} of {cells} cells of {setting.cell}x{setting.cell} hidden; pre-training on "
        f"{images} training images without labels, {setting.pretrain_epochs} epochs, Adam, batch "
        f"{setting.pretrain_batch}, peak rate {setting.pretrain_lr:g}; fine-tuning and training from scratch "
        f"alike: SGD, batch {setting.batch}, {config.value('few'):,} labels for "
        f"{config.value('few_epochs')} epochs or all for {config.value('all_epochs')}, peak rate the better "
        f"of {', '.join(f'{lr:g}' for lr in config.lrs)} on the validation images; {len(config.seeds)} "
        "seeds, each with a pre-training of its own."
    )


def measure(make: None, options: SparKOptions, case: Row, cells: CellCache) -> Row | list[Row]:
    """A pre-training, a linear probe, a fine-tuning, or the occupancy of a fresh network."""
    setting, arm, seed = options.setting(), case["arm"], case["seed"]
    if case["what"] == "occupancy":
        return occupancies(setting)
    if case["what"] == "pre-training":
        return pretrained(setting, arm, seed, cells, options.device)[1]
    if case["what"] == "probe":
        return probed(setting, arm, case["labels"], seed, cells, options.device)
    tuning = Tuning(case["labels"], case["epochs"], case["lr"])
    return tuned(setting, arm, tuning, seed, cells, options.device)[1]


def cases(options: SparKOptions) -> Iterator[Row]:
    """Every pre-training and fine-tuning, all arms of a seed before the next seed."""
    setting = options.setting()
    kept_cells(_cells_of(setting), setting.ratio)
    for seed in options.seeds:
        for arm in options.arms:
            own = {"arm": arm, "seed": seed}
            if arm != SCRATCH:
                yield {"what": "pre-training", **own}
            for labels in (options.value("few"), 0):
                yield {"what": "probe", **own, "labels": labels}
            for tuning in options.tunings(arm):
                yield {"what": "fine-tuning", **own, **asdict(tuning)}
    yield {"what": "occupancy", "arm": "re-masked", "seed": 0}


def best_rate(validation: Mapping[float, Sequence[float]]) -> float:
    """The learning rate with the best mean of these validation accuracies; the first of equals."""
    return max(validation, key=lambda lr: statistics.fmean(validation[lr]))


def at_best_rate(rows: Rows, options: SparKOptions) -> Rows:
    """The rows with the level in words, fine-tunings at their best rate only, probes as arms of their own,
    and by how much the gain over scratch shrinks from few labels to all."""
    few = options.value("few")
    named = {few: f"{few:,} labels", 0: "all labels", None: ""}
    rows = [{**row, "level": named.get(row.get("labels"), "")} for row in rows]
    rates: dict[tuple[str, str], dict[float, list[float]]] = {}
    for row in rows:
        if row["what"] == "fine-tuning":
            place = rates.setdefault((row["arm"], row["level"]), {})
            place.setdefault(row["lr"], []).append(row["validation"])
    found: list[Row] = []
    for row in rows:
        if row["what"] == "probe":
            found.append({**row, "arm": f"probe of {row['arm']}"})
        elif row["what"] != "fine-tuning" or row["lr"] == best_rate(rates[row["arm"], row["level"]]):
            found.append(row)
    view, gains = View(STUDY, found, options, {}), {}
    for level in (named[few], named[0]):
        ours, scratch = view.by_seed("SparK", level), view.by_seed(SCRATCH, level)
        gains[level] = {seed: ours[seed] - scratch[seed] for seed in ours.keys() & scratch.keys()}
    shrinks = {"what": "gain", "arm": GAIN, "level": ""}
    less = [
        {**shrinks, "seed": seed, "accuracy": (gain - gains[named[0]][seed]) / 100}
        for seed, gain in gains[named[few]].items()
        if seed in gains[named[0]]
    ]
    return [*found, *less]


def accuracies(view: View) -> Table:
    """Test accuracy of the fine-tuned networks."""
    few, body = view.options.value("few"), []
    levels = (f"{few:,} labels", "all labels")
    own = view.part(what="fine-tuning")
    for arm in own.arms(view.options.arms):
        runs = [own.chosen(arm, level) for level in levels]
        cells = [
            own.cell(arm, lv) + (f" (rate {r[0]['lr']:g})" if r else "")
            for lv, r in zip(levels, runs, strict=True)
        ]
        each = ", ".join(f"{value:.1f}" for value in own.values(arm, levels[0]))
        body.append([arm, *cells, each])
    columns = ["arm", *levels, f"each seed, {levels[0]}"]
    return Table("Test accuracy (%)", columns, body, protocol(view.options))


def probes(view: View) -> Table | None:
    """Test accuracy of linear probes."""
    levels = (f"{view.options.value('few'):,} labels", "all labels")
    arms = [arm for arm in view.options.arms if view.chosen(f"probe of {arm}")]
    body = [[arm, *(view.cell(f"probe of {arm}", level) for level in levels)] for arm in arms]
    title = "Test accuracy of a linear probe on frozen features (%)"
    return Table(title, ["arm", *levels], body) if body else None


def _last(row: Row) -> float:
    return float(row["losses"][max(row["losses"], key=int)])


def losses(view: View) -> Table:
    """Loss on hidden cells before and after pre-training."""
    body, own = [], view.part(what="pre-training")
    for arm in own.arms(tuple(ARMS)):
        runs = own.chosen(arm)
        seconds = statistics.fmean(row["seconds"] for row in runs)
        how = ", ".join(sorted({f"{row['execution'].split()[0]} on {row['device']}" for row in runs}))
        before, after = [row["losses"]["0"] for row in runs], [_last(row) for row in runs]
        body.append([arm, mean_cell(before, 3), mean_cell(after, 3), f"{seconds:,.0f}", how])
    columns = ["arm", "before", "after", "seconds", "execution"]
    return Table("Loss on hidden cells of held-out images", columns, body)


def shares(view: View) -> Table:
    """Occupancy with masks and without."""
    own = view.part(what="occupancy")
    share = {(row["arm"], row["layer"]): f"{row['share']:.3f}" for row in own.rows}
    layers = list(dict.fromkeys(row["layer"] for row in own.rows))
    body = [[layer, share["re-masked", layer], share["not re-masked", layer]] for layer in layers]
    return Table("Occupancy after each convolution", ["layer", "re-masked", "not re-masked"], body)


def facts(view: View) -> list[Verdict]:
    """How far the loss falls, and what masking does to the occupancy."""
    found, reached = [], [_last(row) for row in view.part(what="pre-training", arm="SparK").rows]
    if reached:
        claim, published = (
            "the loss on hidden cells falls well below 1.0",
            f"{BAR}: {WELL_BELOW:g} in every seed",
        )
        holds = max(reached) <= WELL_BELOW
        outcome: Outcome = "holds" if holds else "does not hold"
        found.append(Verdict(claim, published, mean_cell(reached, 3), outcome, paper=(63,)))
    own = view.part(what="occupancy").rows
    kept = [row["share"] for row in own if row["arm"] == "re-masked"]
    grown = [row["share"] for row in own if row["arm"] == "not re-masked"]
    rising = all(b >= a for a, b in zip(grown, grown[1:], strict=False)) and grown[-1] > grown[0]
    # Measured on images of this set: a visible site whose sums are all exactly zero would count as empty.
    steady = max(kept) - min(kept) < 0.01
    found.append(
        Verdict(
            "without re-masking occupancy grows from layer to layer, with it it stays",
            "the mask pattern is erased without (section 3.1)",
            f"with: {kept[0]:.2f} to {kept[-1]:.2f}; without: {grown[0]:.2f} to {grown[-1]:.2f}",
            "holds" if rising and steady else "does not hold",
            paper=(63,),
        )
    )
    return found


def loss_plot(view: View) -> Plot:
    """Loss by epoch."""
    curves, own = [], view.part(what="pre-training")
    for arm in own.arms(tuple(ARMS)):
        runs = own.chosen(arm)
        epochs = sorted(set.intersection(*(set(map(int, row["losses"])) for row in runs)))
        values = [[row["losses"][str(epoch)] for row in runs] for epoch in epochs]
        curves.append(
            Series(arm, epochs, [statistics.fmean(v) for v in values], [deviation(v) for v in values])
        )
    return Plot(
        "loss",
        "Loss on hidden cells of held-out images",
        "epoch",
        "loss (1: nothing learnt)",
        curves,
        alt="One falling curve per pre-trained arm, with bands of one standard deviation over seeds.",
    )


def accuracy_plot(view: View) -> Plot:
    """Accuracy with few labels."""
    few, bars = f"{view.options.value('few'):,} labels", []
    for place, arm in enumerate(view.options.arms):
        if reached := view.part(what="fine-tuning").values(arm, few):
            mean, spread = statistics.fmean(reached), deviation(reached)
            bars.append(Series(arm, [place], [mean], [spread], kind="points"))
    return Plot(
        "accuracy",
        f"Test accuracy with {few}",
        "arm",
        "test accuracy (%)",
        bars,
        alt="One point per arm with one standard deviation over seeds.",
    )


def occupancy_plot(view: View) -> Plot:
    """Occupancy by depth."""
    lines = []
    for arm in ("re-masked", "not re-masked"):
        own = view.part(what="occupancy", arm=arm).rows
        lines.append(Series(arm, [row["depth"] for row in own], [row["share"] for row in own]))
    return Plot(
        "occupancy",
        "Occupancy after each convolution",
        "convolution",
        "share of non-zero sites",
        lines,
        alt="A level line with masks, a rising one without.",
    )


def claims(options: SparKOptions) -> list[Claim]:
    """What pre-training is to give with few labels."""
    few = f"{options.value('few'):,} labels"
    above = "above other pre-training by about a point on ImageNet"
    tuned = "fine-tuning a SparK network on {level} is above training from scratch"
    probe = "a linear probe on SparK's frozen features is above one on those of fresh weights"
    ablated, table = "SparK is above the ablation '%s' at {level}", "above (ablation table)"
    return [
        Claim(tuned, above, "SparK", SCRATCH, at=(few,)),
        Claim(probe, BAR, "probe of SparK", f"probe of {SCRATCH}", at=(few,)),
        Claim("the gain shrinks from few labels to all", BAR, GAIN),
        *(Claim(ablated % arm, table, "SparK", arm, at=(few,)) for arm in ("no re-masking", "single scale")),
    ]


GAIN = "gain over scratch, few labels minus all"
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
    value=Value(),
    varies=("arms", "seeds", "device", "lrs"),
    data=lambda options, where: content(options.setting().data()),
    facts=facts,
    prepare=at_best_rate,
    tables=[accuracies, probes, losses, shares],
    plots=[loss_plot, accuracy_plot, occupancy_plot],
    notes=lambda options: [
        protocol(options),
        "Accuracy is that of the test images in percent at the last epoch, mean ± sample standard deviation "
        "over seeds. The loss is that of hidden cells of validation images; predicting zero everywhere costs "
        "(p - 1) / p for cells of p values.",
        "A linear probe is a ridge regression of the classes on frozen features; from scratch on those of "
        "fresh weights.",
        "Occupancy is the share of non-zero sites after each convolution of a fresh network in eval mode.",
    ],
)
