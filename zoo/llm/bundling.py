"""Dense bundles: models trained here, and models made elsewhere.

    python -m zoo.llm.bundling --source transformers-folder --out my/dense-mine --tasks llm/wikitext2
    python -m zoo.llm.bundling --source stories260K.bin --tokenizer tok512.bin --out my/dense-260k

The result is the dense twin that `zoo sparsify`, `zoo finetune llm` and `zoo generate` start from.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor
from transformers import PreTrainedModel

from zoo.bundles.store import save
from zoo.errors import ConfigError, TaskError
from zoo.harness.evidence import record_evidence
from zoo.harness.tasks import get_task
from zoo.llm.data import corpus
from zoo.llm.data.tokenization import to_extras, tokenizer_of
from zoo.llm.models import architecture_of, load_pretrained

PROTOCOL = "test documents in disjoint windows of the model's context; float32 arithmetic on stored weights"
_METRICS = ("word_perplexity", "bits_per_byte", "accuracy")


def save_dense(
    model: PreTrainedModel,
    folder: Path,
    *,
    name: str,
    summary: str,
    text: str,
    tasks: Sequence[str],
    command: str,
    seconds: float,
    seed: int = 0,
    hyperparameters: Mapping[str, Any] | None = None,
    data: Mapping[str, str] | None = None,
    license: str = "Apache-2.0",
    citation: str = "Hugo Touvron et al. LLaMA: Open and Efficient Foundation Language Models. 2023.",
    evidence: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Measure a dense model and write its bundle, in the precision that its weights have.

    Args:
        model: with its tokenizer (`tokenizer_of`); a tokenizer that is not packaged goes into the extras.
        folder: of the bundle.
        name, summary, command, seconds, seed, hyperparameters, license, citation: for the card.
        text: what it was trained on.
        tasks: what it is measured on.
        data: name, source and licence of what it was trained on, where that is no text of the zoo.
        evidence: path in the repository of the file that collects figures; None for none.
        overwrite: whether a bundle that is there may be replaced.
    """
    architecture = architecture_of(model)
    extras: dict[str, Tensor] = {}
    if architecture["args"]["tokenizer"] is None:
        extras = to_extras(tokenizer_of(model))
    metrics = []
    for task_name in tasks:
        result = get_task(task_name).evaluate(model)
        for metric, measure in result.metrics.items():
            if metric in _METRICS:
                metrics.append(_metric(task_name, metric, measure.value, measure.stderr or 0.0, seed))
                if evidence:
                    path = Path(__file__).parents[2] / evidence
                    record_evidence(path, name, task_name, metric, {seed: measure.value})
    flops = get_task(tasks[0]).flops(model)
    if flops is None:
        raise TaskError(f"The operations of {type(model).__name__} cannot be counted.")
    if data is None:
        source = corpus(text)
        data = {"name": source.title, "source": source.origin, "licence": source.licence}
    card = {
        "name": name,
        "version": "1.0.0",
        "domain": "llm",
        "summary": summary,
        "architecture": architecture,
        "method": {"name": "dense", "hyperparameters": dict(hyperparameters or {}), "seed": seed},
        "cost": {"parameters": {}, "flops": {"dense": flops.dense, "sparse": flops.dense}, "bytes": {}},
        "metrics": metrics,
        "dense_twin": None,
        "training": {"command": command, "seconds": round(seconds, 1)},
        "data": dict(data),
        "license": license,
        "citation": citation,
        "evidence": evidence,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    return save(model, folder, card=card, extras=extras, overwrite=overwrite)


def _metric(task: str, metric: str, value: float, stderr: float, seed: int) -> dict[str, Any]:
    return {
        "task": task,
        "metric": metric,
        "split": "test",
        "protocol": PROTOCOL,
        "value": value,
        "stderr": stderr,
        "per_seed": {seed: value},
        "mean": value,
        "spread": 0.0,
    }


@dataclass(frozen=True)
class Adopt:
    """Make a dense bundle of a model that was trained elsewhere.

    Args:
        source: a folder that transformers' `save_pretrained` wrote, a hub id, or a llama2.c `.bin` file.
        out: folder of the new bundle.
        tokenizer: the llama2.c tokenizer file; other sources bring their own.
        tasks: what to measure it on.
        name: on the card; by default llm/ and the folder's name.
        dtype: precision of the stored weights.
        licence: of the weights, for the card.
        overwrite: replace the bundle that is there.
    """

    source: str
    out: Path
    tokenizer: Path | None = None
    tasks: tuple[str, ...] = ("llm/embedded",)
    name: str | None = None
    dtype: str = "float16"
    licence: str = "not stated"
    overwrite: bool = False

    def run(self) -> Path:
        """Load, measure and save.

        Raises:
            ConfigError: a source that is no causal LM with a gated FFN, or an unknown precision.
        """
        types = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
        if self.dtype not in types:
            raise ConfigError(f"dtype is one of {', '.join(types)}. Received: {self.dtype!r}.")
        start = time.perf_counter()
        if self.source.endswith(".bin"):
            from zoo.llm.models.llama2c import read_llama2c

            if self.tokenizer is None:
                raise ConfigError(f"{self.source} holds no tokenizer: give its file with --tokenizer.")
            model: PreTrainedModel = read_llama2c(self.source, self.tokenizer)
        else:
            model = load_pretrained(self.source)
        model.to(types[self.dtype])  # type: ignore[arg-type]
        return save_dense(
            model,
            self.out,
            name=self.name or f"llm/{self.out.name}",
            summary=f"{type(model).__name__} from {Path(self.source).name}.",
            text="not stated",
            tasks=self.tasks,
            command=shlex.join(["python", "-m", "zoo.llm.bundling", *sys.argv[1:]]),
            seconds=time.perf_counter() - start,
            data={"name": "not stated", "source": self.source, "licence": self.licence},
            license=self.licence,
            overwrite=self.overwrite,
        )


def main(config: Adopt) -> None:
    """Make the bundle and say where it is."""
    print(config.run())


if __name__ == "__main__":
    main(tyro.cli(Adopt, description=__doc__))
