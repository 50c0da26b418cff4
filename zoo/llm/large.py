"""Prune a checkpoint that need not fit into memory, block by block from its safetensors shards.

    python -m zoo.llm.large --source FOLDER --out FOLDER --method wanda --sparsity 0.5
    python -m zoo.llm.large --random llama-3.2-1b --out FOLDER --pattern 2:4

Of the model only the embedding (while the calibration text is embedded) and one block at a time are in
memory, in float32; weights are written back in their stored precision, one shard per block, into a folder
that transformers loads. The command says what the peak was.
"""

from __future__ import annotations

import json
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from zoo.errors import ConfigError
from zoo.llm.converted import Source, read, sources, stored
from zoo.llm.data import corpus
from zoo.llm.data.calibration import random_windows
from zoo.llm.data.tokenization import token_stream, tokenizer_in
from zoo.llm.methods.sparsegpt import sparsegpt_pruner
from zoo.llm.methods.wanda import wanda_pruner
from zoo.llm.pruning import prune_blocks, resolve_sparsity
from zoo.progress import progress_bar
from zoo.shared.blocks import find_chains
from zoo.shared.masks.patterns import parse_pattern
from zoo.shared.store.io import write_json

_INDEX = "model.safetensors.index.json"
#: Shapes for `--random`: arguments of LlamaConfig.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
    },
}


