"""`zoo sparsify` of a transformers folder: a folder that transformers loads, and a bundle of the zoo, in one.

The dense model becomes a bundle beside the new one, as its dense twin. Where the method leaves plain weights,
the new folder also holds them, zeros and all, in transformers' own form with the tokenizer, chat template and
generation configuration of the source; that they load back is checked. Checkpoints of more than `WHOLE` bytes
are pruned block by block from their shards instead (`zoo.llm.large`), without a bundle.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from zoo.bundles.card import CARD_FILE
from zoo.bundles.catalog import open_bundle
from zoo.bundles.folders import put_folder, refuse_taken
from zoo.bundles.public import PublicModel
from zoo.bundles.publish import About
from zoo.bundles.store import WEIGHTS_FILE, load_bundle
from zoo.errors import ConfigError
from zoo.harness.making import Origin, make_bundle
from zoo.harness.tasks import Progress
from zoo.llm.bundling import CITATION, extras_of, save_dense
from zoo.llm.data.calibration import default_text
from zoo.llm.domain import measured
from zoo.llm.large import Large
from zoo.llm.models import architecture_of, load_pretrained
from zoo.llm.models.quantised import GroupQuantLinear
from zoo.llm.models.thresholds import thresholds_of
from zoo.recipes import STREAMED
from zoo.shared.masks import MaskSet
from zoo.shared.store.formats import PackedContents, load_packed

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
    base: PublicModel | None = None,
    progress: Progress | None,
) -> str:
    """Sparsify the model of a transformers folder.

    Args:
        source: written by `save_pretrained`, with a tokenizer.
        method: of the zoo; its option `text` also says what the model is measured on.
        origin: for the card.
        out: the new folder; the dense twin goes to `<out>-dense`.
        overwrite: whether folders that are there may be replaced.
        base: the public model that the folder is; then there is no folder for transformers: dense twin and
        new
            bundle stand on that model, and hold the masks and what the method changed besides.
        progress: called as the steps finish.

    Returns:
        What was written, in a sentence or two.

    Raises:
        ConfigError: no such model, a large one and a method that needs all of it in memory, or folders
        that are
            taken.
        SparseError: whatever the method, measuring or saving refuse. What was there before is then intact.
    """
    dense = out.with_name(f"{out.name}-dense")
    for folder in (out, dense):
        refuse_taken(
            source, folder, CARD_FILE if (folder / CARD_FILE).is_file() else "config.json", overwrite
        )
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    said: list[str] = []
    if size > WHOLE:
        if base is not None:
            raise ConfigError(f"--share: a model of {size / 2**30:.1f} GiB gets no bundle; leave it out")
        put_folder(out, lambda staged: said.append(_stream(source, method, origin, staged, size)))
        return (
            f"{said[0]} transformers loads {out} with from_pretrained; a model of this size gets no bundle."
        )

    def write(staged: Path) -> None:
        with tempfile.TemporaryDirectory(dir=staged.parent, prefix=f".{dense.name}.") as scratch:
            twin = Path(scratch) / dense.name
            _save_twin(source, method, origin, twin, base)
            make_bundle(open_bundle(twin), method, origin, staged, share=base is not None, progress=progress)
            said.append(_beside(source, origin, staged, base).replace(str(staged), str(out)))
            put_folder(dense, lambda folder: shutil.copytree(twin, folder, dirs_exist_ok=True))

    put_folder(out, write)
    return f"The dense twin is {dense}. {said[0]}"


def base_contents(folder: Path) -> PackedContents:
    """The tensors and extras of a public model's folder, as a bundle of it has them."""
    model = load_pretrained(folder, dtype="auto")
    return PackedContents(model.state_dict(), MaskSet({}), extras_of(model, architecture_of(model)), {})


def _save_twin(source: Path, method: Any, origin: Origin, dense: Path, base: PublicModel | None) -> None:
    """Measure the dense model and write its bundle."""
    start = time.perf_counter()
    model = load_pretrained(source, dtype="auto")
    text = getattr(method, "text", None) or default_text(model)
    task, _ = measured(text)
    where = base.stated.reference if base is not None else str(source)
    data = {"name": "not stated", "source": where, "licence": "not stated"}
    about = About(
        f"{origin.name}-dense",
        f"{type(model).__name__} from {source.name if base is None else base.stated.repository}.",
        origin.command,
        CITATION,
        data,
        "not stated",
    )
    save_dense(model, dense, about, [task], seconds=time.perf_counter() - start, base=base)


def _beside(source: Path, origin: Origin, out: Path, base: PublicModel | None) -> str:
    """Put transformers' own files beside a bundle where they can be, and say what lies there."""
    if base is not None:
        stored = load_packed(out / WEIGHTS_FILE)
        changed = [name for name, tensor in stored.tensors.items() if tensor.dtype != torch.bool]
        also = f" and {len(changed)} tensors that {origin.method} changed" if changed else ""
        return f"{out} holds masks{also}; the rest is that of {base.stated.reference}."
    made: Any = load_bundle(open_bundle(out))
    if thresholds_of(made) or any(isinstance(module, GroupQuantLinear) for module in made.modules()):
        return f"transformers has no form for what {origin.method} adds."
    if (other := _export(made, source, out)) is None:
        return f"transformers loads {out} with from_pretrained."
    for file in out.iterdir():
        if file.name not in (CARD_FILE, WEIGHTS_FILE):
            file.unlink()
    return (
        f"transformers would load other values of {other} than {origin.method} made: its configuration "
        f"cannot "
        "describe this model (unequal FFN widths, say). Only the bundle is written."
    )


def _export(model: PreTrainedModel, source: Path, out: Path) -> str | None:
    """Put a model's weights, configuration and what else the source has beside the bundle; the name of a
    tensor
    that transformers loads otherwise, if there is one."""
    model.save_pretrained(out)
    _copy_rest(source, out)
    again = AutoModelForCausalLM.from_pretrained(out, dtype="auto", trust_remote_code=False)
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in state or not torch.equal(state[name], tensor):
            return name
    return None


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
        f"peak memory {done['peak_bytes'] / 2**30:.2f} GiB."
    )
