"""Cards: the schema, cards that lie, and YAML that is out to harm."""

from __future__ import annotations

import contextlib
import copy
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.bundles import cardfile
from zoo.bundles.card import mean_and_spread, parse_card, read_card
from zoo.bundles.cardfile import MAX_BYTES, dump_yaml, load_yaml, read_yaml
from zoo.bundles.catalog import select
from zoo.errors import CardError


@pytest.fixture
def fields() -> dict[str, Any]:
    accuracy = {0: 0.81, 1: 0.79, 2: 0.83}
    dense = {0: 0.815, 1: 0.805, 2: 0.825}
    return {
        "schema_version": 1,
        "name": "graph/test-gcn-cora-g30-w80",
        "version": "1.0.0",
        "domain": "graph",
        "summary": "A ticket of a two-layer graph convolution.\nIt has two lines.",
        "architecture": {
            "name": "graph/gcn",
            "args": {
                "in_features": 1433,
                "hidden": 512,
                "dropout": 0.5,
                "bias": True,
                "norm": None,
                "sizes": [1, 2],
            },
        },
        "method": {"name": "graph/teddy", "hyperparameters": {"lr": 1e-3, "pattern": "2:4"}, "seed": 0},
        "sparsity": {
            "overall": 1 - 270 / 1100,
            "parts": {
                "weights": {"kept": 200, "total": 1000, "sparsity": 0.8, "pattern": "unstructured"},
                "edges": {"kept": 70, "total": 100, "sparsity": 0.3, "pattern": "unstructured"},
            },
        },
        "cost": {
            "parameters": {"dense": 1010, "kept": 210},
            "flops": {"dense": 5000, "sparse": 1000},
            "bytes": {"dense": 4040, "sparse": 900, "on_disk": 1500},
        },
        "metrics": [
            {
                "task": "graph/cora",
                "metric": "accuracy",
                "split": "test",
                "protocol": "public split",
                "value": 0.81,
                "stderr": 0.012,
                "per_seed": accuracy,
                "mean": mean_and_spread(accuracy)[0],
                "spread": mean_and_spread(accuracy)[1],
                "dense": {
                    "name": "graph/dense-gcn-cora",
                    "value": 0.815,
                    "per_seed": dense,
                    "mean": mean_and_spread(dense)[0],
                    "spread": mean_and_spread(dense)[1],
                },
            }
        ],
        "dense_twin": "graph/dense-gcn-cora",
        "training": {"command": "zoo finetune graph --seed 0", "seconds": 12.5},
        "data": {"name": "Cora", "source": "https://example.org", "licence": "unknown"},
        "license": "Apache-2.0",
        "citation": "Somebody, somewhere, 2024",
        "weights": {"file": "weights.safetensors", "sha256": "0" * 64, "bytes": 1500},
        "evidence": "benchmarks/results/teddy.json",
    }


def put(fields: dict[str, Any], path: str, value: Any) -> None:
    """Set a nested field; `...` deletes it."""
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    target: Any = fields
    for part in parents:
        target = target[part]
    if value is ...:
        del target[last]
    else:
        target[last] = value


def test_a_card_survives_its_file(fields, tmp_path: Path) -> None:
    card = parse_card(fields)
    text = card.to_yaml()
    (tmp_path / "card.yaml").write_text(text)
    again = read_card(tmp_path / "card.yaml")
    assert again == card and again.to_yaml() == text
    assert again.architecture.args == fields["architecture"]["args"], "also what is None"
    assert text.startswith("schema_version: 1\nname: graph/test-gcn-cora-g30-w80\nversion: ")
    assert "summary: |" in text and "hidden: 512\n" in text


def test_a_dense_card_needs_no_twin(fields) -> None:
    fields["method"]["name"] = "dense"
    fields["dense_twin"] = None
    fields["metrics"][0]["dense"] = None
    fields["sparsity"] = {"overall": 0.0}
    card = parse_card(fields)
    assert parse_card(load_yaml(card.to_yaml(), "again")) == card


