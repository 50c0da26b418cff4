"""QUEEN: a video of a scene as what changes from frame to frame, sparse where it moves, rounded elsewhere.

Girish et al., "QUEEN: QUantized Efficient ENcoding of Dynamic Gaussians for Streaming Free-viewpoint Videos",
NeurIPS 2024. A frame t is learned against frame t - 1, which is given:

    position   x_t = x_(t-1) + g r        g a hard-concrete gate of each Gaussian, noiseless as released
    others     a_t = a_(t-1) + round(l) D    latents l rounded straight through, D one small matrix a kind

and its loss has lambda times the share of open gates. A gate starts from how much more the Gaussian's place
on the screen would help the new pictures than the old ones: p = G / (G + median G).

Differs from the released code: no density control (the number of Gaussians is fixed), opacity's matrix is
learned like the others, harmonics beyond the first are those of frame 1, all pixels are rendered, the entropy
coder is LZMA, and positions are rounded to 1e-4 in what is trained on, too, so that file and state agree.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor, nn
from torch.func import functional_call

from zoo.errors import ConfigError, DataError
from zoo.neural3d.cameras import Camera
from zoo.neural3d.packed import pack_integers, unpack_integers
from zoo.neural3d.refine import RECIPE, view_loss
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.views import View, ViewBatches
from zoo.shared.learned.constraints.straight_through import round_through
from zoo.shared.learned.gates import HardConcrete
from zoo.shared.masks import Mask, MaskSet
from zoo.shared.store.identity import data_digest
from zoo.shared.store.io import atomic_write
from zoo.shared.train import Job, Recipe

FORMAT = "zoo-queen-1"
GRID = 1e-4  # to which positions are rounded
LATENTS = {"sh0": 8, "scales": 8, "quats": 6, "opacities": 3}  # numbers of a Gaussian, released configuration
SPREAD = {"sh0": 1e-4, "scales": 1e-3, "quats": 1e-2, "opacities": 1e-4}  # of the matrices at the start
BETA, GAMMA, ETA = 0.3, -0.5, 1.01  # of the gates


@dataclass(frozen=True)
class Queen:
    """How a frame is learned.

    Attributes:
        steps: of a frame.
        sparsity: lambda, the weight of the share of open gates.
        gated: without gates every Gaussian may move.
        rates: of positions, gates, latents and matrices.
    """

    steps: int = 80
    sparsity: float = 0.05
    gated: bool = True
    rates: tuple[float, float, float, float] = (2e-3, 0.1, 0.05, 3e-3)

    def fit(self, before: GaussianScene, old: Sequence[View], new: Sequence[View], seed: int = 0) -> Residual:
        """Learn a frame.

        Args:
            before: the scene of the frame before.
            old, new: the pictures of both frames, by the same cameras in the same order.

        Raises:
            ConfigError: frames of other cameras, or no views.
        """
        start = gate_logits(gradient_difference(before, old, new)) if self.gated else None
        residual = Residual(before, start, seed)
        moves, gates, latents, matrices = self.rates
        groups = [
            {"params": [residual.moves], "lr": moves},
            {"params": [*residual.latents.parameters()], "lr": latents},
            {"params": [*residual.matrices.parameters()], "lr": matrices},
        ]
        if residual.gate is not None:
            groups.append({"params": [residual.gate.logits], "lr": gates})
        recipe = Recipe(**{**RECIPE, "steps": self.steps})
        job = Job(ViewBatches(list(new)), loss=view_loss, recipe=recipe, seed=seed)

        def penalty() -> Tensor:
            assert residual.gate is not None
            return self.sparsity * residual.gate.open_probability().mean()

        job.fit(
            residual, parameters=groups, penalty=penalty if residual.gate is not None else None, macs=_none
        ).run(after_step=residual.hold)
        return residual


class Residual(nn.Module):
    """What one frame adds to the scene before it.

    Args:
        before: the frame before; it is not changed.
        logits: log alpha of the gates [n], or None for no gates.
        seed: of the matrices.
    """

    def __init__(self, before: GaussianScene, logits: Tensor | None, seed: int = 0) -> None:
        super().__init__()
        self._before = [before]  # no part of this module's own parameters
        count = len(before)
        self.moves = nn.Parameter(torch.zeros(count, 3))
        self.gate = (
            None
            if logits is None
            else HardConcrete((count,), logits, temperature=BETA, gamma=GAMMA, zeta=ETA)
        )
        generator = torch.Generator().manual_seed(seed)
        self.latents, self.matrices = nn.ParameterDict(), nn.ParameterDict()
        for name, width in LATENTS.items():
            outputs = getattr(before, name)[0].numel()
            self.latents[name] = nn.Parameter(torch.zeros(count, width))
            drawn = torch.randn(width, outputs, generator=generator) * SPREAD[name]
            self.matrices[name] = nn.Parameter(drawn)

    @property
    def before(self) -> GaussianScene:
        """The frame before."""
        return self._before[0]

    def hold(self) -> None:
        """Keep log alpha within the released bounds."""
        if self.gate is not None:
            with torch.no_grad():
                self.gate.logits.clamp_(-math.log(1000), math.log(1000))

    def gates(self) -> Float[Tensor, " n"]:
        """The gates, noiseless; ones if there are none."""
        if self.gate is None:
            return torch.ones(len(self.moves))
        return self.gate.sample(torch.full_like(self.gate.logits, 0.5))

    def steps(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What a file holds: moves in steps of `GRID` [n, 3] and latents, whole numbers with gradients."""
        moved = round_through(self.gates()[:, None] * self.moves / GRID)
        return moved, {name: round_through(latent) for name, latent in self.latents.items()}

    def tensors(self) -> dict[str, Tensor]:
        """The parameters of this frame's scene, by name."""
        moved, latents = self.steps()
        return _added(self.before, moved, latents, dict(self.matrices.items()))

    def forward(self, camera: Camera) -> Tensor:
        """The colours [height, width, 3] that the camera sees in this frame."""
        found: Tensor = functional_call(self.before, self.tensors(), (camera,))
        return found

    def scene(self) -> GaussianScene:
        """This frame as a scene of its own, exactly what the file gives back."""
        moved, latents = self.steps()
        whole = {name: latent.detach().round() for name, latent in latents.items()}
        matrices = {name: matrix.detach() for name, matrix in self.matrices.items()}
        return _scene(self.before, _added(self.before, moved.detach().round(), whole, matrices))


