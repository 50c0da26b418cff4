"""Options that all studies have: seeds, lists and counts that must not be empty, names that must be known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from zoo.errors import ConfigError
from zoo.names import check_known
from zoo.registry import STUDIES
from zoo.studies.options import StudyOptions


@dataclass(frozen=True)
class Options(StudyOptions):
    may_be_none: ClassVar[tuple[str, ...]] = ("documents",)
    arms: tuple[str, ...] = ("a", "b")
    more: tuple[str, ...] = ()
    documents: int = 40
    flag: bool = True
    rate: float = 0.5


@pytest.mark.parametrize("wrong", [{"seeds": 0}, {"arms": ()}, {"documents": -1}, {"seeds": -3}])
def test_nothing_where_something_is_needed_is_refused(wrong):
    with pytest.raises(ConfigError, match=f"give at least [01] of {next(iter(wrong))}; received"):
        Options(**wrong)


@pytest.mark.parametrize("first", [-1, 3, 4])
def test_a_first_seed_that_leaves_none_is_refused(first):
    with pytest.raises(ConfigError, match=f"from seed {first} on there is none of 3 seeds; give more"):
        Options(from_seed=first)


def test_what_may_be_none_may_be_none():
    made = Options(documents=0, more=(), flag=False, rate=-1.0)
    assert made.documents == 0 and made.seeds == 3


def test_unknown_names_are_refused_with_what_was_meant():
    check_known("arm", ["a"], {"a": 1})
    with pytest.raises(ConfigError, match="Unknown arm 'maginitude'. Did you mean 'magnitude'?"):
        check_known("arm", ["random", "maginitude"], ("magnitude", "random"))


def test_the_options_of_studies_refuse_no_seeds():
    kinds = [STUDIES.get(name).options for name in STUDIES.names()]
    own = [kind for kind in kinds if issubclass(kind, StudyOptions)]
    assert len(own) >= 10
    for kind in own:
        with pytest.raises(ConfigError, match="at least 1 of seeds"):
            kind(seeds=0)
