"""What README, CONTRIBUTING and the demo tell a reader to type, and what they point at, is there."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import zoo
from zoo import demo, registry
from zoo.bundles.catalog import select
from zoo.cli import COMMANDS, main
from zoo.report import numbers
from zoo.shared.bench import report

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/design.md",
    "docs/format.md",
    "docs/goals.md",
    "docs/performance.md",
    "docs/security.md",
    "docs/zeros.md",
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs/tutorials").glob("*.md"))),
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "zoo").glob("*/README.md"))),
)


def pages() -> dict[str, str]:
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in PAGES if (ROOT / name).exists()}


def commands() -> list[str]:
    """Every `zoo ...` line of the pages' shell blocks, of the table of goals and of the demo's last words."""
    blocks = [block for text in pages().values() for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(?:ZOO_OFFLINE=1 )?(zoo [^`]+)`", pages()["docs/goals.md"])
    return [line for line in [*lines, *demo.NEXT] if line.startswith("zoo ")]


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_a_command_exists_with_its_options_and_models(line: str, capsys) -> None:
    """Options are looked up in the help of the command and of the method that the line names."""
    command, *words = shlex.split(line, comments=True)[1:]
    assert command in COMMANDS
    asks = [word for word in words[:1] if command in ("finetune", "pretrain", "reproduce")]
    if command == "sparsify" and Path(words[0]).suffix in registry.FILE_SPARSIFIERS.names():
        asks += words[:1]  # a file has options of its own
    if "--method" in words and command == "sparsify":
        asks += ["--method", words[words.index("--method") + 1]]
    assert main([command, *asks, "--help"]) == 0
    shown = capsys.readouterr().out
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"{word}\b", shown), f"{line}: {word}"
        elif word.startswith(tuple(f"{domain}/" for domain in registry.DOMAINS)):
            assert word in registry.TASKS or select(word.partition("@")[0]), line


@pytest.mark.parametrize("page", PAGES)
def test_names_in_a_page_lead_somewhere(page: str) -> None:
    """Links, and paths and public names in backticks or code."""
    if page not in pages():
        pytest.skip("that domain has no page yet")
    text = pages()[page]
    places = [target for target in re.findall(r"\]\(([^)#:]+)\)", text)]
    missing = [place for place in places if not (ROOT / page).parent.joinpath(place).exists()]
    paths = re.findall(r"`((?:zoo|shared|tests|benchmarks|docs|native)/[\w/.-]+)`", text)
    missing += [path for path in paths if not (ROOT / path).exists()]
    missing += [name for name in re.findall(r"\bzoo\.(\w+)\(", text) if name not in zoo.__all__]
    assert not missing, missing


def test_the_times_of_tokens_are_the_measured_ones() -> None:
    """The tables of docs/performance.md, and the rows of the README's."""
    text, shown = pages()["docs/performance.md"], {}
    for threads in (1, 2):
        for row in rows_of(f"llm_decode-rival-{threads}.json"):
            batch, seconds = row["labels"]["batch"], row["seconds"]
            label = "a token" if batch == 1 else f"a {batch}"
            times = [1e3 * seconds[name]["median"] for name in ("ours", "llama.cpp Q4_0", "OpenVINO int4")]
            digits = 1 if times[1] < 100 else 0
            said = " | ".join(f"{time:.{digits}f}" for time in times)
            assert f"| {label} | {threads} | {said} | {ranged(row)} |" in text
            shown.setdefault(label, []).append((ranged(row), f"{times[2] / times[0]:.2f}"))
    for label, both in shown.items():
        cells = " | ".join(", ".join(column) for column in zip(*both, strict=True))
        assert f"| {label}, one and two threads | {cells} |" in pages()["README.md"]


