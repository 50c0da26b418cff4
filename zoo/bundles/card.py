"""Cards: what is known of a pretrained sparse model, and what it cost, beside its dense twin.

A card is checked for lies as well as for types: a sparsity must follow from the counts, a mean and a spread
from the values per seed, and every figure of a sparse model must stand beside that of its dense twin.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
import statistics
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from zoo.bundles import cardfile
from zoo.errors import CardError, UnknownNameError
from zoo.names import is_model_name, is_version, split_version

CARD_FILE = "card.yaml"
OWN = "own"  # the domain of models that somebody saved as they were
SCHEMA_VERSION = 1
BASE_SCHEMA_VERSION = 2  # the same with `base`: a reader of version 1 would take the file for the whole
PUBLIC_SCHEMA_VERSION = 3  # the same with `public_base`
_LEVEL_TOLERANCE = 5e-4  # of a sparsity that asks for a level
TOLERANCE = 1e-6  # relative; figures on a card are written with all their digits


def _plain(value: Any) -> Any:
    """Refuse what YAML and JSON cannot both say."""
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("keys must be text")
        for item in value.values():
            _plain(item)
    elif isinstance(value, list):
        for item in value:
            _plain(item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("numbers must be finite")
    elif not (value is None or isinstance(value, (str, bool, int, float))):
        raise ValueError(f"expected text, numbers, lists or mappings, not {type(value).__name__}")
    return value


def _model_name(value: str) -> str:
    if not is_model_name(value):
        raise ValueError("expected domain/slug in lower case, e.g. graph/teddy-gcn-cora-g30-w80")
    return value


def _model_reference(value: str) -> str:
    name, version = split_version(value)
    if not is_model_name(name) or not (version is None or is_version(version)):
        raise ValueError("expected domain/slug or domain/slug@version, no path and no address of a hub")
    return value


def _version(value: str) -> str:
    if not is_version(value):
        raise ValueError("expected a quoted version such as '1.0.0'")
    return value


def _file_name(value: str) -> str:
    # A bare name: no folder, no drive, no "..", nothing that another system reads as a path.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_-]+)*\.safetensors", value):
        raise ValueError("expected a bare file name that ends in .safetensors, without any folder")
    return value


def _hexadecimal(digits: int, what: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
            raise ValueError(f"expected {what}{digits} lower-case hexadecimal digits")
        return value

    return check


_sha256, _commit = _hexadecimal(64, ""), _hexadecimal(40, "a commit: ")


def _repository(value: str) -> str:
    word = r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,95}"
    if not re.fullmatch(f"{word}/{word}", value):
        raise ValueError("expected owner/name, a repository of a hub")
    return value


def _repository_path(value: str) -> str:
    parts = value.split("/")
    if "\\" in value or "\0" in value or any(part in ("", ".", "..") for part in parts) or ":" in parts[0]:
        raise ValueError("expected a relative path inside the repository, with forward slashes")
    return value


Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1, max_length=4000)]
InsidePath = Annotated[str, AfterValidator(_repository_path)]
ModelName = Annotated[str, AfterValidator(_model_name)]
ModelReference = Annotated[str, AfterValidator(_model_reference)]
Plain = Annotated[dict[str, Any], AfterValidator(_plain)]
PerSeed = Annotated[dict[Count, Finite], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Architecture(_Part):
    """Which builder makes the module: a name in `ARCHITECTURES` and its keyword arguments."""

    name: Text
    args: Plain = {}


class Method(_Part):
    """How the masks were found. The name `dense` says that there are none."""

    name: Text
    hyperparameters: Plain = {}
    seed: Count | None = None


class SparsityPart(_Part):
    """Kept and total elements of one kind of thing that masks keep or drop: weights, edges, channels ..."""

    kept: Count
    total: Count
    sparsity: Share
    pattern: Text

    @model_validator(mode="after")
    def _follows_from_counts(self) -> SparsityPart:
        if self.kept > self.total:
            raise ValueError(f"kept {self.kept} of {self.total}")
        _require_equal("sparsity", self.sparsity, share_dropped(self.kept, self.total))
        return self


class Sparsity(_Part):
    """Dropped share of everything that the parts name. `cost.parameters` has that of the whole model."""

    overall: Share
    parts: dict[str, SparsityPart] = {}

    @model_validator(mode="after")
    def _follows_from_parts(self) -> Sparsity:
        kept = sum(part.kept for part in self.parts.values())
        total = sum(part.total for part in self.parts.values())
        _require_equal("overall", self.overall, share_dropped(kept, total))
        return self


class ParameterCount(_Part):
    """Parameters of the dense architecture, and those that the masks keep."""

    dense: Count
    kept: Count

    @model_validator(mode="after")
    def _kept_are_fewer(self) -> ParameterCount:
        if self.kept > self.dense:
            raise ValueError(f"kept {self.kept} of {self.dense}")
        return self


class FlopCount(_Part):
    """Floating-point operations of one forward pass: all, and those that touch no dropped element."""

    dense: Count
    sparse: Count

    @model_validator(mode="after")
    def _sparse_are_fewer(self) -> FlopCount:
        if self.sparse > self.dense:
            raise ValueError(f"sparse {self.sparse} of dense {self.dense}")
        return self


class ByteCount(_Part):
    """Bytes of the tensors stored densely and packed (those of a base, too), and of the weights file as it
    lies on disk (without the base, whose bytes are in `base`)."""

    dense: Count
    sparse: Count
    on_disk: Count


class Cost(_Part):
    """What the model costs beside its dense twin."""

    parameters: ParameterCount
    flops: FlopCount | None = None
    bytes: ByteCount


F = TypeVar("F", "DenseFigure", "Metric")


def _follow_from_seeds(figure: F) -> F:
    mean, spread = mean_and_spread(figure.per_seed)
    _require_equal("mean", figure.mean, mean)
    if (figure.spread is None) != (spread is None):
        raise ValueError(
            f"spread is stated as {figure.spread}, but of {len(figure.per_seed)} seeds it is {spread}"
        )
    if figure.spread is not None and spread is not None:
        _require_equal("spread", figure.spread, spread)
    return figure


def _none_for_one_seed(spread: float | None, info: Any) -> float | None:
    """Cards used to write 0 where a single seed shows no spread."""
    return None if spread == 0 and len(info.data.get("per_seed", ())) == 1 else spread


class DenseFigure(_Part):
    """The same metric of the dense twin: the stored model's, its seeds', their mean and spread."""

    name: Text
    value: Finite
    per_seed: PerSeed
    mean: Finite
    spread: NonNegative | None

    _one_seed = field_validator("spread")(_none_for_one_seed)
    _consistent = model_validator(mode="after")(_follow_from_seeds)


class Metric(_Part):
    """One measured figure of the stored model (`value`), of its seeds, and of its dense twin.

    `stderr` is the standard error of `value` over the evaluated samples; `spread` is the sample standard
    deviation over training seeds (None for one seed, which shows none).
    """

    task: Text
    metric: Text
    split: Text
    protocol: Text
    value: Finite
    stderr: NonNegative
    per_seed: PerSeed
    mean: Finite
    spread: NonNegative | None
    dense: DenseFigure | None = None

    _one_seed = field_validator("spread")(_none_for_one_seed)
    _consistent = model_validator(mode="after")(_follow_from_seeds)


class Training(_Part):
    """The command that made the model and its figures, how long it ran, and with what: versions, commit,
    processor (cards of earlier versions do not say)."""

    command: Text
    seconds: NonNegative | None = None
    environment: dict[str, Text] | None = None


class Data(_Part):
    """What it was trained on, and the digest of its content, where that has a name by which it is loaded
    (cards of earlier versions do not say)."""

    name: Text
    source: Text
    licence: Text
    sha256: Annotated[str, AfterValidator(_sha256)] | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, serialize: Callable[[Any], dict[str, str]]) -> dict[str, str]:
        return {key: value for key, value in serialize(self).items() if value is not None}


class Weights(_Part):
    """The weights file beside the card."""

    file: Annotated[str, AfterValidator(_file_name)]
    sha256: Annotated[str, AfterValidator(_sha256)]
    bytes: Annotated[int, Field(gt=0, lt=1 << 63)]


class Base(_Part):
    """The bundle that holds the tensors which a weights file leaves out: exactly that file, and its bytes."""

    name: ModelName
    version: Annotated[str, AfterValidator(_version)]
    sha256: Annotated[str, AfterValidator(_sha256)]
    bytes: Annotated[int, Field(gt=0, lt=1 << 63)]

    @property
    def reference(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"

    @property
    def identity(self) -> dict[str, str]:
        """What the weights file says of its base, too."""
        return {"name": self.name, "version": self.version, "sha256": self.sha256}


class PublicBase(_Part):
    """A model of another library on a hub that holds the tensors which a weights file leaves out: one
    commit's files, each with its hash, and their bytes together."""

    repository: Annotated[str, AfterValidator(_repository)]
    revision: Annotated[str, AfterValidator(_commit)]
    files: Annotated[dict[InsidePath, Annotated[str, AfterValidator(_sha256)]], Field(min_length=1)]
    bytes: Annotated[int, Field(gt=0, lt=1 << 63)]

    @property
    def reference(self) -> str:
        """`hf://owner/name@commit`."""
        return f"hf://{self.repository}@{self.revision}"

    @property
    def identity(self) -> dict[str, str]:
        """What the weights file says of its base, too."""
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(self.files.items()))
        digest = hashlib.sha256(lines.encode()).hexdigest()
        return {"name": self.repository, "version": self.revision, "sha256": digest}


