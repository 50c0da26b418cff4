"""DPMesh: the mesh of a person in a crop, from a denoiser's features and joints that may be wrong or missing.

Zhu et al., "DPMesh: Exploiting Diffusion Prior for Occluded Human Mesh Recovery", CVPR
2024. A denoising U-Net looks at the crop once, without noise. Joints on the screen steer it as heat maps in a
control branch, whose outputs begin at zero (ControlNet), and as tokens of its cross-attention. Its
features of
all scales and its attention maps are fused, and a transformer's layers correct pose, shape, camera and joints
one after the other. Training hides joints, moves them, and holds the features near those of a teacher that
sees true joints (noisy key-point reasoning).

Differs from the paper: a toy body and crops (`zoo.neural3d.bodies`) for SMPL and photographs; the U-Net is a
small one that learned to denoise such crops, is trained on as a whole rather than by LoRA, and takes pixels
in blocks of four in place of a VAE's latents; the head reads the map in place of a volume."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from zoo.errors import ConfigError, DataError
from zoo.neural3d.bodies import JOINTS, SIZE, TURNING, Bodies, draw, from_six, random_bodies
from zoo.neural3d.networks import fresh
from zoo.shared.train import Drawn, Job, Recipe

BLOCK = 4  # pixels on a side that become one place of the U-Net's input
LATENT = 3 * BLOCK * BLOCK
PLACES = SIZE // BLOCK
POOL = 4000  # crops that a seed trains on
SIGMA = 0.75  # of a heat map's blob, in places
RECIPE = Recipe(
    lr=3e-3, optimizer="adamw", weight_decay=0.01, warmup=0.05, decay="cosine", clip=1.0, epochs=1
)


class Crop(NamedTuple):
    """Pictures [b, 3, 32, 32], joints in pixels [b, 15, 2], which of them are known [b, 15], the truth."""

    picture: Tensor
    joints: Tensor
    known: Tensor
    bodies: Bodies


class Found(NamedTuple):
    """What a layer of the head says: bodies, and joints in space [b, 15, 3] of their own."""

    bodies: Bodies
    joints: Tensor


def heat_maps(joints: Float[Tensor, "b 15 2"], known: Bool[Tensor, "b 15"]) -> Float[Tensor, "b 15 8 8"]:
    """A blob at each joint; a joint that is not known has an empty map, not a blob at the corner.

    Raises:
        DataError: a known joint outside the crop, or a crop without any known joint.
    """
    outside = known & ((joints < 0) | (joints > SIZE)).any(2)
    if bool(outside.any()):
        row, joint = outside.nonzero()[0].tolist()
        raise DataError(
            f"joint {joint} of crop {row} is at {joints[row, joint].tolist()}, outside the {SIZE} pixels: "
            "clamp it, or say that it is not known"
        )
    if not bool(known.any(1).all()):
        raise DataError(f"crop {int((~known.any(1)).int().argmax())} has no known joint to start from")
    line = (torch.arange(PLACES) + 0.5) * BLOCK
    x, y = ((-0.5 * ((line - joints[..., axis, None]) / (SIGMA * BLOCK)).square()).exp() for axis in (0, 1))
    return y[..., :, None] * x[..., None, :] * known[..., None, None]


def spoil(crop: Crop, missing: float, noise: float, generator: torch.Generator) -> Crop:
    """Hide each joint with a probability and move the others by Gaussian noise in pixels; one joint of each
    crop always stays known."""
    known = crop.known & (torch.rand(crop.known.shape, generator=generator) >= missing)
    luck = torch.rand(known.shape, generator=generator).masked_fill(~crop.known, -1.0)
    known = known | functional.one_hot(luck.argmax(1), JOINTS).bool() & ~known.any(1, keepdim=True)
    joints = crop.joints + noise * torch.randn(crop.joints.shape, generator=generator)
    return crop._replace(joints=joints.clamp(0, SIZE), known=known)


def crops(count: int, generator: torch.Generator, covers: int = 2) -> Crop:
    """Random bodies behind grey boxes, with all their joints."""
    bodies = random_bodies(count, generator)
    line = torch.arange(SIZE)
    covered = torch.zeros(count, SIZE, SIZE, dtype=torch.bool)
    for _ in range(covers):
        corner = torch.rand(count, 2, 1, generator=generator) * SIZE
        extent = 4 + 8 * torch.rand(count, 2, 1, generator=generator)
        inside = (line >= corner - extent / 2) & (line < corner + extent / 2)
        covered |= inside[:, 1, :, None] & inside[:, 0, None, :]
    joints = bodies.seen(bodies.frames()[0]).clamp(0, SIZE)
    return Crop(draw(bodies, covered), joints, torch.ones(count, JOINTS, dtype=torch.bool), bodies)


class Block(nn.Module):
    """Two convolutions with the time between them, beside a shortcut."""

    def __init__(self, given: int, wanted: int, time: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, given), nn.SiLU(), nn.Conv2d(given, wanted, 3, padding=1))
        self.time = nn.Linear(time, wanted)
        self.second = nn.Sequential(
            nn.GroupNorm(4, wanted), nn.SiLU(), nn.Conv2d(wanted, wanted, 3, padding=1)
        )
        self.short = nn.Conv2d(given, wanted, 1) if given != wanted else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        out: Tensor = self.short(x) + self.second(self.first(x) + self.time(time)[:, :, None, None])
        return out


class Attention(nn.Module):
    """Places that look at the joints' tokens; also where they looked."""

    def __init__(self, width: int, token: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.ask, self.key = nn.Linear(width, width), nn.Linear(token, width)
        self.value, self.out = nn.Linear(token, width), nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "b c h w"], tokens: Float[Tensor, "b 15 t"], known: Bool[Tensor, "b 15"]
    ) -> tuple[Tensor, Float[Tensor, "b 15 h w"]]:
        asked = self.ask(self.norm(x).flatten(2).mT) @ self.key(tokens).mT / math.sqrt(x.shape[1])
        looks = asked.masked_fill(~known[:, None], -torch.inf).softmax(2)
        out = self.out(looks @ self.value(tokens)).mT.unflatten(2, x.shape[2:])
        return x + out, looks.mT.unflatten(2, x.shape[2:])


