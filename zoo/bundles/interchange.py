"""`zoo export MODEL --to onnx` and `--to torch-export`: a model as a graph that runs without the zoo.

The weights are dense, zeros included. What was written is run in a process of its own, by onnxruntime or
torch alone, on two inputs of different batch sizes, and compared with the model: a file that computes
something else, or that needs operators of the zoo, is not kept.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zoo.bundles.catalog import find
from zoo.bundles.store import load_bundle
from zoo.cli.parsing import Positional, metavar
from zoo.errors import ConfigError, MissingDataError
from zoo.registry import EXAMPLES, JOBS
from zoo.shared.masks import masks_of

BATCH = 2  # of the example: exporters take a size of one for a constant
LENGTH = 16  # tokens of the example
TOLERANCE = 1e-3

_RUN = """
import json, sys
import torch
from safetensors.torch import load_file, save_file
file, folder = sys.argv[1:]
cases = [load_file(f"{folder}/{n}.safetensors") for n in range(2)]
cases = [[case[str(n)] for n in range(len(case))] for case in cases]
RUN
assert "zoo" not in sys.modules
for number, output in enumerate(outputs):
    save_file({"0": output.contiguous()}, f"{folder}/out{number}.safetensors")
"""
_TORCH = """
program = torch.export.load(file).module()
outputs = [program(*case).detach() for case in cases]
"""
_ONNX = """
import onnxruntime
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
names = [one.name for one in session.get_inputs()]
fed = [{name: one.numpy() for name, one in zip(names, case)} for case in cases]
outputs = [torch.from_numpy(session.run(None, case)[0]) for case in fed]
"""


class _OfTokens(nn.Module):
    """Token ids to logits, by a language model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def plain_function(model: nn.Module) -> nn.Module:
    """A module of tensors to one tensor: language models without their cache, others as they are."""
    return _OfTokens(model) if _is_language_model(model) else model


def _is_language_model(model: nn.Module) -> bool:
    return hasattr(model, "generate") and hasattr(getattr(model, "config", None), "vocab_size")


def example_inputs(model: nn.Module, domain: str) -> tuple[Tensor, ...]:
    """A batch of two samples: token ids, or of the data that a model of a domain is made for, or noise of
    their size.

    Raises:
        ConfigError: its inputs are not tensors that are stacked by sample.
        MissingDataError: data that are not at hand, and whose size is not known.
    """
    if _is_language_model(model):
        config: Any = model.config
        return (torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % config.vocab_size,)
    try:
        given = JOBS.get(domain)(None, model=model).batches.example()
    except MissingDataError:
        noise = EXAMPLES.get(domain)(model) if domain in EXAMPLES else None
        if noise is None:
            raise
        given = (noise,)
    if not all(isinstance(one, Tensor) and one.dim() and len(one) == 1 for one in given):
        kinds = ", ".join(type(one).__name__ for one in given)
        raise ConfigError(
            f"a {type(model).__name__} takes {kinds} of one piece, not a batch of tensors: graphs and scenes "
            "have no form there; zoo export --to FOLDER writes their weights"
        )
    return tuple(torch.cat([one, one.flip(-1)][:BATCH]) for one in given)


