"""Makers of recipe rows (`zoo make`) that are particular to images and LiDAR."""

from __future__ import annotations

from typing import Any

from torch import nn

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.bundles.sources import published_file
from zoo.bundles.store import load
from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified, default_recipe
from zoo.methods.iss_p import ISSP
from zoo.methods.sparcl import SparCL
from zoo.registry import ARCHITECTURES, METHODS
from zoo.shared.masks import MaskSet, set_masks
from zoo.shared.masks.foreign import masks_from_zeros
from zoo.shared.structure.relatives import reinitialised, seeded
from zoo.shared.train import Checkpoint, Distillation, Recipe, resume
from zoo.vision.data import load_images
from zoo.vision.domain import image_job, make_job
from zoo.vision.lidar.data import scene_frames
from zoo.vision.lidar.train import detector_job, detector_recipe
from zoo.vision.models import read_resnet
from zoo.vision.slots import RECIPE as SLOT_RECIPE
from zoo.vision.slots import slot_job
from zoo.vision.spark.command import Pretrain
from zoo.vision.squeezenet import read_deep_compression
from zoo.vision.studies.dsvt import make_arm


def classifier(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A classifier trained from fresh weights, or from those of `start` with a fresh head.

    Option `labels`: how many training images have a label; 0 for all.
    """
    data, labels = load_images(str(row.dataset)), row.options.get("labels", 0)
    if labels:
        data = data.subset(labels)
    model: Any = reinitialised(_build(row), seed)
    if start is not None:
        head = {k: v for k, v in model.state_dict().items() if k.startswith("linear.")}
        model.load_state_dict({**start.state_dict(), **head})
    image_job(data, Recipe(**row.recipe), seed, work.device).fit(model, macs=lambda: 0.0).run()
    return Sparsified(model.cpu().eval(), MaskSet({}), arguments=model.current_arguments())


def published_resnet(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A ResNet of akamaster/pytorch_resnet_cifar10 as it is."""
    return Sparsified(read_resnet(published_file(row.imported), row.arguments["depth"]), MaskSet({}))


def published_squeezenet(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """The pruned SqueezeNet of Deep Compression as it is, its zeros as masks."""
    model = read_deep_compression(published_file(row.imported))
    masks = masks_from_zeros(model, at_least=0.0)
    set_masks(model, masks)
    return Sparsified(model, masks)


def taught(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """The row's method with its options, a dense network being the teacher.

    Options beside those of the method: `teacher`, name of a bundle; `distillation`, weight of the divergence
    of the answers at temperature 4, that of the labels being the rest to 1; `features`, weight of the
    normalised distance after each of the modules `stages`.
    """
    if start is None:
        raise ConfigError(f"the recipe of {row.name} needs a model to start from: give it `from`")
    options = dict(row.options)
    teacher, weight = load(options.pop("teacher")), options.pop("distillation")
    stages = {name: name for name in options.pop("stages", ())}
    method: Any = METHODS.get(row.method)
    recipe = Recipe(**{**default_recipe(method), **row.recipe})
    job = make_job(row.dataset, recipe=recipe, seed=seed, device=work.device, model=start)
    distil = Distillation(
        teacher.to(job.device),
        task=1 - weight,
        output=weight,
        temperature=4.0,
        features=stages,
        normalised=options.pop("features", 0.0),
    )
    made: Sparsified = method(**options).sparsify(start, job.replace(distil=distil))
    return made


def continual(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A dense classifier that learned the classes task after task by DER++, as SparCL does without its three
    parts."""
    model = _build(row)
    method = SparCL(masks="dense", sparse_gradients=False, removal=0.0, **row.options)
    recipe = Recipe(**{**default_recipe(SparCL), **row.recipe})
    made = method.sparsify(model, make_job(row.dataset, recipe=recipe, seed=seed, device=work.device))
    return Sparsified(made.model, MaskSet({}), arguments=made.arguments)


def upscaler(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A dense upscaler trained on T91, as ISS-P trains it."""
    model = _build(row).fresh(seed)
    recipe = Recipe(**{**default_recipe(ISSP), **row.recipe})
    make_job("t91", recipe=recipe, seed=seed, device=str(work.device), model=model).fit(model).run()
    return Sparsified(model.cpu().eval(), MaskSet({}))


def spark(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A ResNet pre-trained by SparK without labels, with a linear probe as its head."""
    options = {**row.options, **row.recipe, "seed": seed, "device": work.device}
    command = Pretrain(out=work.folder, dataset=str(row.dataset), **options)
    model, loss = command.pretrained()
    facts = {"hidden_loss": loss}
    return Sparsified(model, MaskSet({}), hyperparameters=facts, arguments=model.current_arguments())


def slots(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A model of slots trained on sprites; what its arguments switch on is all that SLASH adds."""
    with seeded(seed):
        model = _build(row)
    slot_job(Recipe(**{**SLOT_RECIPE, **row.recipe}), seed, work.device).fit(model, macs=lambda: 0.0).run()
    return Sparsified(model.cpu().eval(), MaskSet({}))


def detector(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A LiDAR detector trained on generated scenes.

    Options: `arm`, see `zoo.vision.studies.dsvt`; `scenes`, how many.
    """
    frames = scene_frames("train", row.options["scenes"])
    job = detector_job(frames, detector_recipe(**row.recipe), seed, work.device)
    fit = job.fit(make_arm(row.options["arm"], seed), macs=lambda: 0.0)
    resume(fit, Checkpoint(work.folder, {**row.identity(), "seed": seed}), every_epochs=1, seconds=20.0)
    model: Any = fit.model.cpu().eval()
    return Sparsified(model, MaskSet({}), arguments=model.current_arguments())


def _build(row: Row) -> Any:
    return ARCHITECTURES.get(str(row.architecture))(**row.arguments)
