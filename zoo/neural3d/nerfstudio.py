"""Plug-ins of nerfstudio: `ns-train hollow-nerf`, `zoo-splats` and `sparse-nerf`, on the zoo's CPU kernels.

nerfstudio finds the three specifications at the end of this file by the entry points of pyproject.toml and
is the only importer of this module: the zoo itself needs no nerfstudio. None of the models makes an LPIPS,
whose backbone would be downloaded; PSNR and SSIM are the figures of `ns-eval`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.base_datamanager import VanillaDataManagerConfig
from nerfstudio.data.datamanagers.full_images_datamanager import (
    FullImageDatamanager,
    FullImageDatamanagerConfig,
)
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from nerfstudio.data.datasets.depth_dataset import DepthDataset
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackLocation
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.models.base_model import Model, ModelConfig
from nerfstudio.pipelines.base_pipeline import VanillaPipelineConfig
from nerfstudio.plugins.types import MethodSpecification
from torch import Tensor, nn

from zoo.errors import ConfigError
from zoo.neural3d.cameras import Camera, from_opengl
from zoo.neural3d.fields import HashField
from zoo.neural3d.importance import SCORES, pruned
from zoo.neural3d.methods.hollow_nerf import HollowNeRF, hollow
from zoo.neural3d.methods.sparse_nerf import SparseNeRF
from zoo.neural3d.metrics import psnr, ssim
from zoo.neural3d.priors import expected_depth, known_depth
from zoo.neural3d.refine import RATES, picture_loss
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.splats import from_points
from zoo.neural3d.views import View
from zoo.shared.learned.constraints import AugmentedLagrangian
from zoo.shared.masks import MaskSet
from zoo.shared.structure.resize import RowResizer

WHITE = (1.0, 1.0, 1.0)


def camera_of(cameras: Cameras, number: int = 0) -> Camera:
    """One of nerfstudio's cameras; its pictures are taken as undistorted, which its data manager sees to."""
    pose = torch.eye(4)
    pose[:3] = cameras.camera_to_worlds[number].cpu()
    intrinsics = cameras.get_intrinsics_matrices()[number].cpu()
    return from_opengl(pose, intrinsics, int(cameras.width[number]), int(cameras.height[number]))


def over_white(image: Tensor) -> Tensor:
    """Colours [..., 3] of an image that may have an alpha channel."""
    if image.shape[-1] == 3:
        return image
    return image[..., :3] * image[..., 3:] + (1 - image[..., 3:])


class Depths(DepthDataset):
    """Pictures with depth; where a set has none, nerfstudio would download a network that guesses it."""

    def __init__(self, dataparser_outputs: Any, scale_factor: float = 1.0) -> None:
        if not dataparser_outputs.metadata.get("depth_filenames"):
            raise ConfigError("sparse-nerf needs depth_file_path in transforms.json for every picture")
        super().__init__(dataparser_outputs, scale_factor)


class _Judged(Model):
    """What the models share: figures of a picture, callbacks after a step."""

    def get_metrics_dict(self, outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        wanted = over_white(batch["image"]).to(outputs["rgb"])
        return {"psnr": -10 * (outputs["rgb"] - wanted).square().mean().log10()}

    def get_image_metrics_and_images(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        found, wanted = outputs["rgb"], over_white(batch["image"]).to(outputs["rgb"])
        figures = {"psnr": psnr(found, wanted), "ssim": ssim(found, wanted)}
        return figures, {"img": torch.cat([wanted, found.clamp(0, 1)], 1)}

    def after_step(self, step: int, attributes: Any) -> None:
        """Called when a step is done."""

    def get_training_callbacks(self, training_callback_attributes: Any) -> list[TrainingCallback]:
        def call(step: int) -> None:
            self.after_step(step, training_callback_attributes)

        return [TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], call)]


def _share(step: int, attributes: Any) -> float:
    """How much of a training is done after a step."""
    return float((step + 1) / attributes.trainer.config.max_num_iterations)


@dataclass
class HollowConfig(ModelConfig):
    """A hash field with a saliency grid; see `zoo.neural3d.methods.hollow_nerf`."""

    _target: type = field(default_factory=lambda: HollowModel)
    enable_collider: bool = False
    bound: float = HollowNeRF.bound
    """Largest mean saliency of a cell."""
    cells: int = HollowNeRF.cells
    """Cells of the saliency grid on a side."""
    levels: int = 8
    """Levels of the hash grid."""
    log2_size: int = 14
    """Logarithm of the entries of a level."""
    finest: int = 256
    """Cells of the finest level on a side."""
    samples: int = 64
    """Samples of a ray."""
    start: float = HollowNeRF.start
    """Share of the steps before the bound is imposed."""
    trained: float = HollowNeRF.trained
    """Share of the steps after which empty cells stay so."""


