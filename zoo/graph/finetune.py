"""`zoo finetune graph`: train a ticket on, on its own graph or on another, with every zero kept.

Every few epochs the whole state goes into one file beside the output, written atomically; the same command
goes on from there after a kill, and its result equals that of an uninterrupted run bit for bit.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch_geometric.data import Data

from zoo.bundles.card import Card
from zoo.bundles.catalog import Bundle, find
from zoo.bundles.store import load_bundle
from zoo.errors import ConfigError, UnknownNameError
from zoo.graph.checkpoint import Checkpoint
from zoo.graph.data import SOURCES, load_graph
from zoo.graph.method import dataset_of
from zoo.graph.models import GraphModel
from zoo.graph.train import Fit, TrainConfig
from zoo.graph.transfer import transferred
from zoo.harness.tasks import get_task
from zoo.harness.tuning import (
    check_target,
    checkpoint_folder,
    finetuned_card,
    options_of,
    publish,
    require_zeros,
    show_change,
    zero_count,
)
from zoo.progress import progress_bar
from zoo.shared.masks import masks_of


@dataclass
class Finetune:
    """Fine-tune a graph model; the zeros of a sparse one stay zero.

    On its own graph the model goes on from its weights. On another graph whose features and classes differ,
    the layers that meet them are new: their weights are drawn with the seed and masked at the model's weight
    sparsity by magnitude, edges are dropped by degree at the model's edge sparsity, and only layers of the
    same shape keep weights and masks.
    """

    model: str
    """The model to start from: a name, folder or hf://owner/name."""

    out: Path
    """Folder for the new bundle."""

    dataset: str | None = None
    """Graph to train on: cora, citeseer, pubmed, cs or digits; by default the model's own."""

    epochs: int = 100
    """Full-batch epochs."""

    lr: float = 0.005
    """Adam's learning rate."""

    weight_decay: float = 5e-4
    """L2 penalty on all weights."""

    distillation: float = 0.0
    """Weight of distillation from the dense twin; 0 leaves it out."""

    seed: int = 0
    """Of dropout and of new layers."""

    checkpoint_every: int = 10
    """Epochs between checkpoints."""

    twin: str | None = None
    """Dense model to stand beside on the new card; by default the packaged one of this architecture and
    graph.
    """

    name: str | None = None
    """Name on the card; by default graph/ and the folder's name."""

    overwrite: bool = False
    """Replace the bundle that is there."""

    def run(self) -> Path:
        """Train, or go on with an interrupted training, and write the bundle.

        Returns:
            The folder of the new bundle.

        Raises:
            ConfigError: options that contradict each other, or a checkpoint of another run.
            SparseError: whatever loading, data or saving refuse.
        """
        recipe = TrainConfig(self.epochs, self.lr, self.weight_decay, self.distillation)
        check_target(self)
        source = find(self.model)
        loaded = load_bundle(source)
        if not isinstance(loaded, GraphModel):
            raise ConfigError(f"{source.card.name} is no model of the graph domain.")
        dataset = self.dataset or dataset_of(loaded)
        data = load_graph(dataset)
        twin = self._twin(source.card, dataset)
        model, changes = transferred(loaded, data, self.seed)
        for line in changes:
            print(f"zoo: {line}", file=sys.stderr)
        start = time.perf_counter()
        zeros = zero_count(model)
        before, after = self._train(model, source, dataset, data, twin, recipe)
        seconds = time.perf_counter() - start
        for parameter in model.parameters():  # stored as the source stores them
            parameter.data = parameter.data.to(next(loaded.parameters()).dtype)
        fields = self._card(model, source.card, dataset, data, twin, seconds)
        extras = model.ticket.to_extras() if model.ticket is not None else {}
        path = publish(self, model, fields, extras)
        show_change(
            f"{source.card.name} on graph/{dataset}", "accuracy", (before, after), (zeros, zero_count(model))
        )
        return path

    def _train(
        self,
        model: GraphModel,
        source: Bundle,
        dataset: str,
        data: Data,
        twin: Bundle | None,
        recipe: TrainConfig,
    ) -> tuple[float, float]:
        """Train in place; returns the test accuracy before and after."""
        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            raise ConfigError(
                "Full-batch training on one graph runs in one process; start it without a launcher."
            )
        task = get_task(f"graph/{dataset}")
        before = task.evaluate(model.eval()).metrics["accuracy"].value
        teacher = None
        if recipe.distillation > 0:
            if twin is None:
                raise ConfigError("Distillation needs a dense twin, and a dense model has none.")
            dense = load_bundle(twin)
            with torch.no_grad():
                teacher = dense(data.x, data.edge_index).float()
        masks = masks_of(model)
        adam = torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        prepared, optimizer = accelerator.prepare(model, adam)
        fit = Fit(prepared, data, recipe, teacher=teacher, optimizer=optimizer, backward=accelerator.backward)
        checkpoint = Checkpoint(checkpoint_folder(self.out), self._identity(source, dataset))
        torch.manual_seed(self.seed)
        checkpoint.restore(fit)
        handle = masks.attach(model, adam) if masks is not None else None
        with progress_bar() as progress:

            def on_epoch(fit: Fit) -> None:
                best = fit.result().val_accuracy
                progress(fit.epoch, recipe.epochs, f"loss {fit.last_loss:.4f}, best validation {best:.4f}")
                if fit.epoch % self.checkpoint_every == 0 and not fit.done:
                    checkpoint.save(fit)

            best = fit.run(on_epoch)
        if handle is not None:
            handle.detach()
        model.load_state_dict(best.weights)
        model.cpu().eval()
        require_zeros(model, masks)
        return before, task.evaluate(model).metrics["accuracy"].value

    def _identity(self, source: Bundle, dataset: str) -> dict[str, Any]:
        """What a checkpoint must agree with to be gone on from."""
        return {**options_of(self), "dataset": dataset, "weights": source.card.weights.sha256}

    def _twin(self, card: Card, dataset: str) -> Bundle | None:
        """The dense model beside which the new one will stand; None for a dense model."""
        if card.dense_twin is None:
            return None
        own = card.metrics[0].task == f"graph/{dataset}"
        architecture = card.architecture.name.partition("/")[2]
        name = self.twin or (card.dense_twin if own else f"graph/dense-{architecture}-{dataset}")
        try:
            return find(name)
        except UnknownNameError as error:
            raise ConfigError(
                f"No dense twin {name!r} to stand beside on {dataset}: name one with --twin."
            ) from error

    def _card(
        self, model: GraphModel, card: Card, dataset: str, data: Data, twin: Bundle | None, seconds: float
    ) -> dict[str, Any]:
        source = SOURCES[dataset]
        fields = finetuned_card(
            self,
            card,
            twin,
            model,
            get_task(f"graph/{dataset}"),
            protocol=f"fine-tuned from {card.name}; epoch of best validation accuracy",
            seconds=seconds,
            data={"name": source.title, "source": source.origin, "licence": source.licence},
            arguments=_arguments(card, data),
        )
        fields["method"]["hyperparameters"]["finetuned"]["dataset"] = dataset
        return fields


def _arguments(card: Card, data: Data) -> dict[str, Any]:
    widths = {"in_channels": int(data.x.shape[1]), "out_channels": int(data.y.max()) + 1}
    return {**card.architecture.args, **widths}
