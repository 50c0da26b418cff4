"""Records: compact samples, schema, environment, memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from zoo.errors import DataError
from zoo.harness.records import Environment, MetricValue, Record, Samples


def record(**changes):
    fields = {
        "key": "0" * 64,
        "model": "toy/dense-mlp",
        "weights_sha256": "1" * 64,
        "execution": "masked",
        "task": "toy/accuracy",
        "task_version": "1",
        "primary": "accuracy",
        "direction": 1,
        "code_sha256": "",
        "metrics": {"accuracy": MetricValue(value=0.5, stderr=0.1)},
        "samples": {"accuracy": Samples.encode([0.0, 1.0])},
        "n": 2,
        "seed": 0,
        "seconds": 0.1,
        "peak_memory_bytes": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "environment": Environment.here(),
    }
    return Record(**(fields | changes))


@pytest.mark.parametrize(
    ("values", "encoding"),
    [
        ([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0], "bits"),
        ([0.1, -2.5, 1e300, 5e-324], "f64le"),
        ([], "bits"),
    ],
)
def test_samples_come_back_exactly(values, encoding):
    packed = Samples.encode(values)
    assert packed.encoding == encoding
    assert packed.decode() == values


def test_binary_samples_take_a_bit_each():
    assert len(Samples.encode([1.0, 0.0] * 600).data) == 200


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (Samples(encoding="bits", n=9, data="AAAA"), "3 bytes, but 9 samples need 2"),
        (Samples(encoding="f64le", n=1, data="!"), "base64"),
    ],
)
def test_broken_samples_are_refused(samples, message):
    with pytest.raises(DataError, match=message):
        samples.decode()


def test_round_trip_through_a_file(tmp_path):
    written = record()
    path = written.write(tmp_path / "new" / "one.json")
    assert Record.read(path) == written
    assert json.loads(path.read_text())["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the file"),
        ("{}", "key: Field required"),
        (json.dumps({**json.loads(record().model_dump_json()), "surprise": 1}), "surprise: Extra"),
        (json.dumps({**json.loads(record().model_dump_json()), "direction": 0}), "direction"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        Record.read(path)


def test_peak_memory_sees_a_short_allocation():
    # In a process of its own: where the mark cannot be reset, an earlier peak would hide this one.
    script = """
from zoo.harness.records import PeakMemory
with PeakMemory() as before:
    pass
with PeakMemory() as during:
    held = bytearray(80_000_000)
    held[::4096] = b"x" * len(held[::4096])
    del held
print(during.bytes - before.bytes)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(told.stdout) > 60_000_000
