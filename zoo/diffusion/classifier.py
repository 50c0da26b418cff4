"""The judge of generated digits: a small convolutional classifier, trained on the same data and shipped.

`python -m zoo.diffusion.classifier DATASET` trains it again and prints its accuracy on the test images.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor, nn

from zoo.diffusion.data import load_pictures
from zoo.errors import DataError
from zoo.shared.store.io import atomic_write
from zoo.shared.train import Job, Recipe

FOLDER = Path(__file__).parent / "judges"
FEATURES = 64


class Judge(nn.Module):
    """Three convolutions; `features` are the activations before the last layer.

    Args:
        classes: how many digits there are.
    """

    num_features = FEATURES

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(512, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, classes)

    def features(self, x: Float[Tensor, "n 1 H W"]) -> Float[Tensor, "n 64"]:
        """Activations before the last layer."""
        out: Tensor = self.body(x)
        return out

    def forward(self, x: Float[Tensor, "n 1 H W"]) -> Float[Tensor, "n classes"]:
        out: Tensor = self.head(self.features(x))
        return out


@functools.lru_cache(maxsize=2)
def load_judge(dataset: str) -> Judge:
    """The classifier that was trained on a data set.

    Raises:
        DataError: none was.
    """
    path = FOLDER / f"{dataset}.safetensors"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.safetensors")))
        raise DataError(f"No classifier was trained on {dataset!r}; there are those of: {known or 'none'}")
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.eval()


def train_judge(dataset: str, seed: int = 0) -> Judge:
    """A classifier of the training images, from fresh weights."""
    data = load_pictures(dataset)
    torch.manual_seed(seed)
    judge = Judge()
    chosen = torch.utils.data.TensorDataset(data.train, data.train_labels)
    loader = torch.utils.data.DataLoader(chosen, batch_size=128, shuffle=True, drop_last=True)
    epochs = max(2, 40_000 // len(data.train))
    recipe = Recipe(epochs=epochs, lr=2e-3, optimizer="adam", weight_decay=0.0)
    Job(loader, recipe=recipe, seed=seed).fit(judge).run()
    return judge.eval()


@torch.no_grad()
def accuracy(judge: Judge, images: Tensor, labels: Tensor) -> float:
    """Share of images that the classifier assigns to their class."""
    return float((judge(images).argmax(1) == labels).double().mean())


def frechet_distance(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]) -> float:
    """Frechet distance of two samples under a Gaussian fit of each, by torchmetrics' formula.

    Biased upwards by about a constant over the number of samples: compare equal numbers only.

    Raises:
        DataError: fewer than two samples.
    """
    from torchmetrics.image.fid import _compute_fid

    if min(len(first), len(second)) < 2:
        raise DataError("a Frechet distance needs at least two samples of each kind")
    moments = [(x.double().mean(0), torch.cov(x.double().T)) for x in (first, second)]
    (m1, c1), (m2, c2) = moments
    return float(_compute_fid(m1, c1, m2, c2))


def main(dataset: str) -> None:
    """Train, store in half precision, and say how good it is."""
    judge, data = train_judge(dataset), load_pictures(dataset)
    FOLDER.mkdir(exist_ok=True)
    halves = {name: value.half().contiguous() for name, value in judge.state_dict().items()}
    atomic_write(FOLDER / f"{dataset}.safetensors", save(halves))
    load_judge.cache_clear()
    print(f"{dataset}: {accuracy(load_judge(dataset), data.test, data.test_labels):.4f} of the test images")


if __name__ == "__main__":
    main(sys.argv[1])
