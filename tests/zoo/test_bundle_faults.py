"""Bundles that are damaged, hostile or cannot be written: a clear error each, and the old bundle intact."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from zoo.bundles import folders
from zoo.bundles import store as bundles
from zoo.bundles.folders import put_folder, refuse_taken
from zoo.bundles.store import load, save
from zoo.errors import BundleError, CardError, ConfigError, UnwritableBundleError, ZooError
from zoo.shared.errors import MaskError, StorageError
from zoo.shared.masks import MaskSet
from zoo.shared.store.formats import load_packed, save_packed

WEIGHTS = "weights.safetensors"


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def make_card_agree(folder: Path) -> None:
    """Let the card state hash and size of the weights as they are: a liar that lies consistently."""
    data = (folder / WEIGHTS).read_bytes()
    card = yaml.safe_load((folder / "card.yaml").read_text())
    card["weights"] |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    card["cost"]["bytes"]["on_disk"] = len(data)
    (folder / "card.yaml").write_text(yaml.safe_dump(card, sort_keys=False))


def edit_card(folder: Path, old: str, new: str) -> None:
    text = (folder / "card.yaml").read_text()
    assert old in text
    (folder / "card.yaml").write_text(text.replace(old, new, 1))


# -- reading: the card does not know


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_truncated_weights(tiny_bundle: Path, share: float) -> None:
    data = (tiny_bundle / WEIGHTS).read_bytes()
    (tiny_bundle / WEIGHTS).write_bytes(data[: int(share * len(data))])
    with pytest.raises(BundleError, match=rf"{WEIGHTS}: \d+ bytes, but its card says \d+; it is truncated"):
        load(tiny_bundle)


def test_every_flipped_bit_is_noticed(tiny_bundle: Path) -> None:
    data = bytearray((tiny_bundle / WEIGHTS).read_bytes())
    for position in range(0, len(data), max(1, len(data) // 60)):
        data[position] ^= 1 << (position % 8)
        (tiny_bundle / WEIGHTS).write_bytes(data)
        with pytest.raises(BundleError, match="sha256 .* but its card says .* damaged"):
            load(tiny_bundle)
        data[position] ^= 1 << (position % 8)


def test_weights_that_are_missing_or_no_file(tiny_bundle: Path) -> None:
    weights = tiny_bundle / WEIGHTS
    weights.unlink()
    with pytest.raises(BundleError, match=f"{WEIGHTS}: cannot be read: No such file"):
        load(tiny_bundle)
    weights.mkdir()
    with pytest.raises(BundleError, match="not a regular file"):
        load(tiny_bundle)
    weights.rmdir()
    os.mkfifo(weights)
    with pytest.raises(BundleError, match="not a regular file"):
        load(tiny_bundle)
    weights.unlink()
    weights.symlink_to("/dev/zero")
    with pytest.raises(BundleError, match="not a regular file"):
        load(tiny_bundle)


def test_a_card_that_lies_about_hash_or_size(tiny_bundle: Path) -> None:
    card = (tiny_bundle / "card.yaml").read_text()
    stated = yaml.safe_load(card)["weights"]
    edit_card(tiny_bundle, stated["sha256"], "f" * 64)
    with pytest.raises(BundleError, match="its card says ffffffffffff"):
        load(tiny_bundle)
    size = stated["bytes"]
    (tiny_bundle / "card.yaml").write_text(card.replace(str(size), str(size + 1)))
    with pytest.raises(BundleError, match=f"{size} bytes, but its card says {size + 1}"):
        load(tiny_bundle)


def test_a_path_in_the_file_name(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.safetensors").write_bytes((tiny_bundle / WEIGHTS).read_bytes())
    outside = str(tmp_path / "outside.safetensors")
    for name in ("../outside.safetensors", outside, "..\\\\outside.safetensors"):
        text = (tiny_bundle / "card.yaml").read_text()
        edit_card(tiny_bundle, f"file: {WEIGHTS}", f'file: "{name}"')
        with pytest.raises(CardError, match="weights.file: expected a bare file name"):
            load(tiny_bundle)
        (tiny_bundle / "card.yaml").write_text(text)


def test_a_bomb_for_a_card(tiny_bundle: Path) -> None:
    bomb = "a: &a [x, x, x]\n" + "\n".join(f"b{i}: [*a, *a, *a, *a]" for i in range(100))
    (tiny_bundle / "card.yaml").write_text(bomb)
    with pytest.raises(CardError, match="card.yaml:2: a YAML alias"):
        load(tiny_bundle)


# -- reading: the card agrees with what is there, and that is wrong


def a_pickle(state: dict) -> bytes:
    class Harm:
        def __reduce__(self) -> tuple:
            return (os.mkdir, ("harm-was-done",))

    return pickle.dumps({"weight": Harm()})


def a_torch_file(state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def a_zip(state: dict) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x", "y")
    return buffer.getvalue()


def plain_safetensors(state: dict) -> bytes:
    from safetensors.torch import save as save_plain

    return save_plain({name: value.clone() for name, value in state.items()})


@pytest.mark.parametrize(
    "content,message",
    [
        (a_pickle, "pickle"),
        (a_torch_file, "torch.save"),
        (a_zip, "zip archive"),
        (plain_safetensors, "not a zoo-packed file"),
        (lambda _: b"<html>503</html>", "web page"),
        (lambda _: b"x", "too few"),
        (lambda _: bytes(1000), "header of 0 bytes"),
        (lambda _: b"\xff" * 1000, "truncated or not a safetensors file"),
    ],
    ids=["pickle", "torch", "zip", "plain", "html", "one byte", "zeros", "ones"],
)
def test_something_else_in_place_of_the_weights(
    tiny_bundle: Path, tiny_model, monkeypatch, content: Callable[[dict], bytes], message: str
) -> None:
    monkeypatch.chdir(tiny_bundle.parent)
    (tiny_bundle / WEIGHTS).write_bytes(content(tiny_model.state_dict()))
    make_card_agree(tiny_bundle)
    with pytest.raises(BundleError, match=message) as caught:
        load(tiny_bundle)
    assert "graph/tiny-test" in str(caught.value) and len(str(caught.value)) < 700
    assert not Path("harm-was-done").exists()


def rewrite(folder: Path, change: Callable[[dict, dict, dict], None]) -> None:
    """Store other contents, with a card that agrees."""
    old = load_packed(folder / WEIGHTS)
    tensors, masks, metadata = dict(old.tensors), dict(old.masks), dict(old.metadata)
    change(tensors, masks, metadata)
    save_packed(folder / WEIGHTS, tensors, masks, old.extras, metadata)
    make_card_agree(folder)


def drop_tensor(tensors: dict, masks: dict, metadata: dict) -> None:
    del tensors["first.bias"]


def add_tensor(tensors: dict, masks: dict, metadata: dict) -> None:
    tensors["third.bias"] = torch.zeros(3)


def other_shape(tensors: dict, masks: dict, metadata: dict) -> None:
    tensors["first.bias"] = torch.zeros(9)


def other_mask_shape(tensors: dict, masks: dict, metadata: dict) -> None:
    tensors["first.weight"] = torch.zeros(9, 4)
    masks["first.weight"] = MaskSet({"x": torch.zeros(9, 4, dtype=torch.bool)})["x"]


def mask_of_a_buffer(tensors: dict, masks: dict, metadata: dict) -> None:
    tensors["norm.running_mean"] = torch.zeros(8)
    masks["norm.running_mean"] = MaskSet({"x": torch.zeros(8, dtype=torch.bool)})["x"]


def other_type(tensors: dict, masks: dict, metadata: dict) -> None:
    tensors["first.bias"] = torch.zeros(8, dtype=torch.int32)


def other_architecture(tensors: dict, masks: dict, metadata: dict) -> None:
    metadata["architecture"] = {"name": "test/tiny", "args": {"width": 9}}


def no_architecture(tensors: dict, masks: dict, metadata: dict) -> None:
    metadata.clear()


def strange_architecture(tensors: dict, masks: dict, metadata: dict) -> None:
    metadata["architecture"] = [1, 2]


@pytest.mark.parametrize(
    "change,message",
    [
        (drop_tensor, "the weights lack 'first.bias'"),
        (add_tensor, "'third.bias', which the architecture lacks"),
        (other_shape, r"'first.bias' has the shape \(9,\), the architecture \(8,\)"),
        (other_mask_shape, r"'first.weight' has the shape \(9, 4\)"),
        (mask_of_a_buffer, "no parameter 'norm.running_mean'"),
        (other_type, "stored as torch.int32, the architecture has torch.float32"),
        (other_architecture, "not the one that its weights were saved with"),
        (no_architecture, "not the one that its weights were saved with"),
        (strange_architecture, "not the one that its weights were saved with"),
    ],
)
def test_weights_of_another_model(tiny_bundle: Path, change, message: str) -> None:
    rewrite(tiny_bundle, change)
    with pytest.raises(BundleError, match=message):
        load(tiny_bundle)


def test_a_card_with_other_arguments_builds_nothing(tiny_bundle: Path) -> None:
    edit_card(tiny_bundle, "width: 8", "width: 8000000000")
    with pytest.raises(BundleError, match="not the one that its weights were saved with"):
        load(tiny_bundle)


def test_an_architecture_is_looked_up_never_imported(tiny_bundle: Path) -> None:
    def change(tensors: dict, masks: dict, metadata: dict) -> None:
        metadata["architecture"]["name"] = "os:system"

    edit_card(tiny_bundle, "name: test/tiny", "name: os:system")
    rewrite(tiny_bundle, change)
    with pytest.raises(ZooError, match="Unknown architecture 'os:system'"):
        load(tiny_bundle)


# -- writing


def test_masks_of_another_shape_are_not_saved(tiny_model, tiny_fields, tmp_path: Path) -> None:
    masks = MaskSet({"first.weight": torch.ones(4, 8, dtype=torch.bool)})
    with pytest.raises(MaskError, match=r"'first.weight' has shape \(4, 8\), the parameter \(8, 4\)"):
        save(tiny_model, tmp_path / "b", card=tiny_fields, masks=masks)
    misnamed = MaskSet({"frist.weight": masks["first.weight"]})
    with pytest.raises(MaskError, match="no parameter 'frist.weight'.*did you mean 'first.weight'"):
        save(tiny_model, tmp_path / "b", card=tiny_fields, masks=misnamed)
    assert list(tmp_path.iterdir()) == []


STEPS = [
    "os.fsync",
    "os.replace",
    "pathlib.Path.rename",
    "pathlib.Path.write_text",
    "pathlib.Path.chmod",
    "tempfile.mkdtemp",
    "tempfile.mkstemp",
    "os.fdopen",
]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "renames"])
def test_a_disk_that_fails_at_any_step(
    tiny_bundle: Path, save_tiny, monkeypatch, step: str, number: int, exchange: bool
) -> None:
    """The n-th call of one function fails, for every n that saving gets to."""
    before = snapshot(tiny_bundle)
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda first, second: False)
    module, _, name = step.rpartition(".")
    owner = Path if module == "pathlib.Path" else sys.modules[module]
    original = getattr(owner, name)
    failures = 0
    for failing in range(20):
        calls = 0

        def fails(*args, _failing=failing, **kwargs):
            nonlocal calls
            calls += 1
            if calls - 1 == _failing:
                raise OSError(number, os.strerror(number))
            return original(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(owner, name, fails)
            try:
                save_tiny(tiny_bundle, overwrite=True, version="2.0.0")
                break
            except BundleError as error:
                assert os.strerror(number) in str(error) and "intact" in str(error)
        failures += 1
        assert snapshot(tiny_bundle) == before
        assert os.listdir(tiny_bundle.parent) == [tiny_bundle.name], "nothing is left behind"
    assert failures or (step, exchange) == ("pathlib.Path.rename", True)
    assert load(tiny_bundle).zoo_info.card.version == "2.0.0", "once the disk works again"


SAVE_IN_CHILD = """
    import json, os, resource, signal, sys
    from pathlib import Path
    sys.path[:0] = [{root!r}]
    import torch
    from torch import nn
    from zoo.bundles import store as bundles, folders
    from zoo.registry import ARCHITECTURES
    from zoo.bundles.card import read_card
    from zoo.errors import ZooError

    folder = Path(sys.argv[1])
    ARCHITECTURES.register("test/linear", nn.Linear)
    torch.manual_seed(int(sys.argv[2]))
    fields = read_card(folder / "card.yaml").to_dict()
    fields |= {{"version": sys.argv[3], "architecture": {{"name": "test/linear", "args": {{
        "in_features": 100, "out_features": 100}}}}}}
    del fields["cost"]["parameters"], fields["cost"]["bytes"], fields["sparsity"]

    def save():
        bundles.save(nn.Linear(100, 100), folder, card=fields, extras={{}}, overwrite=True)
