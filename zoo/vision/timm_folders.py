"""`zoo sparsify` of a folder that timm wrote for a hub: `config.json` and `model.safetensors`, in and out.

The new folder is one that timm loads by itself, by `timm.create_model("local-dir:FOLDER", pretrained=True)`;
that it loads the same tensors is checked. There is no bundle beside it: nothing is measured without images.
On a public base there is a bundle of masks instead, for `zoo.load(..., into=timm.create_model(...))`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from zoo.bundles.card import CARD_FILE
from zoo.bundles.folders import put_folder, refuse_taken
from zoo.bundles.public import PublicModel
from zoo.bundles.store import save
from zoo.errors import ConfigError
from zoo.harness.making import Origin
from zoo.harness.tasks import Progress
from zoo.methods.contract import needs_job
from zoo.optional import import_timm
from zoo.shared.store.io import read_json

WEIGHTS = "model.safetensors"


def load_folder(folder: Path) -> nn.Module:
    """The model of a folder, in eval mode.

    Raises:
        ConfigError: no safetensors in it (pickled weights are not read), or timm refuses what it says.
    """
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"{folder} has no {WEIGHTS}; pickled weights are not read. Convert them first.")
    name = read_json(folder / "config.json").get("architecture")
    try:
        model: nn.Module = import_timm().create_model(f"local-dir:{folder}", pretrained=True)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        line = " ".join(str(error).split())[:200]
        raise ConfigError(f"{folder}: timm cannot make a {name!r} of it: {line}") from error
    return model.eval()


def sparsify_folder(
    source: Path,
    method: Any,
    origin: Origin,
    out: Path,
    *,
    overwrite: bool = False,
    base: PublicModel | None = None,
    progress: Progress | None,
) -> str:
    """Sparsify the model of a timm folder by a method that needs no data.

    Args:
        source: `config.json` with timm's `architecture`, and `model.safetensors`.
        method: of the zoo.
        origin: for messages.
        out: the new folder.
        overwrite: whether a folder that is there may be replaced.
        base: the public model that the folder is.
        progress: called as the steps finish.

    Returns:
        What was written, in a sentence or two.

    Raises:
        ConfigError: a folder that is taken or that timm cannot load, a method that needs data or changes
            shapes, or other tensors than were saved.
        SparseError: whatever the method refuses.
    """
    refuse_taken(source, out, WEIGHTS if base is None else CARD_FILE, overwrite)
    if needs_job(method):
        raise ConfigError(f"{origin.method} learns from data, and a folder of timm has none: try prune")
    if progress is not None:
        progress(0, 1, f"sparsifying by {origin.method}")
    made = method.sparsify(load_folder(source))
    dropped = sum(mask.numel - mask.kept for mask in made.masks.values())
    total = sum(parameter.numel() for parameter in made.model.parameters())
    said = f"{out}: {100 * dropped / total:.1f} % of {total:,} parameters are zero."
    if base is not None:
        save(made.model, out, masks=made.masks, base=base, overwrite=overwrite)
        load = f"zoo.load({str(out)!r}, into=timm.create_model(...))"
        return f"{said} The rest is that of {base.stated.reference}: {load}"
    state = {name: value.detach().clone() for name, value in made.model.state_dict().items()}

    def write(staged: Path) -> None:
        for file in source.iterdir():
            if file.suffix in (".json", ".md", ".txt") and file.is_file():
                shutil.copy(file, staged / file.name)
        save_file(state, staged / WEIGHTS, metadata={"format": "pt"})
        again = load_folder(staged).state_dict()
        for name, tensor in state.items():
            if name not in again or not torch.equal(again[name], tensor):
                raise ConfigError(
                    f"timm loads other values of {name!r} than {origin.method} made: use zoo.save"
                )

    put_folder(out, write)
    return f"{said} timm loads local-dir:{out}."