def test_the_times_of_tokens_in_sixteen_bits_are_the_measured_ones() -> None:
    """The table of docs/performance.md, and the ranges in the README."""
    text, ratios = pages()["docs/performance.md"], []
    one, two = (rows_of(f"llm_decode-halves-rival-{threads}.json") for threads in (1, 2))
    for rows in zip(one, two, strict=True):
        said = (f"{1e3 * row['seconds']['ours']['median']:.0f} | {ranged(row)}" for row in rows)
        assert f"| {' | '.join(said)} |" in text
        ratios.append([row["ratio"]["value"] for row in rows])
    first, second = zip(*ratios, strict=True)
    said = (
        f"{min(second):.2f} to {max(second):.2f} times on two threads, {min(first):.2f} to {max(first):.2f}"
    )
    assert said in pages()["README.md"]


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of a file of results."""
    found: list[dict[str, Any]] = json.loads((ROOT / "benchmarks/results" / name).read_text("utf-8"))["rows"]
    return found


def ranged(row: dict[str, Any]) -> str:
    """A ratio and its range over the rounds."""
    return "{value:.2f} ({low:.2f} to {high:.2f})".format(**row["ratio"])


def test_the_accuracies_of_published_networks_are_those_of_the_cards() -> None:
    """The README's table of networks that others published."""
    cards = [bundle.card for bundle in select("vision/*")]
    published = {card.name for card in cards if card.imported is not None}
    for card in cards:
        if card.name in published or card.dense_twin in published:
            figures, dense = [f"{100 * metric.value:.1f}" for metric in card.metrics], card.metrics[0].dense
            twin = "" if dense is None else f"{100 * dense.value:.1f} %"
            zeros = "" if card.method.name == "dense" else f"{100 * card.sparsity.overall:.0f} %"
            cells = [f"`{card.name}`", zeros, f"{' / '.join(figures)} %", twin]
            row = f"| {' | '.join(cells)} | {numbers.size(card.weights.bytes)} |"
            assert row.replace("|  |", "| |") in pages()["README.md"], row


