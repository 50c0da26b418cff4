"""Bundles become models and models become bundles.

    model = load("graph/teddy-gcn-cora-g30-w80")     # verified, in eval mode, its masks attached
    save(model, "my-bundle", card=info(model).card)   # whole or not at all

A bundle is a folder with `card.yaml` and one packed safetensors file. Nothing in it is executed: the card
names an architecture, and only a builder that the zoo or a plug-in registered under that name is called.
"""

from __future__ import annotations

import copy
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.bundles import base as bases
from zoo.bundles import own as own_models
from zoo.bundles.building import build, fill_model, refusing
from zoo.bundles.card import (
    BASE_SCHEMA_VERSION,
    CARD_FILE,
    PUBLIC_SCHEMA_VERSION,
    SCHEMA_VERSION,
    Base,
    Card,
    parse_card,
    share_dropped,
)
from zoo.bundles.catalog import Bundle, base_of, find, open_bundle
from zoo.bundles.folders import publish_folder
from zoo.bundles.public import Base as Standing
from zoo.bundles.public import PublicModel, base_for, public_base_of
from zoo.errors import BundleError, ConfigError
from zoo.shared.errors import SparseError
from zoo.shared.masks import MaskSet, SparsityReport, masks_of, nested, set_masks
from zoo.shared.ops import packing
from zoo.shared.store.formats import PackedContents, PackedReport, load_packed, save_packed
from zoo.shared.store.io import sha256_file
from zoo.shared.structure.relatives import copied

__all__ = ["Bundle", "ModelInfo", "find", "info", "load", "load_bundle", "open_bundle", "save"]

WEIGHTS_FILE = "weights.safetensors"
PART_MASK = "/keep"  # a boolean extra `edges/keep` is the mask of the part `edges`
_log = logging.getLogger("zoo")
Execution = Literal["masked", "packed"]


@dataclass(frozen=True)
class ModelInfo:
    """What a model that came out of the zoo knows of itself, as `model.zoo_info`."""

    card: Card
    extras: dict[str, Tensor]
    folder: Path
    execution: str


def load(
    name: str | os.PathLike[str],
    execution: Execution = "masked",
    version: str | None = None,
    offline: bool | None = None,
    into: nn.Module | type[nn.Module] | None = None,
    sparsity: float | None = None,
) -> nn.Module:
    """Load a pretrained sparse model.

    Args:
        name: a path, a name, `name@version` or `hf://owner/name@revision`; see `zoo.bundles.catalog.find`.
        execution: `masked` for plain dense parameters with exact zeros, to fine-tune or compare; `packed`
            swaps in modules that skip the zeros, for inference. Outputs are the same within 1e-5.
        version: the version wanted, the same as a pin in the name.
        offline: whether the hub may not be asked; None leaves it to `ZOO_OFFLINE` and `HF_HUB_OFFLINE`.
        into: of a model that was saved without a card: its class, or a model of it, which is filled.
        sparsity: of a nested model the level wanted, the same as `#0.9` at the end of the name; by
            default the least sparse one.

    Returns:
        The module on the CPU in eval mode, its masks recorded (`zoo.shared.masks.masks_of`), with a
        `ModelInfo`
        as `model.zoo_info`. A model with a method `load_extras` was given the bundle's extra tensors.

    Raises:
        UnknownNameError, HubError: the model cannot be found or fetched.
        CardError, BundleError: it is damaged, or not what its card says.
        ConfigError: an unknown execution, or an architecture whose package is not installed.
    """
    _check_execution(execution)
    bundle = find(name, version, offline)
    return load_bundle(bundle if sparsity is None else bundle.at(sparsity), execution, into, offline)


