"""The packed format: exact round trips, size, laziness, ties, refusals."""

from __future__ import annotations

import builtins
import errno
import io
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zoo.shared.errors import FormatError, MaskError
from zoo.shared.masks import Mask, MaskSet
from zoo.shared.masks.patterns import NM, Block, Group, Pattern, Unstructured, Whole
from zoo.shared.store.formats import load_packed, open_packed, save_packed
from zoo.shared.store.formats.coding import decode_mask, encode_mask
from zoo.shared.store.formats.container import DTYPE_NAMES, DTYPES

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_identical(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert bits(a) == bits(b)


def random_mask(shape: tuple[int, ...], pattern: Pattern, density: float, seed: int = 0) -> Mask:
    score = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return Mask(pattern.keep(score, pattern.feasible(shape, round(density * score.numel()))), pattern)


PATTERNS: list[tuple[tuple[int, ...], Pattern]] = [
    ((64, 48), Unstructured()),
    ((7,), Unstructured()),
    ((), Unstructured()),
    ((0, 4), Unstructured()),
    ((16, 32), NM(2, 4)),
    ((16, 32), NM(1, 4, dim=0)),
    ((6, 16, 3, 3), NM(4, 8, dim=1)),
    ((64, 64), NM(1, 16)),
    ((16, 6, 2, 2), Block(4, 3)),
    ((16, 32), Block(1, 16)),
    ((12, 5, 3, 3), Group(0)),
    ((12, 5, 3, 3), Group(1)),
    ((12, 5), Group(-1)),
    ((9, 9), Whole()),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("density", [0.0, 0.004, 0.1, 0.5, 1.0])
def test_round_trip_is_exact(tmp_path, dtype, density) -> None:
    tensors, masks = {}, {}
    for i, (shape, pattern) in enumerate(PATTERNS):
        name = f"layer{i}.weight"
        masks[name] = random_mask(shape, pattern, density, seed=i)
        tensors[name] = (torch.randn(shape) * masks[name].keep + 0.0).to(dtype)
    tensors["bias"] = torch.randn(13).to(dtype)
    metadata = {"seed": 3, "note": 'ünïcode " \\ \n', "nested": {"list": [1, None, True, 0.1]}}
    save_packed(tmp_path / "f", tensors, masks, metadata=metadata)
    contents = load_packed(tmp_path / "f")
    assert list(contents.tensors) == list(tensors) and set(contents.masks) == set(masks)
    for name, tensor in tensors.items():
        assert_identical(contents.tensors[name], tensor)
    for name, mask in masks.items():
        assert contents.masks[name].equal(mask) and contents.masks[name].pattern == mask.pattern
    assert contents.metadata == metadata


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_with_and_without_mask(tmp_path, dtype) -> None:
    torch_dtype, size = DTYPES[dtype]
    raw = torch.arange(24 * size, dtype=torch.uint8).reshape(-1)
    tensor = (raw % 2 if dtype == "BOOL" else raw).view(torch_dtype).reshape(4, 6)
    keep = torch.zeros(4, 6, dtype=torch.bool)
    keep[:2] = True
    masked = torch.zeros(4, 6, dtype=torch_dtype)
    masked[:2] = tensor[:2]
    save_packed(tmp_path / "f", {"dense": tensor, "masked": masked}, {"masked": keep})
    contents = load_packed(tmp_path / "f")
    assert_identical(contents.tensors["dense"], tensor)
    assert_identical(contents.tensors["masked"], masked)


@pytest.mark.parametrize("dtype", FLOATS)
def test_kept_values_survive_bit_for_bit(tmp_path, dtype) -> None:
    """Kept zeros of both signs, infinities and NaN payloads: the mask is the truth, not `w != 0`."""
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    payload_nan = torch.tensor([torch.tensor(float("nan"), dtype=dtype).view(word) | 5], dtype=word).view(
        dtype
    )
    special = torch.cat(
        [torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-7], dtype=dtype), payload_nan]
    )
    keep = torch.zeros(40, dtype=torch.bool)
    keep[[0, 3, 9, 20, 21, 39]] = True
    tensor = torch.zeros(40, dtype=dtype)
    tensor[keep] = special
    save_packed(tmp_path / "f", {"w": tensor}, {"w": keep})
    contents = load_packed(tmp_path / "f")
    assert_identical(contents.tensors["w"], tensor)
    assert torch.equal(contents.masks["w"].keep, keep)
    assert contents.masks["w"].kept == 6  # two of them are zeros


