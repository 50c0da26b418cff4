"""`zoo finetune lidar`: train a detector on, on generated scenes or on the real frames of KITTI.

The state goes into one file beside the output every few seconds; the same command goes on from there after a
kill, and its result equals that of an uninterrupted run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zoo.bundles.catalog import find
from zoo.bundles.store import info, load_bundle
from zoo.checkpoints import CheckpointFile
from zoo.errors import ConfigError
from zoo.harness.subjects import twin_of
from zoo.harness.tasks import get_task
from zoo.harness.tuning import (
    check_target,
    checkpoint_folder,
    command_of,
    finetuned_card,
    options_of,
    publish,
    show_change,
)
from zoo.progress import progress_bar
from zoo.vision.lidar.data import KITTI, KITTI_FRAMES, SOURCE, Frame, real_frame, scene_frames
from zoo.vision.lidar.detector import Detector
from zoo.vision.lidar.tasks import Scenes
from zoo.vision.lidar.train import DetectorFit, DetectorRecipe, run_with_checkpoints


@dataclass
class FinetuneLidar:
    """Fine-tune a detector of boxes in point clouds."""

    model: str
    """The model to start from: a name, folder or hf://owner/name."""

    out: Path
    """Folder for the new bundle."""

    data: Literal["scenes", "kitti"] = "scenes"
    """Generated scenes, or the KITTI frames below ZOO_DATA."""

    scenes: int = 240
    """How many generated scenes."""

    epochs: int = 5
    """Passes over the frames."""

    lr: float = 5e-4
    """Peak of the learning rate of AdamW: linear warm-up, then linear to 0."""

    batch: int = 4
    """Frames per step."""

    weight_decay: float = 0.01
    """Decoupled weight decay."""

    seed: int = 0
    """Of shuffling and augmentation."""

    device: str = "cpu"
    """Where to train."""

    name: str | None = None
    """Name on the card; by default vision/ and the folder's name."""

    overwrite: bool = False
    """Replace the bundle that is there."""

    def run(self) -> Path:
        """Train, or go on with an interrupted training, and write the bundle.

        Returns:
            The folder of the new bundle.

        Raises:
            ConfigError: options out of range, a model that is no detector, or a checkpoint of another run.
            SparseError: whatever loading, data or saving refuse.
        """
        recipe = DetectorRecipe(self.epochs, self.batch, self.lr, self.weight_decay, self.device)
        check_target(self)
        source = find(self.model)
        model = load_bundle(source)
        if not isinstance(model, Detector):
            raise ConfigError(f"{source.card.name} is no detector that this command can train.")
        extras = info(model).extras
        frames = self._frames()
        fit = DetectorFit(model, frames, recipe, self.seed)
        identity = {**options_of(self), "weights": source.card.weights.sha256}
        file = CheckpointFile(checkpoint_folder(self.out), identity)
        start = time.perf_counter()
        with progress_bar() as progress:
            run_with_checkpoints(
                fit, file, lambda f: progress(f.epoch, f.recipe.epochs, f"loss {f.last_loss:.3f}")
            )
        seconds = time.perf_counter() - start
        model.cpu().eval()
        task = get_task(Scenes.name)
        twin = twin_of(source) if source.card.dense_twin else None
        origin = SOURCE if self.data == "scenes" else KITTI
        fields = finetuned_card(
            self,
            source.card,
            twin,
            model,
            task,
            protocol=f"fine-tuned from {source.card.name}, last epoch",
            seconds=seconds,
            data={"name": origin.title, "source": origin.origin, "licence": origin.licence},
            arguments=model.current_arguments(),
        )
        fields["training"]["command"] = command_of(self, "lidar")
        path = publish(self, model, fields, extras)
        values = source.card.metrics[0].value, fields["metrics"][0]["value"]
        show_change(f"{source.card.name} on {task.name}", task.primary, values, (0, 0))
        return path

    def _frames(self) -> tuple[Frame, ...]:
        if self.data == "scenes":
            return scene_frames("train", self.scenes)
        return tuple(real_frame("lidar-kitti-mini", name) for name in KITTI_FRAMES)