@dataclass
class CheckedExport(ABC):
    """The options of both."""

    model: Annotated[str, Positional, metavar("MODEL")]
    """A name, folder or hf://owner/name."""

    out: Path
    """The file to write."""

    overwrite: bool = False
    """Replace a file that is there."""

    json: bool = False
    """Print JSON."""

    suffix = ""
    run_alone = ""

    def run(self) -> dict[str, Any]:
        """Write the file and check it.

        Raises:
            ConfigError: another ending, a file that is there, no such library, a model that the format
                cannot carry, or a file that does not compute what the model does.
        """
        if self.out.suffix != self.suffix:
            raise ConfigError(f"--out {self.out}: give a name that ends in {self.suffix}")
        if self.out.exists() and not self.overwrite:
            raise ConfigError(f"{self.out} is there already; give another place, or --overwrite")
        bundle = find(self.model)
        model = load_bundle(bundle).float().eval()
        inputs = example_inputs(model, bundle.card.domain)
        function = plain_function(model)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, self.out.name)
            with torch.no_grad():
                self.write_file(function, inputs, file)
            error = self._difference(function, inputs, file)
            self.out.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, self.out)
        masks = masks_of(model)
        zeros = sum(mask.numel - mask.kept for mask in masks.values()) if masks else 0
        return {
            "model": bundle.card.reference,
            "file": str(self.out),
            "bytes": self.out.stat().st_size,
            "inputs": [["batch", *one.shape[1:]] for one in inputs],
            "zeros": zeros,
            "difference": error,
        }

    @staticmethod
    def describe(report: dict[str, Any]) -> str:
        """A report of `run` as a line of text."""
        return (
            f"{report['file']}: {report['bytes'] / 1e6:.2f} MB, {report['zeros']:,} pruned weights as zeros; "
            f"run without the zoo it gives the model's outputs to {report['difference']:.1e}"
        )

    @abstractmethod
    def write_file(self, function: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> None:
        """Write the function, traced with these inputs, in the format of the subclass."""

    def _difference(self, function: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> float:
        """The largest difference to the model's outputs, relative to the largest output."""
        cases = [inputs, tuple(torch.cat([one, one[:1]]) for one in inputs)]
        for number, case in enumerate(cases):
            named = {str(n): one.contiguous() for n, one in enumerate(case)}
            save_file(named, file.with_name(f"{number}.safetensors"))
        command = [sys.executable, "-c", _RUN.replace("RUN", self.run_alone), str(file), str(file.parent)]
        done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(
                f"{self.model} does not run from {self.suffix} without the zoo, so the file was not kept: "
                f"{(done.stderr.strip().splitlines() or ['no message'])[-1][:300]}"
            )
        worst = 0.0
        for number, case in enumerate(cases):
            with torch.no_grad():
                wanted = function(*case)
            found = load_file(file.with_name(f"out{number}.safetensors"))["0"]
            if found.shape != wanted.shape:
                raise ConfigError(
                    f"{self.suffix} gives outputs {list(found.shape)}, the model {list(wanted.shape)}"
                )
            worst = max(worst, float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)))
        if not worst <= TOLERANCE:
            raise ConfigError(
                f"{self.model} computes something else from {self.suffix} ({worst:.1e} off), so the file was "
                "not kept"
            )
        return worst


class ExportProgram(CheckedExport):
    """Write a model as a program of torch.export, which torch.export.load runs without the zoo."""

    suffix = ".pt2"
    run_alone = _TORCH

    def write_file(self, function: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> None:
        shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
        try:
            program = torch.export.export(function, inputs, dynamic_shapes=shapes)
        except Exception as error:  # torch raises its own and any of the model's
            raise _untraced(function, error) from error
        torch.export.save(program, file)


class ExportOnnx(CheckedExport):
    """Write a model as ONNX, with a batch of any size, checked by onnxruntime."""

    suffix = ".onnx"
    run_alone = _ONNX

    def write_file(self, function: nn.Module, inputs: tuple[Tensor, ...], file: Path) -> None:
        for library in ("onnxscript", "onnxruntime"):
            try:
                __import__(library)
            except ModuleNotFoundError as error:
                raise ConfigError(
                    f"{error.name} is not installed. Run: pip install 'sparse-model-zoo[onnx]'"
                ) from error
        shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other domains of operators, and of names of dimensions
                program: Any = torch.onnx.export(
                    function, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False
                )
        except Exception as error:  # the exporter raises its own and any of the model's
            raise _untraced(function, error) from error
        program.save(file)


def _untraced(function: nn.Module, error: Exception) -> ConfigError:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ConfigError(f"{type(function).__name__} cannot be traced for export: {line[:300]}")
