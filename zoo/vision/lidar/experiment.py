"""`zoo reproduce dsvt`: rotated sets against fixed windows, dense pillars and sparse convolution.

Arms have equal parameters. They are compared after the same epochs, and after the same training time: the
faster ones then train for more epochs, by the ratio of the times of their steps, measured in turn in one
process. Several processes that run the command share its cells.
"""

from __future__ import annotations

import functools
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from safetensors.torch import load_file, save

from zoo.checkpoints import CheckpointFile
from zoo.errors import ConfigError
from zoo.harness.experiments import CellCache, Experiment, ExperimentResult, share
from zoo.names import suggestion
from zoo.shared.store.io import atomic_write
from zoo.vision.lidar import verdicts
from zoo.vision.lidar.arms import ARMS, make_arm
from zoo.vision.lidar.data import scene_frames
from zoo.vision.lidar.detector import Detector
from zoo.vision.lidar.tasks import detections, scores, truth_of
from zoo.vision.lidar.train import DetectorFit, DetectorRecipe, run_with_checkpoints

VERSION = 1  # raise it when a cell means something else
SPEED_FRAMES, SPEED_ROUNDS = 32, 5


@dataclass(frozen=True)
class DSVTExperimentConfig:
    """Options of the experiment.

    Args:
        arms: which; by default all. The first one sets the training time.
        seeds: how many, from 0.
        scenes: training scenes.
        test_scenes: test scenes.
        epochs: passes over them.
        batch: scenes per step.
        lr: peak learning rate.
        device: where to train.
    """

    arms: tuple[str, ...] = tuple(ARMS)
    seeds: int = 3
    scenes: int = 240
    test_scenes: int = 100
    epochs: int = 6
    batch: int = 4
    lr: float = 2e-3
    device: str = "cpu"

    def __post_init__(self) -> None:
        for arm in self.arms:
            if arm not in ARMS:
                raise ConfigError(f"Unknown arm {arm!r}. {suggestion(arm, ARMS)}")
        if not self.arms or min(self.seeds, self.scenes, self.test_scenes, self.epochs) < 1:
            raise ConfigError("give at least one arm, seed, scene and epoch")

    def recipe(self, epochs: int) -> DetectorRecipe:
        """How an arm is trained."""
        return DetectorRecipe(epochs, self.batch, self.lr, device=self.device)

    def key(self, **rest: Any) -> dict[str, Any]:
        """A cell's key. The device is no part of it: it changes no more than the order of sums."""
        own = {"scenes": self.scenes, "test": self.test_scenes, "batch": self.batch, "lr": self.lr}
        return {"experiment": "dsvt", "version": VERSION, **own, **rest}


def step_times(config: DSVTExperimentConfig, cells: CellCache) -> dict[str, float]:
    """Seconds of a training step of each arm: medians over rounds in which each has its turn."""
    key = config.key(cell="step time", arms=list(config.arms), device=torch.device(config.device).type)

    def compute() -> dict[str, float]:
        frames = scene_frames("train", SPEED_FRAMES)
        fits = {
            arm: DetectorFit(make_arm(arm, 0), frames, config.recipe(SPEED_ROUNDS + 1)) for arm in config.arms
        }
        times: dict[str, list[float]] = {arm: [] for arm in config.arms}
        for round_ in range(SPEED_ROUNDS + 1):
            for arm, fit in fits.items():
                before = fit.cost.seconds
                fit.run(until=round_ + 1)
                times[arm].append((fit.cost.seconds - before) / len(fit.batches))
        return {arm: statistics.median(own[1:]) for arm, own in times.items()}

    found: dict[str, float] = cells.cell(key, compute)
    return found


def trained_cell(
    config: DSVTExperimentConfig, arm: str, seed: int, epochs: int, cells: CellCache
) -> dict[str, Any]:
    """An arm trained for so many epochs, and what it finds in the test scenes; its weights lie beside the
    cell."""
    key = config.key(cell="trained", arm=arm, seed=seed, epochs=epochs)
    file = cells.path(key).with_suffix(".safetensors")

    def compute() -> dict[str, Any]:
        torch.set_num_threads(1)
        frames = scene_frames("train", config.scenes)
        fit = DetectorFit(make_arm(arm, seed), frames, config.recipe(epochs), seed)
        checkpoint = CheckpointFile(file.with_suffix(".state"), key)
        start = time.perf_counter()
        run_with_checkpoints(fit, checkpoint)
        model = fit.model
        state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, save(state))
        test = scene_frames("test", config.test_scenes)
        found = detections(cast(Detector, model), test)
        measured = scores(found, [truth_of(frame) for frame in test])
        shutil.rmtree(checkpoint.folder, ignore_errors=True)
        return {
            "arm": arm,
            "seed": seed,
            "epochs": epochs,
            "seconds": fit.cost.seconds,
            "wall": time.perf_counter() - start,
            "loss": fit.last_loss,
            "parameters": sum(p.numel() for p in model.parameters()),
            "metrics": {name: measure.value for name, measure in measured.items()},
            "stderr": {n: m.stderr for n, m in measured.items() if m.stderr is not None},
        }

    value: dict[str, Any] = cells.cell(key, compute)
    return value


def trained_model(
    config: DSVTExperimentConfig, arm: str, seed: int, epochs: int, cells: CellCache
) -> Detector:
    """The detector of a cell, trained first if it is not there."""
    trained_cell(config, arm, seed, epochs, cells)
    file = cells.path(config.key(cell="trained", arm=arm, seed=seed, epochs=epochs)).with_suffix(
        ".safetensors"
    )
    model = make_arm(arm, seed)
    model.load_state_dict(load_file(file))
    return model.eval()


def equal_time_epochs(config: DSVTExperimentConfig, times: dict[str, float]) -> dict[str, int]:
    """Epochs of each arm that take as long as those of the first."""
    first = times[config.arms[0]]
    return {arm: max(1, round(config.epochs * first / times[arm])) for arm in config.arms}


class DSVTExperiment(Experiment):
    """DSVT and its baselines on generated scenes."""

    name: ClassVar[str] = "dsvt"
    title: ClassVar[str] = "DSVT: rotated sets against dense pillars and sparse convolution"
    paper: ClassVar[str] = (
        "Haiyang Wang, Chen Shi, Shaoshuai Shi, Meng Lei, Sen Wang, Di He, Bernt Schiele, Liwei Wang: DSVT: "
        "Dynamic Sparse Voxel Transformer with Rotated Sets, CVPR 2023"
    )
    config_class: ClassVar[type] = DSVTExperimentConfig

    def run(
        self, config: DSVTExperimentConfig, cells: CellCache, progress: Callable[..., None] | None = None
    ) -> ExperimentResult:
        """Run what is missing and sum up."""
        times = share([("step times", functools.partial(step_times, config, cells))], cells)[0]
        longer = equal_time_epochs(config, times)
        jobs = []
        for plan in (dict.fromkeys(config.arms, config.epochs), longer):
            for seed in range(config.seeds):
                for arm in config.arms:
                    job = functools.partial(trained_cell, config, arm, seed, plan[arm], cells)
                    jobs.append((f"{arm}, seed {seed}, {plan[arm]} epochs", job))
        found = share(jobs, cells, progress)
        half = len(found) // 2
        rows = [
            {**row, "equal": equal}
            for equal, part in (("epochs", found[:half]), ("time", found[half:]))
            for row in part
        ]
        return verdicts.summarise(rows, config, times)