def _added(
    before: GaussianScene, moved: Tensor, latents: dict[str, Tensor], matrices: dict[str, Tensor]
) -> dict[str, Tensor]:
    out = {"means": before.means.detach() + moved * GRID}
    for name, latent in latents.items():
        old = getattr(before, name).detach()
        out[name] = old + (latent @ matrices[name]).reshape(old.shape)
    return out


def _scene(before: GaussianScene, tensors: dict[str, Tensor]) -> GaussianScene:
    after = before.like(before.splats)
    with torch.no_grad():
        for name, value in tensors.items():
            getattr(after, name).copy_(value)
    return after


class Stream(nn.Module):
    """A video: its first frame whole, and what each later one adds.

    Parameters: those of the scene `first`; of each of `frames` the `moves` [n, 3] in steps of `GRID` and the
    latents [n, width] by name, whole numbers all, and the matrices as `NAME_matrix`.

    Args:
        count: Gaussians of every frame.
        frames: after the first one.
        background: colour where nothing is.

    Attributes:
        full_precision: that it computes in float32; whole numbers up to 2,048 are exact in float16.
    """

    full_precision: ClassVar[bool] = True

    def __init__(self, count: int, frames: int, background: Sequence[float]) -> None:
        super().__init__()
        self.first = GaussianScene(count, 0, background)
        blank = Residual(self.first, None)
        self.frames = nn.ModuleList(nn.ParameterDict(self._stored(blank)) for _ in range(frames))

    @classmethod
    def of(cls, residuals: Sequence[Residual]) -> Stream:
        """The video of frames that were learned one after the other.

        Raises:
            ConfigError: none, or a scene with harmonics beyond the first.
        """
        if not residuals or residuals[0].before.sh_degree:
            raise ConfigError("a stream has one later frame or more, of scenes of degree 0")
        first = residuals[0].before
        made = cls(len(first), len(residuals), first.background.tolist())
        made.first.load_state_dict(first.state_dict())
        made.frames = nn.ModuleList(nn.ParameterDict(cls._stored(one)) for one in residuals)
        return made

    @staticmethod
    def _stored(residual: Residual) -> dict[str, Tensor]:
        moved, latents = residual.steps()
        matrices = {f"{name}_matrix": matrix for name, matrix in residual.matrices.items()}
        return {k: v.detach().clone() for k, v in {"moves": moved, **latents, **matrices}.items()}

    def changes(self) -> MaskSet:
        """Which moves and latents are there: a Gaussian moves or stands still, other zeros lie anywhere."""
        found = {}
        for number, frame in enumerate(self.frames):
            assert isinstance(frame, nn.ParameterDict)
            for name in ("moves", *LATENTS):
                keep = frame[name] != 0
                found[f"frames.{number}.{name}"] = Mask(
                    keep.any(1)[:, None] | keep if name == "moves" else keep
                )
        return MaskSet(found)

    def scenes(self) -> list[GaussianScene]:
        """The frames, the first one too, as scenes."""
        found = [self.first]
        for frame in self.frames:
            assert isinstance(frame, nn.ParameterDict)
            latents = {name: frame[name].detach() for name in LATENTS}
            matrices = {name: frame[f"{name}_matrix"].detach() for name in LATENTS}
            found.append(_scene(found[-1], _added(found[-1], frame["moves"].detach(), latents, matrices)))
        return found

    def forward(self, camera: Camera, frame: int = -1) -> Tensor:
        """The colours [height, width, 3] that the camera sees in a frame, by default the last."""
        found: Tensor = self.scenes()[frame](camera)
        return found


