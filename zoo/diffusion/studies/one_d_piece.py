"""`zoo reproduce one-d-piece`: tail token drop on MNIST, and its rate and quality beside JPEG and WebP."""

from __future__ import annotations

import dataclasses
import io
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from zoo.diffusion.data import load_pictures
from zoo.diffusion.networks.one_d_piece import OneDPiece, errors
from zoo.diffusion.networks.photos import test_tiles
from zoo.studies.cells import CellCache
from zoo.studies.figures import Curves, Grid
from zoo.studies.study import BAR, Arm, Claim, Study, grid
from zoo.studies.tables import Plot, Series, Table, Verdict
from zoo.studies.view import Row, Rows, Value, View

DROP, NONE = "tail drop", "no drop"
JPEG, SCAN, WEBP = "JPEG", "JPEG without its headers", "WebP"
MNIST, PHOTOS = "MNIST 16x16", "photographs 64x64"
SIZES: dict[str, dict[str, Any]] = {
    MNIST: {"side": 16, "patch": 4, "tokens": 16, "codes": 128},
    PHOTOS: {"side": 64, "patch": 8, "tokens": 32, "codes": 256},
}
WIGGLE = 1.01  # a longer beginning may be this much worse and still count as not worse
MSE = Value("mse", 1.0, 4, "in logarithms", 3, lower=True, log=True)
PSNR = Value("psnr", 1.0, 2, "dB", 2)


@dataclass(frozen=True)
class OneDPieceOptions:
    """Options.

    Args:
        seeds: how many, from 0.
        steps: of each training on MNIST.
        photo_steps: of each training on photographs.
        images: MNIST test images.
        tiles: squares of Set5 and Set14.
        device: where to train.
    """

    seeds: int = 3
    steps: int = 700
    photo_steps: int = 350
    images: int = 300
    tiles: int = 100
    device: str = "cpu"


def cases(options: OneDPieceOptions) -> Iterator[Row]:
    """Each training once; its rows have a level per length."""
    yield from grid(ARMS, [None], options.seeds, [DROP, NONE], pictures=MNIST)
    yield from grid(ARMS, [None], options.seeds, [DROP], pictures=PHOTOS)
    yield from grid(ARMS, [None], 1, [JPEG, SCAN, WEBP], pictures=PHOTOS)


def measure(make: Any, options: OneDPieceOptions, case: Row, cells: CellCache) -> list[Row]:
    """Error by length of the beginning; of codecs, by quality."""
    if case["arm"] in CODECS:
        return codec(case["arm"], test_tiles(64, options.tiles))
    data = case["pictures"]
    model = OneDPiece.fresh(case["seed"], **SIZES[data], tail_drop=make)
    recipe = dataclasses.replace(model.usual, steps=options.steps)
    model.learn(
        "mnist" if data == MNIST else "photos", recipe=recipe, seed=case["seed"], device=options.device
    )
    model.cpu()
    images = load_pictures("mnist").test[: options.images] if data == MNIST else test_tiles(64, options.tiles)
    found = []
    for k in lengths(model.tokens):
        error = errors(model, images, k).double()
        found.append({"level": k, **figures(error), "bytes": model.bits(k) / 8})
    return found


def lengths(tokens: int) -> list[int]:
    """1, 2, 4 ... and all."""
    return [2**power for power in range(int(math.log2(tokens)) + 1)]


def figures(error: Float[Tensor, " n"]) -> Row:
    """Mean squared error, and the mean of the images' PSNR; pixels are -1 to 1."""
    return {"mse": float(error.mean()), "psnr": float((10 * torch.log10(4 / error)).mean())}