def test_negative_zeros_under_the_mask_come_back_as_plain_zeros(tmp_path) -> None:
    weight = torch.tensor([-1.0, 2.0, -3.0]) * torch.tensor([0.0, 1.0, 0.0])
    save_packed(tmp_path / "f", {"w": weight}, {"w": torch.tensor([False, True, False])})
    assert_identical(load_packed(tmp_path / "f").tensors["w"], torch.tensor([0.0, 2.0, 0.0]))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 9), max_size=3), st.floats(0, 1))
def test_codes_are_inverse(seed, shape, density) -> None:
    keep = np.asarray(np.random.default_rng(seed).random(shape) < density)
    code = encode_mask(keep)
    assert np.array_equal(decode_mask(code.index, code.payload, keep.shape), keep)


@pytest.mark.parametrize("gap", [0, 1, 254, 255, 256, 509, 510, 511, 65534, 65535, 65536, 131070])
def test_gaps_at_the_escape(gap) -> None:
    keep = np.zeros(200_000, dtype=bool)
    keep[[gap, 2 * gap + 1 if gap < 66_000 else gap + 1]] = True
    code = encode_mask(keep)
    assert code.index["code"] == "gaps"
    assert np.array_equal(decode_mask(code.index, code.payload, keep.shape), keep)


def test_hand_coded_masks() -> None:
    """The bytes that the document promises."""
    code = encode_mask(np.array([1, 0, 0, 1, 1, 0, 1, 0, 1, 1, 1, 1], dtype=bool))
    assert code.index == {"code": "bitmap", "units": "element"}
    assert code.payload is not None and code.payload.tolist() == [0b01011001, 0b1111]

    keep = np.zeros(1000, dtype=bool)
    keep[[0, 2, 300]] = True
    code = encode_mask(keep)
    assert code.index == {"code": "gaps", "units": "element"}
    assert code.payload is not None and code.payload.tolist() == [0, 1, 255, 42]

    # 2:4 choices in order: 01 02 03 12 13 23, so the ranks are 1 (0b001) and 4 (0b100), lowest bit first.
    keep = np.array([[1, 0, 1, 0, 0, 1, 0, 1]] * 4, dtype=bool)
    code = encode_mask(keep, NM(2, 4))
    assert code.index == {"code": "nm", "n": 2, "m": 4, "dim": -1}
    assert code.payload is not None and code.payload.tolist() == [0b01100001, 0b00011000, 0b10000110]

    keep = np.zeros((8, 4), dtype=bool)
    keep[4:] = True
    code = encode_mask(keep, Block(4, 2))
    assert code.index == {"code": "bitmap", "units": "block", "rows": 4, "cols": 2}
    assert code.payload is not None and code.payload.tolist() == [0b1100]


def test_mask_below_its_pattern_still_round_trips(tmp_path) -> None:
    """2:4 allows a group to keep fewer than two; such a mask has no ranks and is stored as a bitmap."""
    keep = torch.tensor([[True, True, False, False, False, False, False, True]] * 8)
    mask = Mask(keep, NM(2, 4))
    report = save_packed(tmp_path / "f", {"w": torch.ones(8, 8) * keep}, {"w": mask})
    assert report.tensors["w"].encoding == "sparse/bitmap"
    assert load_packed(tmp_path / "f").masks["w"].pattern == NM(2, 4)


