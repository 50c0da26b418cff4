"""The fine-tuner of all domains: a sparse model is trained on, and every zero is kept.

Every few epochs or steps the whole state goes into one file beside the output; the same command goes on from
there after a kill, and its result equals that of an uninterrupted run bit for bit. Under
`accelerate launch -m zoo finetune ...` each batch is shared among the processes.
"""

from __future__ import annotations

import dataclasses
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from zoo.bundles.catalog import Bundle, find, twin_of
from zoo.bundles.publish import About, Figure, Trained, figures_of, publish, require_data
from zoo.bundles.sources import with_digest
from zoo.bundles.store import info, load_bundle
from zoo.errors import ConfigError, UnknownNameError
from zoo.harness.workers import workers
from zoo.names import name_for
from zoo.progress import progress_bar
from zoo.registry import FINETUNERS
from zoo.shared.masks import MaskSet, masks_of, set_masks
from zoo.shared.store.kept import going_on_from
from zoo.shared.train import Checkpoint, Distillation, Fit, Job, device_named, resume
from zoo.shared.train.recipe import Parameters
from zoo.training.options import check_target, checkpoint_folder, command_of, options_of


def finetune(domain: str, **options: Any) -> Path:
    """Fine-tune a sparse model of a domain without losing its zeros.

    Args:
        domain: whose fine-tuner to use, e.g. `graph`.
        options: fields of that fine-tuner's dataclass; `zoo finetune DOMAIN --help` explains them.

    Returns:
        The folder of the new bundle.

    Raises:
        UnknownNameError: the domain has no fine-tuner.
        ConfigError: an unknown or a missing option.
    """
    tuner = FINETUNERS.get(domain)
    try:
        configured = tuner(**options)
    except TypeError as error:
        raise ConfigError(f"finetune({domain!r}): {error}. See `zoo finetune {domain} --help`.") from error
    path: Path = configured.run()
    return path


@dataclass(frozen=True)
class Plan:
    """What a domain makes of its options.

    Attributes:
        model: to be trained in place, in single precision, with its masks.
        job: to train it by.
        dataset: what it is trained on, for the card.
        how: how it is trained, for the summary, e.g. `by low-rank updates`.
        arguments: of its architecture; None for those on the source's card.
        figures: what is measured; None for what the source's card has figures of.
        data: name, source and licence of the data; None for those on the source's card.
        extras: further tensors of the bundle; None for the source's.
        parts: of the sparsity without a mask, for the card; None for the source's.
        parameters: what is trained, as for `Fit`; None for everything.
        after_step: given the training, makes what is called after each step.
        identity: what a checkpoint must agree with beyond the options.
        finish: what makes the trained model one of the source's architecture again, for updates that are
            trained beside its weights; these keep its zeros by themselves.
    """

    model: nn.Module
    job: Job
    dataset: str
    how: str = ""
    arguments: Mapping[str, Any] | None = None
    figures: Sequence[Figure] | None = None
    data: Mapping[str, str] | None = None
    extras: Mapping[str, Tensor] | None = None
    parts: Mapping[str, Any] | None = None
    parameters: Parameters | None = None
    after_step: Callable[[Fit], Callable[[], object]] | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    finish: Callable[[], object] | None = None