class Imported(_Part):
    """The file that others published, from which the weights were read: its place below $ZOO_DATA, its
    SHA-256, the address where it is to be had, and its licence."""

    file: InsidePath
    sha256: Annotated[str, AfterValidator(_sha256)]
    address: Text
    licence: Text


class Level(_Part):
    """A further level of a nested model: the same weights under a mask inside that of the level before, with
    figures of its own."""

    sparsity: Sparsity
    cost: Cost
    metrics: Annotated[list[Metric], Field(min_length=1)]


class Card(_Part):
    """Everything that a bundle says about itself. See the fields' own types.

    A model of the domain `own` was saved by somebody who measured nothing: its card may lack figures, twin,
    FLOPs, seed and time. No other card may, but that of a model that was imported sparse, whose dense twin
    its makers may have kept. Names that it had before stand under `formerly` and go on finding it.
    """

    schema_version: Literal[1, 2, 3]
    name: ModelName
    version: Annotated[str, AfterValidator(_version)]
    domain: Text
    summary: Text
    architecture: Architecture
    method: Method
    sparsity: Sparsity
    cost: Cost
    metrics: list[Metric] = []
    dense_twin: ModelReference | None = None
    training: Training
    data: Data
    license: Text
    citation: Text
    weights: Weights
    base: Base | None = None
    public_base: PublicBase | None = None
    imported: Imported | None = None
    levels: list[Level] = []
    evidence: InsidePath | None = None
    formerly: list[ModelName] = []

    @model_validator(mode="after")
    def _is_consistent(self) -> Card:
        if self.name.partition("/")[0] != self.domain:
            raise ValueError(f"domain {self.domain!r} is not that of the name {self.name!r}")
        if self.cost.bytes.on_disk != self.weights.bytes:
            on_disk = self.cost.bytes.on_disk
            raise ValueError(f"cost.bytes.on_disk {on_disk} is not weights.bytes {self.weights.bytes}")
        if (self.base is None) == (self.schema_version == BASE_SCHEMA_VERSION):
            raise ValueError("a card with a base has schema_version 2, one without has 1")
        if (self.public_base is None) == (self.schema_version == PUBLIC_SCHEMA_VERSION):
            raise ValueError("a card with a public_base has schema_version 3, one without has 1 or 2")
        if self.base is not None and self.base.name == self.name:
            raise ValueError("base names the bundle itself")
        if self.name in self.formerly:
            raise ValueError("formerly has the name that the bundle has now")
        keys = [(metric.task, metric.metric, metric.split, metric.protocol) for metric in self.metrics]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"metrics has {' / '.join(key)} twice")
        shares = [self.sparsity.overall, *(level.sparsity.overall for level in self.levels)]
        if any(after <= before for before, after in itertools.pairwise(shares)):
            raise ValueError(f"levels must become sparser one after the other; they have {shares}")
        for number in range(1, len(self.levels) + 1):
            Card.model_validate(self.at(number).to_dict())
        if self.domain == OWN:
            return self
        known = {
            "metrics": self.metrics,
            "method.seed": self.method.seed is not None,
            "cost.flops": self.cost.flops,
        }
        for field, stated in (known | {"training.seconds": self.training.seconds is not None}).items():
            if not stated:
                raise ValueError(f"{field} is missing; only models of the domain {OWN!r} may lack it")
        if self.method.name == "dense":
            if self.dense_twin is not None or any(metric.dense for metric in self.metrics):
                raise ValueError("a dense model is its own twin: leave dense_twin and metrics.dense out")
            return self
        if self.dense_twin is None and self.imported is not None:
            if any(metric.dense for metric in self.metrics):
                raise ValueError("metrics have figures of a dense twin that dense_twin does not name")
            return self
        if self.dense_twin is None:
            raise ValueError("dense_twin is missing: name the dense model beside which it stands")
        for metric in self.metrics:
            if metric.dense is None:
                raise ValueError(f"metrics {metric.task} / {metric.metric} has no dense: measure the twin")
            if metric.dense.name != self.dense_twin:
                raise ValueError(f"metrics.dense.name {metric.dense.name!r} is not {self.dense_twin!r}")
        return self

    @property
    def seed(self) -> int:
        """That of the stored model.

        Raises:
            CardError: it is not stated.
        """
        if self.method.seed is None:
            raise CardError(f"{self.name}: its card states no seed: the model was saved as it was")
        return self.method.seed

    @property
    def reference(self) -> str:
        """`name@version`, which names exactly this model."""
        return f"{self.name}@{self.version}"

    def at(self, number: int) -> Card:
        """The card of one level alone: the first one, which has the number 0, or a further one."""
        if number == 0:
            return self.model_copy(update={"levels": []})
        level = self.levels[number - 1]
        own = {"sparsity": level.sparsity, "cost": level.cost, "metrics": level.metrics}
        return self.model_copy(update={**own, "levels": []})

    def level_at(self, sparsity: float) -> int:
        """The number of the level with that overall sparsity, to three digits.

        Raises:
            UnknownNameError: there is none.
        """
        shares = [self.sparsity.overall, *(level.sparsity.overall for level in self.levels)]
        for number, share in enumerate(shares):
            if abs(share - sparsity) < _LEVEL_TOLERANCE:
                return number
        there = ", ".join(map(level_label, shares))
        raise UnknownNameError(f"{self.name} has no level of sparsity {sparsity:g}; it has {there}.")

    @property
    def bytes_needed(self) -> int:
        """Bytes of the files that loading reads: its own weights and those of its base."""
        stands_on = self.stands_on
        return self.weights.bytes + (stands_on.bytes if stands_on is not None else 0)

    @property
    def stands_on(self) -> Base | PublicBase | None:
        """What holds the tensors that the weights file leaves out."""
        return self.base if self.base is not None else self.public_base

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in the order of the fields; without those that most cards have not."""
        rare = ("base", "public_base", "imported", "levels", "formerly")
        return self.model_dump(exclude={key for key in rare if not getattr(self, key)})

    def to_yaml(self) -> str:
        """The text of the card's file; `parse_card(load_yaml(text))` gives an equal card."""
        return cardfile.dump_yaml(self.to_dict())


