"""Texts by several models from the same prompts, side by side.

    python -m zoo.llm.samples --models llm/dense-stories llm/sparsegpt-50-stories --prompts "Once upon a time"

The most probable token is taken each time, so that models differ by their weights alone. The result goes into
a JSON file and a Markdown table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from zoo.bundles.catalog import find
from zoo.bundles.store import load_bundle
from zoo.errors import ConfigError
from zoo.llm.generate import generate
from zoo.shared.store.io import atomic_write, write_json

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "llm-samples.json"


@dataclass(frozen=True)
class Samples:
    """What to write.

    Args:
        models: names or folders of language models.
        prompts: beginnings of texts.
        max_new_tokens: at most so many tokens after each.
        results: JSON file; the Markdown goes beside it.
    """

    models: tuple[str, ...]
    prompts: tuple[str, ...]
    max_new_tokens: int = 80
    results: Path = RESULTS

    def __post_init__(self) -> None:
        if not self.models or not self.prompts:
            raise ConfigError("give at least one model and one prompt")

    def run(self) -> dict[str, Any]:
        """Generate and write both files.

        Raises:
            SparseError: whatever finding, loading or generating refuse.
        """
        texts: dict[str, dict[str, str]] = {}
        for name in self.models:
            bundle = find(name)
            model = load_bundle(bundle)
            texts[bundle.card.reference] = {
                prompt: generate(model, prompt, max_new_tokens=self.max_new_tokens).text
                for prompt in self.prompts
            }
        content = {"max_new_tokens": self.max_new_tokens, "texts": texts}
        self.results.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.results, content)
        atomic_write(self.results.with_suffix(".md"), _table(self.prompts, texts).encode())
        return content


def _table(prompts: tuple[str, ...], texts: dict[str, dict[str, str]]) -> str:
    """Prompts in bold, a column for each model."""
    names = list(texts)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for prompt in prompts:
        cells = [_cell(f"**{prompt}**{texts[name][prompt]}") for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.strip().replace("|", "\\|").replace("\n", "<br>")


def main(config: Samples) -> None:
    """Generate and show the table."""
    config.run()
    print(config.results.with_suffix(".md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(tyro.cli(Samples, description=__doc__))