@dataclass
class FineTuner(ABC):
    """Options of every fine-tuner; a domain adds its own, and says in `plan` what they mean."""

    domain: ClassVar[str]
    shares: ClassVar[bool] = True  # whether several processes can share a batch
    counts: ClassVar[str] = "epochs"  # in what `checkpoint_every` counts, epochs or steps

    model: str
    """The model to start from: a name, folder or hf://owner/name."""

    out: Path
    """Folder for the new bundle."""

    distillation: float = 0.0
    """Weight of the divergence from the dense twin's predictions, added to the loss; 0 leaves it out."""

    twin: str | None = None
    """Dense model to stand beside on the new card; by default the one on the card of the model."""

    seed: int = 0
    """Random seed of order, augmentation, dropout and fresh weights."""

    device: str = "auto"
    """Where to train: cpu, cuda or cuda:1, say; auto takes a GPU if there is one."""

    checkpoint_every: int = 1
    """Epochs between checkpoints."""

    name: str | None = None
    """Name on the card; by default the domain and the folder's name."""

    overwrite: bool = False
    """Overwrite an existing bundle."""

    @abstractmethod
    def plan(self, source: Bundle, loaded: nn.Module, twin: Bundle | None, device: torch.device) -> Plan:
        """The job of these options and the model to train, on a device.

        Raises:
            ConfigError: a model that this fine-tuner cannot train, or options that contradict each other.
        """

    def run(self) -> Path:
        """Train, or go on with an interrupted training, and write the bundle.

        Returns:
            The folder of the new bundle.

        Raises:
            ConfigError: options that contradict each other, or a model of another domain.
            IdentityError: a checkpoint of another run.
            SparseError: whatever loading, data, training or saving refuse.
        """
        check_target(self)
        if not 0 <= self.distillation < float("inf"):
            raise ConfigError(f"distillation must be finite and not negative. Received: {self.distillation}.")
        accelerator = self._accelerator()
        device = device_named(self.device) if accelerator is None else accelerator.device
        source = find(self.model)
        if source.card.domain != self.domain:
            raise ConfigError(f"{source.card.name} is no model of the {self.domain} domain.")
        loaded = load_bundle(source)
        stored = {name: value.dtype for name, value in loaded.state_dict().items()}
        extras, zeros = info(loaded).extras, zero_count(loaded)
        twin = self.twin_of(source)
        if self.distillation and twin is None:
            raise ConfigError("Distillation needs a dense twin, and a dense model has none.")
        plan = self.plan(source, loaded, twin, device)
        require_data(figures_of(source.card) if plan.figures is None else plan.figures)
        with going_on_from(checkpoint_folder(self.out)):
            fit = self._train(source, plan, twin, accelerator)
            _store_as(plan.model, stored)
            path = self._publish(source, plan, twin, fit, extras if plan.extras is None else plan.extras)
        if zeros:
            kept = zero_count(plan.model)
            print(f"zoo: {kept:,} pruned weights that are zero, {zeros:,} before", file=sys.stderr)
        return path

    def _accelerator(self) -> Any:
        """Accelerate, if a launcher started several processes."""
        if workers().count == 1:
            return None
        if not self.shares:
            raise ConfigError(
                f"Fine-tuning of this kind ({self.domain}) runs in one process; start it without a launcher."
            )
        from accelerate import Accelerator

        return Accelerator()

    def twin_of(self, source: Bundle) -> Bundle | None:
        """The dense model beside which the new one will stand; None for a dense model.

        Raises:
            ConfigError: there is none of that name.
        """
        if source.card.dense_twin is None:
            return None
        try:
            return twin_of(source) if self.twin is None else find(self.twin)
        except UnknownNameError as error:
            name = self.twin or source.card.dense_twin
            raise ConfigError(f"No dense twin {name!r} to stand beside: name one with --twin.") from error

    def taught(self, job: Job, twin: Bundle) -> Job:
        """The job with distillation from the dense twin."""
        teacher = load_bundle(twin).float().to(job.device)
        return job.replace(distil=Distillation(teacher, output=self.distillation))

    def _train(self, source: Bundle, plan: Plan, twin: Bundle | None, accelerator: Any) -> Fit:
        masks, first = masks_of(plan.model), workers().index == 0
        job = self.taught(plan.job, twin) if self.distillation and twin else plan.job
        fit = job.fit(plan.model, accelerator=accelerator, macs=lambda: 0.0, parameters=plan.parameters)
        after = None if plan.after_step is None else plan.after_step(fit)
        identity = {**options_of(self), "weights": source.card.weights.sha256, **plan.identity}
        every = self.checkpoint_every * (fit.steps_per_epoch if self.counts == "epochs" else 1)
        held = masks.attach(plan.model, fit.optimizer) if masks and plan.finish is None else nullcontext()
        with held, progress_bar(quiet=not first) as progress:

            def note(fit: Fit) -> None:
                best = "" if fit.best is None else f", best validation {fit.best.score:.4f}"
                progress(fit.step, fit.steps, f"loss {fit.last_loss:.4f}{best}")

            checkpoint = Checkpoint(checkpoint_folder(self.out), identity)
            resume(
                fit,
                checkpoint,
                every_steps=every,
                note=note if first else None,
                after_step=after,
                last=True,  # where the result cannot be measured or written, the training is not lost
                writes=first,
            )
        if plan.finish is not None:
            plan.finish()
        plan.model.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        require_zeros(plan.model.eval(), masks)
        return fit

    def _publish(
        self, source: Bundle, plan: Plan, twin: Bundle | None, fit: Fit, extras: Mapping[str, Tensor]
    ) -> Path:
        card = source.card
        arguments = card.architecture.args if plan.arguments is None else plan.arguments
        tuned = {**options_of(self), "dataset": plan.dataset, "from": card.reference}
        parts = {name: part.model_dump() for name, part in card.sparsity.parts.items()}
        trained = Trained(
            {self.seed: plan.model},
            {"name": card.architecture.name, "args": dict(arguments)},
            card.method.name,
            {**card.method.hyperparameters, "finetuned": tuned},
            fit.spent.seconds,
            extras=extras,
            parts=parts if plan.parts is None else plan.parts,
        )
        how = f" {plan.how}" if plan.how else ""
        name = self.name or name_for(self.domain, self.out)
        summary = f"{card.name} fine-tuned on {plan.dataset}{how}."
        about = About.like(card, name, summary, command_of(self, self.domain))
        data = about.data if plan.data is None else plan.data
        about = dataclasses.replace(about, data=with_digest(self.domain, plan.dataset, data))
        chosen = "best validation score" if fit.best is not None else "last step"
        protocol = f"fine-tuned from {card.name}, {chosen}"
        figures = [
            dataclasses.replace(figure, protocol=protocol)
            for figure in (figures_of(card) if plan.figures is None else plan.figures)
        ]
        path = publish(trained, about, figures, self.out, twin=twin, overwrite=self.overwrite)
        if workers().index == 0:
            Checkpoint(checkpoint_folder(self.out), {}).remove()
        return path


def _store_as(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Round the weights to the precision in which the source stores them."""
    state = model.state_dict(keep_vars=True)
    for name, dtype in dtypes.items():
        state[name].data = state[name].data.to(dtype)


def require_zeros(model: nn.Module, masks: MaskSet | None) -> None:
    """Let the model carry its masks again, after checking that every dropped weight is still zero.

    Raises:
        ConfigError: a zero was lost.
    """
    if masks is None:
        return
    set_masks(model, masks)
    if lost := masks.lost_zeros(model):
        raise ConfigError(
            f"Fine-tuning lost zeros of {lost[0]!r}; this is a fault of the zoo, please report it."
        )


def zero_count(model: nn.Module) -> int:
    """Weights that are zero and that the masks drop."""
    masks, weights = masks_of(model), dict(model.named_parameters())
    return sum(int((weights[n][~m.keep] == 0).sum()) for n, m in masks.items()) if masks else 0