def codec(name: str, tiles: Float[Tensor, "n 1 H W"]) -> list[Row]:
    """A codec of Pillow at its qualities: bytes of whole files (or of the entropy-coded part), quality."""
    grey = ((tiles[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
    found = []
    for quality in CODECS[name]:
        sizes, error = [], []
        for tile in grey:
            held = io.BytesIO()
            kind, extra = ("WEBP", {"method": 6}) if name == WEBP else ("JPEG", {"optimize": True})
            Image.fromarray(tile).save(held, kind, quality=quality, **extra)
            file = held.getvalue()
            # A JPEG's scan begins after the marker FFDA and its 10 bytes of a grey image; FFD9 ends it.
            sizes.append(len(file) - file.index(b"\xff\xda") - 12 if name == SCAN else len(file))
            held.seek(0)
            with Image.open(held) as image:
                again = np.asarray(image.convert("L"), dtype=np.float64)
            error.append(((again - tile) / 127.5) ** 2)
        mean = torch.tensor(np.stack(error)).flatten(1).mean(1).clamp(min=1e-9)
        found.append({"level": f"quality {quality}", **figures(mean), "bytes": statistics.fmean(sizes)})
    return found


def beside_smallest(rows: Rows, options: OneDPieceOptions) -> Rows:
    """Adds to the photographs' rows how far their PSNR is above that of each codec's smallest files."""
    out = [dict(row) for row in rows]
    for name in CODECS:
        files = [(row["bytes"], row["psnr"]) for row in rows if row["arm"] == name]
        for row in out:
            if files and row["pictures"] == PHOTOS and row["arm"] == DROP:
                row[f"above {name}"] = row["psnr"] - min(files)[1]
    return out


def monotone(view: View) -> list[Verdict]:
    """Whether more tokens are never worse, in every seed; asked where the tokens carry something."""
    data = view.where["pictures"]
    if data == PHOTOS:
        return []
    ratios = [
        longer / shorter
        for seed in sorted({row["seed"] for row in view.rows})
        for shorter, longer in _pairs(
            [row["mse"] for row in view.rows if row["arm"] == DROP and row["seed"] == seed]
        )
    ]
    if not ratios:
        return []
    worst = max(ratios)
    return [
        Verdict(
            f"{data}: with tail drop the error falls with every doubling of the tokens (1 % allowed)",
            "quality grows with the tokens",
            f"largest ratio of a doubling {worst:.3f} over all seeds",
            "holds" if worst <= WIGGLE else "does not hold",
            paper=(20,),
        )
    ]


def _pairs(values: list[float]) -> list[tuple[float, float]]:
    return list(zip(values, values[1:], strict=False))


def rates(view: View) -> Plot | None:
    """PSNR against bytes of a 64x64 grey image."""
    if view.where["pictures"] != PHOTOS:
        return None
    series = []
    for arm in view.arms():
        points = []
        for level in view.levels(arm):
            rows = view.chosen(arm, level)
            points.append([statistics.fmean(row[key] for row in rows) for key in ("bytes", "psnr")])
        points.sort()
        series.append(Series(arm, [x for x, _ in points], [y for _, y in points]))
    return Plot(
        "rate",
        "Quality against bytes, grey 64x64 squares of Set5 and Set14",
        "bytes per image",
        "PSNR (dB)",
        series,
        "The tokens' curve is flat and ends at fewer bytes and far lower than those of JPEG and WebP begin.",
        log_x=True,
    )


def lengths_table(view: View) -> Table | None:
    """Errors of the tokenizers by length."""
    arms = view.arms((DROP, NONE))
    return Grid("Mean squared error, {where}", arms=arms, levels=view.levels(DROP))(view)


def codecs(view: View) -> Table | None:
    """The tokens' quality beside that of the codecs' smallest files."""
    if view.where["pictures"] != PHOTOS:
        return None
    values = [PSNR, *(Value(f"above {name}", 1.0, 2) for name in CODECS)]
    body = [[k, *(view.cell(DROP, k, value) for value in values)] for k in view.levels(DROP)]
    heads = ["PSNR (dB)", *(f"above the smallest {name}" for name in CODECS)]
    smallest = [
        f"{name} {min(row['bytes'] for row in view.chosen(name)):.0f}" for name in view.arms(tuple(CODECS))
    ]
    note = f"A token is a byte here; bytes of the smallest files: {', '.join(smallest)}."
    return Table("PSNR beside the codecs' smallest files (dB)", ["tokens", *heads], body, note)


CODECS: dict[str, tuple[int, ...]] = {
    JPEG: (1, 3, 5, 8, 12, 18, 25, 40),
    SCAN: (1, 3, 5, 8, 12, 18, 25, 40),
    WEBP: (0, 1, 3, 5, 10, 20, 30, 45),
}
ARMS = {
    DROP: Arm(True),
    NONE: Arm(False),
    **{name: Arm(once=True) for name in CODECS},
}
STUDY = Study(
    "one-d-piece",
    "One-D-Piece: image tokens of which any beginning is an image",
    "Miwa et al. One-D-Piece: Image Tokenizer Meets Quality-Controllable Compression. arXiv 2501.10064",
    OneDPieceOptions,
    ARMS,
    cases,
    measure,
    papers=(20,),
    claims=[
        Claim(
            "{where}: at {level} of 16 tokens tail drop lowers the error by 30 % or more",
            BAR,
            DROP,
            NONE,
            -math.log(0.7),
            at=(2,),
            only={"pictures": MNIST},
        ),
        Claim(
            "{where}: at all 16 tokens tail drop costs at most 15 % of the error",
            BAR,
            DROP,
            NONE,
            -math.log(1.15),
            at=(16,),
            only={"pictures": MNIST},
        ),
        *(
            Claim(
                f"{{where}}: {{level}} tokens, a byte each, reach the PSNR of the smallest {name}",
                "better than JPEG and WebP at the same bytes",
                DROP,
                at=(32,),
                value=Value(f"above {name}", 1.0, 2, "dB", 2),
                only={"pictures": PHOTOS},
            )
            for name in CODECS
        ),
    ],
    value=MSE,
    varies=("seeds", "device"),
    by=("pictures",),
    facts=monotone,
    tables=[lengths_table, codecs],
    plots=[
        lambda view: (
            Curves(
                "length",
                "Error against the number of tokens, {where}",
                "tokens kept",
                "mean squared error",
                arms=(DROP, NONE),
                x=float,
                log_x=True,
            )(view)
            if view.where["pictures"] == MNIST
            else None
        ),
        rates,
    ],
    prepare=beside_smallest,
    notes=lambda options: [
        f"{options.steps} steps of 24 images each, the same for both arms; nothing was tuned for one of "
        "them. Errors are of pixels in [-1, 1], on images that were not trained on. The claims on errors "
        f"are of logarithms: {-math.log(0.7):.3f} is 30 % less, {math.log(1.15):.3f} is 15 % more.",
        f"The photographs' tokenizer had {options.photo_steps} steps of 12 squares of 91 images. It learned "
        "next to nothing but the mean: the comparison with the codecs is lost at every size. The weights of "
        "the decoder are not counted for the tokens.",
    ],
)