# -- size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1024, 1024), (64, 64, 3, 3), (7, 100_003)])
def test_size_on_disk(tmp_path, dtype, shape) -> None:
    """At most 1.05 x (kept values + the cheaper of bitmap and index list) + the documented header."""
    numel = int(np.prod(shape))
    for density in (0.0003, 0.001, 0.004, 0.01, 0.02, 0.05, 0.1, 0.15, 0.3, 0.5, 0.7, 0.9, 0.99):
        mask = random_mask(shape, Unstructured(), density)
        report = save_packed(tmp_path / "f", {"w": (torch.randn(shape) * mask.keep).to(dtype)}, {"w": mask})
        index_width = 2 if numel <= 1 << 16 else 4
        bound = mask.kept * dtype.itemsize + min(-(-numel // 8), index_width * mask.kept)
        assert report.header_bytes <= 1000
        assert report.bytes - report.header_bytes <= 1.05 * bound, (density, report.tensors)
        assert report.bytes == (tmp_path / "f").stat().st_size
        assert report.tensors["w"].bytes == report.bytes - report.header_bytes
        assert report.dense_bytes == numel * dtype.itemsize


@pytest.mark.parametrize(
    ("pattern", "index_bits"),
    [
        (NM(2, 4), 3 / 4),
        (NM(1, 4), 2 / 4),
        (NM(2, 8), 5 / 8),
        (NM(4, 8), 7 / 8),
        (NM(4, 16), 11 / 16),
        (Block(4, 1), 1 / 4),
        (Block(16, 16), 1 / 256),
        (Group(0), 1 / 4096),
    ],
)
def test_patterns_take_less_than_a_bitmap(tmp_path, pattern, index_bits) -> None:
    shape = (512, 4096)
    mask = random_mask(shape, pattern, 0.5)
    report = save_packed(tmp_path / "f", {"w": torch.randn(shape) * mask.keep}, {"w": mask})
    assert report.tensors["w"].bytes == mask.kept * 4 + -(-int(mask.numel * index_bits) // 8)


def test_header_of_a_model_of_many_tensors(tmp_path) -> None:
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(200)]
    tensors = {name: torch.rand(64, 64).tril() for name in names}
    report = save_packed(tmp_path / "f", tensors, {name: torch.ones(64, 64).tril().bool() for name in names})
    assert report.header_bytes <= 200 * (450 + 4 * len(names[-1]))
    report = save_packed(tmp_path / "f", tensors)
    assert report.header_bytes <= 200 * (250 + 3 * len(names[-1]))


# -- ties, extras, order


def test_tied_tensors_are_stored_once(tmp_path) -> None:
    weight = torch.eye(50)
    tensors = {"embed": weight, "head": weight, "copy": weight.clone(), "view": weight[:, :25]}
    mask = Mask(torch.eye(50).bool())
    report = save_packed(tmp_path / "f", tensors, {"embed": mask})
    assert report.tensors["head"].bytes == 0 and report.tensors["copy"].bytes == 10_000
    contents = load_packed(tmp_path / "f")
    assert contents.tensors["head"] is contents.tensors["embed"]
    assert contents.tensors["copy"] is not contents.tensors["embed"]
    assert_identical(contents.tensors["head"], weight)
    assert_identical(contents.tensors["view"], weight[:, :25])
    assert set(contents.masks) == {"embed"}
    opened = open_packed(tmp_path / "f")
    assert_identical(opened.tensor("head"), weight)
    assert opened.mask("head") is None and opened.shape("head") == (50, 50)

    save_packed(tmp_path / "g", tensors, {"embed": mask, "head": mask})
    contents = load_packed(tmp_path / "g")
    assert set(contents.masks) == {"embed", "head"} and contents.masks["head"].equal(mask)
    head = open_packed(tmp_path / "g").mask("head")
    assert head is not None and head.equal(mask)

    other = Mask(torch.ones(50, 50, dtype=torch.bool))
    save_packed(tmp_path / "h", tensors, {"head": mask, "embed": other})
    contents = load_packed(tmp_path / "h")
    assert contents.masks["head"].equal(mask) and contents.masks["embed"].equal(other)


class Lazy(Mapping[str, Tensor]):
    """Tensors that are made when asked for and let go at once, each at the address of the one before."""

    def __init__(self) -> None:
        self._memory = bytearray(4 * 64 * 64)

    def __getitem__(self, name: str) -> Tensor:
        value = torch.frombuffer(self._memory, dtype=torch.float32)  # a storage of its own, each time
        return value.fill_(float(name[1:]) + 1).view(64, 64).T

    def __iter__(self) -> Iterator[str]:
        return iter([f"w{i}" for i in range(6)])

    def __len__(self) -> int:
        return 6


def test_tensors_of_a_lazy_mapping_are_not_taken_for_ties(tmp_path) -> None:
    path, whole = tmp_path / "lazy.safetensors", torch.ones(64, 64, dtype=torch.bool)
    save_packed(path, Lazy(), {name: whole for name in Lazy()})
    assert [tensor[0, 0].item() for tensor in load_packed(path).tensors.values()] == [1, 2, 3, 4, 5, 6]


def test_extras(tmp_path) -> None:
    edges = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) < 0.5
    extras = {
        "edges": edges,
        "few": torch.arange(3000) == 7,
        "scalar": torch.tensor(True),
        "none": torch.zeros(0),
        "thresholds/0": torch.randn(5, dtype=torch.float64),
        "ids": torch.arange(4),
    }
    report = save_packed(tmp_path / "f", {}, extras=extras)
    assert report.extras["edges"].bytes == 1250 and report.extras["few"].bytes == 1
    opened = open_packed(tmp_path / "f")
    assert opened.extras() == list(extras) and opened.keys() == []
    for name, extra in load_packed(tmp_path / "f").extras.items():
        assert_identical(extra, extras[name])


def test_non_contiguous_and_parameters(tmp_path) -> None:
    weight = torch.nn.Parameter(torch.randn(6, 4, 3).permute(2, 0, 1))
    keep = weight.detach() > 0
    with torch.no_grad():
        weight.mul_(keep)
    save_packed(
        tmp_path / "f",
        {"w": weight, "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)},
        {"w": keep},
    )
    contents = load_packed(tmp_path / "f")
    assert torch.equal(contents.tensors["w"], weight.detach()) and not contents.tensors["w"].requires_grad
    contents.tensors["w"].add_(1)  # memory of its own, writable


def test_same_content_gives_same_bytes(tmp_path) -> None:
    tensors = {f"t{i}": torch.full((3,), float(i)) for i in range(20)}
    save_packed(tmp_path / "a", tensors, metadata={"x": 1})
    save_packed(tmp_path / "b", {name: t.clone() for name, t in tensors.items()}, metadata={"x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_nothing_at_all(tmp_path) -> None:
    save_packed(tmp_path / "f", {})
    contents = load_packed(tmp_path / "f")
    assert contents.tensors == {} and contents.extras == {} and len(contents.masks) == 0


# -- the safetensors library as an oracle


def test_the_public_library_reads_the_same_arrays(tmp_path) -> None:
    tensors = {
        "a": torch.randn(5, 7),
        "b": torch.randn(3).bfloat16(),
        "c": torch.tensor(2, dtype=torch.int64),
        "e": torch.zeros(0, 3, dtype=torch.float16),
    }
    mask = random_mask((32, 32), Unstructured(), 0.3)
    masked = torch.rand(32, 32) * mask.keep
    save_packed(tmp_path / "f", {**tensors, "m": masked}, {"m": mask})
    public = safetensors.torch.load_file(tmp_path / "f")
    assert set(public) == {"tensor.index/m", "tensor.values/m", *(f"tensor/{name}" for name in tensors)}
    for name, tensor in tensors.items():
        assert_identical(public[f"tensor/{name}"], tensor)
    assert_identical(public["tensor.values/m"], masked[mask.keep])


def test_arrays_rewritten_by_the_public_library_are_still_read(tmp_path) -> None:
    """Another order of arrays and metadata is the same file."""
    mask = random_mask((32, 32), Unstructured(), 0.02)
    masked = torch.rand(32, 32) * mask.keep
    save_packed(tmp_path / "f", {"m": masked, "x": torch.arange(3)}, {"m": mask})
    with safetensors.safe_open(tmp_path / "f", framework="pt") as file:
        metadata = file.metadata()
        arrays = {key: file.get_tensor(key) for key in sorted(file.keys(), reverse=True)}
    safetensors.torch.save_file(arrays, tmp_path / "g", metadata)
    assert_identical(load_packed(tmp_path / "g").tensors["m"], masked)


# -- one tensor without the rest


class CountedReads:
    """Stands for `open` and counts the bytes that are read."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, path, mode="r"):
        counter = self

        class Counted(io.FileIO):
            def read(self, size=-1):
                data = super().read(size)
                counter.bytes += len(data)
                return data

            def readinto(self, buffer):
                count = super().readinto(buffer)
                counter.bytes += count
                return count

        return Counted(path, "r")


def test_one_tensor_reads_only_its_own_bytes(tmp_path, monkeypatch) -> None:
    mask = random_mask((256, 256), Unstructured(), 0.25)
    tensors = {
        "small": torch.rand(256, 256) * mask.keep,
        "large": torch.randn(1000, 1000),
        "other": torch.randn(500, 500),
    }
    report = save_packed(tmp_path / "f", tensors, {"small": mask})
    counted = CountedReads()
    monkeypatch.setattr("zoo.shared.store.formats.container.open", counted, raising=False)
    opened = open_packed(tmp_path / "f")
    assert counted.bytes <= report.header_bytes + 32
    counted.bytes = 0
    assert opened.shape("large") == (1000, 1000) and opened.dtype("large") == torch.float32
    assert opened.masked() == ["small"] and counted.bytes == 0
    assert_identical(opened.tensor("small"), tensors["small"])
    assert counted.bytes == report.tensors["small"].bytes
    counted.bytes = 0
    opened.mask("small")
    assert counted.bytes == 256 * 256 // 8
    assert builtins.open is not counted


def test_damage_elsewhere_does_not_matter(tmp_path) -> None:
    save_packed(tmp_path / "f", {"a": torch.arange(100.0), "b": torch.arange(200.0)})
    data = bytearray((tmp_path / "f").read_bytes())
    data[-10] ^= 1  # within b
    (tmp_path / "f").write_bytes(data)
    opened = open_packed(tmp_path / "f")
    assert_identical(opened.tensor("a"), torch.arange(100.0))
    with pytest.raises(FormatError, match="'tensor/b' does not match.*damaged; fetch the file again"):
        opened.tensor("b")
    with pytest.raises(FormatError):
        load_packed(tmp_path / "f")


def test_file_replaced_between_opening_and_reading(tmp_path) -> None:
    save_packed(tmp_path / "f", {"a": torch.zeros(100)})
    opened = open_packed(tmp_path / "f")
    save_packed(tmp_path / "f", {"a": torch.zeros(101)})
    with pytest.raises(FormatError, match="changed on disk"):
        opened.tensor("a")


# -- refusals when writing


@pytest.mark.parametrize(
    "name", ["", "a\0b", "../up", "/etc/passwd", "a//b", "a/./b", "a\\b", "x" * 1025, "\ud800", "a\n"]
)
def test_names_that_are_refused(tmp_path, name) -> None:
    with pytest.raises(FormatError, match="name"):
        save_packed(tmp_path / "f", {name: torch.zeros(2)})
    with pytest.raises(FormatError, match="name"):
        save_packed(tmp_path / "f", {}, extras={name: torch.zeros(2)})
    assert list(tmp_path.iterdir()) == []


def test_masks_that_do_not_fit(tmp_path) -> None:
    weight = torch.ones(4, 4)
    with pytest.raises(MaskError, match="'v', which is not among the 1 tensors"):
        save_packed(tmp_path / "f", {"w": weight}, {"v": weight.bool()})
    with pytest.raises(MaskError, match=r"shape \[4\], its tensor \[4, 4\]"):
        save_packed(tmp_path / "f", {"w": weight}, {"w": torch.ones(4, dtype=torch.bool)})
    with pytest.raises(MaskError, match="6 of the entries that its mask drops are not zero"):
        save_packed(tmp_path / "f", {"w": weight}, {"w": weight.tril().bool()})
    with pytest.raises(MaskError, match="1 of the entries"):
        save_packed(
            tmp_path / "f", {"w": torch.tensor([1.0, float("nan")])}, {"w": torch.tensor([True, False])}
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta"), torch.eye(3).to_sparse()]
)
def test_tensors_that_cannot_be_stored(tmp_path, tensor) -> None:
    with pytest.raises(FormatError, match="cannot be stored"):
        save_packed(tmp_path / "f", {"w": tensor})


@pytest.mark.parametrize(
    "metadata", [{"x": float("nan")}, {"x": torch.zeros(2)}, {"x": {1: 2}}, {"x": (1, 2)}, {"x": {1, 2}}]
)
def test_metadata_that_would_change(tmp_path, metadata) -> None:
    with pytest.raises(FormatError, match="metadata"):
        save_packed(tmp_path / "f", {}, metadata=metadata)


def test_missing_names(tmp_path) -> None:
    save_packed(tmp_path / "f", {"w": torch.ones(2)}, extras={"e": torch.ones(1)})
    opened = open_packed(tmp_path / "f")
    for call in (opened.tensor, opened.mask, opened.extra, opened.shape, opened.dtype):
        with pytest.raises(FormatError, match="no (tensor|extra) 'v'"):
            call("v")


# -- full disk, atomic


def test_full_disk_leaves_the_old_file(tmp_path) -> None:
    """The file size limit of the process plays the full disk."""
    target = tmp_path / "f"
    save_packed(target, {"w": torch.ones(10)})
    before = target.read_bytes()
    code = (
        "import resource, signal, sys, torch\n"
        "from zoo.shared.store.formats import save_packed\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    save_packed(sys.argv[1], {'w': torch.ones(1_000_000)})\n"
        "except OSError as error:\n"
        "    print('refused', error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(target)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["refused", str(errno.EFBIG)], done.stderr
    assert target.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_no_space_left_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    target = tmp_path / "f"
    save_packed(target, {"w": torch.ones(10)})
    before = target.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_packed(target, {"w": torch.zeros(10)})
    assert target.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_dtype_tables_agree() -> None:
    assert {DTYPE_NAMES[dtype] for dtype, _ in DTYPES.values()} == set(DTYPES)
    assert all(dtype.itemsize == size for dtype, size in DTYPES.values())


def test_maskset_argument(tmp_path) -> None:
    mask = random_mask((4, 8), NM(2, 4), 0.5)
    save_packed(tmp_path / "f", {"w": torch.ones(4, 8) * mask.keep}, MaskSet({"w": mask}))
    assert load_packed(tmp_path / "f").masks["w"].pattern == NM(2, 4)
