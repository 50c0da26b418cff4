"""How probable a causal language model finds a text: negative log-likelihoods in nats, summed by document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from zoo.errors import DataError
from zoo.harness.tasks import Progress
from zoo.llm.data.calibration import context_limit
from zoo.llm.data.tokenization import encode, first_tokens
from zoo.shared.measure.modes import float32

# Tokens per batch: with 2,000 tokens in the vocabulary their logits take 32 MB.
_BATCH = 4096
# Longest window: what a model accepts beyond it would only take memory.
_WINDOW = 2048


@dataclass(frozen=True)
class Scored:
    """Token ids, of which those from `first` on are scored; the ids before them are their context."""

    ids: list[int]
    first: int = 1


def document_nats(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[str],
    progress: Progress | None = None,
) -> tuple[list[float], list[int]]:
    """Negative log-likelihood of each document, in nats, and its number of tokens.

    A document begins with the tokenizer's first token, which is not scored, and is read in windows as long as
    the model's context that do not overlap; each but the first begins with the last token of the one before.

    Raises:
        DataError: an empty document, or a likelihood that is not finite.
    """
    pieces: list[Scored] = []
    owners: list[int] = []
    counts = []
    window = context_of(model)
    for index, document in enumerate(documents):
        ids = first_tokens(tokenizer) + encode(tokenizer, document)
        if len(ids) < 2:
            raise DataError(f"Document {index} holds no token to predict. Leave empty documents out.")
        counts.append(len(ids) - 1)
        for start in range(0, len(ids) - 1, window):
            pieces.append(Scored(ids[start : start + window + 1]))
            owners.append(index)
    totals = [0.0] * len(documents)
    for owner, nats in zip(owners, sequence_nats(model, pieces, progress), strict=True):
        totals[owner] += nats
    return totals, counts


def sequence_nats(
    model: nn.Module, sequences: Sequence[Scored], progress: Progress | None = None
) -> list[float]:
    """Negative log-likelihood in nats of the scored tokens of each sequence.

    Sequences are batched by length; padding at the end changes nothing in a causal model.

    Raises:
        DataError: a likelihood that is not finite.
    """
    result = [0.0] * len(sequences)
    done = 0
    was_training = model.training
    model.eval()
    with float32(model), torch.inference_mode():
        for batch in _batches(sequences):
            for index, nats in zip(batch, _nats(model, [sequences[i] for i in batch]), strict=True):
                result[index] = nats
            done += len(batch)
            if progress:
                progress(done, len(sequences))
    model.train(was_training)
    if bad := [index for index, nats in enumerate(result) if not nats < float("inf")]:
        raise DataError(
            f"The model gives sequence {bad[0]} a likelihood of {result[bad[0]]}; check its weights."
        )
    return result


def context_of(model: nn.Module) -> int:
    """Tokens of the longest window that the model is given."""
    return context_limit(model, _WINDOW)


def _batches(sequences: Sequence[Scored]) -> Iterator[list[int]]:
    """Indices in batches of at most `_BATCH` tokens with padding, longest first."""
    order = sorted(range(len(sequences)), key=lambda i: (-len(sequences[i].ids), i))
    while order:
        size = max(1, _BATCH // len(sequences[order[0]].ids))
        yield order[:size]
        order = order[size:]


def _nats(model: nn.Module, batch: Sequence[Scored]) -> list[float]:
    longest = max(len(one.ids) for one in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    scored = torch.zeros(len(batch), longest, dtype=torch.bool)
    for row, one in enumerate(batch):
        ids[row, : len(one.ids)] = torch.tensor(one.ids)
        scored[row, one.first : len(one.ids)] = True
    device = next(model.parameters()).device
    ids, scored = ids.to(device), scored.to(device)
    logits: Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits
    nats = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    sums: list[float] = (nats.view(len(batch), -1).double() * scored[:, 1:]).sum(1).tolist()
    return sums