def load_bundle(
    bundle: Bundle,
    execution: Execution = "masked",
    into: nn.Module | type[nn.Module] | None = None,
    offline: bool | None = None,
) -> nn.Module:
    """Load the model of a bundle that is at hand; see `load`."""
    _check_execution(execution)
    contents = _unpack(bundle)
    _require_same_architecture(bundle, contents)
    base = _base_contents(bundle, contents, offline)
    with refusing(bundle.card.name, f" in {bundle.folder}"):
        if base is not None:
            contents = bases.restore(contents, base)
        contents = _at_level(contents, bundle)
    if bundle.card.architecture.name.startswith(own_models.PYTHON):
        model = own_models.handed(bundle.card, into, contents.tensors)
    elif into is None:
        model = build(bundle.card, contents.tensors)
    else:
        raise ConfigError(
            f"{bundle.card.name} is a {bundle.card.architecture.name} of the zoo: leave into out"
        )
    with refusing(bundle.card.name, f" in {bundle.folder}"):
        fill_model(model, contents.tensors)
        set_masks(model, contents.masks)
        if lost := contents.masks.lost_zeros(model):
            raise BundleError(f"{lost[0]!r} has other values than zero where its mask drops")
        for module in model.modules():  # masked execution refuses what packed execution would
            if callable(check := getattr(module, "check_loaded", None)):
                check()
        if callable(take := getattr(model, "load_extras", None)):
            take({name: one for name, one in contents.extras.items() if not name.startswith(nested.PREFIX)})
        model.eval()
        if execution == "packed":
            model = packing.pack(model, contents.masks)
    model.zoo_info = ModelInfo(bundle.card, contents.extras, bundle.folder, execution)  # type: ignore[assignment]
    return model


