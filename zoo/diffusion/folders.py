"""`zoo sparsify` of a folder of diffusers: a whole pipeline, or one network; out comes the same, sparse.

Only the parts that are pruned are loaded, one after the other: text encoders and the denoiser. Scores that
look at weights alone need no more; for those that need prompts (`--captions`) the whole pipeline is loaded
round these parts, and what is in half precision is measured in single. The new folder is read back and
compared before it is called done.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import safe_open
from torch import nn

from zoo.bundles.folders import put_folder, refuse_taken
from zoo.diffusion.parts import DENOISERS
from zoo.diffusion.plan import Plan
from zoo.diffusion.prompting import Pipeline, in_single, read_captions
from zoo.diffusion.pruned import load_network, plan_of, prune
from zoo.errors import ConfigError
from zoo.harness.making import Origin
from zoo.harness.tasks import Progress
from zoo.shared.store.io import read_json, write_json

INDEX = "model_index.json"


class Parts(nn.Module):
    """The denoiser of a pipeline and its text encoders, as methods take a model.

    Attributes:
        source: the whole pipeline with prompts, where there are any.
        seed: of random scores and of gates.
    """

    source: Pipeline | None = None
    seed: int = 0

    def cut(self, plan: Plan) -> None:
        """Cut the denoiser in place."""
        prune(self.get_submodule(self.denoiser_name), plan)

    def current_arguments(self) -> dict[str, Any]:
        """Nothing: the networks' own folders say how they are built."""
        return {}

    @property
    def denoiser_name(self) -> str:
        """Name of the denoiser among the parts."""
        return next(name for name in DENOISERS if hasattr(self, name))


def sparsify_folder(
    source: Path,
    method: Any,
    origin: Origin,
    out: Path,
    *,
    overwrite: bool = False,
    seed: int = 0,
    progress: Progress | None,
) -> str:
    """Sparsify the denoiser and the text encoders of a folder that diffusers wrote.

    Args:
        source: of a pipeline (`model_index.json`) or of one network (`config.json`).
        method: of the zoo; its option `captions` names a file with the prompts that some scores need.
        origin: for messages.
        out: the new folder.
        overwrite: whether a folder that is there may be replaced.
        seed: of the noise that prompts start from, of gates and of random scores.
        progress: called as the steps finish.

    Returns:
        What was written, in a sentence or two.

    Raises:
        ConfigError: the folder or a part is missing, pickled or of an unknown class, the output is there
            already, or diffusers would load other values than were saved.
        SparseError: whatever the method refuses.
    """
    pipeline = (source / INDEX).is_file()
    refuse_taken(source, out, INDEX if pipeline else "config.json", overwrite)
    index = read_json(source / INDEX) if pipeline else {}
    model = load_parts(source, index) if pipeline else _alone(load_network(source, _dtype(source)))
    name = model.denoiser_name
    before = sum(p.numel() for p in model.parameters())
    if progress is not None:
        progress(0, 2, f"sparsifying by {origin.method}")
    model.seed = seed
    if method.captions is None:
        method.sparsify(model)
    else:
        if not pipeline:
            raise ConfigError(f"{source} is a network alone, which draws nothing: give its pipeline's folder")

        def told(passes: int) -> None:
            if progress is not None:
                progress(0, 2, f"sparsifying by {origin.method}, pass {passes} of the denoiser")

        with in_single(model):
            pipe = whole_pipeline(source, index, model)
            model.source = Pipeline(pipe, read_captions(method.captions), seed, method.image_side, told)
            method.sparsify(model)
    if progress is not None:
        progress(1, 2, "saving")

    def write(staged: Path) -> None:
        if pipeline:
            pruned = {part for part, _ in model.named_children()}
            shutil.copytree(
                source, staged, ignore=lambda at, _: pruned if Path(at) == source else (), dirs_exist_ok=True
            )
            if plan_of(model.get_submodule(name)) is not None:
                kind = type(model.get_submodule(name))
                write_json(staged / INDEX, {**index, name: [kind.__module__, kind.__name__]})
        for part, network in model.named_children():
            save: Any = network
            place = staged / part if pipeline else staged
            save.save_pretrained(place)
            _check(network, _load(place, index.get(part) if part != name else None))

    put_folder(out, write)
    left = sum(p.numel() for p in model.parameters())
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    return (
        f"{out}: {left:,} of {before:,} parameters are left, {100 * zeros / left:.1f} % of them zero. "
        "diffusers loads it with from_pretrained"
        + (" after `import zoo.diffusion.pruned`." if left != before else ".")
    )