def gradient_difference(
    scene: GaussianScene, old: Sequence[View], new: Sequence[View]
) -> Float[Tensor, " n"]:
    """How much each Gaussian's place on the screen matters to what has changed: the length of the gradient of
    [error to the new picture - error to the old one], summed over cameras.

    Raises:
        ConfigError: frames of other cameras, or no views.
    """
    same = len(old) == len(new) > 0 and all(
        torch.equal(a.camera.viewmat, b.camera.viewmat)
        and torch.equal(a.camera.intrinsics, b.camera.intrinsics)
        and a.image.shape == b.image.shape
        for a, b in zip(old, new, strict=False)
    )
    if not same:
        raise ConfigError(
            f"frames must have the same cameras in the same order; received {len(old)} and {len(new)} views"
        )
    total = torch.zeros(len(scene))
    for one, other in zip(old, new, strict=True):
        shift = torch.zeros(len(scene), 2, requires_grad=True)
        seen = scene.render(one.camera, shift=shift).colour
        change = (seen - other.image).square().mean() - (seen - one.image).square().mean()
        (slope,) = torch.autograd.grad(change, shift)
        total += slope.norm(dim=1)
    return total


def gate_logits(difference: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """log alpha at the start: gates that are open with probability G / (G + median G)."""
    share = difference / (difference + difference.median()).clamp_min(1e-30)
    logits = share.clamp(1e-3, 1 - 1e-3).logit() + BETA * math.log(-GAMMA / ETA)
    return logits.clamp(-math.log(1000), math.log(1000))


def write_frame(path: str | Path, residual: Residual) -> int:
    """Write what a frame adds to the one before; returns the number of bytes."""
    exact = residual.steps()
    moved, latents = _whole(exact[0]), {name: _whole(latent) for name, latent in exact[1].items()}
    moving = moved.any(1)
    streams = {
        "moving": numpy.packbits(moving),
        "moves": numpy.frombuffer(pack_integers(moved[moving], differences=False), numpy.uint8),
    }
    streams["moving"] = numpy.frombuffer(lzma.compress(streams["moving"].tobytes()), numpy.uint8)
    for name, latent in latents.items():
        streams[f"{name}/latents"] = numpy.frombuffer(pack_integers(latent, differences=False), numpy.uint8)
        streams[f"{name}/matrix"] = residual.matrices[name].detach().numpy()
    meta = {"format": FORMAT, "count": str(len(moved)), "before": _digest(residual.before)}
    content = save(streams, metadata=meta)
    atomic_write(Path(path), content)
    return len(content)


def read_frame(path: str | Path, before: GaussianScene) -> GaussianScene:
    """The scene of a frame, from its file and the scene of the frame before.

    Raises:
        DataError: no such file, a damaged one, or one that goes on from another scene.
    """
    try:
        with safe_open(str(path), "numpy") as file:
            meta = file.metadata() or {}
            streams = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: no frame of a stream: {error}") from error
    if meta.get("format") != FORMAT:
        raise DataError(f"{path}: format {meta.get('format')!r}; this code reads {FORMAT}")
    if meta.get("before") != _digest(before) or meta.get("count") != str(len(before)):
        raise DataError(f"{path} goes on from another scene than the one given; decode the frames in order")
    count = len(before)
    try:
        bits = lzma.LZMADecompressor().decompress(streams["moving"].tobytes(), count // 8 + 2)
        if len(bits) != -(-count // 8):
            raise ValueError(f"{len(bits)} bytes of moving Gaussians")
        moving = numpy.unpackbits(numpy.frombuffer(bits, numpy.uint8), count=count).astype(bool)
        moved = numpy.zeros((count, 3), numpy.int64)
        moved[moving] = unpack_integers(streams["moves"].tobytes(), int(moving.sum()), 3, differences=False)
        latents, matrices = {}, {}
        for name, width in LATENTS.items():
            whole = unpack_integers(streams[f"{name}/latents"].tobytes(), count, width, differences=False)
            latents[name] = torch.from_numpy(whole).float()
            matrices[name] = torch.from_numpy(streams[f"{name}/matrix"]).reshape(
                width, getattr(before, name)[0].numel()
            )
    except (KeyError, ValueError, IndexError, RuntimeError, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path}: a stream is missing or damaged: {error!r}") from error
    return _scene(before, _added(before, torch.from_numpy(moved).float(), latents, matrices))


def _whole(part: Tensor) -> numpy.ndarray:
    found: numpy.ndarray = part.detach().round().long().numpy()
    return found


def _digest(scene: GaussianScene) -> str:
    return data_digest([tensor.contiguous() for tensor in scene.splats.tensors])[:32]


def _none() -> float:
    return 0.0
