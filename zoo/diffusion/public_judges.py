"""CLIP score and FID, by networks that others trained and that this zoo does not ship.

`zoo eval diffusion/NAME --task clip_score:FOLDER` and `--task fid:FILE`. Both refuse to judge by weights that
are missing or others: a figure of a network with random weights would look like one.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.diffusion.data import captions, load_pictures
from zoo.diffusion.models import TextToImage
from zoo.diffusion.paired import images_of
from zoo.errors import ConfigError, TaskError
from zoo.harness.tasks import Measure, Progress, Task, TaskResult
from zoo.shared.store.io import sha256_file

IMAGES = 500
INCEPTION, DIGEST = "pt_inception-2015-12-05-6726825d.pth", "6726825d"


class ClipScore(Task):
    """100 times the cosine of CLIP's embeddings of image and prompt, over images of the digits in turn.

    Args:
        argument: folder of a CLIP model (`config.json`, `model.safetensors`, its processor).

    Raises:
        ConfigError: no such folder, or weights that it lacks.
    """

    domain, primary = "diffusion", "clip_score"

    def __init__(self, argument: str = "") -> None:
        self.name, self._folder = f"clip_score:{argument}", Path(argument)
        if not argument or not (self._folder / "model.safetensors").is_file():
            raise ConfigError(
                f"clip_score:{argument}: CLIP's weights are not there (model.safetensors). Download "
                "openai/clip-vit-base-patch16 and give its folder: --task clip_score:FOLDER"
            )

    def measured_on(self) -> Any:
        """CLIP's files."""
        return self._folder

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Sample and score; not by torchmetrics, whose CLIPScore (1.9) does not know transformers 5."""
        from transformers import CLIPModel, CLIPProcessor

        images = as_bytes(_made(self.name, model, progress))
        load: Any = CLIPModel.from_pretrained
        clip, found = load(
            self._folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        if found["missing_keys"]:
            raise ConfigError(f"{self._folder} lacks CLIP's weight {sorted(found['missing_keys'])[0]!r}")
        prepare: Any = CLIPProcessor.from_pretrained(self._folder, local_files_only=True)
        texts, scores = captions(torch.arange(len(images)) % 10), []
        for at in range(0, len(images), 50):
            given = {"text": texts[at : at + 50], "images": list(images[at : at + 50])}
            with torch.no_grad():
                out = clip.eval()(**prepare(**given, return_tensors="pt", padding=True))
            scores += (100 * (out.image_embeds * out.text_embeds).sum(1)).tolist()
        return TaskResult.from_samples({"clip_score": scores})


class InceptionDistance(Task):
    """FID to the test images of the digits; of 500 images it is biased upward, alike for all models.

    Args:
        argument: file of the Inception-v3 of the FID, as torch-fidelity publishes it.

    Raises:
        ConfigError: torch-fidelity is not installed, or the file is missing or another.
    """

    domain, primary, higher_is_better = "diffusion", "fid", False

    def __init__(self, argument: str = "") -> None:
        self.name, self._file = f"fid:{argument}", Path(argument)
        if importlib.util.find_spec("torch_fidelity") is None:
            raise ConfigError("FID needs torch-fidelity. Run: pip install 'sparse-model-zoo[fid]'")
        if not self._file.is_file() or not sha256_file(self._file).startswith(DIGEST):
            raise ConfigError(
                f"fid:{argument} is not Inception's file of the FID. Download {INCEPTION} from the "
                "releases of github.com/toshas/torch-fidelity: --task fid:FILE"
            )

    def measured_on(self) -> Any:
        """Inception's file."""
        return self._file

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Sample and compare."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        made = _made(self.name, model, progress)
        distance = FrechetInceptionDistance(feature_extractor_weights_path=str(self._file))
        for images, real in ((load_pictures("digits").test[: len(made)], True), (made, False)):
            for part in as_bytes(images).split(50):
                distance.update(part, real=real)
        return TaskResult({"fid": Measure(float(distance.compute()))}, n=len(made))


def as_bytes(images: Tensor) -> Tensor:
    """Images [n, 1 or 3, H, W] in [-1, 1] as colours [n, 3, H, W] of 0 to 255."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)


def _made(name: str, model: nn.Module, progress: Progress | None) -> Tensor:
    shape = load_pictures("digits").shape
    if not isinstance(model, TextToImage) or model.sample_shape != shape:
        raise TaskError(f"{name} takes text-to-image models of the digits; got a {type(model).__name__}")
    noise = torch.randn((IMAGES, *shape), generator=torch.Generator().manual_seed(0))
    return images_of(model, noise, progress=progress)
