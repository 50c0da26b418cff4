"""Perplexity and cloze on held-out text, as harness tasks."""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from zoo.errors import ConfigError
from zoo.harness.tasks import Flops, Progress, Task, TaskResult, register_task
from zoo.llm.data import corpus, words
from zoo.llm.data.tokenization import tokenizer_of
from zoo.llm.scoring import Scored, context_of, document_nats, encode, first_tokens, sequence_nats
from zoo.shared.measure.account import count


class TextTask(Task):
    """What the tasks share: the text they are on, and the operations of one window."""

    domain = "llm"
    text: ClassVar[str]

    def measured_on(self) -> Any:
        """The test documents."""
        return corpus(self.text).test

    def flops(self, model: nn.Module) -> Flops | None:
        """Operations of one pass over one window as long as the model's context, at most 2,048 tokens."""
        device = next(model.parameters()).device
        ids = torch.zeros(1, context_of(model), dtype=torch.long, device=device)
        total = count(model, kwargs={"input_ids": ids, "use_cache": False}).total
        return Flops(total.flops, total.flops_kept)


class Perplexity(TextTask):
    """Perplexity over the test documents of a text, in units that do not depend on the tokenizer.

    word_perplexity = exp(sum of nats / sum of words), words being what stands between blanks, and
    bits_per_byte = sum of nats / (ln 2 * sum of bytes). Both are ratios of sums over documents; the sample of
    a document is its linear contribution, v + v' (nats_i - r size_i) n / sum of sizes with r the ratio and v'
    the derivative of the metric at r. Their mean is the metric, and their standard error that of the ratio
    (delta method), so that models are compared document by document.
    """

    primary = "word_perplexity"
    higher_is_better = False

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Both metrics on the test split."""
        documents = corpus(self.text).test
        nats, _ = document_nats(model, tokenizer_of(model), documents, progress)
        return perplexity_result(nats, documents)


def perplexity_result(nats: list[float], documents: Iterable[str]) -> TaskResult:
    """The metrics of `Perplexity` from the nats of each document; also for models that are no networks."""
    texts = list(documents)
    by_word, ratio = _contributions(nats, [words(text) for text in texts])
    perplexity = math.exp(ratio)
    by_byte, bits = _contributions(nats, [len(text.encode()) for text in texts])
    samples = {
        "word_perplexity": [perplexity * (1 + each) for each in by_word],
        "bits_per_byte": [(bits + each) / math.log(2) for each in by_byte],
    }
    return TaskResult.from_samples(samples, _digest(texts))


def _contributions(nats: list[float], sizes: list[int]) -> tuple[list[float], float]:
    """Centred linear contributions of each document to the ratio of the sums, and the ratio."""
    total = sum(sizes)
    ratio = math.fsum(nats) / total
    scale = len(nats) / total
    return [(n - ratio * size) * scale for n, size in zip(nats, sizes, strict=True)], ratio


class Cloze(TextTask):
    """Which of four continuations is the text's own.

    Test documents are cut between two sentences (speeches, in a play); the wrong answers are what follows the
    cuts in three other documents. The model reads the last 128 tokens before the cut; its answer is the
    continuation that gains most from them, log p(answer | context) - log p(answer). Chance is 0.25.
    """

    primary = "accuracy"
    separator: ClassVar[str] = r"(?<=[.!?\"])\s+"
    cuts: ClassVar[int] = 1
    context: ClassVar[int] = 128

    def evaluate(self, model: nn.Module, *, progress: Progress | None = None) -> TaskResult:
        """Share of questions answered right; samples are 1 for right and 0 for wrong."""
        questions = self.questions()
        tokenizer, window = tokenizer_of(model), context_of(model)
        start = first_tokens(tokenizer) or encode(tokenizer, "\n")[:1]
        pieces = []
        for context, answers in questions:
            before = (start + encode(tokenizer, context))[-self.context :]
            for answer in answers:
                after = encode(tokenizer, answer)[: window - 1]
                ids = before[-(window + 1 - len(after)) :] + after
                pieces.append(Scored(ids, len(ids) - len(after)))
                pieces.append(Scored(start + after, len(start)))
        nats = sequence_nats(model, pieces, progress)
        gains = [alone - given for given, alone in zip(nats[::2], nats[1::2], strict=True)]
        right = [
            float(max(range(4), key=gains[4 * i : 4 * i + 4].__getitem__) == 0) for i in range(len(questions))
        ]
        return TaskResult.from_samples({"accuracy": right}, _digest(context for context, _ in questions))

    def questions(self) -> list[tuple[str, list[str]]]:
        """Contexts, each with four continuations of which the first is the right one."""
        generator = random.Random(0)
        cuts: list[tuple[int, str, str, str]] = []
        for owner, document in enumerate(corpus(self.text).test):
            spans = [
                span for span in _spans(document, self.separator) if span[0] and span[1] - span[0] <= 400
            ]
            for start, end in sorted(generator.sample(spans, min(self.cuts, len(spans)))):
                context = document[:start].rstrip()
                cuts.append((owner, context, document[len(context) : start], document[start:end]))
        questions = []
        for owner, context, blank, answer in cuts:
            others = sorted({wrong for other, _, _, wrong in cuts if other != owner and wrong != answer})
            answers = [answer, *generator.sample(others, 3)]
            questions.append((context, [blank + text for text in answers]))
        return questions


@register_task
class WikiText2(Perplexity):
    """Perplexity on the 62 articles of WikiText-2's test part."""

    name, text = "llm/wikitext2", "wikitext2"


@register_task
class TinyStories(Perplexity):
    """Perplexity on 116 held-out stories of the TinyStories excerpt."""

    name, text = "llm/tinystories", "tinystories"


@register_task
class Embedded(Perplexity):
    """Perplexity on The Taming of the Shrew, in 47 passages, of the packaged text."""

    name, text = "llm/embedded", "embedded"


@register_task
class ClozeTinyStories(Cloze):
    """The next sentence of held-out stories."""

    name, text = "llm/cloze-tinystories", "tinystories"


@register_task
class ClozeEmbedded(Cloze):
    """The next speech of The Taming of the Shrew."""

    name, text, separator, cuts = "llm/cloze-embedded", "embedded", r"\n\n", 3


@register_task
class ClozeWikiText2(Cloze):
    """The next sentence of WikiText-2's test articles."""

    name, text, cuts = "llm/cloze-wikitext2", "wikitext2", 2


def _spans(document: str, separator: str) -> list[tuple[int, int]]:
    """(start, end) of each part of a document between separators."""
    breaks = [match.span() for match in re.finditer(separator, document)]
    starts = [0, *(end for _, end in breaks)]
    ends = [*(start for start, _ in breaks), len(document)]
    return [(start, end) for start, end in zip(starts, ends, strict=True) if end - start >= 20]


def _digest(texts: Iterable[str]) -> str:
    content = hashlib.sha256()
    for text in texts:
        content.update(text.encode() + b"\0")
    return content.hexdigest()[:16]


class TextFile(Perplexity):
    """Perplexity on the documents of a .txt or .jsonl file, or of a text of the zoo, that are for testing.

    Args:
        argument: path or name, see `zoo.llm.data.corpus`.
    """

    def __init__(self, argument: str) -> None:
        if not corpus(argument).test:
            raise ConfigError(
                f"{argument} holds no document to test on; give a text of two documents or more"
            )
        self.name, self.text = f"llm/text:{argument}", argument  # type: ignore[misc]
