"""Tasks and the runner: registration, resolution, cache, kill and resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from zoo.bundles.store import load
from zoo.errors import BundleError, ConfigError, TaskError, UnknownNameError
from zoo.harness.compare import compare
from zoo.harness.records import Record
from zoo.harness.runner import evaluate
from zoo.harness.tasks import Measure, Task, TaskResult, get_task, register_task
from zoo.shared.masks import masks_of


def test_result_from_samples_by_hand():
    result = TaskResult.from_samples({"accuracy": [1.0, 0.0, 1.0, 1.0]})
    assert result.n == 4
    assert result.metrics["accuracy"].value == 0.75
    assert result.metrics["accuracy"].stderr == pytest.approx(0.5 / 2)
    assert TaskResult.from_samples({"x": [2.0]}).metrics["x"] == Measure(2.0, None)
    with pytest.raises(TaskError, match="same, positive number"):
        TaskResult.from_samples({"a": [1.0], "b": []})


def test_a_task_without_a_name_is_refused():
    class Nameless(Task):
        domain = "toy"
        primary = "x"

        def evaluate(self, model, *, progress=None):
            raise NotImplementedError

    with pytest.raises(TaskError, match="Nameless lacks name"):
        register_task(Nameless)


def test_tasks_by_name_and_with_an_argument(toy):
    assert isinstance(get_task("toy/accuracy"), toy.Accuracy)
    assert get_task("toy_param:17").count == 17
    with pytest.raises(UnknownNameError, match="toy/accuracy"):
        get_task("toy/acuracy")


def test_entry_points_of_another_package(toy_environment):
    script = (
        "from zoo.harness.tasks import get_task; from zoo.registry import TASKS, METHODS, STUDIES\n"
        "print(type(get_task('toy/loss')).__module__, TASKS.names('toy/*'), METHODS.get('toy-half').__name__,"
        "STUDIES.names('toy'))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=toy_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "zoo_toy ['toy/accuracy', 'toy/loss', 'toy/slow'] Half ['toy']"


def test_a_record_has_what_the_schema_promises(toy_zoo, tmp_path):
    [record] = evaluate("toy/half-mlp", out=tmp_path)
    assert (record.task, record.model, record.model_version) == ("toy/accuracy", "toy/half-mlp", "1.0.0")
    assert record.dense_twin == "toy/dense-mlp"
    assert record.sparsity == pytest.approx(0.5)
    assert record.cost.parameters.sparse < record.cost.parameters.dense
    assert record.cost.flops.sparse == pytest.approx(record.cost.flops.dense / 2)
    assert record.n == len(record.samples["accuracy"].decode()) == 400
    assert record.metrics["accuracy"].value == pytest.approx(sum(record.samples["accuracy"].decode()) / 400)
    assert record.seconds > 0 and record.peak_memory_bytes > 1_000_000
    assert Record.read(tmp_path / "toy-half-mlp--toy-accuracy--masked.json") == record


def test_globs_paths_modules_and_code(toy_zoo, toy_site, monkeypatch):
    assert [r.model for r in evaluate("toy/*")] == ["toy/dense-mlp", "toy/half-mlp", "toy/tenth-mlp"]
    assert evaluate(toy_zoo["half"])[0].model == "toy/half-mlp"
    twins = evaluate("toy/half-mlp", twins=True)
    assert [r.model for r in twins] == ["toy/dense-mlp", "toy/half-mlp"]
    both = evaluate(["toy/half-mlp", "toy/dense-mlp"], twins=True)
    assert [r.model for r in both] == ["toy/dense-mlp", "toy/half-mlp"], "each once"
    [code] = evaluate("zoo_toy:MLP", "toy/accuracy")
    assert (code.model, code.sparsity, code.cost.bytes_on_disk) == ("MLP", None, None)
    module = load("toy/half-mlp")
    [given] = evaluate(module, "toy/loss")
    [named] = evaluate("toy/half-mlp", "toy/loss")
    assert given.metrics == named.metrics
    assert given.cost.parameters == named.cost.parameters
    with pytest.raises(UnknownNameError, match="toy/half-mlp"):
        evaluate("toy/haf-mlp")
    with pytest.raises(UnknownNameError):
        evaluate("toy/nothing*")
    with pytest.raises(ConfigError, match="cannot be imported"):
        evaluate("zoo_toy:Nothing", "toy/accuracy")
    with pytest.raises(ConfigError, match="not a torch.nn.Module"):
        evaluate("zoo_toy:data", "toy/accuracy")


def test_which_tasks(toy_zoo, toy):
    assert [r.task for r in evaluate("toy/half-mlp", "toy/*")] == ["toy/accuracy", "toy/loss", "toy/slow"]
    with pytest.raises(UnknownNameError, match="no task matches 'tyo/"):
        evaluate("toy/half-mlp", "tyo/*")
    with pytest.raises(TaskError, match="no card"):
        evaluate(toy.MLP())

    class Other(toy.Accuracy):
        domain = "elsewhere"

    with pytest.raises(TaskError, match="not accepted"):
        evaluate("toy/half-mlp", Other())


def test_masked_and_packed_agree(toy_zoo):
    masked, packed = evaluate("toy/tenth-mlp", "toy/loss", ("masked", "packed"))
    assert (masked.execution, packed.execution) == ("masked", "packed")
    assert packed.metrics["loss"].value == pytest.approx(masked.metrics["loss"].value, abs=1e-5)
    assert masked.key != packed.key != ""


def test_cache_is_by_content(toy_zoo, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("TOY_LOG", str(log))
    first = evaluate("toy/*", "toy/accuracy")
    assert log.read_text().count("\n") == 3
    assert evaluate("toy/*", "toy/accuracy") == first
    assert log.read_text().count("\n") == 3
    evaluate("toy/half-mlp", "toy/accuracy", seed=1)
    evaluate("toy/half-mlp", "toy/accuracy", use_cache=False)
    assert log.read_text().count("\n") == 5

    class Newer(type(get_task("toy/accuracy"))):
        version = "2"

    evaluate("toy/half-mlp", Newer())
    assert log.read_text().count("\n") == 6


def test_a_bare_module_is_kept_only_when_asked(toy_zoo, tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("TOY_LOG", str(log))
    model = load("toy/half-mlp")
    for use_cache in (None, False):
        assert evaluate(model, "toy/accuracy", use_cache=use_cache)[0].key == ""
    assert not (tmp_path / "zoo-cache" / "records").exists()
    compare([model, toy_zoo["dense"]], "toy/accuracy")
    assert len(list((tmp_path / "zoo-cache" / "records").iterdir())) == 1, "that of the bundle"
    log.unlink()
    before = evaluate(model, "toy/accuracy", use_cache=True)[0]
    assert evaluate(model, "toy/accuracy", use_cache=True)[0] == before
    assert log.read_text().count("\n") == 1
    model.first.bias.data += 1.0
    assert evaluate(model, "toy/accuracy", use_cache=True)[0].key not in ("", before.key)


def test_another_behaviour_is_not_given_a_kept_figure(toy_zoo, toy, tmp_path):
    """Each changes what is measured, and none the weights: a wrapper, an attribute, the labels."""

    class Negated(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return -self.inner(x)

    good = evaluate(load("toy/half-mlp"), "toy/accuracy", use_cache=True)[0].metrics["accuracy"].value
    assert good > 0.5
    assert evaluate(Negated(load("toy/half-mlp")), "toy/accuracy", use_cache=True)[0].key == ""
    model = load("toy/half-mlp")
    model.register_forward_hook(toy.negate)
    assert evaluate(model, "toy/accuracy", use_cache=True)[0].metrics["accuracy"].value < good - 0.3
    assert evaluate("toy/half-mlp", "toy/accuracy")[0].metrics["accuracy"].value == good


def test_data_that_changed_are_measured_again(toy_zoo, toy):
    task = toy.Held(shift=0)
    first = evaluate("toy/half-mlp", task)[0]
    assert evaluate("toy/half-mlp", task)[0] == first
    task.labels.data.copy_((task.labels + 1) % toy.OUT)  # the same object, name and version
    second = evaluate("toy/half-mlp", task)[0]
    assert second.key != first.key and second.metrics["accuracy"].value < first.metrics["accuracy"].value


def test_weights_that_are_not_those_of_the_card_are_refused_also_with_a_record(toy_zoo, tmp_path):
    folder = shutil.copytree(toy_zoo["half"], tmp_path / "copy")
    evaluate(folder)
    raw = bytearray((folder / "weights.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(raw)
    with pytest.raises(BundleError, match="sha256"):
        evaluate(folder)


@pytest.mark.parametrize("damage", ["cut", "digit", "nan", "other"])
def test_a_damaged_kept_record_is_measured_again(toy_zoo, tmp_path, caplog, damage):
    [first] = evaluate("toy/half-mlp")
    folder = tmp_path / "zoo-cache" / "records"
    path = folder / f"{first.key}.safetensors"
    raw = path.read_bytes()
    value = json.dumps(first.metrics["accuracy"].value).encode()
    assert value in raw
    if damage == "other":
        [other] = evaluate("toy/tenth-mlp")
        os.replace(folder / f"{other.key}.safetensors", path)
    else:
        new = {"cut": b"", "digit": value[:-1] + b"1", "nan": b"NaN".ljust(len(value))}[damage]
        path.write_bytes(raw[:100] if damage == "cut" else raw.replace(value, new))
    [again] = evaluate("toy/half-mlp")
    assert (again.metrics, again.key) == (first.metrics, first.key)
    assert "Measured again" in caplog.text
    assert Record.kept(path, first.key) == again


def test_random_numbers_of_the_caller_are_left_alone(toy_zoo):
    # Python's own generator is left out here: the run-time type checker of the tests draws from it.
    torch.manual_seed(3)
    np.random.seed(3)
    expected = (torch.rand(1), np.random.rand())
    torch.manual_seed(3)
    np.random.seed(3)

    class Drawing(type(get_task("toy/accuracy"))):
        name = "toy/drawing"

        def evaluate(self, model, *, progress=None):
            return TaskResult.from_samples({"accuracy": torch.rand(5).tolist() + [np.random.rand()]})

    one = evaluate("toy/half-mlp", Drawing(), use_cache=False)[0]
    assert evaluate("toy/half-mlp", Drawing(), use_cache=False)[0].samples == one.samples
    assert evaluate("toy/half-mlp", Drawing(), seed=1, use_cache=False)[0].samples != one.samples
    assert (torch.rand(1), np.random.rand()) == expected


def test_training_mode_and_masks_survive(toy_zoo):
    model = load("toy/half-mlp").train()
    evaluate(model, "toy/accuracy")
    assert model.training
    assert masks_of(model).lost_zeros(model) == []


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (TaskResult({"other": Measure(1.0)}), "gave no 'accuracy'"),
        (TaskResult({"accuracy": Measure(float("nan"))}), "not finite"),
    ],
)
def test_wrong_results_are_refused(toy, result, message):
    class Wrong(toy.Accuracy):
        def evaluate(self, model, *, progress=None):
            return result

    with pytest.raises(TaskError, match=message):
        evaluate(nn.Linear(2, 2), Wrong())


def test_progress_counts_cells_and_shows_the_inner_steps(toy_zoo):
    seen = []
    evaluate("toy/half-mlp", ["toy/slow", "toy/loss"], progress=lambda *step: seen.append(step))
    assert seen[0] == (0, 2, "toy/half-mlp on toy/slow")
    assert (0, 2, "toy/half-mlp on toy/slow 4/5") in seen
    assert seen[-1] == (2, 2, "done")


def test_killed_and_run_again(toy_environment, toy_zoo, tmp_path, monkeypatch):
    """kill -9 in the middle of six cells: the second run measures the rest and gives what one run gives."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "zoo", "eval", "toy/*", "--task", "toy/slow", "--json"]
    command += ["--execution", "masked", "packed"]
    slow = toy_environment | {"TOY_LOG": str(log), "TOY_SLEEP": "0.4"}
    process = subprocess.Popen(command, env=slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    records = tmp_path / "zoo-cache" / "records"
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and len(list(records.glob("[0-9a-f]*.safetensors"))) < 3:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    finished = len(list(records.glob("[0-9a-f]*.safetensors")))
    assert 3 <= finished < 6
    log.unlink()
    monkeypatch.setenv("TOY_LOG", str(log))
    resumed = evaluate("toy/*", "toy/slow", ("masked", "packed"))
    assert log.read_text().count("\n") == 6 - finished
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "other"))
    fresh = evaluate("toy/*", "toy/slow", ("masked", "packed"))
    assert len(resumed) == 6
    for one, other in zip(resumed, fresh, strict=True):
        assert (one.key, one.model, one.execution) == (other.key, other.model, other.execution)
        assert (one.metrics, one.samples) == (other.metrics, other.samples)