def test_the_speeds_of_bundles_are_the_measured_ones() -> None:
    """The README's table, of ratios to the dense twins."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in json.loads((ROOT / "benchmarks/results/bundles-2.json").read_text(encoding="utf-8"))["rows"]:
        domain, _, rest = row["labels"]["bundle"].partition("/")
        kind = rest.split("-")[1] if domain == "graph" else rest.split("-")[0]
        seconds = {name: times["median"] for name, times in row["seconds"].items()}
        for twin in seconds.keys() & {"dense twin", "dense twin fp32"}:
            name = f"{kind} {row['labels']['input']}"
            found.setdefault((name, twin), []).append(seconds[twin] / seconds["ours"])

    def of(name: str, twin: str) -> str:
        return f"{min(found[name, twin]):.2f} to {max(found[name, twin]):.2f}"

    def each(name: str, twin: str) -> str:
        return ", ".join(f"{value:.2f}" for value in sorted(found[name, twin]))

    def cells(make: Callable[[str], str]) -> str:
        return " | ".join(make(twin) for twin in ("dense twin", "dense twin fp32"))

    text = pages()["README.md"]
    graphs = cells(lambda twin: ", ".join(of(f"{kind} graph", twin) for kind in ("gcn", "gin", "gat")))
    assert f"GCN, GIN, GAT | {graphs} |" in text
    assert f"64 images | {each('fast 64 images', 'dense twin')} |" in text
    for kind, name in (("64 tokens", "64 tokens"), ("one token at a time", "1 token")):
        row = cells(lambda twin: f"{of(f'wanda {name}', twin)}; GQSA {each(f'gqsa {name}', twin)}")  # noqa: B023
        assert f"{kind} | {row} |" in text


def test_the_times_of_images_are_the_measured_ones() -> None:
    """The table of docs/performance.md, of ratios to the fastest dense rival."""
    rows = json.loads((ROOT / "benchmarks/results/convnets-1.json").read_text(encoding="utf-8"))["rows"]
    found: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        labels = row["labels"]
        if labels["batch"] != 1:  # the text has these
            continue
        found.setdefault(labels["network"], {})[labels["pattern"], labels["zeros"]] = (
            f"{row['ratio']['value']:.2f}"
        )
    assert len(found) == 3
    for network, ratios in found.items():
        cells = " | ".join(ratios[p, z] for p in ("unstructured", "block4x1") for z in ("70%", "80%", "90%"))
        assert f"| {network} | {cells} |" in pages()["docs/performance.md"], (network, cells)


BENCHMARKS = re.compile(r"Made by `python -m zoo\.shared\.bench\.report ([^`]+)`")


def pages_of_benchmarks() -> dict[str, list[Path]]:
    texts = {path: path.read_text() for path in sorted((ROOT / "benchmarks/results").glob("*.md"))}
    found = {path.name: BENCHMARKS.search(text) for path, text in texts.items()}
    return {name: [Path(file) for file in made[1].split()] for name, made in found.items() if made}


@pytest.mark.parametrize("name", pages_of_benchmarks())
def test_a_page_of_benchmarks_is_that_of_its_files(name: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    made = report.page(pages_of_benchmarks()[name])
    assert (ROOT / "benchmarks/results" / name).read_text() == f"{made}\n"


def test_every_page_of_benchmarks_says_how_it_is_made() -> None:
    texts = [path.read_text() for path in (ROOT / "benchmarks/results").glob("*.md")]
    assert all(BENCHMARKS.search(text) for text in texts if text.startswith("# Results of the benchmark"))
    assert len(pages_of_benchmarks()) >= 4


def test_the_site_has_every_page_that_its_menu_names(tmp_path) -> None:
    spec = importlib.util.spec_from_file_location("stage", ROOT / "docs/stage.py")
    stage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    assert stage.stage(tmp_path / "pages") > 60
    menu = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    named = re.findall(r"'([\w./-]+\.md)'", str(menu))
    missing = [page for page in named if not (tmp_path / "pages" / page).is_file()]
    assert len(named) > 30 and not missing, missing
    made = {f"reference/{path.name}" for path in (tmp_path / "pages/reference").iterdir()}
    assert made <= set(named)
    tutorials = {str(page.relative_to(ROOT)) for page in (ROOT / "docs/tutorials").glob("*.md")}
    assert tutorials <= set(named)


def test_the_readme_runs_as_python(monkeypatch, tmp_path) -> None:
    """The blocks of Python code in the README, one after the other, as a reader would paste them."""
    import torch
    from torch import nn
    from torch.nn.utils import prune

    class MyNet(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, 2))

    def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(data.x, data.edge_index).square().mean().backward()
        optimizer.step()

    blocks = re.findall(r"```python\n(.*?)```", pages()["README.md"], re.DOTALL)
    assert len(blocks) == 7
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"train": train}
    exec(blocks.pop(0), space)
    assert space["logits"].shape == (1, 1000)
    exec(blocks[0], space)
    model, data = space["model"], space["data"]
    masked = space["logits"]
    assert masked.shape == (1797, 10)
    space["optimizer"] = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = model.state_dict()["conv1.lin.weight"].clone()
    exec(blocks[1], space)
    assert not torch.equal(model.state_dict()["conv1.lin.weight"], before)
    exec(blocks[2], space)
    torch.testing.assert_close(space["logits"], masked, atol=1e-2, rtol=1e-2)
    space["model"] = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    first, second = blocks[3].splitlines()[-2:]
    exec(f"import zoo\n{first}", space)
    assert space["masks"].sparsity() == pytest.approx(0.9, abs=0.01)
    space["model"] = nn.Linear(32, 16)
    exec(second, space)
    assert space["masks"].sparsity() == 0.5
    space["pruned"] = prune.l1_unstructured(nn.Linear(32, 16), "weight", amount=0.25)
    space |= {"model": MyNet(16), "MyNet": MyNet}
    space["zoo"].sparsify(space["model"], sparsity=0.5)
    exec(blocks[4], space)
    assert space["masks_of"](space["model"]).sparsity() == 0.5
    exec(blocks[5], space)
    assert set(space["state"]) == {"weight", "bias"} and space["masks"].sparsity() == 0.5


def test_the_recording_shows_what_the_first_of_its_commands_prints_now(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("record", ROOT / "docs" / "record.py")
    assert spec is not None and spec.loader is not None
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    shown = (ROOT / "docs" / "terminal.svg").read_text(encoding="utf-8")
    first = record.COMMANDS[0]
    assert record.drawing(first, record.output(first, tmp_path), 0) in shown, (
        "record it again: python docs/record.py docs/terminal.svg"
    )
    assert all(html.escape(command) in shown for command in record.COMMANDS)
