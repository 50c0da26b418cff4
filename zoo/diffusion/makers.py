"""Makers of recipe rows (`zoo make`) that are particular to diffusion."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from zoo.bundles.make import Work
from zoo.bundles.recipes import Row
from zoo.diffusion.domain import dense_model, make_job
from zoo.methods.contract import Sparsified
from zoo.registry import ARCHITECTURES
from zoo.shared.masks import MaskSet
from zoo.shared.train import Recipe


def text_to_image(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A dense text-to-image model, trained to predict noise."""
    model = dense_model(str(row.dataset), seed)
    recipe = Recipe(**row.recipe)
    job = make_job(str(row.dataset), recipe=recipe, seed=seed, device=work.device, model=model)
    job.fit(model).run()
    return Sparsified(model.cpu().eval(), MaskSet({}), arguments=model.current_arguments())


def flow(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A dense flow of the row's architecture, trained to predict velocities."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = ARCHITECTURES.get(str(row.architecture))(**row.arguments)
    job = make_job(str(row.dataset), recipe=Recipe(**row.recipe), seed=seed, device=work.device, model=model)
    job.fit(model).run()
    return Sparsified(model.cpu().eval(), MaskSet({}), arguments=model.current_arguments())


def network(row: Row, seed: int, start: nn.Module | None, work: Work) -> Sparsified:
    """A dense network of a paper, trained as it says itself (`zoo.diffusion.networks.base.PaperNetwork`)."""
    kind: Any = ARCHITECTURES.get(str(row.architecture))
    model = kind.fresh(seed, **row.arguments)
    recipe = dataclasses.replace(kind.usual, **row.recipe)
    model.learn(str(row.dataset), recipe=recipe, seed=seed, device=work.device)
    return Sparsified(model.cpu().eval(), MaskSet({}))