"""


def child(body: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    root = str(Path(bundles.__file__).parents[1])
    code = textwrap.dedent(SAVE_IN_CHILD).format(root=root) + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_disk_that_is_really_full(tiny_bundle: Path) -> None:
    """The kernel refuses every byte beyond 16 KiB of a file; the weights need 40 kB."""
    before = snapshot(tiny_bundle)
    done = child(
        """
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, 16 << 10))
        try:
            save()
        except ZooError as error:
            print(type(error).__name__, error)
    """,
        tiny_bundle,
        0,
        "2.0.0",
    )
    assert done.stdout.startswith("UnwritableBundleError") and "File too large" in done.stdout, done.stderr
    assert "intact" in done.stdout and done.stdout.count("\n") == 1
    assert snapshot(tiny_bundle) == before and os.listdir(tiny_bundle.parent) == [tiny_bundle.name]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_kill_at_any_step_leaves_the_old_or_the_new(tiny_bundle: Path, tmp_path: Path) -> None:
    """Dies, as by kill -9, right before and right after each step that changes the disk."""
    before = snapshot(tiny_bundle)
    done = child(
        """
        steps = [(os, "fsync"), (os, "replace"), (Path, "rename"), (Path, "write_text")]
        steps.append((folders, "_exchange"))
        count, fatal = 0, -1

        def watched(original):
            def call(*args, **kwargs):
                global count
                count += 1
                if count == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = original(*args, **kwargs)
                count += 1
                if count == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result
            return call

        for owner, name in steps:
            setattr(owner, name, watched(getattr(owner, name)))
        old = {path.name: path.read_bytes() for path in folder.iterdir()}
        outcomes = []
        for fatal in range(1, 100):
            pid = os.fork()
            if pid == 0:
                save()
                os._exit(0)
            died = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            now = {path.name: path.read_bytes() for path in folder.iterdir()}
            bundles.open_bundle(folder).check()
            outcomes.append("old" if now == old else "new")
            if not died:
                break
        print(json.dumps([outcomes, died]))
    """,
        tiny_bundle,
        0,
        "2.0.0",
    )
    assert done.returncode == 0, done.stderr
    outcomes, died = json.loads(done.stdout)
    assert not died and len(outcomes) > 10, "the last run was left alone"
    assert outcomes == sorted(outcomes, reverse=True), "old until some step, new from then on"
    assert outcomes[0] == "old" and outcomes[-1] == "new"
    assert snapshot(tiny_bundle) != before


def test_a_place_that_cannot_be_written_is_refused_before_any_work() -> None:
    with pytest.raises(StorageError, match="/proc: cannot be written: .*choose another folder"):
        folders.refuse_place(Path("/proc/bundle"))


def test_a_full_disk_is_the_environments_fault() -> None:
    assert issubclass(UnwritableBundleError, StorageError) and issubclass(UnwritableBundleError, BundleError)


def test_a_folder_that_cannot_be_made(save_tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BundleError, match="cannot be written"):
        save_tiny(tmp_path / "file" / "b")


def test_overwriting_a_model_of_another_library_takes_no_other_folder(tmp_path):
    source, out = tmp_path / "model", tmp_path / "photos"
    for folder, name in ((source, "config.json"), (out, "holiday.jpg")):
        folder.mkdir()
        (folder / name).write_text("x")
    with pytest.raises(ConfigError, match="is the source itself"):
        refuse_taken(source, source, "config.json", True)
    with pytest.raises(ConfigError, match="is there already"):
        refuse_taken(source, out, "config.json", False)
    with pytest.raises(ConfigError, match="holds no config.json: it is not replaced"):
        refuse_taken(source, out, "config.json", True)
    refuse_taken(source, tmp_path / "new", "config.json", False)

    def fails(folder):
        (folder / "half").write_text("x")
        raise ConfigError("stopped")

    with pytest.raises(ConfigError, match="stopped"):
        put_folder(source, fails)
    assert [path.name for path in source.iterdir()] == ["config.json"], "what was there is intact"
    put_folder(source, lambda folder: (folder / "config.json").write_text("new"))
    assert (source / "config.json").read_text() == "new"