def load_parts(source: Path, index: dict[str, Any]) -> Parts:
    """The denoiser and the text encoders of a pipeline's folder.

    Args:
        source: the folder.
        index: its `model_index.json`.

    Raises:
        ConfigError: no denoiser, or a part that is missing, pickled or of an unknown class.
    """
    if not any(_given(index, name) for name in DENOISERS):
        raise ConfigError(f"{source / INDEX} names no denoiser: none of {', '.join(DENOISERS)}")
    model = Parts()
    for name in index:
        if name in DENOISERS and _given(index, name):
            model.add_module(name, _load(source / name, None))
        elif name.startswith("text_encoder") and _given(index, name):
            model.add_module(name, _load(source / name, index[name]))
    return model.eval()


def whole_pipeline(source: Path, index: dict[str, Any], parts: Parts) -> Any:
    """The pipeline of a folder round parts that are loaded already, in single precision.

    Raises:
        ConfigError: a class that diffusers and transformers have not.
    """
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)):
        raise ConfigError(f"{source / INDEX}: diffusers has no pipeline {index.get('_class_name')!r}")
    for name, entry in index.items():
        if _given(index, name) and not _is_known(str(entry[0])):
            raise ConfigError(f"{source / INDEX}: {name} is of {entry[0]!r}, which is not read")
    given: dict[str, Any] = dict(parts.named_children())
    if "safety_checker" in index:  # it looks at images, and none are made
        given |= {"safety_checker": None, "requires_safety_checker": False}
    found: Any = kind
    return found.from_pretrained(
        source, **given, dtype=torch.float32, use_safetensors=True, local_files_only=True
    )


def _is_known(library: str) -> bool:
    return library in ("diffusers", "transformers", "zoo.diffusion.pruned") or hasattr(
        diffusers.pipelines, library
    )


def _given(index: dict[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _alone(network: nn.Module) -> Parts:
    model = Parts()
    model.add_module(DENOISERS[0], network)
    return model.eval()


def _load(folder: Path, entry: Any) -> nn.Module:
    """A part: a text encoder of transformers, or with no entry a network of diffusers."""
    if entry is None:
        return load_network(folder, _dtype(folder))
    kind = getattr(transformers, str(entry[1]), None) if entry[0] == "transformers" else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ConfigError(f"{folder.name} is a {entry[0]}.{entry[1]}, which is no model of transformers")
    _dtype(folder)
    found: Any = kind
    loaded, facts = found.from_pretrained(
        folder, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if facts["missing_keys"]:
        raise ConfigError(f"{folder} lacks the weights of {sorted(facts['missing_keys'])[0]!r}")
    model: nn.Module = loaded
    return model


def _dtype(folder: Path) -> torch.dtype:
    """Precision of a folder's weights.

    Raises:
        ConfigError: there is no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{folder} has no safetensors file; pickled weights are not read. Convert them first."
        )
    with safe_open(files[0], "pt") as held:
        found: torch.dtype = held.get_tensor(next(iter(held.keys()))).dtype
    return found


def _check(network: nn.Module, again: nn.Module) -> None:
    state = again.state_dict()
    for name, tensor in network.state_dict().items():
        if name not in state or not torch.equal(state[name], tensor):
            raise ConfigError(f"the saved {type(network).__name__} loads other values of {name!r}")