def level_label(share: float) -> str:
    """A sparsity as a level is asked for by it: `0.9`."""
    return f"{round(share, 3):g}"


def share_dropped(kept: int, total: int) -> float:
    """1 - kept / total; 0 where there is nothing to drop."""
    return 1 - kept / total if total else 0.0


def mean_and_spread(per_seed: Mapping[int, float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1) of values by seed; one seed has no deviation: None."""
    values = list(per_seed.values())
    try:
        mean = statistics.fmean(values)
    except OverflowError:  # of the sum, not of the mean
        mean = math.fsum(value / len(values) for value in values)
    if len(values) < 2:
        return mean, None
    # in floats: `statistics.stdev` computes in fractions, for hundreds of figures a tenth of a listing's time
    return mean, math.hypot(*(value - mean for value in values)) / math.sqrt(len(values) - 1)


def parse_card(fields: Mapping[str, Any], source: str = "card") -> Card:
    """Validate a card.

    Args:
        fields: plain values as `cardfile.load_yaml` gives them.
        source: what the card is called in messages, e.g. its path.

    Raises:
        CardError: a field is missing, unknown, of another type, out of range, or contradicts another one.
    """
    try:
        return Card.model_validate(dict(fields))
    except ValidationError as error:
        raise CardError(_condense(error, source)) from error


def read_card(path: str | os.PathLike[str]) -> Card:
    """Read and validate a card's file.

    Raises:
        CardError: the file cannot be read, is no plain YAML, or breaks the schema.
    """
    return parse_card(cardfile.read_yaml(path), str(path))


def _require_equal(field: str, stated: float, computed: float) -> None:
    if not math.isclose(stated, computed, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
        raise ValueError(f"{field} is stated as {stated:.9g}, but its own numbers give {computed:.9g}")


def _condense(error: ValidationError, source: str) -> str:
    """The first thing that is wrong, in one line, and how many more there are."""
    first, *more = error.errors(include_url=False, include_context=False)
    field = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    received = ""
    if first["type"] not in ("missing", "extra_forbidden") and not isinstance(first["input"], (dict, list)):
        text = repr(first["input"])
        received = f", received {text[:77] + '...' if len(text) > 80 else text}"
    rest = f" ({len(more)} more such errors)" if more else ""
    return f"{source}: {field + ': ' if field else ''}{message}{received}{rest}. Correct it or save anew."
