"""Makers of recipe rows (`zoo make`) that are particular to scenes."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from torch import nn

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.methods.contract import Sparsified
from zoo.neural3d.edges import load_edges
from zoo.neural3d.fields import HashField, field_job
from zoo.neural3d.methods.coherent_gs import PairedViews, flows_between
from zoo.neural3d.methods.edge_gaussians import EdgeGaussians, EdgePoints
from zoo.neural3d.methods.gvgen import VolumeFit, boxed
from zoo.neural3d.methods.one2345 import One2345
from zoo.neural3d.methods.orex import OReX, load_sections
from zoo.neural3d.methods.queen import Queen
from zoo.neural3d.methods.sparp import CoordinateNet
from zoo.neural3d.methods.spin_nerf import SPInNeRF
from zoo.neural3d.priors import affine, monotone, noisy_cloud, scattered
from zoo.neural3d.refine import refine, scene_job, start_of
from zoo.neural3d.scene import GaussianScene
from zoo.neural3d.studies import edge_gaussians, part123, queen, sparp, spin_nerf
from zoo.neural3d.studies.one2345 import train_set
from zoo.neural3d.views import load_views
from zoo.registry import METHODS
from zoo.shared.masks import MaskSet, set_masks


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
    SparseNeRF of another scale, CoherentGS and LM-Gaussian under an affine map of each view, the former with
    the flow between them, the latter from a noisy cloud of it, others none."""
    views = load_views(str(row.dataset))
    options: dict[str, Any] = dict(row.options)
    fit = options.pop("fit")
    prior = {"sparse-nerf": monotone, "coherent-gs": affine, "lm-gaussian": affine}.get(fit)
    train = views.train if prior is None else prior(views.train, seed)
    job = scene_job(train, seed=seed, **row.recipe)
    if fit == "coherent-gs":
        job = job.replace(batches=PairedViews(train, flows_between(views.train)))
    count = row.arguments["count"]
    if fit == "lm-gaussian":
        blank = noisy_cloud(train, count, seed, views.background)
    else:
        blank = start_of(views, count, 0, seed) if prior is None else scattered(views, count, seed)
    scene = METHODS.get(fit)(**options).sparsify(blank, job).model
    arguments = {"count": len(scene), "sh_degree": 0, "background": list(views.background)}
    return Sparsified(scene, MaskSet({}), arguments=arguments)


def carved(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """One-2-3-45's sparse cost volume, trained on toy shapes."""
    return Sparsified(One2345(**row.recipe).fit(*train_set(seed), seed), MaskSet({}))


def volume(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """GVGEN's volume of the row's views, as the scene that it is."""
    views, options = load_views(str(row.dataset)), dict(row.options)
    width = options.pop("width")
    made = VolumeFit(seed=seed, **options, **row.recipe).fit(
        boxed(views.train, views.centre, width), views.background
    )
    scene = GaussianScene.from_splats(made.placed(views.centre, width), views.background)
    arguments = {"count": len(scene), "sh_degree": 0, "background": list(views.background)}
    return Sparsified(scene.eval(), MaskSet({}), arguments=arguments)


def stream(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """QUEEN's video of a moving ball; gated, its masks are of what changes from frame to frame."""
    make = Queen(**row.options)
    model = queen.streamed(make, replace(queen.VIDEO, **row.recipe), seed)
    masks = model.changes() if make.gated else MaskSet({})
    set_masks(model, masks)
    return Sparsified(model.eval(), masks)


def edges(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """EdgeGaussians' points of the edge maps of ABC-NEF; from a start those of them that count."""
    if isinstance(start, EdgePoints):
        keep = edge_gaussians.on_the_edges(start)
        found = start.rows(keep)
        part = {"kept": len(found), "total": len(start), "sparsity": 1 - len(found) / len(start)}
        parts, extras = {"gaussians": part | {"pattern": "rows"}}, {"gaussians/keep": keep}
        return Sparsified(found.eval(), MaskSet({}), extras, parts=parts, arguments={"count": len(found)})
    points = EdgeGaussians(seed=seed, **row.recipe).fit(load_edges()[0])
    return Sparsified(points.eval(), MaskSet({}), arguments={"count": len(points)})


def taken_out(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """SPIn-NeRF's field of a painted disc without the ball that the pictures show."""
    steps, rays = row.recipe["steps"], row.recipe["rays"]
    scene, masks, _ = spin_nerf.whole(steps, rays, seed)
    make = SPInNeRF(steps=steps, rays=rays, arguments=spin_nerf.FIELD)
    return Sparsified(make.fit(scene, load_views(str(row.dataset)).train, masks, seed), MaskSet({}))


def coordinates(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """SpaRP's network of object coordinates."""
    make = functools.partial(CoordinateNet, **row.arguments)
    return Sparsified(sparp.trained(make, sparp.PoseOptions(**row.recipe), seed), MaskSet({}))


def parted(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """Part123's field of a chair with features that tell its parts."""
    return Sparsified(part123.made(part123.PartOptions(**row.recipe), seed), MaskSet({}))


def sections(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """OReX's field through the row's cross-sections; plain with one iteration and no hinge."""
    make = OReX(**row.options, **row.recipe)
    model = make.fit(load_sections(str(row.dataset))[0], seed)
    return Sparsified(model, MaskSet({}), arguments={"iterations": make.iterations})
