"""The command line as a user types it: in process for most, as a process for start-up, signals and pipes."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from safetensors.torch import load_file

from zoo import cli
from zoo.bundles.card import read_card
from zoo.bundles.cardfile import dump_yaml, load_yaml
from zoo.bundles.catalog import select
from zoo.bundles.store import load
from zoo.cli import COMMANDS, main
from zoo.errors import BundleError, ConfigError, HubError
from zoo.report import html
from zoo.report.plain import plain
from zoo.shared.masks import masks_of
from zoo.shared.store.kept import going_on_from
from zoo.training.options import check_target


def run(capsys, *argv):
    """Exit code, stdout, stderr of a command."""
    code = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def process(environment, *argv, **options):
    command = [sys.executable, "-m", "zoo", *map(str, argv)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **options)


def test_overview_names_every_command_and_exit_code(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in COMMANDS:
        assert f"\n  {command} " in out
    assert "130 interrupted" in out
    assert run(capsys)[0] == 0


@pytest.mark.parametrize(
    "command", [name for name in COMMANDS if name not in ("finetune", "pretrain", "reproduce", "completion")]
)
def test_every_command_explains_itself(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"usage: zoo {command}" in out and "--json" in out
    assert "{None}" not in out and "(default: )" not in out
    boxes = [line for line in out.splitlines() if line.startswith(("╭", "│", "╰"))]
    assert len({len(line) for line in boxes}) <= 1, "the frames are straight"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["lst"], ["unknown command 'lst'", "zoo list"]),
        (["list", "--mehod", "x"], ["--mehod", "did you mean --method?", "zoo list --help"]),
        (["list", "--min-sparsity", "much"], ["--min-sparsity takes a number; received 'much'"]),
        (["list", "--max-bytes", "1.5"], ["--max-bytes takes a whole number; received '1.5'"]),
        (["list", "--min-sparsity", "1.5"], ["between 0 and 1", "1.5"]),
        (["list", "toy/hlf*"], ["toy/hlf*", "toy/half-mlp"]),
        (["list", "--kind", "moddels"], ["moddels"]),
        (["show"], ["MODEL"]),
        (["show", "toy/haf-mlp"], ["toy/haf-mlp", "toy/half-mlp"]),
        (["eval"], ["name at least one model"]),
        (["eval", "toy/half-mlp", "--task", "toy/acuracy"], ["toy/acuracy", "toy/accuracy"]),
        (["eval", "toy/half-mlp", "--report", "page.pdf"], ["page.pdf", ".html"]),
        (["eval", "toy/half-mlp", "--execution", "fast"], ["fast"]),
        (["compare", "toy/dense-mlp"], ["no dense twin"]),
        (["verify", "toy/half-mlp", "--tolerance", "-1"], ["--tolerance"]),
        (["sparsify", "toy/dense-mlp", "--method", "prunee", "--out", "x"], ["prunee", "prune"]),
        (["sparsify", "toy/dense-mlp", "--method"], ["--method needs a value"]),
        (["sparsify", "toy/dense-mlp", "--methd", "prune", "--out", "x"], ["did you mean --method?"]),
        (["generate", "toy/half-mlp", "--max-new-tokens", "0"], ["--max-new-tokens", "received 0"]),
        (["generate", "toy/half-mlp", "--temperature", "nan"], ["--temperature", "received nan"]),
        (["sparsify", "toy/dense-mlp", "--out", "x", "--sparsity", "1.0"], ["sparsity", "1.0"]),
        (["sparsify", "toy/dense-mlp", "--out", "x", "--sparsity", "-0.1"], ["sparsity", "-0.1"]),
        (["sparsify", "toy/dense-mlp", "--out", "x", "--sparsity", "nan"], ["sparsity", "nan"]),
        (["sparsify", "toy/dense-mlp", "--out", "x", "--pattern", "5:7"], ["7"]),
        (["sparsify", "toy/dense-mlp", "--out", "x", "--name", "llm/x", "--sparsity", "0.5"], ["'toy/'"]),
        (["finetune"], ["DOMAIN", "toy"]),
        (["finetune", "tyo"], ["tyo", "toy"]),
        (["reproduce"], ["NAME", "toy"]),
        (["reproduce", "tyo"], ["tyo", "toy"]),
        (["reproduce", "toy", "--seed", "1"], ["--seed", "--seeds"]),
        (["bench", "nothing"], ["nothing"]),
        (["pull", "owner/name"], ["owner/name", "hf://"]),
        (["pull", "hf://owner"], ["hf://owner", "hf://owner/name"]),
        (["push", "toy/half-mlp", "owner/name"], ["hf://"]),
        (["export", "toy/half-mlp", "--to", "x.bin"], ["x.bin", ".safetensors"]),
        (["list", "./mine"], ["looks like a folder", "zoo show ./mine"]),
    ],
)
def test_bad_input_is_named_in_a_line_or_two(capsys, toy_zoo, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 2, err
    last = err.strip().splitlines()[-2:]
    for word in words:
        assert word in " ".join(last)
    assert "Traceback" not in err and out == ""
    assert [path for path in tmp_path.rglob("*") if path.is_file() and "zoo-cache" not in path.parts] == []


def test_errors_for_machines_and_with_traceback(capsys, toy_zoo):
    code, out, _ = run(capsys, "show", "toy/haf-mlp", "--json")
    assert code == 2
    error = json.loads(out)["error"]
    assert error["type"] == "UnknownNameError" and error["exit_code"] == 2 and "half" in error["message"]
    code, _, err = run(capsys, "show", "toy/haf-mlp", "--debug")
    assert code == 2 and "Traceback" in err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (HubError("no connection"), 3, "no connection"),
        (PermissionError(13, "Permission denied", "/cache"), 3, "/cache: Permission denied"),
        (OSError(28, "No space left on device"), 3, "No space left"),
        (MemoryError(), 3, "out of memory"),
        (ZeroDivisionError("x"), 70, "internal error: ZeroDivisionError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(capsys, monkeypatch, error, code, words):
    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "dispatch", fail)
    got, _, err = run(capsys, "list")
    assert got == code
    assert words in err and "Traceback" not in err


def test_list_and_show(capsys, toy_zoo):
    code, out, _ = run(capsys, "list", "toy/*")
    assert code == 0 and "toy/tenth-mlp" in out and "50.0 %" in out
    assert "weights" in out.splitlines()[1].split()  # the kind of zeros is the column's name
    listed = json.loads(run(capsys, "list", "--domain", "toy", "--min-sparsity", "0.6", "--json")[1])
    assert [model["name"] for model in listed] == ["toy/tenth-mlp"]
    assert listed[0]["metrics"][0]["dense"] is not None
    assert "toy/accuracy" in json.loads(run(capsys, "list", "--kind", "tasks", "--json")[1])
    assert "prune" in run(capsys, "list", "--kind", "methods")[1].split()
    code, out, _ = run(capsys, "show", "toy/half-mlp")
    assert code == 0
    for word in ("toy/half-mlp@1.0.0", "dense twin", "Nobody, 2026", "unstructured", "sha256"):
        assert word in out
    shown = json.loads(run(capsys, "show", "toy/half-mlp", "--json")[1])
    assert shown == read_card(toy_zoo["half"] / "card.yaml").to_dict() | {"metrics": shown["metrics"]}


def test_eval_with_reports_and_records(capsys, toy_zoo, tmp_path):
    page, text = tmp_path / "new" / "page.html", tmp_path / "page.md"
    command = ["eval", "toy/half-mlp", "toy/tenth-mlp", "--task", "toy/acc*", "--out", tmp_path / "r"]
    code, out, err = run(capsys, *command, "--report", page, text)
    assert code == 0
    assert "toy/dense-mlp" in out  # the twin came along
    assert page.read_text().startswith("<!doctype html>") and "# Evaluation" in text.read_text()
    assert len(list((tmp_path / "r").glob("*.json"))) == 3
    assert "[3/3]" in err
    records = json.loads(run(capsys, "eval", "toy/half-mlp", "--json")[1])
    assert records[0]["task"] == "toy/accuracy"


def test_compare_and_its_goal(capsys, toy_zoo):
    assert run(capsys, "compare", "toy/tenth-mlp", "toy/dense-mlp")[0] == 0
    code, out, _ = run(capsys, "compare", "toy/tenth-mlp", "--margin", "0.9")
    assert code == 0 and "worse" in out
    code, out, _ = run(capsys, "compare", "toy/tenth-mlp", "--margin", "0.0001", "--json")
    assert code == 1
    assert json.loads(out)[0]["within_margin"] is False


def test_verify_says_what_failed(capsys, toy_zoo, tmp_path):
    code, out, err = run(capsys, "verify", "toy/half-mlp", "toy/tenth-mlp")
    assert code == 0 and "2 models" in err and "0 failed" in err and "failed" not in out
    assert re.search(r"\d+ figures measured again, 2 compared with other statements", err)
    shown = run(capsys, "show", "toy/half-mlp")[1]
    assert "One seed." in shown and "spread" not in shown and "± 0 " not in shown, "one seed has no spread"
    card = (toy_zoo["dense"] / "card.yaml").read_text()
    liar = tmp_path / "liar"
    liar.mkdir()
    (liar / "weights.safetensors").write_bytes((toy_zoo["dense"] / "weights.safetensors").read_bytes())
    (liar / "card.yaml").write_text(card.replace("stderr: 0.0", "stderr: 0.7"))
    code, out, _ = run(capsys, "verify", liar, "--json")
    assert code == 1
    [bad] = [check for check in json.loads(out)[0]["checks"] if check["ok"] is False]
    assert bad["figure"] == "toy/accuracy: accuracy, stderr"
    code, out, _ = run(capsys, "verify", liar, "--failed-only")
    assert code == 1 and "stderr" in out and "sha256" not in out


def test_sparsify_makes_a_bundle_that_verifies(capsys, toy_zoo, tmp_path):
    out = tmp_path / "mine"
    command = ["sparsify", "toy/dense-mlp", "--sparsity", "0.75", "--budget", "uniform", "--out", out]
    code, _, err = run(capsys, *command)
    assert code == 0, err
    card = read_card(out / "card.yaml")
    assert card.name == "toy/mine" and card.dense_twin == "toy/dense-mlp"
    assert card.sparsity.overall == 0.75
    assert card.method.hyperparameters["budget"] == "uniform"
    assert card.training.command.startswith("zoo sparsify toy/dense-mlp --sparsity 0.75")
    assert run(capsys, "verify", out)[0] == 0
    code, _, err = run(capsys, "sparsify", "toy/dense-mlp", "--sparsity", "0.5", "--out", out)
    assert code == 2 and str(out) in err
    assert read_card(out / "card.yaml") == card
    nm = tmp_path / "nm"
    assert run(capsys, "sparsify", out, "--pattern", "2:4", "--out", nm, "--json")[0] == 0
    assert read_card(nm / "card.yaml").dense_twin == "toy/dense-mlp"


def test_sparsify_can_store_what_differs_only(capsys, toy_zoo, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert run(capsys, "sparsify", "toy/dense-mlp", "--sparsity", "0.5", "--share", "--out", once)[0] == 0
    assert run(capsys, "sparsify", once, "--sparsity", "0.75", "--share", "--out", twice)[0] == 0
    for folder in (once, twice):
        assert read_card(folder / "card.yaml").base.name == "toy/dense-mlp", "never two levels"
        assert run(capsys, "verify", folder)[0] == 0


def test_methods_of_another_package_are_options(capsys, toy_zoo, tmp_path):
    code, out, _ = run(capsys, "sparsify", "--method", "toy-half", "--help")
    assert code == 0 and "--score" in out and "--pattern" not in out and "toy-half" in out
    out = tmp_path / "half"
    command = ["sparsify", "toy/dense-mlp", "--method=toy-half", "--score", "random", "--out", out]
    assert run(capsys, *command)[0] == 0
    assert read_card(out / "card.yaml").method.name == "toy-half"


def test_finetune_keeps_zeros(capsys, toy_zoo, tmp_path):
    assert "toy" in run(capsys, "finetune", "--help")[1]
    assert "--steps" in run(capsys, "finetune", "toy", "--help")[1]
    out = tmp_path / "tuned"
    code, text, err = run(capsys, "finetune", "toy", "--model", "toy/half-mlp", "--out", out, "--steps", "5")
    assert code == 0, err
    assert "before" in text and "after" in text and "50.0 % sparse" in err
    before, after = load("toy/half-mlp"), load(out)
    assert masks_of(before).equal(masks_of(after))
    assert masks_of(after).lost_zeros(after) == []


def test_reproduce(capsys, toy, tmp_path):
    assert "toy" in run(capsys, "reproduce", "--help")[1]
    assert "--levels" in run(capsys, "reproduce", "toy", "--help")[1]
    page = tmp_path / "page.html"
    command = ["reproduce", "toy", "--seeds", "1", "--results", tmp_path / "r"]
    code, out, err = run(capsys, *command, "--report", page)
    assert code == 0
    assert "published" in out and "measured" in out and "verdict" in out
    assert "toy-accuracy.png" in err and "Verdicts" in page.read_text()
    code, out, _ = run(capsys, *command, "--json")
    assert code == 0 and json.loads(out)["verdicts"][0]["claim"] == "magnitude beats chance at 50 %"


def test_reproduce_judges_again_and_lists(capsys, toy, tmp_path):
    folder = tmp_path / "r"
    assert run(capsys, "reproduce", "toy", "--seeds", "1", "--results", folder)[0] == 0
    code, out, err = run(capsys, "reproduce", "--from-results", folder / "toy.json")
    assert code == 0 and "magnitude beats chance" in out and "nothing measured" in err
    page = tmp_path / "papers.md"
    code, out, _ = run(capsys, "reproduce", "--list", "--results", folder, "--markdown", page, "--json")
    rows = json.loads(out)
    assert code == 0 and rows[-1]["verdict"] == "not yet" and len(rows) == 64 + 2
    assert {row["command"] for row in rows} == {"", "zoo reproduce toy --seeds 1"}
    assert "| Nobody, Journal of Toys 1 (2026) | magnitude beats chance at 50 % |" in page.read_text()
    assert run(capsys, "reproduce", "--list", "--results", tmp_path / "nowhere")[0] == 2
    assert run(capsys, "reproduce", "--from-results", page)[0] == 2


def test_a_queue_of_studies_goes_on_past_what_fails_and_from_where_it_stopped(capsys, toy, tmp_path):
    queue, folder = tmp_path / "queue.txt", tmp_path / "r"
    lines = ["# by value", "", "toy --seed 1", f"toy --seeds 1 --results {folder}  # short"]
    queue.write_text("\n".join(lines))
    code, _, err = run(capsys, "reproduce", "--queue", queue)
    assert code == 1 and "1 of 2: zoo reproduce toy --seed 1" in err and "not run: " in err
    assert json.loads((folder / "toy.json").read_text())["cells"]["computed"] > 0
    queue.write_text(lines[-1])
    assert run(capsys, "reproduce", "--queue", queue)[0] == 0
    assert json.loads((folder / "toy.json").read_text())["cells"]["computed"] == 0
    assert run(capsys, "reproduce", "--queue", tmp_path / "none")[0] == 2


def test_export_writes_what_any_program_reads(capsys, toy_zoo, tmp_path):
    file = tmp_path / "dense.safetensors"
    assert run(capsys, "export", "toy/tenth-mlp", "--to", file)[0] == 0
    state, model = load_file(file), load("toy/tenth-mlp")
    assert set(state) == set(model.state_dict())
    assert all(state[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert run(capsys, "export", "toy/tenth-mlp", "--to", file)[0] == 2
    code, out, _ = run(capsys, "export", "toy/tenth-mlp", "--to", tmp_path / "folder", "--json")
    assert code == 0 and json.loads(out)["tensors"] == 4
    assert json.loads((tmp_path / "folder" / "card.json").read_text())["name"] == "toy/tenth-mlp"


def test_push_can_be_tried_without_a_network(capsys, toy_zoo):
    code, out, _ = run(capsys, "push", "toy/half-mlp", "hf://someone/half", "--dry-run", "--json")
    assert code == 0
    assert set(json.loads(out)["files"]) >= {"card.yaml", "weights.safetensors"}


def test_pull_without_a_network_is_an_error_of_the_environment(capsys):
    code, _, err = run(capsys, "pull", "hf://someone/half", "--offline")
    assert code == 3 and "hf://someone/half" in err


def test_bench_runs_scripts_of_a_checkout(capsys, tmp_path, monkeypatch):
    from zoo.cli import bench

    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "benchmarks" / "good.py").write_text('"""Measures nothing.\n\nMore."""\nprint("fine")')
    (tmp_path / "benchmarks" / "bad.py").write_text('"""Misses."""\nraise SystemExit(1)')
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "zoo" / "cli" / "bench.py"))
    code, out, _ = run(capsys, "bench")
    assert code == 0 and "good  Measures nothing." in out
    assert run(capsys, "bench", "good", "--quick", "--threads", "2")[0] == 0
    code, _, err = run(capsys, "bench", "all")
    assert code == 1 and "bad" in err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").unlink()
    code, _, err = run(capsys, "bench")
    assert code == 2 and "source checkout" in err


def test_results_of_several_benchmarks_are_one_json_document(tmp_path, toy_environment):
    script = "import sys\nfrom pathlib import Path\nprint('a table')\n"
    writes = f"{script}Path(sys.argv[sys.argv.index('--json') + 1]).write_text('{{\"n\": 1}}')"
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "pyproject.toml").write_text("")
    for name, text in {"first": writes, "missed": f"{writes}\nsys.exit(1)", "silent": script}.items():
        (tmp_path / "benchmarks" / f"{name}.py").write_text(text)
    run_it = "import sys; from zoo.cli import bench, main; bench.__file__ = sys.argv.pop(1); sys.exit(main())"
    command = [sys.executable, "-c", run_it, tmp_path / "zoo" / "cli" / "bench.py", "bench", "--json"]
    names = ["first", "missed", "silent"]
    done = subprocess.run([*command, *names], env=toy_environment, capture_output=True, text=True)
    assert json.loads(done.stdout) == {"first": {"n": 1}, "missed": {"n": 1}, "silent": None}
    assert done.returncode == 1 and done.stderr.count("a table") == 3 and "broken: missed" in done.stderr


def test_listing_is_quick_and_imports_no_torch(toy_environment):
    script = (
        "import sys; from zoo.cli import main; code = main(['list'])\n"
        "heavy = {'torch', 'matplotlib', 'scipy', 'torch_geometric', 'transformers'} & set(sys.modules)\n"
        "assert code == 0 and not heavy, heavy"
    )
    command = [sys.executable, "-c", script]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=toy_environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "toy/half-mlp" in done.stdout
    # processor time, which a busy machine does not stretch as it stretches the wall clock
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_version_entry_module_and_a_closed_pipe(toy_environment):
    assert process(toy_environment, "--version").stdout.startswith("zoo ")
    command = f"{sys.executable} -m zoo list --kind tasks | head -n 1"
    done = subprocess.run(command, shell=True, env=toy_environment, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


def test_the_reader_of_a_table_may_leave(toy_environment):
    command = f"{sys.executable} -m zoo list | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], env=toy_environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("argv", [["list", "--json"], ["list"], ["--version"], ["show", "x", "--json"]])
def test_an_output_that_takes_nothing_is_named_once(toy_environment, argv):
    with open("/dev/full", "w") as full:
        pipes = {"stdout": full, "stderr": subprocess.PIPE, "text": True, "timeout": 120}
        done = subprocess.run([sys.executable, "-m", "zoo", *argv], env=toy_environment, **pipes)
    assert done.returncode == (2 if "show" in argv else 3), done.stderr
    assert done.stderr.startswith("zoo: ") and done.stderr.count("\n") == 1


def test_a_closed_output_is_no_error(toy_environment):
    command = f"{sys.executable} -m zoo list >&-"
    done = subprocess.run(command, shell=True, env=toy_environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_of_ascii_alone(toy_environment):
    done = process(toy_environment | {"PYTHONIOENCODING": "ascii"}, "show", "graph/teddy-gcn-digits-g30-w80")
    assert done.returncode == 0 and "0.9800 +- 0.0039" in done.stdout and done.stdout.isascii()


def test_help_and_version_in_other_words(capsys):
    assert run(capsys, "help", "list")[1] == run(capsys, "list", "--help")[1]
    assert set(json.loads(run(capsys, "--version", "--json")[1])) == {"zoo", "torch", "python"}
    assert "`zoo --version`" in run(capsys, "version")[2]


@pytest.mark.parametrize(
    ("name", "said"), [("graph/*", "zoo list 'graph/*'"), ("", "zoo list"), ("a" * 9000, "(9003 characters)")]
)
def test_what_is_no_name_is_refused_in_a_line(capsys, name, said):
    code, _, err = run(capsys, "show", name)
    assert code == 2 and said in err and len(err) < 500


def test_what_was_measured_is_shown_where_it_cannot_be_kept(toy_environment, tmp_path):
    (tmp_path / "file").write_text("")
    there = toy_environment | {"ZOO_CACHE": str(tmp_path / "file" / "cache")}
    done = process(there, "eval", "toy/half-mlp", "toy/dense-mlp", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)
    assert done.stderr.count("Set ZOO_CACHE to a folder that can be written") == 1


def test_ctrl_c_leaves_nothing_half_written(toy_environment, tmp_path):
    environment = toy_environment | {"TOY_SLEEP": "30"}
    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "zoo", "eval", "toy/half-mlp", "--task", "toy/slow"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job ignores it
    running = subprocess.Popen([*command, "--report", str(page)], env=environment, **pipes)
    line = running.stderr.readline()  # the progress of the first cell: it is being measured
    assert "toy/slow" in line
    time.sleep(0.3)
    os.kill(running.pid, signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted" in err and "Traceback" not in err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("kept", [True, False])
def test_an_interruption_is_one_json_document_and_promises_no_more_than_is_kept(
    capsys, monkeypatch, tmp_path, kept
):
    def stop(arguments):
        with going_on_from(tmp_path if kept else tmp_path / "nothing"):
            raise KeyboardInterrupt

    monkeypatch.setattr(cli, "dispatch", stop)
    code, out, err = run(capsys, "eval", "toy/half-mlp", "--json")
    told = json.loads(out)["error"]
    assert code == told["exit_code"] == 130 and told["message"].startswith("interrupted")
    assert ("run the same command to go on" in told["message"]) is kept and told["message"] in err


def test_two_processes_share_the_runs(toy_environment, tmp_path):
    """Each process measures its share, one prints, and the records are those of one process."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        launcher += ["--main_process_port", str(probe.getsockname()[1]), "--num_machines", "1"]
    arguments = ["-m", "zoo", "eval", "toy/*", "--twins", "--json", "--out", str(tmp_path / "out")]
    command = [*launcher, *arguments]
    done = subprocess.run(command, env=toy_environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)
    alone = toy_environment | {"ZOO_CACHE": str(tmp_path / "another-cache")}
    expected = json.loads(process(alone, "eval", "toy/*", "--twins", "--json").stdout)
    assert len(records) == len(expected) > 2
    for one, other in zip(records, expected, strict=True):
        assert (one["key"], one["metrics"]) == (other["key"], other["metrics"])
    assert len(list((tmp_path / "out").glob("*.json"))) == len(expected)