class Shards:
    """A transformers folder of safetensors, read tensor by tensor.

    Args:
        folder: with config.json and model.safetensors or its index.

    Raises:
        ConfigError: no such files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if (folder / _INDEX).is_file():
            files: dict[str, str] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        elif (folder / "model.safetensors").is_file():
            with safe_open(folder / "model.safetensors", "pt") as shard:
                files = dict.fromkeys(shard.keys(), "model.safetensors")
        else:
            raise ConfigError(
                f"{folder} has neither model.safetensors nor {_INDEX}; save the model there first"
            )
        self.files = files
        self.model: nn.Module = nn.Module()
        self.sources = {name: Source(((name, None),), name) for name in files}

    def bind(self, model: nn.Module) -> None:
        """Read parameters by their names in a model, whatever transformers makes them of."""
        self.model, self.sources = model, sources(model, list(self.files))

    def read(self, name: str) -> Tensor:
        """One parameter of the model, in its stored precision.

        Raises:
            ConfigError: it is not in the checkpoint.
        """
        if name not in self.sources:
            raise ConfigError(f"{self.folder} has no tensor {name!r}; its config belongs to other weights")
        return read(self.sources[name], self.read_file, self.model)

    def read_file(self, name: str) -> Tensor:
        """One tensor as the checkpoint names it."""
        with safe_open(self.folder / self.files[name], "pt") as shard:
            tensor: Tensor = shard.get_tensor(name)
        return tensor


class BlockStore:
    """Brings one block of a model on the meta device into memory at a time, and writes it out after use.

    Args:
        model: from `skeleton`.
        shards: its checkpoint.
        out: folder of the new checkpoint.
    """

    def __init__(self, model: nn.Module, shards: Shards, out: Path) -> None:
        self.model, self.shards, self.out = model, shards, out
        shards.bind(model)
        self.weight_map: dict[str, str] = {}

    @contextmanager
    def opened(self, name: str) -> Iterator[None]:
        """The block's parameters are there, in float32, while the context lasts; then they are written."""
        block = self.model.get_submodule(name)
        held = {key: self.shards.read(f"{name}.{key}") for key, _ in block.named_parameters()}
        dtypes = {key: tensor.dtype for key, tensor in held.items()}
        fill(block, held)
        yield
        tensors = {
            f"{name}.{key}": parameter.detach().to(dtypes[key]).contiguous()
            for key, parameter in block.named_parameters()
        }
        block.to("meta")
        self.write(stored(self.model, tensors))

    def write(self, tensors: dict[str, Tensor]) -> None:
        """One more shard."""
        file = f"model-{len(set(self.weight_map.values())) + 1:05d}.safetensors"
        save_file(tensors, self.out / file, metadata={"format": "pt"})
        self.weight_map |= dict.fromkeys(tensors, file)

    def finish(self) -> None:
        """Copy what was not pruned, tensor by tensor, and write the index."""
        for name in self.shards.files:
            if name not in self.weight_map:
                self.write({name: self.shards.read_file(name)})
        size = sum((self.out / file).stat().st_size for file in set(self.weight_map.values()))
        index = {"metadata": {"total_size": size}, "weight_map": self.weight_map}
        (self.out / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def skeleton(folder: Path) -> nn.Module:
    """The model of a folder with its parameters on the meta device and its buffers in memory."""
    from accelerate import init_empty_weights

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model.eval()


def _before_blocks(model: nn.Module) -> list[str]:
    """Names of the parameters outside the blocks, but for the output layer: what embedding a text needs."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    paths = [f"{path}." for path in find_chains(model)]
    heads = {id(parameter) for parameter in (head.parameters() if head is not None else ())}
    tied = {id(parameter) for parameter in model.get_input_embeddings().parameters()}  # type: ignore[operator]
    return [
        name
        for name, parameter in model.named_parameters()
        if not any(name.startswith(path) for path in paths) and id(parameter) not in heads - tied
    ]


def fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a module on the meta device its parameters, in float32."""
    for key, tensor in tensors.items():
        owner, _, attribute = key.rpartition(".")
        target = module.get_submodule(owner)
        setattr(target, attribute, nn.Parameter(tensor.float(), requires_grad=False))


def write_random(shape: str, folder: Path, seed: int = 0) -> None:
    """A checkpoint of random bf16 weights, block by block.

    Raises:
        ConfigError: an unknown shape.
    """
    if shape not in SHAPES:
        raise ConfigError(f"unknown shape {shape!r}: {', '.join(SHAPES)}")
    LlamaConfig(**SHAPES[shape], architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    model = skeleton(folder)
    generator = torch.Generator().manual_seed(seed)
    groups: dict[str, dict[str, Tensor]] = {}
    names: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(".".join(name.split(".")[:3]), {})[name] = parameter
    for number, parameters in enumerate(groups.values(), start=1):
        file = f"model-{number:05d}.safetensors"
        tensors = {
            name: torch.ones(meta.shape, dtype=torch.bfloat16)
            if meta.dim() == 1
            else torch.randn(meta.shape, generator=generator).mul_(0.02).bfloat16()
            for name, meta in parameters.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        names |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": names}
    (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")


@dataclass
class Large:
    """Prune a checkpoint larger than memory.

    Args:
        out: folder of the new checkpoint.
        source: folder that `save_pretrained` wrote.
        random: instead of a source, random weights of this shape: llama-3.2-1b or tiny; for times and memory.
        method: wanda or sparsegpt.
        sparsity: share of zeros; N:M patterns fix it themselves.
        pattern: unstructured or N:M.
        text: corpus of the calibration, for a source with a tokenizer.
        windows: calibration windows.
        length: tokens per window.
        seed: of the windows, and of random weights.
        threads: processor threads; 0 leaves torch's choice.
        report: also write what it took to this JSON file.
    """

    out: Path
    source: Path | None = None
    random: str | None = None
    method: Literal["wanda", "sparsegpt"] = "wanda"
    sparsity: float | None = None
    pattern: str = "unstructured"
    text: str = "embedded"
    windows: int = 8
    length: int = 256
    seed: int = 0
    threads: int = 0
    report: Path | None = None

    def run(self) -> dict[str, Any]:
        """Prune, write, and tell seconds, zeros and peak memory.

        Raises:
            ConfigError: neither or both of source and random, a folder that is taken, or a model or options
                that are not possible.
            DataError: too little text, or activations that are not finite.
        """
        if (self.source is None) == (self.random is None):
            raise ConfigError("give either a source folder or --random with a shape")
        if self.out.exists() and any(self.out.iterdir()):
            raise ConfigError(f"{self.out} is not empty; give a new folder")
        if self.threads:
            torch.set_num_threads(self.threads)
        parsed = parse_pattern(self.pattern)
        pruner = wanda_pruner if self.method == "wanda" else sparsegpt_pruner
        prune = pruner(parsed, resolve_sparsity(parsed, self.sparsity))
        self.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            source = self.source or Path(scratch)
            if self.random is not None:
                write_random(self.random, source, self.seed)
            start = time.perf_counter()
            kept, total = self._prune(source, prune)
            seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        facts = {
            "zeros": 1 - kept / total,
            "weights": total,
            "seconds": round(seconds, 1),
            "peak_bytes": peak,
            "model": self.random or str(self.source),
            "method": self.method,
            "pattern": self.pattern,
            "tokens": self.windows * self.length,
            "threads": torch.get_num_threads(),
        }
        if self.report is not None:
            write_json(self.report, facts)
        return facts

    def _prune(self, source: Path, prune: Any) -> tuple[int, int]:
        shards, model = Shards(source), skeleton(source)
        batches = list(self._windows(source, model).split(1))
        shards.bind(model)
        outside = _before_blocks(model)
        fill(model, {name: shards.read(name) for name in outside})
        store = BlockStore(model, shards, self.out)
        counts = [0, 0]

        def counting(block: Any) -> Any:
            # All is embedded by now: the tables make room for the blocks.
            fill(
                model, {name: torch.empty(model.get_parameter(name).shape, device="meta") for name in outside}
            )
            masks = prune(block)
            counts[0] += sum(mask.kept for mask in masks.values())
            counts[1] += sum(mask.numel for mask in masks.values())
            return masks

        with progress_bar() as progress:
            prune_blocks(model, batches, counting, opened=store.opened, collect=False, progress=progress)
        store.finish()
        for file in source.iterdir():
            if file.is_file() and file.suffix in (".json", ".txt", ".model") and file.name != _INDEX:
                shutil.copy(file, self.out / file.name)
        return counts[0], counts[1]

    def _windows(self, source: Path, model: nn.Module) -> Tensor:
        if self.random is not None:
            generator = torch.Generator().manual_seed(self.seed)
            vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
            return torch.randint(vocabulary, (self.windows, self.length), generator=generator)
        tokens = token_stream(corpus(self.text).train, tokenizer_in(source, True))
        return random_windows(tokens, self.windows, self.length, self.seed)


def main(config: Large) -> None:
    """Prune and print what it took."""
    done = config.run()
    print(
        f"{config.out}: {100 * done['zeros']:.1f} % of {done['weights']:,} block weights are zero; "
        f"{done['seconds']} s, peak memory {done['peak_bytes'] / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    main(tyro.cli(Large, description=__doc__))
