"""The record of one run: which model, which task, what came out, on which machine. One JSON file each."""

from __future__ import annotations

import base64
import json
import os
import platform
import resource
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zoo.errors import DataError
from zoo.shared.store.checked import read_checked, write_checked
from zoo.shared.store.io import atomic_write

SCHEMA_VERSION = 1


class Frozen(BaseModel):
    """Base of the parts of a record: unknown keys are refused, and nothing changes after it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MetricValue(Frozen):
    """One metric's value and its standard error."""

    value: float = Field(allow_inf_nan=False)
    stderr: float | None = Field(default=None, allow_inf_nan=False)


class Samples(Frozen):
    """Per-sample values, compact: `bits` for 0/1 values (packed, big-endian), else `f64le`; both in
    base64."""

    encoding: Literal["bits", "f64le"]
    n: int = Field(ge=0)
    data: str

    @classmethod
    def encode(cls, values: list[float]) -> Samples:
        """Pack a list of floats, without loss."""
        array = np.asarray(values, dtype="<f8")
        binary = bool(np.isin(array, (0.0, 1.0)).all())
        raw = np.packbits(array.astype(bool)).tobytes() if binary else array.tobytes()
        return cls(encoding="bits" if binary else "f64le", n=len(array), data=base64.b64encode(raw).decode())

    def decode(self) -> list[float]:
        """The values.

        Raises:
            DataError: the data are not what `n` and `encoding` say.
        """
        try:
            raw = base64.b64decode(self.data, validate=True)
        except ValueError as error:
            raise DataError(
                f"per-sample values are not valid base64 ({error}); measure the model again"
            ) from None
        expected = -(-self.n // 8) if self.encoding == "bits" else 8 * self.n
        if len(raw) != expected:
            raise DataError(f"per-sample values have {len(raw)} bytes, but {self.n} samples need {expected}")
        if self.encoding == "bits":
            return np.unpackbits(np.frombuffer(raw, np.uint8), count=self.n).astype(float).tolist()
        return np.frombuffer(raw, "<f8").tolist()


class Environment(Frozen):
    """Where a run happened."""

    python: str
    torch: str
    zoo: str
    platform: str
    cpu: str
    cpus: int
    threads: int

    @classmethod
    def here(cls) -> Environment:
        """The environment of this process."""
        import torch

        return cls(
            python=platform.python_version(),
            torch=torch.__version__,
            zoo=zoo_version(),
            platform=platform.platform(),
            cpu=cpu_name(),
            cpus=os.cpu_count() or 1,
            threads=torch.get_num_threads(),
        )


class Pair(Frozen):
    """A cost of the dense model and of the sparse one."""

    dense: int
    sparse: int


class Cost(Frozen):
    """What the model costs; what is not known is None."""

    parameters: Pair | None = None
    flops: Pair | None = None
    bytes: Pair | None = None
    bytes_on_disk: int | None = None


class Record(Frozen):
    """One run of one task on one model in one execution.

    `key` is the content address: equal keys mean equal model, task, data, code, execution and seed. It is
    empty where that could not be known; such a record is not kept.
    """

    schema_version: int = SCHEMA_VERSION
    key: str
    model: str
    model_version: str | None = None
    dense_twin: str | None = None
    weights_sha256: str
    execution: str
    task: str
    task_version: str
    primary: str
    direction: Literal[-1, 1]
    unit: str = ""
    code_sha256: str
    metrics: dict[str, MetricValue]
    samples: dict[str, Samples] = Field(default_factory=dict)
    sample_set: str = ""
    n: int
    sparsity: float | None = None
    cost: Cost = Cost()
    seed: int
    seconds: float
    peak_memory_bytes: int
    created: str
    environment: Environment

    def write(self, path: str | Path) -> Path:
        """Write as JSON, atomically; the folder is made if need be."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return atomic_write(path, (self.model_dump_json() + "\n").encode())

    def keep(self, path: Path) -> Path:
        """Write as a checked container (`zoo.shared.store.checked`) that belongs to the key."""
        return write_checked(path, {}, self.model_dump(mode="json"), identity=self.key)

    @classmethod
    def kept(cls, path: Path, key: str) -> Record:
        """Read what `keep` wrote, every byte of it checked.

        Raises:
            FormatError, IdentityError: it is damaged or was edited, or belongs to another key.
            DataError: it is not a record of this schema.
            OSError: it is not there or not readable.
        """
        _, facts = read_checked(path, identity=key)
        record = cls._validated(json.dumps(facts), path)
        if record.key != key:
            raise DataError(
                f"{path} is a record of {record.model} on {record.task} with another key; delete it"
            )
        return record

    @classmethod
    def read(cls, path: str | Path) -> Record:
        """Read and validate a record.

        Raises:
            DataError: the file is not a record of this schema.
        """
        return cls._validated(Path(path).read_bytes(), path)

    @classmethod
    def _validated(cls, text: str | bytes, path: str | Path) -> Record:
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise DataError(
                f"{path} is not a record of schema {SCHEMA_VERSION}: {where}: {first['msg']}"
            ) from None


def now() -> str:
    """The time in UTC, to the second, in ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def zoo_version() -> str:
    """Version of the installed distribution, or of the source tree when it is not installed."""
    from importlib.metadata import PackageNotFoundError

    try:
        return version("sparse-model-zoo")
    except PackageNotFoundError:
        return "0.0.0+source"


def cpu_name() -> str:
    """The processor's name as Linux gives it, else what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class PeakMemory:
    """Peak resident memory of a block of code, in bytes.

    Linux can reset a process's high-water mark, so that the figure is the block's own; elsewhere it is the
    peak of the process so far.
    """

    bytes: int = 0

    def __enter__(self) -> PeakMemory:
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._resettable = True
        except OSError:
            self._resettable = False
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._resettable:
            for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
                if line.startswith("VmHWM:"):
                    self.bytes = int(line.split()[1]) * 1024
                    return
        unit = 1 if platform.system() == "Darwin" else 1024
        self.bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