class HollowModel(_Judged):
    """HollowNeRF on the rays of nerfstudio; a checkpoint knows whether the field was hardened."""

    config: HollowConfig

    def populate_modules(self) -> None:
        super().populate_modules()
        low, high = self.scene_box.aabb
        config = self.config
        self.field = HashField(
            centre=((low + high) / 2).tolist(),
            half=float((high - low).max()) / 2,
            levels=config.levels,
            log2_size=config.log2_size,
            finest=config.finest,
            samples=config.samples,
            saliency=config.cells,
            background=WHITE,
        )
        self.lagrangian = AugmentedLagrangian(config.bound, HollowNeRF.rho, HollowNeRF.dual_step)
        self.register_buffer("hardened", torch.tensor(False))
        self.hardened: Tensor
        self.done = 0.0

    def get_param_groups(self) -> dict[str, list[nn.Parameter]]:
        rest = [p for name, p in self.field.named_parameters() if name != "saliency"]
        return {"field": rest, "saliency": [self.field.get_parameter("saliency")]}

    def get_outputs(self, ray_bundle: Any) -> dict[str, Tensor]:
        seen = self.field.march(ray_bundle.origins, ray_bundle.directions)
        return {"rgb": seen.colour, "depth": seen.depth[:, None], "accumulation": seen.alpha[:, None]}

    def get_loss_dict(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor], metrics_dict: Any = None
    ) -> dict[str, Tensor]:
        wanted = over_white(batch["image"]).to(outputs["rgb"])
        losses = {"rgb": (outputs["rgb"] - wanted).square().mean()}
        if self._bounded:
            losses["saliency"] = self.lagrangian.penalty(self.field.salient.mean())
        return losses

    @property
    def _bounded(self) -> bool:
        return self.done >= self.config.start and not bool(self.hardened)

    def after_step(self, step: int, attributes: Any) -> None:
        self.done = _share(step, attributes)
        if self._bounded:
            self.lagrangian.dual_step(self.field.salient.mean())
        if self.done >= self.config.trained and not bool(self.hardened):
            masks = hollow(self.field)
            self.hardened.fill_(True)
            steppers = attributes.optimizers.optimizers
            for group, name in (("field", "table"), ("saliency", "saliency")):
                MaskSet({name: masks[name]}).attach(self.field, steppers[group])

    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        loaded = super().load_state_dict(state_dict, *args, **options)
        self.field.hardened = bool(self.hardened)
        return loaded


@dataclass
class SplatsConfig(ModelConfig):
    """Gaussians drawn by `zoo.shared.ops.rasterize`, of which a share is dropped on the way."""

    _target: type = field(default_factory=lambda: SplatsModel)
    enable_collider: bool = False
    count: int = 3000
    """Gaussians to start from; points of the data where there are some, else points of the scene's box."""
    sh_degree: int = 0
    """Degree of the harmonics."""
    keep: float = 0.5
    """Share of the Gaussians that stay."""
    drop_at: float = 0.6
    """Share of the steps after which the others go, by removal error."""


class SplatsModel(_Judged):
    """A scene of Gaussians on the pictures of nerfstudio."""

    config: SplatsConfig

    def populate_modules(self) -> None:
        super().populate_modules()
        if not 0 < self.config.keep <= 1 or not 0 < self.config.drop_at <= 1:
            raise ConfigError(
                f"keep and drop_at are above 0 and at most 1; received {self.config.keep}, "
                f"{self.config.drop_at}"
            )
        points, colours = self._start()
        self.scene = GaussianScene.from_splats(from_points(points, colours, self.config.sh_degree), WHITE)

    def _start(self) -> tuple[Tensor, Tensor]:
        count, given = self.config.count, self.kwargs.get("seed_points")
        if given is not None:
            rows = torch.randperm(len(given[0]))[:count]
            return given[0][rows].float().cpu(), given[1][rows].float().cpu() / 255
        low, high = self.scene_box.aabb.cpu()
        return low + torch.rand(count, 3) * (high - low), torch.rand(count, 3)

    def get_param_groups(self) -> dict[str, list[nn.Parameter]]:
        return {name: [p] for name, p in self.scene.named_parameters() if p.numel()}

    def get_outputs(self, ray_bundle: Any) -> dict[str, Tensor]:
        self.camera = camera_of(ray_bundle)
        seen = self.scene.render(self.camera)
        return {
            "rgb": seen.colour,
            "depth": expected_depth(seen)[..., None],
            "accumulation": seen.alpha[..., None],
        }

    def get_outputs_for_camera(self, camera: Any, obb_box: Any = None) -> dict[str, Tensor]:
        with torch.no_grad():
            return self.get_outputs(camera)

    def get_loss_dict(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor], metrics_dict: Any = None
    ) -> dict[str, Tensor]:
        view = View(self.camera, over_white(batch["image"]).to(outputs["rgb"]))
        return {"picture": picture_loss(outputs["rgb"], view)}

    def after_step(self, step: int, attributes: Any) -> None:
        last = max(1, round(self.config.drop_at * attributes.trainer.config.max_num_iterations))
        if self.config.keep == 1 or step + 1 != last:
            return
        known = attributes.pipeline.datamanager.train_dataset.cameras
        cameras = [camera_of(known, number) for number in range(len(known))]
        mask = pruned(self.scene, SCORES["removal-error"], self.config.keep, cameras, rounds=4)
        names = [name for name, _ in self.scene.named_parameters()]
        RowResizer(self.scene, names, attributes.optimizers.optimizers.values()).keep(mask)

    def load_state_dict(self, state_dict: Any, *args: Any, **options: Any) -> Any:
        for value in self.scene.parameters():
            value.data = value.new_zeros(len(state_dict["scene.means"]), *value.shape[1:])
        return super().load_state_dict(state_dict, *args, **options)