def test_a_card_does_not_steer_the_terminal(capsys, toy_bundles, tmp_path, monkeypatch):
    """Escape sequences, a bell and overrides of direction, as text and in one byte."""
    shutil.copytree(toy_bundles["half"], tmp_path / "models" / "half")
    path = tmp_path / "models" / "half" / "card.yaml"
    fields = load_yaml(path.read_bytes(), "card")
    evil = "good\x1b]0;owned\x07\x1b[2J\x9b31m\u202edab\u2066\r model"
    fields |= {"summary": evil, "license": evil, "citation": evil}
    fields["method"]["name"] = evil
    path.write_text(dump_yaml(fields), encoding="utf-8")
    monkeypatch.setenv("ZOO_PATH", str(tmp_path / "models"))
    for argv in (["list"], ["show", "toy/half-mlp"], ["list", "--json"], ["list", "--method", evil]):
        _, out, err = run(capsys, *argv)
        assert not set(out + err) & set("\x1b\x07\x9b\u202e\u2066\r"), argv
    assert "good" in run(capsys, "show", "toy/half-mlp")[1]


def test_text_of_others_is_plain():
    assert plain("a\x1b[31mb\x00\x7f\x85\u202ec\td\n\u200fe") == "a[31mbc\td\ne"
    assert html.escape("<\u202e>") == "&lt;&gt;"