LIES = {
    "the sparsity of a part": ("sparsity.parts.weights.sparsity", 0.9, "its own numbers give 0.8"),
    "the overall sparsity": ("sparsity.overall", 0.9, "its own numbers give 0.754"),
    "more kept than there are": ("sparsity.parts.weights.kept", 1001, "kept 1001 of 1000"),
    "more parameters than dense": ("cost.parameters.kept", 1011, "kept 1011 of 1010"),
    "more work than dense": ("cost.flops.sparse", 5001, "sparse 5001 of dense 5000"),
    "the mean": ("metrics.0.mean", 0.84, "mean is stated as 0.84"),
    "the spread": ("metrics.0.spread", 0.0, "spread is stated as 0"),
    "the twin's mean": ("metrics.0.dense.mean", 0.7, "metrics.0.dense"),
    "no spread of several seeds": ("metrics.0.spread", None, "spread is stated as None"),
    "the twin's spread": ("metrics.0.dense.spread", 0.7, "metrics.0.dense"),
    "the size on disk": ("cost.bytes.on_disk", 1499, "is not weights.bytes"),
    "the domain": ("domain", "llm", "not that of the name"),
    "another twin": ("metrics.0.dense.name", "graph/other", "is not 'graph/dense-gcn-cora'"),
    "a twin of nothing": ("method.name", "dense", "its own twin"),
}


@pytest.mark.parametrize("path,value,message", LIES.values(), ids=LIES)
def test_a_card_that_lies(fields, path: str, value: Any, message: str) -> None:
    put(fields, path, value)
    with pytest.raises(CardError, match=message):
        parse_card(fields, "x/card.yaml")


@pytest.mark.parametrize(
    "path",
    [
        "schema_version",
        "name",
        "version",
        "domain",
        "summary",
        "architecture",
        "method",
        "method.seed",
        "sparsity",
        "cost",
        "cost.flops",
        "cost.bytes.on_disk",
        "metrics",
        "metrics.0.value",
        "metrics.0.per_seed",
        "metrics.0.mean",
        "metrics.0.spread",
        "metrics.0.stderr",
        "metrics.0.protocol",
        "metrics.0.split",
        "dense_twin",
        "metrics.0.dense",
        "metrics.0.dense.value",
        "metrics.0.dense.per_seed",
        "metrics.0.dense.mean",
        "metrics.0.dense.spread",
        "training",
        "training.command",
        "data.licence",
        "license",
        "citation",
        "weights",
        "weights.sha256",
        "weights.bytes",
    ],
)
def test_what_a_card_must_have(fields, path: str) -> None:
    put(fields, path, ...)
    with pytest.raises(CardError, match=path.split(".")[-1]):
        parse_card(fields)


@pytest.mark.parametrize(
    "path,value",
    [
        ("surprise", 1),
        ("weights.url", "http://x"),
        ("schema_version", 2),
        ("schema_version", "1"),
        ("name", "graph/../etc"),
        ("name", "GRAPH/x"),
        ("name", 3),
        ("version", 1.0),
        ("version", "1.0"),
        ("method.seed", -1),
        ("method.seed", True),
        ("method.seed", 1.5),
        ("method.seed", 1 << 64),
        ("cost.parameters.dense", "1010"),
        ("cost.parameters.kept", -1),
        ("cost.flops.dense", float("nan")),
        ("metrics.0.value", float("nan")),
        ("metrics.0.value", float("inf")),
        ("metrics.0.value", "0.81"),
        ("metrics.0.value", True),
        ("metrics.0.stderr", -0.1),
        ("metrics.0.per_seed", {}),
        ("metrics", []),
        ("metrics.0.per_seed", {"a": 0.81}),
        ("metrics.0.per_seed", {0: float("nan")}),
        ("metrics.0.per_seed", [0.81]),
        ("sparsity.overall", -0.1),
        ("sparsity.overall", 1.1),
        ("sparsity.parts.weights.pattern", ""),
        ("training.command", ""),
        ("training.seconds", -1.0),
        ("training.seconds", float("inf")),
        ("weights.bytes", 0),
        ("weights.sha256", "0" * 63),
        ("weights.sha256", "G" * 64),
        ("weights.sha256", "A" * 64),
        ("weights.sha256", "0" * 64 + "\n"),
        ("architecture.args", {"x": float("nan")}),
        ("architecture.args", {"x": [{"y": float("inf")}]}),
        ("architecture.args", {1: 2}),
        ("architecture.args", {"x": b"bytes"}),
        ("architecture.args", {"x": object()}),
        ("summary", ""),
        ("metrics.0", None),
        ("data", []),
        ("evidence", "/etc/passwd"),
        ("evidence", "../x"),
        ("evidence", "C:/x"),
        ("evidence", "a\\b"),
        ("evidence", "a//b"),
    ],
)
def test_what_a_card_may_not_say(fields, path: str, value: Any) -> None:
    put(fields, path, value)
    with pytest.raises(CardError) as caught:
        parse_card(fields, "x/card.yaml")
    message = str(caught.value)
    assert message.startswith("x/card.yaml: ") and len(message) < 300 and "\n" not in message


