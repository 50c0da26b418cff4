"""An n-gram model with interpolated Kneser-Ney smoothing: what a language model must beat.

    python -m zoo.llm.ngram --text tinystories --tokenizer stories --order 3

It is trained on the same tokens as the networks, so that it, too, gives every text a probability and is
measured in the same units: nats per word.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from zoo.errors import ConfigError
from zoo.llm.data import corpus
from zoo.llm.data.tokenization import packaged
from zoo.llm.scoring import encode
from zoo.llm.tasks import perplexity_result
from zoo.shared.store.io import read_json, write_json

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "llm-ngram.json"


class KneserNey:
    """Interpolated Kneser-Ney (Kneser and Ney 1995; Chen and Goodman 1999, equation 25).

    p_n(w | h) = max(c(h w) - D, 0) / c(h) + D N(h) / c(h) p_{n-1}(w | h'), where N(h) counts the different
    words after h, h' is h without its first word, and c counts occurrences at the highest order, different
    words before at the lower ones. D = n1 / (n1 + 2 n2) for each order. Below order one lies the uniform
    distribution.

    Args:
        order: tokens of the longest n-gram.
        vocabulary: how many tokens there are.

    Raises:
        ConfigError: an order below one.
    """

    def __init__(self, order: int, vocabulary: int) -> None:
        if order < 1:
            raise ConfigError(f"order is the length of the longest n-gram, at least 1. Received: {order}.")
        self.order, self.vocabulary = order, vocabulary
        self._counts: list[Counter[tuple[int, ...]]] = []
        self._totals: list[Counter[tuple[int, ...]]] = []
        self._kinds: list[Counter[tuple[int, ...]]] = []
        self._discounts: list[float] = []

    def fit(self, documents: Iterable[Sequence[int]]) -> KneserNey:
        """Count the n-grams of documents, each of which begins with its first token."""
        counts: Counter[tuple[int, ...]] = Counter()
        for document in documents:
            padded = [document[0]] * (self.order - 1) + list(document)
            for end in range(self.order, len(padded)):
                counts[tuple(padded[end - self.order + 1 : end + 1])] += 1
        levels = [counts]
        while len(next(iter(levels[-1]))) > 1:  # the lower orders count what may stand before
            levels.append(Counter(gram[1:] for gram in levels[-1]))
        self._counts = levels
        for level in levels:
            totals: Counter[tuple[int, ...]] = Counter()
            kinds: Counter[tuple[int, ...]] = Counter()
            for gram, number in level.items():
                totals[gram[:-1]] += number
                kinds[gram[:-1]] += 1
            once, twice = (sum(number == times for number in level.values()) for times in (1, 2))
            self._totals.append(totals)
            self._kinds.append(kinds)
            self._discounts.append(once / (once + 2 * twice) if once else 0.0)
        return self

    def probability(self, history: Sequence[int], token: int) -> float:
        """p(token | history); the last order - 1 tokens of the history count."""
        p = 1 / self.vocabulary
        for level in range(self.order - 1, -1, -1):
            length = self.order - 1 - level
            before = tuple(history[len(history) - length :])
            total = self._totals[level].get(before, 0)
            if total:
                own = self._counts[level].get((*before, token), 0)
                discount = self._discounts[level]
                p = max(own - discount, 0) / total + discount * self._kinds[level][before] / total * p
        return p

    def nats(self, document: Sequence[int]) -> float:
        """Negative log-likelihood of a document, whose first token is given."""
        padded = [document[0]] * (self.order - 1) + list(document)
        return -math.fsum(
            math.log(self.probability(padded[end - self.order + 1 : end], padded[end]))
            for end in range(self.order, len(padded))
        )


@dataclass(frozen=True)
class Baseline:
    """Measure an n-gram model on a text of the zoo.

    Args:
        text: embedded, shakespeare, tinystories or wikitext2.
        tokenizer: packaged tokenizer.
        order: tokens of the longest n-gram.
        results: file that collects the figures.
    """

    text: str = "embedded"
    tokenizer: str = "shakespeare"
    order: int = 3
    results: Path = RESULTS

    def run(self) -> dict[str, dict[str, float | None]]:
        """Train on the text's training documents and measure on its test documents."""
        tokenizer, documents = packaged(self.tokenizer), corpus(self.text)
        start = [int(tokenizer.bos_token_id)]
        model = KneserNey(self.order, len(tokenizer))
        model.fit(start + encode(tokenizer, document) for document in documents.train)
        nats = [model.nats(start + encode(tokenizer, document)) for document in documents.test]
        metrics = perplexity_result(nats, documents.test).metrics
        return {name: {"value": each.value, "stderr": each.stderr} for name, each in metrics.items()}


def main(config: Baseline) -> None:
    """Measure, print and record."""
    measured = config.run()
    collected = read_json(config.results) if config.results.exists() else {}
    collected.setdefault(config.text, {})[f"{config.order}-gram, {config.tokenizer}"] = measured
    write_json(config.results, collected)
    for name, figure in measured.items():
        print(f"{config.order}-gram on {config.text}: {name} {figure['value']:.4g} ± {figure['stderr']:.2g}")


if __name__ == "__main__":
    main(tyro.cli(Baseline, description=__doc__))
