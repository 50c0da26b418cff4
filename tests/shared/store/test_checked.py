"""Checked files: what is written comes back, and every damage is named and refused."""

from __future__ import annotations

import errno
import json

import pytest
import torch

from zoo.shared.errors import FormatError, IdentityError, SparseError, StorageError
from zoo.shared.store.checked import identity_of, read_checked, write_checked
from zoo.shared.store.formats.container import read_container, write_container
from zoo.shared.train import Checkpoint

TENSORS = {
    "model/0.weight": torch.arange(6.0).reshape(2, 3),
    "step": torch.tensor(7),
    "empty": torch.zeros(0, 3),
    "keep": torch.tensor([True, False]),
    "half": torch.ones(3, dtype=torch.bfloat16),
}
FACTS = {"epoch": 3, "note": "x", "list": [1, 2.5]}


def test_round_trip(tmp_path) -> None:
    path = write_checked(tmp_path / "new" / "f.safetensors", TENSORS, FACTS, identity="me")
    tensors, facts = read_checked(path, identity="me")
    assert facts == FACTS and tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype and torch.equal(tensors[name], value)


def test_every_flipped_bit_is_refused(tmp_path) -> None:
    path = write_checked(tmp_path / "f", {"a": torch.tensor([1.0, 2.0])}, {"n": 1}, identity="me")
    whole = path.read_bytes()
    for position in range(len(whole)):
        bad = bytearray(whole)
        bad[position] ^= 1 << position % 8
        path.write_bytes(bytes(bad))
        with pytest.raises(SparseError):
            read_checked(path, identity="me")


def test_every_truncation_is_refused(tmp_path) -> None:
    path = write_checked(tmp_path / "f", {"a": torch.tensor([1.0, 2.0])})
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match=str(path)):
            read_checked(path)


def test_a_missing_tensor_and_changed_facts_are_named(tmp_path) -> None:
    from zoo.shared.store.checked import _array

    path = write_checked(tmp_path / "f", TENSORS, FACTS)
    metadata = dict(read_container(path).metadata)
    write_container(path, [_array(path, k, v) for k, v in TENSORS.items() if k != "step"], metadata)
    with pytest.raises(FormatError, match="the tensor 'step' is missing"):
        read_checked(path)
    changed = {**metadata, "facts": json.dumps({"epoch": 4})}
    write_container(path, [_array(path, k, v) for k, v in TENSORS.items()], changed)
    with pytest.raises(FormatError, match="seal"):
        read_checked(path)


def test_the_file_of_another_run_is_refused(tmp_path) -> None:
    path = write_checked(tmp_path / "f", TENSORS, identity=identity_of({"lr": 0.1}))
    with pytest.raises(IdentityError, match="belongs to another run"):
        read_checked(path, identity=identity_of({"lr": 0.2}))
    assert identity_of({"a": 1, "b": 2}) == identity_of({"b": 2, "a": 1})


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = write_checked(tmp_path / "f", TENSORS, FACTS)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device.*free some space"):
        write_checked(path, {}, {})
    monkeypatch.undo()
    assert read_checked(path)[1] == FACTS and len(list(tmp_path.iterdir())) == 1


def test_what_no_file_can_hold_is_refused(tmp_path) -> None:
    with pytest.raises(FormatError, match="'c' is torch.complex64"):
        write_checked(tmp_path / "f", {"c": torch.zeros(1, dtype=torch.complex64)})
    with pytest.raises(FormatError, match="the facts are no JSON"):
        write_checked(tmp_path / "f", {}, {"x": float("nan")})


def test_checkpoints_name_the_remedy(tmp_path) -> None:
    file = Checkpoint(tmp_path / "run", {"seed": 0})
    assert file.read() is None
    file.write(TENSORS, {"execution": "pairs"})
    assert file.read()[1] == {"execution": "pairs"}
    with pytest.raises(IdentityError, match="other options or another model. Delete"):
        Checkpoint(tmp_path / "run", {"seed": 1}).read()
    (tmp_path / "run" / "state.safetensors").write_bytes(b"nonsense that is long enough to be a file")
    with pytest.raises(FormatError, match="cannot be read: .*Delete"):
        file.read()
    file.remove()
    assert file.read() is None