@pytest.mark.parametrize(
    "name",
    [
        "../weights.safetensors",
        "/etc/weights.safetensors",
        "a/weights.safetensors",
        "..\\weights.safetensors",
        "C:weights.safetensors",
        "weights.safetensors\0",
        "weights\0.safetensors",
        "weights.safetensors\n",
        "..safetensors",
        ".safetensors",
        ".hidden.safetensors",
        "weights..safetensors",
        "weights.pt",
        "weights.bin",
        "~root.safetensors",
        "",
        "weights.safetensors/",
        "%2e%2e%2fx.safetensors",
        "wéights.safetensors",
    ],
)
def test_a_weights_file_is_a_bare_name(fields, name: str) -> None:
    put(fields, "weights.file", name)
    with pytest.raises(CardError, match="bare file name"):
        parse_card(fields)


def test_many_errors_are_condensed(fields) -> None:
    for path in ("name", "version", "license", "citation"):
        put(fields, path, 3)
    with pytest.raises(CardError, match=r"x: name: .*received 3 \(3 more such errors\)\. Correct"):
        parse_card(fields, "x")


def test_twice_the_same_metric(fields) -> None:
    fields["metrics"].append(copy.deepcopy(fields["metrics"][0]))
    with pytest.raises(CardError, match="accuracy .* twice"):
        parse_card(fields)


def test_the_spread_is_the_sample_deviation() -> None:
    assert mean_and_spread({0: 1.0, 1: 3.0}) == (2.0, 2.0**0.5)
    assert mean_and_spread({7: 4.0}) == (4.0, None)


def test_one_seed_has_no_spread(fields) -> None:
    fields["metrics"][0] |= {"per_seed": {0: 0.8}, "mean": 0.8, "spread": None}
    assert parse_card(fields).metrics[0].spread is None
    fields["metrics"][0]["spread"] = 0.0  # as cards used to say
    assert parse_card(fields).metrics[0].spread is None
    fields["metrics"][0]["spread"] = 0.1
    with pytest.raises(CardError, match="of 1 seeds it is None"):
        parse_card(fields)


def billion_laughs() -> str:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    return "\n".join(lines)


BAD_YAML = {
    "billion laughs": (billion_laughs(), "alias"),
    "recursive alias": ("a: &a [*a]", "alias"),
    "merge key": ("a: &a {x: 1}\nb:\n  <<: *a", "alias"),
    "python object": ("a: !!python/object/apply:os.system ['true']", "tag"),
    "binary": ("a: !!binary aGVsbG8=", "tag"),
    "own tag": ("a: !mine 3", "tag"),
    "deep flow": ("a: " + "[" * 5000 + "]" * 5000, "nested deeper"),
    "deep blocks": ("\n".join(" " * i + "a:" for i in range(400)), "nested deeper"),
    "duplicate key": ("a: 1\nb: 2\na: 3", "'a' twice"),
    "duplicate nested key": ("a: {x: 1, x: 2}", "'x' twice"),
    "too large": ("a: " + "x" * MAX_BYTES, "at most"),
    "a list": ("- a\n- b", "expected a mapping"),
    "text": ("just text", "expected a mapping"),
    "nothing": ("", "expected a mapping"),
    "two documents": ("a: 1\n---\nb: 2", "another document"),
    "key is a list": ("? [a]\n: 1", "no name"),
    "key is true": ("true: 1", "no name"),
    "unclosed": ("a: [1, 2", "line"),
    "tabs": ("a:\n\t- b", "line"),
    "not UTF-8": (b"a: \xff\xfe", "UTF-8"),
    "null byte": (b"a: \x00", "not a YAML card"),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00", "UTF-8"),
}


