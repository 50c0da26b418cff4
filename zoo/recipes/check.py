"""Recipes tried: each entry's own command, on its configuration with random weights at reduced size.

The folder that the command starts from is written by the library that wrote the base; a language model that
is pruned block by block at its real size is pruned so here, too. Afterwards the library loads the result, and
the share of zeros is counted.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.cli import main
from zoo.errors import ConfigError
from zoo.recipes import Entry

VOCABULARY = 1024  # of the tokenizer in the package
SHORT = ("--windows", "2", "--length", "32")


@dataclass(frozen=True)
class Tried:
    """What came of an entry.

    Attributes:
        zeros: share of the pruned weights that are zero, or of the parameters that are gone.
        seconds: of its command.
        note: why it was not tried, or what failed; empty where it works.
    """

    zeros: float | None
    seconds: float
    note: str = ""


def tried(entry: Entry, work: Path) -> Tried:
    """Run an entry in an empty folder."""
    begun = time.perf_counter()
    try:
        base = BASES[entry.library](entry, work)
        with _streamed(entry):
            for words in entry.commands(str(work / "out"), str(base)):
                _run([*words, *_short(entry, words, work)])
        zeros = RESULTS[entry.library](entry, work)
    except ConfigError as error:
        return Tried(None, time.perf_counter() - begun, " ".join(str(error).split()))
    return Tried(zeros, time.perf_counter() - begun)


def _run(words: list[str]) -> None:
    """One command of the zoo, silent unless it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(words)
    if code:
        raise ConfigError(f"zoo {words[0]} ended with {code}: {said.getvalue()[-300:]}")


@contextlib.contextmanager
def _streamed(entry: Entry) -> Iterator[None]:
    """Take the way of a large checkpoint where the entry's own is one."""
    if not entry.streamed:
        yield
        return
    import zoo.llm.folders as folders

    usual, folders.WHOLE = folders.WHOLE, 0
    try:
        yield
    finally:
        folders.WHOLE = usual


def _short(entry: Entry, words: list[str], work: Path) -> list[str]:
    """What makes a command quick: little text, few epochs."""
    if entry.library == "transformers":
        (work / "text.txt").write_text("\n\n".join(f"line {i} of a text " * 60 for i in range(4)))
        return ["--text", str(work / "text.txt"), *SHORT]
    return ["--epochs", "2"] if entry.library == "graph" else []


# -- what a command starts from


def _transformers(entry: Entry, work: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    from zoo.llm.data.tokenization import packaged
    from zoo.llm.families import sizes

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        entry.kind, **{**sizes(entry.kind), "vocab_size": VOCABULARY, **entry.config}
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(work / "base")
    packaged("shakespeare").save_pretrained(work / "base")
    return work / "base"


def _diffusers(entry: Entry, work: Path) -> Path:
    from zoo.diffusion.families import family

    network: Any = family(entry.kind)[0]
    network.save_pretrained(work / "base")
    return work / "base"


def _timm(entry: Entry, work: Path) -> Path:
    from zoo.optional import import_timm

    timm = import_timm()
    torch.manual_seed(0)
    model = timm.create_model(entry.kind, num_classes=10, **_tuples(entry.config))
    options = {"model_args": dict(entry.config)} if entry.config else {}
    timm.models.save_for_hf(model, work / "base", safe_serialization=True, **options)
    return work / "base"


def _tuples(config: Any) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def _graph(entry: Entry, work: Path) -> Path:
    from torch_geometric.data import Data
    from torch_geometric.utils import to_undirected

    from zoo.graph import save_graph

    generator = torch.Generator().manual_seed(0)
    classes, features = int(entry.config["classes"]), int(entry.config["features"])
    nodes = 8 * classes
    x = torch.randn(nodes, features, generator=generator)
    edges = torch.randint(nodes, (2, 4 * nodes), generator=generator)
    edges = to_undirected(edges[:, edges[0] != edges[1]])
    masks = {
        f"{part}_mask": torch.arange(nodes) // classes % 4 == n for n, part in enumerate(("train", "val"))
    }
    data = Data(x=x, edge_index=edges, y=torch.arange(nodes) % classes, **masks)
    data.test_mask = ~(data.train_mask | data.val_mask)
    return save_graph(data, work / "graph.npz")


BASES: dict[str, Callable[[Entry, Path], Path]] = {
    "transformers": _transformers,
    "diffusers": _diffusers,
    "timm": _timm,
    "graph": _graph,
}

# -- what came out, loaded by the library


def _of_transformers(entry: Entry, work: Path) -> float:
    from transformers import AutoModelForCausalLM

    if entry.method == "gqsa":  # codes, for which transformers has no form
        import zoo

        return zoo.info(zoo.load(work / "out")).card.sparsity.overall
    dense: Any = AutoModelForCausalLM.from_pretrained(work / "base", dtype="auto")
    made: Any = AutoModelForCausalLM.from_pretrained(work / "out", dtype="auto")
    ids = torch.randint(3, VOCABULARY, (1, 8))
    if not torch.isfinite(made(ids).logits).all():
        raise ConfigError("the result puts out what is not finite")
    return _new_zeros(dense, made)


def _new_zeros(dense: nn.Module, made: nn.Module) -> float:
    """Share of zeros in the weights that have more of them than before."""
    before, zeros, total = dense.state_dict(), 0, 0
    for name, tensor in made.state_dict().items():
        own = int((tensor == 0).sum())
        if own > int((before[name] == 0).sum()):
            zeros, total = zeros + own, total + tensor.numel()
    return zeros / total if total else 0.0


def _of_diffusers(entry: Entry, work: Path) -> float:
    from zoo.diffusion.families import family, output
    from zoo.diffusion.pruned import load_network

    made = load_network(work / "out").eval()
    dense, inputs = family(entry.kind)
    if not torch.isfinite(output(made, inputs)).all():
        raise ConfigError("the result puts out what is not finite")
    left, before = (sum(p.numel() for p in one.parameters()) for one in (made, dense))
    return 1 - left / before if left < before else _new_zeros(dense, made)


def _of_timm(entry: Entry, work: Path) -> float:
    from zoo.vision.timm_folders import load_folder

    dense, made = load_folder(work / "base"), load_folder(work / "out")
    return _new_zeros(dense, made)


def _of_graph(entry: Entry, work: Path) -> float:
    import zoo

    return zoo.info(zoo.load(work / "out")).card.sparsity.parts["weights"].sparsity


RESULTS: dict[str, Callable[[Entry, Path], float]] = {
    "transformers": _of_transformers,
    "diffusers": _of_diffusers,
    "timm": _of_timm,
    "graph": _of_graph,
}
