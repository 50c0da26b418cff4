"""`zoo sparsify` of a transformers folder: a folder that transformers loads, and a bundle of the zoo, in one.

The dense model becomes a bundle beside the new one, as its dense twin. Where the method leaves plain weights,
the new folder also holds them, zeros and all, in transformers' own form with the tokenizer, chat template and
generation configuration of the source; that they load back is checked. Checkpoints of more than `WHOLE` bytes
are pruned block by block from their shards instead (`zoo.llm.large`), without a bundle.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from zoo.bundles.card import CARD_FILE
from zoo.bundles.catalog import open_bundle
from zoo.bundles.publish import About
from zoo.bundles.store import load_bundle
from zoo.errors import ConfigError
from zoo.harness.making import Origin, make_bundle
from zoo.harness.tasks import Progress
from zoo.llm.bundling import CITATION, save_dense
from zoo.llm.data.calibration import default_text
from zoo.llm.large import Large
from zoo.llm.models import load_pretrained
from zoo.llm.models.quantised import GroupQuantLinear
from zoo.llm.models.thresholds import thresholds_of
from zoo.recipes import STREAMED
from zoo.registry import TASKS

#: Bytes of weights up to which a checkpoint is loaded whole.
WHOLE = STREAMED
_STREAMED = ("wanda", "sparsegpt")


def sparsify_folder(
    source: Path,
    method: Any,
    origin: Origin,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None,
) -> str:
    """Sparsify the model of a transformers folder.

    Args:
        source: written by `save_pretrained`, with a tokenizer.
        method: of the zoo; its option `text` also says what the model is measured on.
        origin: for the card.
        out: the new folder; the dense twin goes to `<out>-dense`.
        overwrite: whether folders that are there may be replaced.
        progress: called as the steps finish.

    Returns:
        What was written, in a sentence or two.

    Raises:
        ConfigError: no such model, or a large one and a method that needs all of it in memory.
        SparseError: whatever the method, measuring or saving refuse.
    """
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    if size > WHOLE:
        return _stream(source, method, origin, out, size)
    start = time.perf_counter()
    model = load_pretrained(source, dtype="auto")
    text = getattr(method, "text", None) or default_text(model)
    task = f"llm/{text}" if f"llm/{text}" in TASKS else f"llm/text:{text}"
    data = {"name": "not stated", "source": str(source), "licence": "not stated"}
    about = About(
        f"{origin.name}-dense",
        f"{type(model).__name__} from {source.name}.",
        origin.command,
        CITATION,
        data,
        "not stated",
    )
    dense = out.with_name(f"{out.name}-dense")
    seconds = time.perf_counter() - start
    save_dense(model, dense, about, [task], seconds=seconds, overwrite=overwrite)
    make_bundle(open_bundle(dense), method, origin, out, overwrite=overwrite, progress=progress)
    made: Any = load_bundle(open_bundle(out))
    if thresholds_of(made) or any(isinstance(module, GroupQuantLinear) for module in made.modules()):
        return f"The dense twin is {dense}; transformers has no form for what {origin.method} adds."
    _export(made, source, out)
    return f"The dense twin is {dense}. transformers loads {out} with from_pretrained."


def _export(model: PreTrainedModel, source: Path, out: Path) -> None:
    """Put a model's weights, configuration and what else the source has beside the bundle, and check them."""
    model.save_pretrained(out)
    _copy_rest(source, out)
    again = AutoModelForCausalLM.from_pretrained(out, dtype="auto", trust_remote_code=False)
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in state or not torch.equal(state[name], tensor):
            raise ConfigError(
                f"{out}: transformers loads other values of {name} than were saved: its configuration cannot "
                "describe this model (unequal FFN widths, say). Use the bundle, or other options."
            )


def _copy_rest(source: Path, out: Path) -> None:
    """The files of a folder that are neither weights nor the bundle's own, unless they are there already."""
    for file in source.iterdir():
        own = file.name in (CARD_FILE, "config.json", "model.safetensors.index.json")
        if file.is_file() and file.suffix in (".json", ".jinja", ".txt", ".model") and not own:
            shutil.copy(file, out / file.name)


def _stream(source: Path, method: Any, origin: Origin, out: Path, size: int) -> str:
    if origin.method not in _STREAMED:
        raise ConfigError(
            f"{source} holds {size / 2**30:.1f} GiB of weights: models above {WHOLE / 2**30:.0f} GiB are "
            f"pruned block by block, which {' and '.join(_STREAMED)} can; received {origin.method}"
        )
    shared = ("sparsity", "pattern", "windows", "length", "seed")
    options = {name: getattr(method, name) for name in shared}
    streamed: Any = origin.method
    done = Large(out, source, method=streamed, text=method.text or "embedded", **options).run()
    _copy_rest(source, out)
    return (
        f"{100 * done['zeros']:.1f} % of {done['weights']:,} block weights are zero; {done['seconds']} s, "
        f"peak memory {done['peak_bytes'] / 2**30:.2f} GiB. transformers loads {out} with from_pretrained; a "
        "model of this size gets no bundle."
    )
