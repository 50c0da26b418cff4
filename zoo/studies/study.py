"""A study is data: arms x levels x seeds, and claims with what the paper published.

A paper's file holds one `Study`: which method makes each arm, what one run measures, the claims, and a
function of its own only where a figure is its own. The runner (`zoo.studies.runner`) gives the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from zoo.errors import ConfigError
from zoo.shared.store.identity import data_digest
from zoo.studies.cells import CellCache, share
from zoo.studies.digests import code_digest
from zoo.studies.tables import Plot, Result, Table, Verdict
from zoo.studies.verdict import Cap, Finding, judge
from zoo.studies.view import NotRunError, Row, Rows, Value, View

BAR = "not stated; this zoo's bar"
TableMaker = Callable[[View], Table | None]
PlotMaker = Callable[[View], Plot | None]


@dataclass(frozen=True)
class Tuned:
    """What was chosen for an arm.

    Attributes:
        what: the option.
        on: the data that chose it: "validation images", say. Anything that begins with "test" makes the
            claims of the arm invalid.
        grid: the values that were tried, or the name of the option that holds them.
    """

    what: str
    on: str
    grid: tuple[Any, ...] | str


@dataclass(frozen=True)
class Arm:
    """One way to a model.

    Attributes:
        make: what the study's `measure` makes it with: a method's class or a partial of it, or plain options.
        control: name of the arm of chance that it must beat, where others are compared with it.
        tuned: what was chosen for it; None for the method's defaults.
        once: whether nothing is drawn in it, so that one run stands for every seed.
        flat: whether it has no level, so that its runs stand for every level.
    """

    make: Any = None
    control: str = ""
    tuned: Tuned | None = None
    once: bool = False
    flat: bool = False


@dataclass(frozen=True)
class Claim:
    """That one arm is above another.

    Attributes:
        text: with `{where}` for the group and `{level}`; by default what arms and bar say.
        published: what the paper says, or that it says nothing.
        first, second: the arms; without a second the first's figure itself is held against the bar.
        bar: what the difference must exceed.
        at: levels, each a claim of its own; empty for all that the first arm has.
        mean: over the levels instead.
        value: the figure, if it is not the study's.
        only: what a group must have for the claim to be asked there.
        papers: by number, if they are not the study's.
    """

    text: str
    published: str
    first: str
    second: str = ""
    bar: float = 0.0
    at: tuple[Any, ...] = ()
    mean: bool = False
    value: Value | None = None
    only: Mapping[str, Any] = field(default_factory=dict)
    papers: tuple[int, ...] = ()

    def findings(self, view: View) -> Iterator[Finding]:
        """What was measured of it in a group, level by level."""
        if any(view.where.get(name) != value for name, value in self.only.items()):
            return
        value = self.value or view.study.value
        levels = self.at or tuple(view.levels(self.first))
        for each in [levels] if self.mean else [(level,) for level in levels]:
            difference = view.difference(self.first, self.second, each, value)
            if difference is None:
                continue
            cap, note = _cap(self, view, each, value)
            text, where = self.text, view.title
            if not text:
                text, where = self._in_words(value, len(levels) > 1), f"{where}: " if where else ""
            yield Finding(
                text.format(where=where, level=shown(each[0])),
                self.published,
                difference,
                self.bar,
                value.unit,
                value.decimals,
                self.papers or view.study.papers,
                cap,
                note,
            )

    def _in_words(self, value: Value, levels: bool) -> str:
        """What is claimed, from the arms and the bar."""
        gap = f"{abs(self.bar):.{value.decimals}f} {value.unit}"
        how = f"less than {gap} below" if self.bar < 0 else f"{gap} or more above" if self.bar else "above"
        return f"{{where}}'{self.first}' is {how} '{self.second}'{' at {level}' * levels}"


def above(first: str, second: str, bar: float = 0.0, published: str = BAR, **fields: Any) -> Claim:
    """That one arm is above another by more than the bar, in the words that arms and bar make."""
    return Claim("", published, first, second, bar, **fields)


def _cap(claim: Claim, view: View, levels: Sequence[Any], value: Value) -> tuple[Cap, str]:
    """What bounds the verdict: an arm tuned on test data, a control that does not beat chance."""
    study = view.study
    for name in (claim.first, claim.second):
        tuned = study.arm({"arm": name}).tuned
        if tuned is not None and tuned.on.startswith("test"):
            return "invalid", f"{name}: {tuned.what} was chosen on {tuned.on}"
    for name in (claim.first, claim.second):
        chance = study.arm({"arm": name}).control
        if not chance or chance in (claim.first, claim.second):
            continue
        above = view.difference(name, chance, levels, value)
        if above is None:
            if value == study.value:  # of a time, say, chance has none
                return "cannot be told", f"{chance}, which the control {name} must beat, was not run"
            continue
        if above.value <= 0:
            return "invalid", f"the control {name} does not beat {chance}"
        if above.low <= 0:
            return "cannot be told", f"the control {name} is not shown to beat {chance}"
    return "", ""


@dataclass(frozen=True)
class Study:
    """A paper's claims and how they are measured.

    Attributes:
        name: what `zoo reproduce` takes.
        title: one line.
        paper: reference.
        papers: numbers in `zoo.studies.papers`.
        options: a dataclass with defaults; its fields become the options of `zoo reproduce NAME`.
        arms: by name.
        cases: options -> the runs: arm, level, seed, and the coordinates named in `by`.
        measure: what the arm is made with, options, a case, the cells -> figures of the run; or a list of
            rows, which may replace what the case says.
        claims: or options -> claims.
        value: the figure of claims and tables.
        varies: names of options that decide no cell: which cases there are, where they are computed.
        data: options and a case's coordinates -> what the cells' digest of the data is taken of.
        by: coordinates that split the rows into groups; the claims of a group are one family.
        titles: words for coordinates.
        facts: a group -> verdicts that rest on no difference (an exact count, say).
        tables, plots: of each group.
        overall: tables and plots of all rows together.
        prepare: rows as measured -> rows as reported.
        notes: options -> sentences for the reader.
    """

    name: str
    title: str
    paper: str
    options: type
    arms: Mapping[str, Arm]
    cases: Callable[[Any], Iterable[Row]]
    measure: Callable[[Any, Any, Row, CellCache], Row | list[Row]]
    papers: tuple[int, ...] = ()
    claims: Sequence[Claim] | Callable[[Any], Sequence[Claim]] = ()
    value: Value = Value()
    varies: tuple[str, ...] = ("seeds", "levels", "arms", "device")
    data: Callable[[Any, Row], Any] | None = None
    by: tuple[str, ...] = ()
    titles: Mapping[Any, str] = field(default_factory=dict)
    facts: Callable[[View], list[Verdict]] | None = None
    tables: Sequence[TableMaker] = ()
    plots: Sequence[PlotMaker] = ()
    overall: Sequence[TableMaker | PlotMaker] = ()
    prepare: Callable[[Rows, Any], Rows] | None = None
    notes: Callable[[Any], list[str]] = lambda options: []  # noqa: E731

    def arm(self, case: Row) -> Arm:
        """The arm of a case."""
        return self.arms.get(case.get("arm", ""), Arm())

    def key(self, options: Any, case: Row) -> Row:
        """What decides the value of a case: its options, and digests of its code and data.

        Raises:
            ConfigError: an option or coordinate with the name of one of the digests, which would hide it.
        """
        decides_none = (*self.varies, "from_seed")
        own = {k: v for k, v in dataclasses.asdict(options).items() if k not in decides_none}
        if clash := sorted({"code", "data"} & {*own, *case}):
            raise ConfigError(f"study {self.name}: {clash[0]!r} is the name of a digest; name it otherwise")
        where = {name: case[name] for name in self.by if name in case}
        return {
            "study": self.name,
            **json.loads(json.dumps(own, default=str)),
            **case,
            "code": _code(self.measure, _Hashed(self.arm(case).make)),
            "data": _data(_Hashed(self), _Hashed(options), json.dumps(where)),
        }

    def run(self, options: Any, cells: CellCache, progress: Callable[..., None] | None = None) -> Result:
        """Measure what is missing, and report; several processes on one folder of cells divide the work."""

        def measured(case: Row) -> list[Row]:
            make = self.arm(case).make
            found = cells.cell(self.key(options, case), lambda: self.measure(make, options, case, cells))
            return [{**case, **one} for one in (found if isinstance(found, list) else [found])]

        first = getattr(options, "from_seed", 0)  # what has no seed belongs to the run that began with 0
        work = [
            (" ".join(str(value) for value in case.values()), functools.partial(measured, case))
            for case in self.cases(options)
            if case.get("seed", 0) >= first
        ]
        rows = [row for found in share(work, cells, progress) for row in found]
        return self.report(rows, options)

    def report(self, rows: Rows, options: Any) -> Result:
        """Tables, verdicts and plots of rows, whoever measured them."""
        reported = self.prepare(rows, options) if self.prepare else rows
        everything = View(self, reported, options, {})
        tables: list[Table] = []
        plots: list[Plot] = []
        verdicts: list[Verdict] = []
        claims = self.claims(options) if callable(self.claims) else self.claims
        without: list[str] = []
        for view in self._groups(everything):
            verdicts += judge([finding for claim in claims for finding in claim.findings(view)])
            with _noting(without):
                verdicts += self.facts(view) if self.facts else []
            for make in (*self.tables, *self.plots):
                with _noting(without):
                    _file(make(view), tables, plots)
        for make in (*self.overall, _tuning):
            with _noting(without):
                _file(make(everything), tables, plots)
        notes = [*self.notes(options), *_left_out(without)]
        return Result(tables, verdicts, plots, list(rows), notes)

    def _groups(self, view: View) -> list[View]:
        found = dict.fromkeys(tuple(row[name] for name in self.by) for row in view.rows)
        return [
            dataclasses.replace(view.part(**where), where=where)
            for where in (dict(zip(self.by, values, strict=True)) for values in found)
        ]


def grid(
    arms: Mapping[str, Arm], levels: Sequence[Any], seeds: int, named: Sequence[str] = (), **where: Any
) -> Iterator[Row]:
    """Every arm (or those named) at every level for every seed; an arm in which nothing is drawn once."""
    for level in levels:
        for name in named or arms:
            for seed in range(1 if arms[name].once else seeds):
                yield {**where, "arm": name, "level": level, "seed": seed}


def shown(level: Any) -> str:
    """A level in words: a share in percent, anything else as it is."""
    return f"{100 * level:g} %" if isinstance(level, float) else str(level)


@contextlib.contextmanager
def _noting(without: list[str]) -> Iterator[None]:
    """Leave out what is made inside if an arm that it needs was not run, and note which."""
    try:
        yield
    except NotRunError as missing:
        without.append(str(missing))


def _left_out(without: Sequence[str]) -> list[str]:
    needed = "; ".join(dict.fromkeys(without))
    return [f"Left out: what is made of {needed}, as that is not there."] if needed else []


def _file(made: Table | Plot | None, tables: list[Table], plots: list[Plot]) -> None:
    if isinstance(made, Table):
        tables.append(made)
    elif made is not None:
        plots.append(made)


def _tuning(view: View) -> Table | None:
    """What was chosen for each arm, on which data, over which grid."""
    chosen = [(name, view.study.arms[name].tuned) for name in view.arms() if name in view.study.arms]
    body = []
    for name, tuned in chosen:
        if tuned is not None:
            tried = getattr(view.options, tuned.grid) if isinstance(tuned.grid, str) else tuned.grid
            body.append([name, tuned.what, tuned.on, ", ".join(map(str, tried))])
    if not body:
        return None
    note = "The other arms have their methods' defaults and the recipe that all share."
    return Table("What was tuned", ["arm", "option", "chosen on", "tried"], body, note)


class _Hashed:
    """Anything, hashed by identity, as an argument of a cache."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashed) and self.value is other.value


@functools.cache
def _code(measure: Callable[..., Any], make: _Hashed) -> str:
    return code_digest(measure, make.value)


@functools.lru_cache(64)
def _data(study: _Hashed, options: _Hashed, where: str) -> str:
    data = study.value.data
    return data_digest(data(options.value, json.loads(where)))[:16] if data else ""