class DPMeshNet(nn.Module):
    """Bodies of crops and known joints; also the denoiser that it starts from.

    Args:
        width: channels of the U-Net's finest level.
        token: of a joint.
        fused: channels of the map that the head reads.
        layers: of the head, each of which corrects the one before.
    """

    def __init__(self, width: int = 12, token: int = 32, fused: int = 40, layers: int = 2) -> None:
        super().__init__()
        one, two = width, 2 * width
        self.time = nn.Sequential(nn.Linear(32, two), nn.SiLU())
        self.tokens = nn.Linear(2, token)
        self.names = nn.Parameter(0.5 * torch.randn(JOINTS, token))  # which joint a token is of
        self.into = nn.Conv2d(LATENT, one, 3, padding=1)
        self.down = nn.ModuleList([Block(one, one, two), Block(one, two, two), Block(two, two, two)])
        self.up = nn.ModuleList([Block(2 * two, two, two), Block(two + one, one, two)])
        self.looks = nn.ModuleList(Attention(two, token) for _ in range(3))
        self.out = nn.Conv2d(one, LATENT, 3, padding=1)
        self.control_into = nn.Conv2d(LATENT + JOINTS, one, 3, padding=1)
        self.control = nn.ModuleList([Block(one, one, two), Block(one, two, two), Block(two, two, two)])
        self.gates = nn.ModuleList(nn.Conv2d(size, size, 1) for size in (one, two, two))
        for gate in self.gates:
            assert isinstance(gate, nn.Conv2d) and gate.bias is not None
            nn.init.zeros_(gate.weight)
            nn.init.zeros_(gate.bias)
        self.fuse = nn.Conv2d(one + 2 * two + 3 * JOINTS, fused, 1)
        self.places = nn.Parameter(0.1 * torch.randn(1, (PLACES // 2) ** 2, fused))
        self.queries = nn.Parameter(torch.randn(1, 3 + JOINTS, fused))
        self.asking = nn.Linear(token, fused)
        self.head = nn.ModuleList(
            nn.TransformerDecoderLayer(fused, 4, 2 * fused, 0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        sizes = (6 * len(TURNING), 3, 3, 3)
        self.steps = nn.ModuleList(nn.ModuleList(nn.Linear(fused, s) for s in sizes) for _ in range(layers))

    @classmethod
    def trained(cls, seed: int, **options: Any) -> DPMeshNet:
        """The network as `DPMesh(**options)` trains it."""
        return DPMesh(**options).fit(seed)

    def features(self, picture: Tensor, joints: Tensor, known: Tensor) -> Float[Tensor, "b c 4 4"]:
        """The fused map of a pass without noise."""
        latent = functional.pixel_unshuffle(2 * picture - 1, BLOCK)
        maps = heat_maps(joints, known)
        finest, middle, coarse, looked = self._pass(latent, torch.zeros(len(latent)), joints, known, maps)
        scales = [functional.avg_pool2d(finest, 2), middle, functional.interpolate(coarse, scale_factor=2.0)]
        found: Tensor = self.fuse(torch.cat([*scales, *looked], 1))
        return found

    def denoised(self, noisy: Float[Tensor, "b 48 8 8"], time: Tensor, crop: Crop) -> Tensor:
        """The noise in a noisy crop, without the control branch."""
        out: Tensor = self.out(self._pass(noisy, time, crop.joints, crop.known, None)[0])
        return out

    def forward(
        self,
        picture: Float[Tensor, "b 3 32 32"],
        joints: Float[Tensor, "b 15 2"],
        known: Bool[Tensor, "b 15"],
    ) -> list[Found]:
        """What every layer of the head says, the last one last.

        Raises:
            DataError: as for `heat_maps`.
        """
        return self.read(self.features(picture, joints, known), joints, known)

    def read(self, fused: Float[Tensor, "b c 4 4"], joints: Tensor, known: Tensor) -> list[Found]:
        """The head alone: queries for pose, shape and camera, and one a joint, which its token begins."""
        memory = fused.flatten(2).mT + self.places
        own = self.asking(self.token(joints)) * known[..., None]
        asked = self.queries + functional.pad(own, (0, 0, 3, 0))
        straight = torch.tensor([1.0, 0, 0, 0, 1, 0]).repeat(len(fused), len(TURNING), 1)
        pose, shape = straight, torch.zeros(len(fused), 3)
        camera, places = (
            torch.tensor([[0.95, 0, 0]]).repeat(len(fused), 1),
            torch.zeros(len(fused), JOINTS, 3),
        )
        found = []
        for layer, steps in zip(self.head, self.steps, strict=True):
            assert isinstance(steps, nn.ModuleList)
            asked = layer(asked, memory)
            pose = pose + steps[0](asked[:, 0]).unflatten(1, (len(TURNING), 6))
            shape, camera = shape + steps[1](asked[:, 1]), camera + 0.1 * steps[2](asked[:, 2])
            places = places + steps[3](asked[:, 3:])
            found.append(Found(Bodies(from_six(pose), shape, camera), places))
        return found

    def token(self, joints: Float[Tensor, "b 15 2"]) -> Float[Tensor, "b 15 t"]:
        """Tokens of joints: where they are, and which."""
        found: Tensor = self.tokens(4 * joints / SIZE - 2) + self.names
        return found

    def _pass(
        self, latent: Tensor, time: Tensor, joints: Tensor, known: Tensor, maps: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """The decoder's maps, finest first, and where each attention looked, at 4 x 4."""
        rates = 2.0 ** torch.arange(16)
        when = self.time(torch.cat([(time[:, None] * rates).sin(), (time[:, None] * rates).cos()], 1))
        tokens = self.token(joints)
        steered = [torch.zeros(())] * 3
        if maps is not None:
            value, steered = self.control_into(torch.cat([latent, maps], 1)), []
            for number, (block, gate) in enumerate(zip(self.control, self.gates, strict=True)):
                value = block(functional.avg_pool2d(value, 2) if number else value, when)
                steered.append(gate(value))
        looked = []
        finest = self.down[0](self.into(latent), when)
        middle, looks = self.looks[0](self.down[1](functional.avg_pool2d(finest, 2), when), tokens, known)
        looked.append(looks)
        coarse = self.down[2](functional.avg_pool2d(middle, 2), when) + steered[2]
        coarse, looks = self.looks[1](coarse, tokens, known)
        looked.append(functional.interpolate(looks, scale_factor=2.0))
        wide = torch.cat([functional.interpolate(coarse, scale_factor=2.0), middle + steered[1]], 1)
        middle, looks = self.looks[2](self.up[0](wide, when), tokens, known)
        looked.append(looks)
        wide = torch.cat([functional.interpolate(middle, scale_factor=2.0), finest + steered[0]], 1)
        return self.up[1](wide, when), middle, coarse, looked


def mesh_loss(found: list[Found], bodies: Bodies) -> Tensor:
    """Distances of the joints that the head says and of those of its body, in space and on the screen,
    of rotations, shape and camera, the mean over the layers."""
    places = bodies.frames()[0]
    flat = bodies.seen(places)
    total = torch.zeros(())
    for one in found:
        own = one.bodies.frames()[0]
        total = total + (one.joints - places).abs().mean() + (own - places).abs().mean()
        total = total + (one.bodies.seen(own) - flat).abs().mean() / (SIZE / 2)
        total = total + 0.5 * (one.bodies.turns - bodies.turns).square().mean()
        total = total + 0.5 * (one.bodies.shape - bodies.shape).abs().mean()
    return total / len(found)


@dataclass(frozen=True)
class DPMesh:
    """How the network is trained.

    Attributes:
        missing: largest share of joints that training hides; each batch draws its own.
        noise: deviation of the joints in pixels.
        teacher: weight of the distance of the features from the teacher's, who sees true joints; 0 for none.
        prior: steps of learning to denoise before; 0 for fresh weights.
        steps: of a training, with which the teacher is trained as well.
        batch: crops of a step.
    """

    missing: float = 0.5
    noise: float = 1.5
    teacher: float = 0.1
    prior: int = 30
    steps: int = 260
    batch: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.missing < 1 or min(self.noise, self.teacher, self.prior) < 0:
            raise ConfigError("the share of missing joints is below 1, and nothing is negative")

    def fit(self, seed: int = 0) -> DPMeshNet:
        """The trained network; what it starts from and its teacher are kept for the next one."""
        return copy.deepcopy(_trained(self, seed))

    def _learn(self, model: DPMeshNet, teacher: DPMeshNet | None, seed: int) -> DPMeshNet:
        def make(count: int, generator: torch.Generator) -> tuple[Crop, Crop]:
            crop = _drawn(count, seed, generator)
            share = self.missing * float(torch.rand((), generator=generator))
            return crop, spoil(crop, share, self.noise, generator)

        def loss(net: nn.Module, batch: tuple[Crop, Crop]) -> Tensor:
            assert isinstance(net, DPMeshNet)
            clean, given = batch
            fused = net.features(*given[:3])
            total = mesh_loss(net.read(fused, given.joints, given.known), clean.bodies)
            if teacher is not None:
                with torch.no_grad():
                    wanted = teacher.features(*clean[:3])
                total = total + self.teacher * (fused - wanted).square().mean()
            return total

        batches = Drawn(make, self.batch, self.steps)
        Job(batches, loss=loss, recipe=RECIPE, seed=seed + 1).fit(model, macs=lambda: 0.0).run()
        return model


@functools.lru_cache(4)
def _trained(make: DPMesh, seed: int) -> DPMeshNet:
    """A finished training; with a teacher, who is trained without anything missing, that one's before."""
    teacher = None
    if make.teacher:
        teacher = _trained(replace(make, missing=0.0, noise=0.0, teacher=0.0), seed)
    return make._learn(copy.deepcopy(_denoiser(make.prior, make.batch, seed)), teacher, seed).eval()


@functools.lru_cache(2)
def _denoiser(steps: int, batch: int, seed: int) -> DPMeshNet:
    """A network that learned to say the noise in noisy crops; fresh without steps."""
    model = fresh(DPMeshNet, seed)

    def noisy(count: int, generator: torch.Generator) -> tuple[Crop, Tensor, Tensor]:
        noise = torch.randn(count, LATENT, PLACES, PLACES, generator=generator)
        return _drawn(count, seed, generator), noise, torch.rand(count, generator=generator)

    if steps:
        job = Job(Drawn(noisy, batch, steps), loss=_denoising, recipe=RECIPE, seed=seed)
        job.fit(model, macs=lambda: 0.0).run()
    return model


@functools.lru_cache(1)
def _pool(seed: int) -> Crop:
    """What a seed trains on."""
    return crops(POOL, torch.Generator().manual_seed(seed))


def _drawn(count: int, seed: int, generator: torch.Generator) -> Crop:
    """Some crops of a seed's pool."""
    pool, rows = _pool(seed), torch.randint(POOL, (count,), generator=generator)
    bodies = Bodies(*(getattr(pool.bodies, part.name)[rows] for part in fields(Bodies)))
    return Crop(pool.picture[rows], pool.joints[rows], pool.known[rows], bodies)


def _denoising(model: nn.Module, batch: tuple[Crop, Tensor, Tensor]) -> Tensor:
    """Mean squared error of the noise in crops at random times from 0, none, to 1, nothing else."""
    assert isinstance(model, DPMeshNet)
    crop, noise, time = batch
    latent = functional.pixel_unshuffle(2 * crop.picture - 1, BLOCK)
    angle = (time * math.pi / 2)[:, None, None, None]
    loss: Tensor = (
        (model.denoised(angle.cos() * latent + angle.sin() * noise, time, crop) - noise).square().mean()
    )
    return loss


def vertex_error(found: Found, bodies: Bodies) -> Float[Tensor, " b"]:
    """Mean distance of the vertices, both meshes shifted to their roots, in thousandths of the unit that the
    body is 1.6 high in."""
    return 1000 * (found.bodies.vertices() - bodies.vertices()).norm(dim=2).mean(1)