def test_a_full_disk_is_the_environment(capsys, toy_zoo, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("zoo.shared.store.io.os.fsync", full)
    code, _, err = run(capsys, "export", "toy/half-mlp", "--to", tmp_path / "w.safetensors")
    assert code == cli.ENVIRONMENT and "No space left on device" in err and "free some space" in err
    assert list(tmp_path.glob("*.safetensors")) == []


def test_a_long_argument_of_a_card_is_cut_and_said_to_be():
    from zoo.cli.browse import _arguments

    assert _arguments({"width": 8}) == "width=8"
    shown = _arguments({"plan": list(range(1000))})
    assert len(shown) < 150 and shown.endswith("characters, whole by --json)")


def test_missing_data_is_the_environments_fault(capsys, monkeypatch):
    monkeypatch.delenv("ZOO_DATA", raising=False)
    monkeypatch.setenv("ZOO_OFFLINE", "1")
    code, _, err = run(capsys, "eval", "vision/deep-compression-squeezenet-imagenet", "--fresh")
    assert code == 3 and "Set ZOO_DATA" in err
    assert "missing data" in run(capsys, "--help")[1]


def test_a_card_of_one_seed_shows_each_figure_once(capsys):
    _, out, _ = run(capsys, "show", "vision/magnitude-resnet20-cifar10-s80")
    assert "dense twin" in out and "One seed." in out
    assert "± -" not in out and "spread" not in out
    assert out.count(" seed=0") == 1
    _, out, _ = run(capsys, "show", "vision/deep-compression-squeezenet-imagenet")
    assert "dense twin" not in out, "there is none"
    assert "mean ± spread (seeds)" in run(capsys, "show", "graph/teddy-gcn-cora-g30-w80")[1]


def test_facts_of_a_card_are_folded_between_words_on_a_terminal():
    from zoo.cli.browse import _fact

    text = "width=16 shortcut=pad /a/very/long/path-to/weights.safetensors"
    assert _fact("Method", text, None) == f"Method:       {text}"
    folded = _fact("Method", text, 40).splitlines()
    assert folded[0] == "Method:       width=16 shortcut=pad"
    assert folded[1] == " " * 14 + "/a/very/long/path-to/weights.safetensors"


def test_a_mistyped_format_of_export_is_named(capsys):
    code, _, err = run(capsys, "export", "vision/dense-convnet-digits", "--to", "onxx", "--out", "x.onnx")
    assert code == 2 and "Unknown export 'onxx'. Did you mean 'onnx'?" in err


def test_the_domains_that_have_pictures_are_named(capsys):
    code, _, err = run(capsys, "show", "vision/dense-convnet-digits", "--picture", "x.png")
    assert code == 2 and "those of diffusion and neural3d have" in err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "taken/x"], "taken is a file"),
        (["--out", "x", "--name", "toy/Mein Netz"], "--name toy/Mein"),
    ],
)
def test_a_place_or_name_that_cannot_be_is_refused_before_the_work(
    capsys, toy_zoo, tmp_path, monkeypatch, options, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    code, out, err = run(capsys, "sparsify", "toy/dense-mlp", "--sparsity", "0.5", *options)
    assert code == 2 and words in err and out == "" and "[" not in err
    name = options[-1] if "--name" in options else None
    with pytest.raises((BundleError, ConfigError), match=words):  # fine-tuning asks the same first
        check_target(SimpleNamespace(checkpoint_every=1, out=Path(options[1]), name=name, overwrite=False))
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_any_folder_gives_a_legal_name(capsys, toy_zoo, tmp_path, monkeypatch):
    (tmp_path / "Mein schönes Netz").mkdir()
    monkeypatch.chdir(tmp_path / "Mein schönes Netz")
    for folder, name in (("Größe 1", "toy/groe-1"), ("../x/ü..v1.", "toy/u.v1"), ("雪", "toy/model")):
        code, _, err = run(capsys, "sparsify", "toy/dense-mlp", "--sparsity", "0.5", "--out", folder)
        assert code == 0, err
        assert read_card(Path(folder, "card.yaml")).name == name


def test_a_folder_that_is_taken_is_refused_before_the_work(capsys, tmp_path, monkeypatch):
    from zoo.harness import making

    (tmp_path / "card.yaml").write_text("kept")
    monkeypatch.setattr(making, "make_bundle", lambda *_, **__: pytest.fail("it worked all the same"))
    code, _, err = run(
        capsys, "sparsify", "vision/dense-convnet-digits", "--method", "prune", "--out", tmp_path
    )
    assert code == 2 and "--overwrite" in err


def test_names_are_whole_at_80_columns(capsys, monkeypatch):
    monkeypatch.setattr(
        "zoo.cli.browse.stdout", lambda: Console(width=80, file=sys.stdout, force_terminal=True)
    )
    _, out, _ = run(capsys, "list")
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out).splitlines()
    assert max(map(len, lines)) <= 80
    shown = {line.split()[0] for line in lines if line.strip()}
    assert {bundle.card.name for bundle in select("*")} <= shown
