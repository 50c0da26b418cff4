"""Models that people know, and the command that makes each of them sparse: `zoo recipes list`.

`hub.yaml` holds one entry a recipe; nothing of it was run on the weights that it names where no hub can be
reached. What was run, by `python -m zoo.recipes --check docs/recipes.md`, is the entry's own command on the
same configuration with random weights at reduced depth and width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zoo.bundles.cardfile import read_yaml
from zoo.errors import ConfigError, UnknownNameError
from zoo.names import match, suggestion

FILE = Path(__file__).parent / "hub.yaml"
PREFIX = "hub/"
STREAMED = 4 << 30  # bytes of weights from which on a language model is pruned block by block
# Wanda at Llama-3.2-1B's shape, 1,024 tokens, 2 threads: benchmarks/results/llm-large.json.
_SECONDS_PER_WEIGHT = 417.2 / 973_078_528
_BYTES = 2  # of a stored weight


@dataclass(frozen=True)
class Entry:
    """How one known model is made sparse.

    Attributes:
        name: without `hub/`.
        base: repository on a hub; of a graph its data set.
        kind: model type of transformers, architecture of timm, family of `zoo.diffusion.families`.
        method, options: of the zoo.
        parameters: of what is pruned, dense, in millions.
        library: that wrote the base.
        shape: layers, width and vocabulary of a language model.
        config: what the configuration has beside the usual; of timm the arguments that make it small.
        full: what the real model's configuration has beside `shape`, from which its parameters are counted.
        gated: whether the hub asks for a name (HF_TOKEN) first.
    """

    name: str
    base: str
    kind: str
    method: str
    options: Mapping[str, Any]
    parameters: float
    library: Literal["transformers", "diffusers", "timm", "graph"] = "transformers"
    shape: tuple[int, int, int] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    full: Mapping[str, Any] = field(default_factory=dict)
    gated: bool = False

    def words(self) -> list[str]:
        """The method and its options, as they are typed."""
        typed = [(f"--{name}", str(value)) for name, value in self.options.items()]
        return ["--method", self.method, *(word for pair in typed for word in pair)]

    def commands(self, out: str, base: str | None = None) -> list[list[str]]:
        """What is typed after `zoo`, one command after the other.

        Args:
            out: folder of the result.
            base: folder or file instead of the entry's own base.
        """
        if self.library != "graph":
            return [["sparsify", base or f"hf://{self.base}", *self.words(), "--out", out]]
        dense, data = f"{out}-dense", base or f"{self.base}.npz"
        start = ["finetune", "graph", "--model", "graph/dense-gcn-digits", "--dataset", data, "--out", dense]
        return [start, ["sparsify", dense, *self.words(), "--out", out]]

    def data(self) -> str:
        """What calibrates or trains it."""
        said = {
            "transformers": "embedded text, or --text FILE",
            "graph": f"{self.base}.npz, made by save_graph",
        }
        return said.get(self.library, "none")

    @property
    def streamed(self) -> bool:
        """Whether the checkpoint is pruned block by block."""
        return self.library == "transformers" and self.parameters * 1e6 * _BYTES > STREAMED

    def minutes(self) -> float | None:
        """Expected on two cores, scaled from the one size that was measured; None where none was."""
        if self.library != "transformers" or self.method != "wanda" or self.shape is None:
            return None
        weights = self.parameters * 1e6 - self.shape[1] * self.shape[2]
        return weights * _SECONDS_PER_WEIGHT / 60

    def gib(self) -> float | None:
        """Expected peak of memory: float32 of the embedding and two blocks where it is streamed, else the
        stored weights, their float32 and the dense twin's; None for a graph, which its data set decides."""
        if self.library == "graph":
            return None
        weights = self.parameters * 1e6
        if not self.streamed or self.shape is None:
            return weights * (4 if self.library != "transformers" else 2 * _BYTES + 4) / 2**30
        layers, width, vocabulary = self.shape
        return 4 * (width * vocabulary + 2 * (weights - width * vocabulary) / layers) / 2**30

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        made = dataclasses.asdict(self) | {"data": self.data(), "minutes": self.minutes(), "gib": self.gib()}
        return made | {"commands": [f"zoo {' '.join(words)}" for words in self.commands(self.name)]}


@functools.cache
def entries() -> dict[str, Entry]:
    """All entries by name, in the order of the file.

    Raises:
        ConfigError: an entry with an unknown or missing field.
    """
    found = {}
    for name, fields in read_yaml(FILE)["entries"].items():
        try:
            shape = fields.pop("shape", None)
            found[name] = Entry(name, shape=None if shape is None else tuple(shape), **fields)
        except TypeError as error:
            raise ConfigError(f"{FILE}: {name}: {error}") from error
    return found


def select(globs: tuple[str, ...]) -> list[Entry]:
    """The entries that names and globs match, with or without `hub/`.

    Raises:
        UnknownNameError: one that matches nothing.
    """
    known = entries()
    chosen: list[str] = []
    for glob in globs:
        own = glob.removeprefix(PREFIX)
        if not (matched := set(match(known, own))):
            raise UnknownNameError(f"There is no recipe {glob!r}. {suggestion(own, known)}")
        chosen += [name for name in known if name in matched]
    return [known[name] for name in dict.fromkeys(chosen)]