def info(model: nn.Module) -> ModelInfo:
    """What the zoo knows of a model that it loaded.

    Raises:
        BundleError: the model does not come from the zoo.
    """
    found = getattr(model, "zoo_info", None)
    if not isinstance(found, ModelInfo):
        raise BundleError(f"This {type(model).__name__} was not loaded by zoo.load: nothing is known of it.")
    return found


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    card: Card | Mapping[str, Any] | None = None,
    like: Bundle | str | os.PathLike[str] | None = None,
    masks: MaskSet | None = None,
    extras: Mapping[str, Tensor] | None = None,
    base: Standing | None = None,
    overwrite: bool = False,
    name: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model as a bundle, the whole folder or nothing, after proving that it loads back bit for bit.

    With neither `card` nor `like` any module is saved as it is, of a class that nobody registered: its card
    says what can be counted, and `zoo.load(folder, into=...)` is given the class or a model of it.

    What can be measured is measured and replaces what the card says: `weights`, `cost.parameters.kept`,
    `cost.bytes.sparse`, `cost.bytes.on_disk`, the parts of `sparsity` with a mask, and the overall share.
    All masks of parameters make the part `weights`; a boolean extra `edges/keep` makes the part `edges`.
    `cost.parameters.dense` and `cost.bytes.dense` are counted too, unless the card gives them (a network
    that was cut states those of its twin). Figures of quality are taken from the card as they are, which is
    right for the very model that it describes; for one that was changed give `like`.

    Args:
        model: a model of a registered architecture, in any mode.
        folder: where to write. Its parents are made.
        card: a card, or its fields as plain values without those that are measured.
        like: instead of a card a bundle of the same architecture, whose figures are measured again on this
            model. The card's name is that of the folder.
        masks: masks of parameters; None for those that the model carries.
        extras: further tensors that belong to the model; None for those that it was loaded with.
        base: a bundle, or `hf://owner/name` of another library's model, whose tensors are not stored again
        where
            the model's are the same, bit for bit, or the same under a mask. It must be found from `folder`
            again; see `zoo.bundles.catalog.base_of` and `zoo.bundles.public`.
        overwrite: whether a bundle that is there may be replaced; it stays until the new one is complete.
        name: of a model that is saved as it is, `own/...`; by default the folder's.
        arguments: with which the class of such a model makes it again, as plain values.

    Returns:
        The folder.

    Raises:
        BundleError: the folder is taken or cannot be written, zeros are lost, it does not load back, or the
            base shares nothing with the model or stands on another one itself.
        CardError: the card breaks the schema.
        ConfigError: both a card and `like`, or neither for a model that was loaded from the zoo.
        MaskError: the masks do not fit the model.
        UnknownNameError: nobody registered the architecture on the card.
    """
    if card is not None and like is not None:
        raise ConfigError("save takes a card, or like=BUNDLE whose figures are measured again; not both")
    if like is not None:
        from zoo.bundles.publish import publish_like

        return publish_like(model, folder, like, masks=masks, extras=extras, base=base, overwrite=overwrite)
    kept = masks if masks is not None else masks_of(model) or MaskSet({})
    if card is None:
        known = getattr(model, "zoo_info", None)
        if isinstance(known, ModelInfo) and known.card.domain != own_models.OWN:
            raise ConfigError(
                f"this model was loaded as {known.card.name}: save it with like={known.card.name!r}, whose "
                "figures are measured again, or with a card"
            )
        card = own_models.own_fields(model, Path(folder), kept, name, arguments)
    elif name is not None or arguments is not None:
        raise ConfigError("a card has a name and arguments already: leave name and arguments out")
    fields = copy.deepcopy(card.to_dict() if isinstance(card, Card) else dict(card))
    whole = isinstance(card, Card) and base is None and card.stands_on is None
    described = fields["weights"]["sha256"] if whole else None  # equal content gives equal bytes
    if lost := kept.lost_zeros(model):
        raise BundleError(
            f"{folder}: {lost[0]!r} has non-zero values where its mask drops. Call masks.apply_(model) first."
        )
    if extras is None:
        known = getattr(model, "zoo_info", None)
        extras = known.extras if isinstance(known, ModelInfo) else {}
    state, stored = _plain_state(model), stored_state(model)
    stands_on = base_for(base) if base is not None else None
    fields |= _base_fields(stands_on)
    if not fields.get("levels"):  # those of the model that it was made from are not its own
        extras = {name: one for name, one in extras.items() if not name.startswith(nested.PREFIX)}

    def write(temporary: Path) -> None:
        report = save_packed(temporary / WEIGHTS_FILE, stored, kept, extras, _metadata(fields))
        _measure(fields, model, kept, extras, report)
        _measure_levels(fields, model, stored, kept, extras)
        if stands_on is not None:
            path = _save_on(stands_on, temporary / WEIGHTS_FILE, stored, kept, extras, fields)
            _measure_file(fields, path)
        if described not in (None, fields["weights"]["sha256"]):
            _log.warning(
                "%s: its card's figures were measured on other weights. To measure them on these: "
                "zoo.save(model, folder, like=%r)",
                folder,
                fields.get("name"),
            )
        for level in fields.get("levels") or ():  # all lie in the one file
            level["cost"]["bytes"]["on_disk"] = fields["weights"]["bytes"]
        written = parse_card(fields, str(Path(folder) / CARD_FILE))
        (temporary / CARD_FILE).write_text(written.to_yaml(), encoding="utf-8")
        _prove(Bundle(written, temporary), model, state, kept, extras)

    return publish_folder(Path(folder), write, overwrite)


def _at_level(contents: PackedContents, bundle: Bundle) -> PackedContents:
    """What a level of a nested model has; a file must hold as many levels as the card says."""
    if bundle.level is None:
        if (found := nested.count_levels(contents.extras)) != len(bundle.card.levels):
            raise BundleError(f"the weights hold {found} further levels, the card {len(bundle.card.levels)}")
        return contents
    tensors, masks = nested.at_level(contents.tensors, contents.masks, contents.extras, bundle.level)
    extras = {name: one for name, one in contents.extras.items() if not name.startswith(nested.PREFIX)}
    return PackedContents(tensors, masks, extras, contents.metadata)


def _unpack(bundle: Bundle) -> PackedContents:
    """What the weights file of a bundle holds, once its hash has been checked."""
    bundle.check()
    try:
        return load_packed(bundle.weights)
    except (SparseError, OSError) as error:
        raise BundleError(f"{bundle.card.name}: {error}. Fetch or save it again.") from error


def _base_contents(bundle: Bundle, contents: PackedContents, offline: bool | None) -> PackedContents | None:
    """What the base's file holds; card and weights must name the same base."""
    stated = bundle.card.stands_on
    record = contents.metadata.get(bases.KEY)
    named = (
        {key: record.get(key) for key in ("name", "version", "sha256")} if isinstance(record, dict) else None
    )
    if named != (stated.identity if stated else None):
        raise BundleError(
            f"{bundle.folder}: the card's base is not the one that its weights were saved on. Fetch or save "
            f"{bundle.card.name} again."
        )
    public = public_base_of(bundle, offline)
    if public is not None:
        return public.contents(bundle.card.domain)
    base = base_of(bundle)
    return None if base is None else _unpack(base)


