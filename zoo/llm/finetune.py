"""`zoo finetune llm`: train a sparse language model on, in full or by low-rank updates, with every zero kept.

The state goes into one file beside the output every few steps, written atomically; the same command goes on
from there after a kill, and its result equals that of an uninterrupted run bit for bit. Under
`accelerate launch -m zoo finetune llm ...` each step's windows are shared among the processes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from zoo.bundles.card import Card
from zoo.bundles.catalog import Bundle, find
from zoo.bundles.store import info, load_bundle
from zoo.checkpoints import CheckpointFile
from zoo.errors import ConfigError, DataError
from zoo.harness.subjects import twin_of
from zoo.harness.tables import Table
from zoo.harness.tasks import Measure, get_task
from zoo.harness.tuning import (
    check_target,
    checkpoint_folder,
    command_of,
    options_of,
    publish,
    require_zeros,
    zero_count,
)
from zoo.llm.data import corpus
from zoo.llm.data.tokenization import END, token_stream, tokenizer_of
from zoo.llm.lora import attach_lora, detach_lora
from zoo.llm.scoring import context_of
from zoo.llm.tasks import TextTask
from zoo.llm.train import Fit, TrainConfig, Windows, adamw, distillation
from zoo.progress import progress_bar
from zoo.shared.masks import masks_of

Measured = dict[str, dict[str, Measure]]


@dataclass
class Finetune:
    """Fine-tune a language model; the zeros of a sparse one stay zero.

    In full, all weights are trained and the masks applied after each step. With a rank, low-rank updates of
    the blocks' projections are trained, masked like the weights, and merged at the end.
    """

    model: str
    """The model to start from: a name, folder or hf://owner/name."""

    out: Path
    """Folder for the new bundle."""

    text: str | None = None
    """What to train on: embedded, shakespeare, tinystories, wikitext2, or a .txt file whose documents are
    separated by lines of <|endoftext|>; by default the training part of the text on the model's card."""

    steps: int = 200
    """Optimizer steps."""

    batch: int = 8
    """Windows per step, over all processes."""

    window: int | None = None
    """Tokens per window; by default the model's context, at most 256."""

    lr: float = 5e-4
    """AdamW's highest learning rate; ten times that suits low-rank updates."""

    weight_decay: float = 0.0
    """Decoupled decay of matrices."""

    lora_rank: int = 0
    """Rank of the updates; 0 trains all weights."""

    lora_alpha: float | None = None
    """Scale of the updates times the rank; by default twice the rank."""

    distillation: float = 0.0
    """Weight of the divergence from the dense twin's predictions, added to the loss; 0 leaves it out."""

    seed: int = 0
    """Of the order of the windows and of the updates."""

    checkpoint_every: int = 25
    """Steps between checkpoints."""

    name: str | None = None
    """Name on the card; by default llm/ and the folder's name."""

    overwrite: bool = False
    """Replace the bundle that is there."""

    def run(self) -> Path:
        """Train, or go on with an interrupted training, and write the bundle.

        Returns:
            The folder of the new bundle.

        Raises:
            ConfigError: options that contradict each other, or a checkpoint of another run.
            DataError: a text that is missing or shorter than two windows.
            SparseError: whatever loading or saving refuse.
        """
        self._check()
        source = find(self.model)
        if source.card.domain != "llm":
            raise ConfigError(f"{source.card.name} is no model of the llm domain.")
        model = load_bundle(source)
        tasks = list(dict.fromkeys(metric.task for metric in source.card.metrics))
        window = self.window or min(context_of(model), 256)
        config = TrainConfig(
            self.steps, self.batch, window, self.lr, weight_decay=self.weight_decay, seed=self.seed
        )
        tokens = token_stream(self._documents(tasks), tokenizer_of(model))
        windows = Windows(tokens, window, self.batch, self.seed)
        accelerator = Accelerator()
        start = time.perf_counter()
        before = _measure(model, tasks) if accelerator.is_main_process else {}
        masks, stored = masks_of(model), {n: t.dtype for n, t in model.state_dict().items()}
        zeros = zero_count(model)
        model.float()
        self._train(model, source, windows, config, accelerator)
        require_zeros(model, masks)
        state = model.state_dict(keep_vars=True)
        for name, dtype in stored.items():  # stored as the source stores them
            state[name].data = state[name].data.to(dtype)
        model.eval()
        if accelerator.is_main_process:
            after = _measure(model, tasks)
            fields = self._card(model, source.card, after, time.perf_counter() - start)
            publish(self, model, fields, info(model).extras)
            _show(source.card.name, before, after, (zeros, zero_count(model)))
        accelerator.wait_for_everyone()
        return self.out

    def _check(self) -> None:
        if not 0 <= self.distillation < float("inf"):
            raise ConfigError(f"distillation must be finite and not negative. Received: {self.distillation}.")
        if self.lora_rank < 0:
            raise ConfigError(f"lora_rank must not be negative. Received: {self.lora_rank}.")
        check_target(self)

    def _documents(self, tasks: list[str]) -> tuple[str, ...]:
        """Training documents only: what the tasks measure on is held out."""
        if self.text is not None and self.text.endswith(".txt"):
            try:
                content = Path(self.text).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{self.text} cannot be read as UTF-8 text: {error}.") from error
            return tuple(part.strip() for part in content.split(END) if part.strip())
        if self.text is not None:
            return corpus(self.text).train
        for task in map(get_task, tasks):
            if isinstance(task, TextTask):
                return corpus(task.text).train
        raise ConfigError(f"{self.model} was measured on no text of the zoo: name one with --text.")

    def _train(
        self,
        model: nn.Module,
        source: Bundle,
        windows: Windows,
        config: TrainConfig,
        accelerator: Accelerator,
    ) -> None:
        """Train in place, in single precision."""
        masks = masks_of(model)
        distil = self._teacher(source, accelerator)
        if self.lora_rank:
            attach_lora(model, self.lora_rank, self.lora_alpha, seed=self.seed)
        adam = adamw(model, config)
        prepared, optimizer = accelerator.prepare(model, adam)
        share = (accelerator.process_index, accelerator.num_processes)
        fit = Fit(
            prepared,
            windows,
            config,
            optimizer=optimizer,
            backward=accelerator.backward,
            share=share,
            distil=distil,
        )
        file = CheckpointFile(checkpoint_folder(self.out), self._identity(source, windows))
        fit.restore(file)
        accelerator.wait_for_everyone()
        main = accelerator.is_main_process
        attached = masks.attach(model, adam) if masks and not self.lora_rank else nullcontext()
        with attached, progress_bar(quiet=not main) as progress:

            def on_step(fit: Fit) -> None:
                if progress:
                    progress(fit.step, config.steps, f"loss {fit.last_loss:.4f}")
                if main and fit.step % self.checkpoint_every == 0 and not fit.done:
                    fit.write(file)

            fit.run(on_step)
        if self.lora_rank:
            detach_lora(model, merge=True)
        model.requires_grad_(True)
        model.cpu()

    def _teacher(self, source: Bundle, accelerator: Accelerator) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The divergence from the dense twin's predictions; None without distillation."""
        if self.distillation == 0:
            return None
        if source.card.dense_twin is None:
            raise ConfigError("Distillation needs a dense twin, and a dense model has none.")
        teacher = load_bundle(twin_of(source)).float().to(accelerator.device)
        return distillation(teacher, self.distillation)

    def _identity(self, source: Bundle, windows: Windows) -> dict[str, Any]:
        """What a checkpoint must agree with to be gone on from."""
        text = [len(windows.tokens), int(windows.tokens.sum())]
        return {**options_of(self), "weights": source.card.weights.sha256, "text": text}

    def _card(self, model: nn.Module, card: Card, after: Measured, seconds: float) -> dict[str, Any]:
        fields = card.to_dict()
        for metric in fields["metrics"]:
            found = after[metric["task"]][metric["metric"]]
            metric |= {
                "value": found.value,
                "stderr": found.stderr or 0.0,
                "per_seed": {self.seed: found.value},
                "mean": found.value,
                "spread": 0.0,
            }
        flops = get_task(card.metrics[0].task).flops(model)
        fields["method"]["seed"] = self.seed
        fields["method"]["hyperparameters"] |= {"finetuned": {**options_of(self), "from": card.reference}}
        if flops is not None:
            dense = max(flops.dense, card.cost.flops.dense)
            fields["cost"]["flops"] = {"dense": dense, "sparse": flops.sparse}
        return fields | {
            "name": self.name or f"llm/{self.out.name}",
            "version": "1.0.0",
            "summary": f"{card.name} fine-tuned{' by low-rank updates' if self.lora_rank else ''}.",
            "training": {"command": command_of(self, "llm"), "seconds": round(seconds, 3)},
            "evidence": None,
        }


def _measure(model: nn.Module, tasks: list[str]) -> Measured:
    return {name: get_task(name).evaluate(model).metrics for name in tasks}


def _show(name: str, before: Measured, after: Measured, zeros: tuple[int, int]) -> None:
    """The before/after table, on standard error: standard output belongs to the command line's own answer."""
    from rich.console import Console

    from zoo.report.terminal import show_table

    rows = [
        [f"{task}: {metric}", f"{before[task][metric].value:.4f}", f"{measure.value:.4f}"]
        for task, measures in after.items()
        for metric, measure in measures.items()
    ]
    rows.append(["pruned weights that are zero", f"{zeros[0]:,}", f"{zeros[1]:,}"])
    show_table(Console(file=sys.stderr), Table(name, ["", "before", "after"], rows))
