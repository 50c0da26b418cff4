"""Dense bundles of models that were trained elsewhere.

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

from zoo.bundles.public import PublicModel
from zoo.bundles.publish import About, Figure, Trained, publish
from zoo.errors import ConfigError
from zoo.harness.tasks import get_task
from zoo.llm.data.tokenization import to_extras, tokenizer_of
from zoo.llm.generate import to_extras as generation_extras
from zoo.llm.models import architecture_of, load_pretrained
from zoo.names import name_for

PROTOCOL = "test documents in disjoint windows of the model's context; float32 arithmetic on stored weights"
_METRICS = {"word_perplexity": ("word_perplexity", "bits_per_byte")}  # by primary metric
CITATION = "Hugo Touvron et al. LLaMA: Open and Efficient Foundation Language Models. 2023."


def save_dense(
    model: PreTrainedModel,
    folder: Path,
    about: About,
    tasks: Sequence[str],
    *,
    seconds: float = 0.0,
    base: PublicModel | None = None,
    overwrite: bool = False,
) -> Path:
    """Measure a dense model and write its bundle, in the precision that its weights have.

    Args:
        model: with its tokenizer (`tokenizer_of`); a tokenizer that is not packaged goes into the extras.
        folder: of the bundle.
        about: what the card says.
        tasks: what it is measured on.
        seconds: that making it took.
        base: the public model that it is, whose tensors are then not stored again.
        overwrite: whether a bundle that is there may be replaced.
    """
    architecture = architecture_of(model)
    extras = extras_of(model, architecture)
    figures = [Figure(task, _METRICS.get(get_task(task).primary, ()), PROTOCOL) for task in tasks]
    trained = Trained({0: model}, architecture, seconds=seconds, extras=extras)
    return publish(trained, about, figures, folder, base=base, overwrite=overwrite)


def extras_of(model: PreTrainedModel, architecture: Mapping[str, Any]) -> dict[str, Tensor]:
    """A tokenizer that is not packaged, and a generation configuration of the model's own."""
    extras = to_extras(tokenizer_of(model)) if architecture["args"]["tokenizer"] is None else {}
    return extras | generation_extras(model)


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
        about = About(
            self.name or name_for("llm", self.out),
            f"{type(model).__name__} from {Path(self.source).name}.",
            shlex.join(["python", "-m", "zoo.llm.bundling", *sys.argv[1:]]),
            CITATION,
            {"name": "not stated", "source": self.source, "licence": self.licence},
            self.licence,
        )
        seconds = time.perf_counter() - start
        return save_dense(model, self.out, about, self.tasks, seconds=seconds, overwrite=self.overwrite)


def main(config: Adopt) -> None:
    """Make the bundle and say where it is."""
    print(config.run())


if __name__ == "__main__":
    main(tyro.cli(Adopt, description=__doc__))