def _base_fields(base: Bundle | PublicModel | None) -> dict[str, Any]:
    """The fields of a card that say on what it stands."""
    none: dict[str, Any] = {"base": None, "public_base": None}
    if base is None:
        return {"schema_version": SCHEMA_VERSION} | none
    if isinstance(base, PublicModel):
        return none | {"schema_version": PUBLIC_SCHEMA_VERSION, "public_base": base.stated.model_dump()}
    card = base.card
    if (on := card.stands_on) is not None:
        name = on.name if isinstance(on, Base) else on.reference
        raise BundleError(f"{card.name} stands on {name} itself and can be no base. Pass base={name!r}.")
    stated = Base(name=card.name, version=card.version, sha256=card.weights.sha256, bytes=card.weights.bytes)
    return none | {"schema_version": BASE_SCHEMA_VERSION, "base": stated.model_dump()}


def _save_on(
    base: Bundle | PublicModel,
    path: Path,
    state: Mapping[str, Tensor],
    masks: MaskSet,
    extras: Mapping[str, Tensor],
    fields: Mapping[str, Any],
) -> Path:
    """Write what the base does not have, and the record of what it has."""
    if isinstance(base, PublicModel):
        contents, stated = base.contents(fields["domain"]), base.stated.identity
    else:
        contents, stated = _unpack(base), Base(**fields["base"]).identity
    try:
        own = bases.subtract(state, masks, extras, contents)
    except BundleError as error:
        raise BundleError(f"{fields.get('name')} on {stated['name']}: {error}.") from error
    metadata = {**_metadata(fields), bases.KEY: stated | own.metadata[bases.KEY]}
    save_packed(path, own.tensors, own.masks, own.extras, metadata)
    return path


def _check_execution(execution: str) -> None:
    if execution not in ("masked", "packed"):
        raise ConfigError(f"execution is 'masked' or 'packed', received {execution!r}.")


