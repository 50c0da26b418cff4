"""Makes the SparK bundles of the zoo from the cells of the study (`zoo reproduce spark`), computing what is
missing:

    python -m zoo.vision.spark.bundling                          # digits
    python -m zoo.vision.spark.bundling --dataset cifar10-jpeg   # with the study's other options

For few labels and for all there is a network trained from scratch; the pre-trained one stands beside the
latter with a linear probe as its head, and fine-tuned beside both. A bundle holds the model of seed 0, its
card the accuracy of every seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from zoo.bundles.card import Card
from zoo.bundles.catalog import cache_folder, open_bundle
from zoo.bundles.store import save
from zoo.harness.evidence import record_evidence
from zoo.harness.experiments import CellCache
from zoo.harness.tasks import get_task
from zoo.vision.data import SOURCES
from zoo.vision.models import ResNet
from zoo.vision.spark.cards import CITATION, PROBE, card_fields
from zoo.vision.spark.experiment import SparKConfig
from zoo.vision.spark.pictures import write_sheet
from zoo.vision.spark.probe import fit_head
from zoo.vision.spark.study import SCRATCH, Setting, Tuning, pretrained, tuned
from zoo.vision.spark.summary import best_rate

ARM = "SparK"
EVIDENCE = "benchmarks/results/spark-bundles.json"
NO_PAPER = "No paper: a plain network, trained for this zoo."
SHORT = {"digits": "digits", "cifar10-jpeg": "cifar10"}


@dataclass(frozen=True)
class Bundling:
    """Which bundles to make.

    Args:
        study: options of the study whose cells are used; its arms are not looked at.
        out: folder of the bundles.
        evidence: file that collects the accuracy of every seed.
        pictures: folder of the pictures of reconstructions.
        cells: folder of the study's cells; by default in the cache.
    """

    study: tyro.conf.OmitArgPrefixes[SparKConfig] = SparKConfig()
    out: Path = Path(__file__).parents[1] / "cards"
    evidence: Path = Path(__file__).parents[3] / EVIDENCE
    pictures: Path = Path(__file__).parents[3] / "benchmarks/results/vision"
    cells: Path | None = None


class Maker:
    """Makes the bundles of one study."""

    def __init__(self, config: Bundling) -> None:
        self.config, self.setting = config, config.study.setting()
        self.cells = CellCache(config.cells or cache_folder() / "cells" / "spark")
        self.name = f"resnet{self.setting.depth}-{SHORT[self.setting.dataset]}"

    def run(self) -> None:
        """Make all bundles and the pictures."""
        few = self.config.study.value("few")
        for labels in (0, few):
            suffix = f"-n{labels}" if labels else ""
            twin = self._tuned(SCRATCH, labels, f"dense-{self.name}{suffix}", None)
            self._tuned(ARM, labels, f"spark-{self.name}-{f'n{labels}' if labels else 'tuned'}", twin)
            if not labels:
                self._probed(f"spark-{self.name}", twin)
        spark, _ = pretrained(self.setting, ARM, self.config.study.seeds[0], self.cells)
        sheet = self.config.pictures / f"spark-{SHORT[self.setting.dataset]}-reconstructions.png"
        write_sheet(spark, self.setting.data(), self.setting.ratio, sheet)

    def _tuned(self, arm: str, labels: int, name: str, twin: Card | None) -> Card:
        study = self.config.study
        tunings = [t for t in study.tunings(arm) if t.labels == labels]
        runs = {t: [tuned(self.setting, arm, t, seed, self.cells) for seed in study.seeds] for t in tunings}
        chosen = best_rate({t.lr: [found["validation"] for _, found in made] for t, made in runs.items()})
        tuning = next(t for t in tunings if t.lr == chosen)
        title = SOURCES[self.setting.dataset].title
        labelled = f"{labels or len(self.setting.data().train):,} labels"
        how = "fine-tuned after SparK pre-training" if twin else "trained from scratch"
        seconds = sum(found["seconds"] for _, found in runs[tuning])
        if twin:
            seconds += sum(pretrained(self.setting, arm, s, self.cells)[1]["seconds"] for s in study.seeds)
        return self._save(
            name,
            [model for model, _ in runs[tuning]],
            twin,
            seconds,
            summary=f"ResNet-{self.setting.depth} {how} on {title}, {labelled}.",
            protocol=f"{how} on {labelled}, last epoch",
            options=_options(self.setting, twin, tuning),
        )

    def _probed(self, name: str, twin: Card) -> Card:
        data, models, seconds = self.setting.data(), [], 0.0
        for seed in self.config.study.seeds:
            spark, found = pretrained(self.setting, ARM, seed, self.cells)
            model = self.setting.model(seed)
            model.load_state_dict(spark.encoder.export())
            fit_head(model, data)
            models.append(model.eval())
            seconds += found["seconds"]
        title = SOURCES[self.setting.dataset].title
        return self._save(
            name,
            models,
            twin,
            seconds,
            protocol=PROBE,
            options=_options(self.setting, twin, None),
            summary=f"ResNet-{self.setting.depth} pre-trained by SparK on {title} without labels, with a "
            "linear probe as its head.",
        )

    def _save(
        self, name: str, models: Sequence[ResNet], twin: Card | None, seconds: float, **texts: Any
    ) -> Card:
        """Save the model of the first seed with the figures of all, and record the evidence."""
        task = get_task(f"vision/{self.setting.dataset}")
        per_seed = {
            seed: task.evaluate(model).metrics[task.primary].value
            for seed, model in zip(self.config.study.seeds, models, strict=True)
        }
        fields = card_fields(
            models[0],
            self.setting.dataset,
            name=f"vision/{name}",
            seed=self.config.study.seeds[0],
            per_seed=per_seed,
            twin=twin,
            command=_command(self.config.study),
            seconds=seconds,
            citation=CITATION if twin else NO_PAPER,
            evidence=EVIDENCE,
            **texts,
        )
        path = save(models[0], self.config.out / name, card=fields, overwrite=True)
        record_evidence(self.config.evidence, f"vision/{name}", task.name, task.primary, per_seed)
        return open_bundle(path).card


def _options(setting: Setting, twin: Card | None, tuning: Tuning | None) -> dict[str, Any]:
    """What decided the weights; from scratch nothing of the pre-training did."""
    own = asdict(setting)
    if twin is None:
        encoder = ("cell", "ratio", "decoder")
        own = {k: v for k, v in own.items() if not k.startswith("pretrain") and k not in encoder}
    return {**own, **(asdict(tuning) if tuning else {})}


def _command(study: SparKConfig) -> str:
    words = ["python -m zoo.vision.spark.bundling"]
    usual = asdict(SparKConfig())
    for key, value in asdict(study).items():
        if value != usual[key] and key != "device":
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(f"--{key.replace('_', '-')} {shown}")
    return " ".join(words)


def main(config: Bundling) -> None:
    """Make the bundles."""
    torch.set_num_threads(1)
    Maker(config).run()


if __name__ == "__main__":
    main(tyro.cli(Bundling, description=__doc__))
