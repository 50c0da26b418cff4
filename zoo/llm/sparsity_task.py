"""What thresholds on activations spare on held-out text, as harness tasks; nothing in a dense model."""

from __future__ import annotations

import torch
from torch import nn

from zoo.harness.tasks import Progress, TaskResult, register_task
from zoo.llm.data import corpus
from zoo.llm.data.tokenization import tokenizer_of
from zoo.llm.models.thresholds import held_out_shares, skipped_share, thresholds_of
from zoo.llm.scoring import context_of, encode, first_tokens
from zoo.llm.tasks import TextTask
from zoo.shared.measure.modes import float32


class ActivationSparsity(TextTask):
    """Shares that thresholds drop, token by token, over the test documents of a text.

    `skipped_weights` is the share of the blocks' linear weights that a token need not read, `closed_gates`
    the share of FFN gates that are zero. A sample is one document, of which the first window counts.
    """

    primary = "skipped_weights"

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Both shares on the test split."""
        documents = corpus(self.text).test
        samples: dict[str, list[float]] = {"skipped_weights": [], "closed_gates": []}
        if not thresholds_of(model):
            zeros = [0.0] * len(documents)
            return TaskResult.from_samples(dict.fromkeys(samples, zeros))
        tokenizer, window = tokenizer_of(model), context_of(model)
        with float32(model):
            for done, document in enumerate(documents, start=1):
                ids = (first_tokens(tokenizer) + encode(tokenizer, document))[:window]
                report = held_out_shares(model, [torch.tensor([ids])])
                samples["skipped_weights"].append(skipped_share(report))
                gates = [float(row.get("ffn", 0.0)) for row in report]
                samples["closed_gates"].append(sum(gates) / len(gates))
                if progress:
                    progress(done, len(documents))
        return TaskResult.from_samples(samples)


@register_task
class EmbeddedSparsity(ActivationSparsity):
    """On The Taming of the Shrew, in 47 passages, of the packaged text."""

    name, text = "llm/sparsity-embedded", "embedded"


@register_task
class TinyStoriesSparsity(ActivationSparsity):
    """On 116 held-out stories of the TinyStories excerpt."""

    name, text = "llm/sparsity-tinystories", "tinystories"