@dataclass
class SparseNeRFConfig(SplatsConfig):
    """Few views whose depth is trusted for its order only; see `zoo.neural3d.methods.sparse_nerf`."""

    _target: type = field(default_factory=lambda: SparseNeRFModel)
    keep: float = 1.0
    near_is_larger: bool = False
    """Whether larger values of the prior are nearer (inverse depth) or farther (depth)."""
    weight: float = SparseNeRF.weight
    """Weight of the depth losses."""


class SparseNeRFModel(SplatsModel):
    """Gaussians fitted to pictures and the order of their depths (`depth_file_path` in transforms.json)."""

    config: SparseNeRFConfig

    def get_loss_dict(
        self, outputs: dict[str, Tensor], batch: dict[str, Tensor], metrics_dict: Any = None
    ) -> dict[str, Tensor]:
        losses = super().get_loss_dict(outputs, batch, metrics_dict)
        prior = known_depth(View(self.camera, outputs["rgb"], depth=batch["depth_image"][..., 0].float()))
        low, high = self.scene_box.aabb.cpu()
        method = SparseNeRF(near_is_larger=self.config.near_is_larger)
        depth = outputs["depth"][..., 0] * 2 / float((high - low).max())
        return losses | {"depth": self.config.weight * method.depth_loss(depth, prior)}


def _method(
    name: str, description: str, data: Any, model: ModelConfig, rates: dict[str, float]
) -> MethodSpecification:
    optimizers = {
        group: {"optimizer": AdamOptimizerConfig(lr=rate, eps=1e-15), "scheduler": None}
        for group, rate in rates.items()
    }
    config = TrainerConfig(
        method_name=name,
        steps_per_eval_batch=0,
        steps_per_eval_image=0,
        steps_per_eval_all_images=0,
        steps_per_save=1000,
        max_num_iterations=3000,
        mixed_precision=False,
        pipeline=VanillaPipelineConfig(datamanager=data, model=model),
        optimizers=optimizers,
        vis="tensorboard",
    )
    return MethodSpecification(config=config, description=description)


HOLLOW = _method(
    "hollow-nerf",
    "HollowNeRF of the sparse model zoo: a hash field that learns which cells are empty and skips them.",
    VanillaDataManagerConfig(dataparser=BlenderDataParserConfig(), train_num_rays_per_batch=1024),
    HollowConfig(),
    {"field": 1e-2, "saliency": 1e-2 * HollowNeRF.saliency_rate},
)
# Rates of 3DGS, that of the means ten times as fast, since thirty thousand steps are not taken here.
_RATES = RATES | {"means": 10 * RATES["means"]}
SPLATS = _method(
    "zoo-splats",
    "Gaussians of the sparse model zoo, drawn and trained on a CPU; half of them go on the way.",
    FullImageDatamanagerConfig(dataparser=BlenderDataParserConfig()),
    SplatsConfig(),
    _RATES,
)
SPARSE = _method(
    "sparse-nerf",
    "SparseNeRF of the sparse model zoo: few views, and depth of which only the order counts.",
    FullImageDatamanagerConfig(_target=FullImageDatamanager[Depths], dataparser=NerfstudioDataParserConfig()),
    SparseNeRFConfig(),
    _RATES,
)
