"""Registries: lazy entries, clashes, near misses, globs and plug-ins of other packages."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from zoo import names
from zoo.errors import ConfigError, UnknownNameError
from zoo.registry import ARCHITECTURES, METHODS, TASKS, Registry


class Runs:
    def run(self) -> None: ...


class AlsoRuns:
    def run(self) -> None: ...


@pytest.fixture
def registry() -> Registry:
    return Registry("thing", needs=("run",))


def test_an_object_comes_back(registry: Registry) -> None:
    assert registry.register("a", Runs) is Runs
    assert registry.get("a") is Runs
    assert "a" in registry and "b" not in registry


def test_the_decorator_leaves_its_object_alone(registry: Registry) -> None:
    @registry.register("decorated")
    class Local(Runs):
        pass

    assert registry.get("decorated") is Local


def test_a_string_is_imported_at_first_use(registry: Registry, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "lazily_found.py").write_text("class Thing:\n    def run(self): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry.register("lazy", "lazily_found:Thing")
    assert registry.names() == ["lazy"] and "lazily_found" not in sys.modules
    thing = registry.get("lazy")
    assert thing.__name__ == "Thing" and "lazily_found" in sys.modules
    registry.register("lazy", thing)  # the module's own decorator, run by the import
    registry.register("lazy", "lazily_found:Thing")
    assert registry.get("lazy") is thing


def test_a_clash_raises_and_keeps_the_first(registry: Registry) -> None:
    registry.register("a", Runs)
    with pytest.raises(ConfigError, match="'a' is already registered as '.*:Runs', received '.*:AlsoRuns'"):
        registry.register("a", AlsoRuns)
    with pytest.raises(ConfigError, match="already registered"):
        registry.register("a", "elsewhere:Runs")
    assert registry.get("a") is Runs


def test_two_lambdas_are_not_the_same_thing() -> None:
    registry = Registry("builder")
    first, second = (lambda n=n: n for n in range(2))
    registry.register("a", first)
    registry.register("a", first)
    with pytest.raises(ConfigError, match="already registered"):
        registry.register("a", second)


@pytest.mark.parametrize("entry", [object(), 3, Runs.run, "no-colon", ":attribute", "module:"])
def test_what_is_not_of_the_kind_is_refused(registry: Registry, entry: object) -> None:
    with pytest.raises(ConfigError, match="thing 'bad'"):
        registry.register("bad", entry)
    assert registry.names() == []


def test_without_needs_an_entry_must_be_callable() -> None:
    with pytest.raises(ConfigError, match="not callable"):
        Registry("builder").register("bad", 3)


def test_a_factory_does_where_the_registry_says_so() -> None:
    registry = Registry("thing", needs=("run",), factories=True)
    registry.register("class", Runs)
    registry.register("instance", Runs())
    registry.register("factory", lambda: Runs())
    with pytest.raises(ConfigError, match=r"no method run\(\)"):
        registry.register("bad", object())


@pytest.mark.parametrize("name", ["", " a", "a\n"])
def test_an_empty_or_padded_name_is_refused(registry: Registry, name: str) -> None:
    with pytest.raises(ConfigError, match="empty or padded"):
        registry.register(name, Runs)


def test_a_lazy_entry_is_checked_when_it_is_used(registry: Registry) -> None:
    registry.register("number", "math:pi")
    registry.register("typo", "math:pie")
    registry.register("missing", "not_a_package_anybody_has:Thing")
    registry.register("fine", Runs)
    with pytest.raises(ConfigError, match=r"no method run\(\)"):
        registry.get("number")
    with pytest.raises(ConfigError, match="math:pie, which does not exist"):
        registry.get("typo")
    with pytest.raises(ConfigError, match="needs the package 'not_a_package_anybody_has'.*pip install"):
        registry.get("missing")
    assert sorted(registry.broken()) == ["missing", "number", "typo"]


def test_an_unknown_name_brings_near_misses(registry: Registry) -> None:
    for name in ("graph/cora", "graph/citeseer", "vision/digits"):
        registry.register(name, Runs)
    with pytest.raises(UnknownNameError, match=r"Unknown thing 'graph/croa'. Did you mean 'graph/cora'"):
        registry.get("graph/croa")
    with pytest.raises(KeyError, match="'vision/digits'"):
        registry.get("graph/digits")


def test_names_follow_globs_in_natural_order(registry: Registry) -> None:
    for name in ("w100", "w8", "w80", "x1"):
        registry.register(name, Runs)
    assert registry.names() == ["w8", "w80", "w100", "x1"]
    assert registry.names("w8*") == ["w8", "w80"]
    assert registry.names("nothing*") == []


def make_distribution(folder: Path, name: str, code: str, entries: str) -> None:
    """An installed package as pip would leave it: a module and its metadata with entry points."""
    module = name.replace("-", "_")
    (folder / f"{module}.py").write_text(textwrap.dedent(code))
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(textwrap.dedent(entries))


def test_plugins_of_other_packages(tmp_path: Path, monkeypatch, caplog) -> None:
    make_distribution(
        tmp_path,
        "good-plugin",
        "class Thing:\n    def run(self): ...\n",
        "[zoo.testthings]\nthing/good = good_plugin:Thing\n",
    )
    make_distribution(
        tmp_path,
        "broken-plugin",
        "raise RuntimeError('half installed')",
        "[zoo.testthings]\nthing/broken = broken_plugin:Thing\n",
    )
    make_distribution(
        tmp_path,
        "rude-plugin",
        "class Thing:\n    def run(self): ...\n",
        "[zoo.testthings]\nthing/ours = rude_plugin:Thing\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("thing", "zoo.testthings", needs=("run",))
    registry.register("thing/ours", Runs)

    assert registry.names() == ["thing/broken", "thing/good", "thing/ours"]
    assert "broken_plugin" not in sys.modules, "listing must not import plug-ins"
    assert registry.get("thing/good").__module__ == "good_plugin"
    assert registry.get("thing/ours") is Runs, "a plug-in must not take over an existing name"
    assert "'rude-plugin' is ignored" in caplog.text
    with pytest.raises(ConfigError, match="plug-in 'broken-plugin'.*RuntimeError: half installed"):
        registry.get("thing/broken")
    assert list(registry.broken()) == ["thing/broken"]


@pytest.mark.parametrize("registry", [ARCHITECTURES, METHODS, TASKS], ids=lambda r: r.kind)
def test_every_entry_of_the_house_loads(registry: Registry) -> None:
    assert registry.broken() == {}


@pytest.mark.parametrize("name", ["graph/teddy-gcn-cora-g30-w80", "llm/a.b_c", "x/y"])
def test_legal_names(name: str) -> None:
    assert names.is_model_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "graph",
        "graph/",
        "/x",
        "graph/..",
        "graph/a..b",
        "../x",
        "graph/../x",
        "graph/a/b",
        "Graph/x",
        "graph/.x",
        "graph/x.",
        "graph/a b",
        "graph/a\n",
        "graph/a\0",
        "graph\\a",
        "graph/ä",
        "graph/" + "a" * 130,
    ],
)
def test_illegal_names(name: str) -> None:
    assert not names.is_model_name(name)


def test_versions() -> None:
    assert names.split_version("a/b@1.2.0") == ("a/b", "1.2.0")
    assert names.split_version("a/b") == ("a/b", None)
    assert names.split_version("a/b@") == ("a/b", "")
    assert [v for v in ("1.2.0", "0.0.1", "10.20.30") if not names.is_version(v)] == []
    illegal = ("1.2", "01.2.3", "1.2.3 ", "1.2.3\n", "v1.2.3", "1.2.3rc1", "", "\u0661.2.3")
    assert [v for v in illegal if names.is_version(v)] == []
    assert sorted(["1.10.0", "1.9.0"], key=names.version_key) == ["1.9.0", "1.10.0"]


def test_natural_order() -> None:
    unsorted = ["g10-w9", "g9-w10", "g9-w9", "g", "10"]
    assert sorted(unsorted, key=names.natural_key) == ["10", "g", "g9-w9", "g9-w10", "g10-w9"]


def test_near_misses() -> None:
    pool = ["graph/teddy-gcn-cora-g30-w80", "graph/teddy-gat-cora-g30-w80", "graph/dense-gcn-cora"]
    assert names.near_misses("graph/tedy-gcn-cora-g30-w80", pool)[0] == pool[0]
    assert names.near_misses("teddy-gcn-cora-g30-w80", pool)[0] == pool[0]
    assert names.near_misses("graph/dense-gnc*", pool) == [pool[2]]
    assert set(names.near_misses("graph/tedy*", pool)) == set(pool[:2]), "the beginning is enough"
    assert names.near_misses("graph/dense-gcn", pool)[0] == pool[2]
    assert names.near_misses("zzz", pool) == []
    assert names.suggestion("x", []) == "None is registered."
    assert "There are 6" in names.suggestion("zzz", "abcdef")


def test_a_word_of_a_name_is_enough() -> None:
    pool = [
        "vision/deep-compression-squeezenet-imagenet",
        "vision/dense-resnet20-cifar10",
        "graph/dense-squash",
    ]
    assert names.near_misses("squeezenet", pool) == [pool[0]]
    assert names.near_misses("vision/squeezenet", pool)[0] == pool[0]
    assert names.near_misses("*resnet20*", pool)[0] == pool[1]


def test_a_glob_over_a_mistyped_domain_is_suggested_with_the_right_one() -> None:
    pool = ["vision/dense-resnet20-cifar10", "graph/dense-gcn-cora"]
    assert names.suggestion("vison/*resnet*", pool) == "Did you mean 'vision/*resnet*'?"
    assert "vision/*zzz" not in names.suggestion("vison/*zzz", pool), "it would match nothing"
