"""Makers of recipe rows (`zoo make`) that are particular to scenes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.errors import ConfigError
from zoo.methods.contract import Sparsified
from zoo.neural3d.fields import HashField, field_job
from zoo.neural3d.methods.coherent_gs import PairedViews, flows_between
from zoo.neural3d.methods.one2345 import One2345
from zoo.neural3d.methods.orex import OReX, load_sections
from zoo.neural3d.priors import affine, monotone, scattered
from zoo.neural3d.refine import refine, scene_job
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.splats import from_points
from zoo.neural3d.studies.one2345 import train_set
from zoo.neural3d.views import Views, load_views
from zoo.registry import METHODS
from zoo.shared.masks import MaskSet


def start_of(views: Views, count: int, sh_degree: int, seed: int) -> GaussianScene:
    """A scene to train: `count` of the points of the surface, or, without any, of a cube round the centre."""
    generator = torch.Generator().manual_seed(seed)
    if views.points is not None and views.colours is not None:
        rows = torch.randperm(len(views.points), generator=generator)[:count]
        points, colours = views.points[rows], views.colours[rows]
    else:
        points = views.centre + (torch.rand(count, 3, generator=generator) - 0.5) * 0.6 * views.extent
        colours = torch.rand(count, 3, generator=generator)
    if len(points) < count:
        raise ConfigError(f"{views.name} has {len(points)} points to start from; received count {count}")
    return GaussianScene.from_splats(from_points(points, colours, sh_degree), views.background)


def gaussians(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A scene fitted to the row's views, of as many Gaussians as its architecture says."""
    views = load_views(str(row.dataset))
    scene = start_of(views, row.arguments["count"], row.arguments.get("sh_degree", 0), seed)
    refine(scene, scene_job(views.train, seed=seed, **row.recipe))
    return Sparsified(scene.eval(), MaskSet({}))


def field(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A field fitted to the row's views."""
    views = load_views(str(row.dataset))
    model = HashField(**row.arguments).like(seed)
    field_job(views.train, seed=seed, **row.recipe).fit(model, macs=lambda: 0.0).run()
    return Sparsified(model.eval(), MaskSet({}))


def few_views(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A scene fitted to few views by the method that the option `fit` names, with the depth that it expects:
    SparseNeRF of another scale, CoherentGS under an affine map of each view and with the flow between them,
    others none."""
    views = load_views(str(row.dataset))
    options: dict[str, Any] = dict(row.options)
    fit = options.pop("fit")
    prior = {"sparse-nerf": monotone, "coherent-gs": affine}.get(fit)
    train = views.train if prior is None else prior(views.train, seed)
    job = scene_job(train, seed=seed, **row.recipe)
    if fit == "coherent-gs":
        job = job.replace(batches=PairedViews(train, flows_between(views.train)))
    count = row.arguments["count"]
    blank = start_of(views, count, 0, seed) if prior is None else scattered(views, count, seed)
    scene = METHODS.get(fit)(**options).sparsify(blank, job).model
    arguments = {"count": len(scene), "sh_degree": 0, "background": list(views.background)}
    return Sparsified(scene, MaskSet({}), arguments=arguments)


def carved(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """One-2-3-45's sparse cost volume, trained on toy shapes."""
    return Sparsified(One2345(**row.recipe).fit(*train_set(seed), seed), MaskSet({}))


def sections(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """OReX's field through the row's cross-sections; plain with one iteration and no hinge."""
    make = OReX(**row.options, **row.recipe)
    model = make.fit(load_sections(str(row.dataset))[0], seed)
    return Sparsified(model, MaskSet({}), arguments={"iterations": make.iterations})