@pytest.mark.parametrize("text,message", BAD_YAML.values(), ids=BAD_YAML)
def test_bad_yaml(text: str | bytes, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(CardError, match=message) as caught:
        load_yaml(text, "x/card.yaml")
    assert time.perf_counter() - start < 2
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    assert str(caught.value).count("x/card.yaml") == 1


def test_values_are_what_they_look_like() -> None:
    text = "a: 2:4\nb: no\nc: 2026-01-01\nd: 1e-3\ne: 010\nf: 0x10\ng: .5\nh: ~\ni: true\nj: 1_000\n<<: x"
    assert load_yaml(text, "x") == {
        "a": "2:4",
        "b": "no",
        "c": "2026-01-01",
        "d": 1e-3,
        "e": 10,
        "f": "0x10",
        "g": 0.5,
        "h": None,
        "i": True,
        "j": "1_000",
        "<<": "x",
    }


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CardError, match="card.yaml: cannot be read: No such file"):
        read_yaml(tmp_path / "card.yaml")
    with pytest.raises(CardError, match="cannot be read"):
        read_yaml(tmp_path)


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.sampled_from(
        ["2:4", "1e5", "no", "~", "null", "0x1", "1_0", "<<", "=", " x ", "a\nb", "a\n", "\n", "- a"]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=10), plain, max_size=4))
def test_what_is_written_is_read_back(value: dict[str, Any]) -> None:
    again = load_yaml(dump_yaml(value), "x")
    assert again == value and repr(again) == repr(value)


def test_a_text_that_is_read_without_a_first_walk_has_nothing_to_find_there() -> None:
    """Random texts of the signs that matter: what `_is_harmless` lets through, the walk would, too."""
    signs = [
        "a",
        "- ",
        "? ",
        ": ",
        "\n",
        " ",
        "  ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "a: ",
        "&x ",
        "*x",
        "!t ",
        "'",
        "#",
        "|",
    ]
    signs += ["'", "#", "|", "\r", "\t", "\x85", "\u2028", "---", "%"]
    draw = random.Random(0)
    texts = ["".join(draw.choices(signs, k=draw.randint(1, 60))) for _ in range(4000)]
    for depth in range(1, 30):
        texts.append("".join(f"{' ' * level}a:\n" for level in range(depth)) + " " * depth + "b: 1")
        beside = [f"{' ' * 2 * level}a:\n{' ' * 2 * level}- b:\n" for level in range(depth)]
        texts.append("".join(beside) + " " * (2 * depth + 2) + "c: 1")
    passed = [text for text in texts if cardfile._is_harmless(text)]
    assert 100 < len(passed) < len(texts) / 2
    for text in passed:
        with contextlib.suppress(yaml.YAMLError):  # reading says so
            cardfile._refuse_dangerous(text, "x")
    cards = [bundle.card.to_yaml() for bundle in select("vision/*digits*")]
    assert sum(map(cardfile._is_harmless, cards)) > 0.9 * len(cards), "else nothing is gained"


def test_spreads_of_far_apart_values_do_not_overflow() -> None:
    mean, spread = mean_and_spread({0: 1e200, 1: -1e200})
    assert mean == 0 and spread == pytest.approx(2**0.5 * 1e200)
    assert mean_and_spread({0: 1.7e308, 1: 1.7e308}) == (1.7e308, 0)
    assert mean_and_spread({0: 1.0, 1: 3.0}) == (2.0, pytest.approx(2**0.5)) and mean_and_spread(
        {0: 4.0}
    ) == (4, None)