def _metadata(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the weights file says of itself: enough to notice a card that belongs to other weights."""
    architecture = fields.get("architecture") or {}
    return {
        "name": fields.get("name"),
        "architecture": {"name": architecture.get("name"), "args": architecture.get("args", {})},
    }


def _require_same_architecture(bundle: Bundle, contents: PackedContents) -> None:
    # Checked before anything is built: a wrong digit in a size would allocate another model.
    stated = bundle.card.architecture.model_dump()
    if contents.metadata.get("architecture") != stated:
        raise BundleError(
            f"{bundle.folder}: the card's architecture is not the one that its weights were saved with. "
            f"Fetch or save {bundle.card.name} again."
        )


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, which must consist of tensors."""
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise BundleError(f"the state {name!r} is a {type(value).__name__}; only tensors can be stored.")
    return {name: value.detach() for name, value in state.items()}


def stored_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as it is stored: as it is, but of a model of full precision (`fill_model`) the float32
    tensors whose values are all those of float16 are stored as such.

    Raises:
        BundleError: the state does not consist of tensors.
    """
    state = _plain_state(model)
    if not getattr(model, "full_precision", False):
        return state
    halves = {name: value.half() for name, value in state.items() if value.dtype == torch.float32}
    return state | {name: half for name, half in halves.items() if torch.equal(half.float(), state[name])}


def _measure(
    fields: dict[str, Any],
    model: nn.Module,
    masks: MaskSet,
    extras: Mapping[str, Tensor],
    report: PackedReport,
) -> None:
    """Replace the fields of a card that can be measured."""
    # Some layers keep weights as codes in buffers; those count like the parameters that they stand for.
    coded = sum(getattr(module, "coded_weights", 0) for module in model.modules())
    parameters = coded + sum(parameter.numel() for parameter in model.parameters())
    counted = masks.report(model)
    cost = fields.setdefault("cost", {})
    cost.setdefault("parameters", {}).setdefault("dense", parameters)
    cost["parameters"]["kept"] = parameters - (counted.masked_numel - counted.kept)
    sizes = cost.setdefault("bytes", {})
    sizes["dense"] = max(sizes.get("dense", 0), report.dense_bytes)
    stored = [*report.tensors.values(), *report.extras.values()]
    sizes["sparse"] = sum(entry.bytes for entry in stored)
    _measure_file(fields, report.path)
    fields["sparsity"] = _sparsity(fields.get("sparsity") or {}, masks, counted, extras)


def _measure_levels(
    fields: dict[str, Any],
    model: nn.Module,
    stored: Mapping[str, Tensor],
    masks: MaskSet,
    extras: Mapping[str, Tensor],
) -> None:
    """The same of each further level, packed by itself."""
    rest = {name: one for name, one in extras.items() if not name.startswith(nested.PREFIX)}
    for number, level in enumerate(fields.get("levels") or (), start=1):
        tensors, inner = nested.at_level(stored, masks, extras, number)
        with tempfile.TemporaryDirectory() as folder:
            report = save_packed(Path(folder) / WEIGHTS_FILE, tensors, inner, rest, {})
            _measure(level, model, inner, rest, report)
            del level["weights"]


def _measure_file(fields: dict[str, Any], path: Path) -> None:
    size = path.stat().st_size
    fields["weights"] = {"file": WEIGHTS_FILE, "sha256": sha256_file(path), "bytes": size}
    fields["cost"]["bytes"]["on_disk"] = size


def _sparsity(
    stated: Mapping[str, Any], masks: MaskSet, counted: SparsityReport, extras: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Parts that have a mask as counted, the others as stated."""
    parts: dict[str, Any] = {name: dict(part) for name, part in (stated.get("parts") or {}).items()}
    if masks:
        patterns = sorted({str(mask.pattern) for mask in masks.values()})
        parts["weights"] = _part(counted.kept, counted.masked_numel, "+".join(patterns))
    for name, keep in extras.items():
        if name.endswith(PART_MASK) and keep.dtype == torch.bool:
            part = name.removesuffix(PART_MASK)
            pattern = parts.get(part, {}).get("pattern", "unstructured")
            parts[part] = _part(int(keep.sum()), keep.numel(), pattern)
    kept, total = (sum(part[key] for part in parts.values()) for key in ("kept", "total"))
    return {"overall": share_dropped(kept, total), "parts": parts}


def _part(kept: int, total: int, pattern: str) -> dict[str, Any]:
    return {"kept": kept, "total": total, "sparsity": share_dropped(kept, total), "pattern": pattern}


def _prove(
    bundle: Bundle,
    model: nn.Module,
    state: Mapping[str, Tensor],
    masks: MaskSet,
    extras: Mapping[str, Tensor],
) -> None:
    """Load what was written and compare it with what was meant."""
    into = None
    if bundle.card.architecture.name.startswith(own_models.PYTHON):
        into = copied(model)
        for tensor in into.state_dict().values():
            tensor.zero_()  # nothing may come back that was not stored
    for number in range(1 + len(bundle.card.levels)):
        at = bundle.at_level(number)
        loaded = load_bundle(bundle if number == 0 else at, into=into)
        again = loaded.state_dict()
        tensors, inner = nested.at_level(state, masks, extras, number)
        for name, tensor in tensors.items():
            if not _same_bits(again[name], tensor):
                raise BundleError(f"{at.reference}: {name!r} does not come back as it was saved.")
        if not inner.equal(masks_of(loaded) or MaskSet({})):
            raise BundleError(f"{at.reference}: the masks do not come back as they were saved.")


def _same_bits(loaded: Tensor, saved: Tensor) -> bool:
    """Equal values in the same type; NaN equals NaN, and -0 under a mask equals 0."""
    saved = saved.cpu()
    if loaded.dtype != saved.dtype or loaded.shape != saved.shape:
        return False
    return bool(((loaded == saved) | ((loaded != loaded) & (saved != saved))).all())
