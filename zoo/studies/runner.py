"""Runs a study, or judges rows that were measured before, and writes its JSON, Markdown and pictures."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zoo.errors import ConfigError, DataError
from zoo.registry import STUDIES
from zoo.shared.store.io import atomic_write, read_json, write_json
from zoo.studies.cells import CellCache
from zoo.studies.digests import commit
from zoo.studies.study import Study
from zoo.studies.tables import Result
from zoo.studies.view import Row


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """A finished study and the files that were written."""

    study: Study
    options: Any
    result: Result
    seconds: float
    files: list[Path]


def get_study(name: str) -> Study:
    """The study of that name.

    Raises:
        UnknownNameError: nobody registered it.
        ConfigError: the entry is not a study.
    """
    entry: Any = STUDIES.get(name)
    if not isinstance(entry, Study):
        raise ConfigError(f"{name!r} is registered as a study, but {entry!r} is not a zoo.studies Study")
    return entry


def reproduce(
    name: str,
    options: Any = None,
    *,
    out: str | Path = "results",
    cells: str | Path | None = None,
    progress: Callable[..., None] | None = None,
    **fields: Any,
) -> Reproduction:
    """Run a study and write `NAME.json`, `NAME.md` and one PNG per plot into `out`.

    Args:
        name: of the study.
        options: an instance of its `options`; or give single `fields` of that class.
        out: folder of the results; made if need be.
        cells: folder of the finished cells, for resuming; by default in the cache folder.
        progress: called as the cells finish.

    Raises:
        UnknownNameError: no such study.
        ConfigError: an option that the study does not have, or options of another class.
    """
    from zoo.bundles.catalog import cache_folder

    study = get_study(name)
    options = _options(study, options, fields)
    cache = CellCache(Path(cells) if cells is not None else cache_folder() / "cells" / name)
    start = time.perf_counter()
    result = study.run(options, cache, progress)
    seconds = time.perf_counter() - start
    made = _provenance(cache) | {"seconds": round(seconds, 1), "created": _now()}
    return Reproduction(
        study, options, result, seconds, write_result(study, options, result, Path(out), made)
    )


def judge_again(
    results: str | Path,
    out: str | Path | None = None,
    more: str | Path | None = None,
    replace: bool = False,
) -> Reproduction:
    """Make tables, verdicts and plots anew from the rows of a result file, without measuring anything.

    Tables that need more than the rows (what is right image by image, say) are kept as they were.

    Args:
        results: a `NAME.json` that `reproduce` wrote.
        out: folder of the new files; by default they replace those beside the file.
        more: another one of the same study, whose rows are added: further arms or seeds, measured later. The
            result names both origins.
        replace: let rows of `more` take the place of those of the same arm, level and seed, which were
            measured with code that was wrong, say.

    Raises:
        DataError: a file is no result of a study; or `more` is of another study or of other options, or
            measured a case that is there already and is not to replace it.
        UnknownNameError: of a study that nobody registered.
    """
    path = Path(results)
    study, stored, options = _stored(path)
    rows = stored["result"]["rows"]
    kept = ("seconds", "created", "environment", "provenance", "cells", "added")
    made = {key: stored[key] for key in kept if key in stored} | {"judged": _now()}
    if more is not None:
        other, added, further = _stored(Path(more))
        options = _joined(study, options, other, further, Path(more))
        rows = _united(study, rows, added["result"]["rows"], None if replace else Path(more))
        origin = {key: added[key] for key in ("command", *kept) if key in added}
        made["added"] = [*made.get("added", []), origin]
    result = study.report(rows, options)
    from zoo.studies.tables import Table

    titles = {table.title for table in result.tables}
    old = [Table(**table) for table in stored["result"]["tables"] if table["title"] not in titles]
    result = dataclasses.replace(result, tables=[*result.tables, *old])
    folder = Path(out) if out is not None else path.parent
    return Reproduction(study, options, result, 0.0, write_result(study, options, result, folder, made))


def _stored(path: Path) -> tuple[Study, dict[str, Any], Any]:
    """The study of a result file, what it holds, and the options it was run with."""
    try:
        stored = read_json(path)
    except ValueError:
        stored = None
    name = stored.get("study", stored.get("experiment")) if isinstance(stored, dict) else None
    if not isinstance(stored, dict) or not isinstance(name, str) or "result" not in stored:
        raise DataError(f"{path} is no result of a study; give a NAME.json that `zoo reproduce` wrote")
    study = get_study(name)
    known = {field.name: field for field in dataclasses.fields(study.options)}
    options = study.options(**{k: _typed(v, known[k]) for k, v in stored["config"].items() if k in known})
    return study, stored, options


def _joined(study: Study, first: Any, other: Study, second: Any, path: Path) -> Any:
    """The options of the first run, with the lists that decide no cell joined, and as many seeds as the
    longer; all else must be alike."""
    if other is not study:
        raise DataError(f"{path} is a result of {other.name!r}, not of {study.name!r}")
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(first):
        ours: Any = getattr(first, field.name)
        theirs: Any = getattr(second, field.name)
        if ours == theirs or field.name == "from_seed":
            continue
        if field.name == "seeds":
            changed[field.name] = max(ours, theirs)
            continue
        if field.name not in study.varies:
            raise DataError(f"{path} was run with {field.name}={theirs!r}, the rows here with {ours!r}")
        if isinstance(ours, tuple):  # an empty list stands for all
            changed[field.name] = tuple(dict.fromkeys([*ours, *theirs])) if ours and theirs else ()
    return dataclasses.replace(first, **changed)


def _united(study: Study, rows: Sequence[Row], more: Sequence[Row], path: Path | None) -> list[Row]:
    """All rows; a further one replaces one of its arm, level and seed, or with a `path` is refused."""

    def case(row: Row) -> tuple[str, ...]:
        return tuple(str(row.get(name)) for name in (*study.by, "arm", "level", "seed"))

    further = {case(row) for row in more}
    if path is not None and (double := next((case(row) for row in rows if case(row) in further), None)):
        raise DataError(
            f"{path} measured {', '.join(double)} again: run it without that arm or seed, or add --replace"
        )
    return [*(row for row in rows if case(row) not in further), *more]


def write_result(
    study: Study, options: Any, result: Result, out: Path, made: Mapping[str, Any]
) -> list[Path]:
    """Write the JSON, the Markdown and the pictures of a result; each file whole or not at all."""
    from zoo.report import markdown, plots

    out.mkdir(parents=True, exist_ok=True)
    written = [out / f"{study.name}.json"]
    content = {
        "study": study.name,
        "paper": study.paper,
        "config": dataclasses.asdict(options),
        "command": command_of(study, options),
        "result": {k: v for k, v in dataclasses.asdict(result).items() if k != "plots"},
        **made,
    }
    write_json(written[0], json.loads(json.dumps(content, default=str)))
    pictures = {}
    for plot in result.plots:
        picture = out / f"{study.name}-{plot.name}.png".replace(" ", "-")  # Markdown ends a link at a blank
        atomic_write(picture, plots.png(plot))
        pictures[plot.name] = picture.name
        written.append(picture)
    facts = {"Paper": study.paper, "Command": command_of(study, options), **_facts(made)}
    text = markdown.study_report(study.title, result, facts=facts, plot_files=pictures)
    written.append(atomic_write(out / f"{study.name}.md", text.encode()))
    return written


def command_of(study: Study, options: Any) -> str:
    """The command that runs a study with these options."""
    words = ["zoo", "reproduce", study.name]
    for field in dataclasses.fields(options):
        value, default = getattr(options, field.name), getattr(study.options(), field.name)
        if value == default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def _provenance(cells: CellCache) -> dict[str, Any]:
    """Where each cell of a result came from; machines are numbered."""
    machines = list(dict.fromkeys(used["machine"] for used in cells.used.values()))
    listed = {}
    for stem, used in cells.used.items():
        key = used["key"]
        digests = {name: key[name] for name in ("code", "data") if name in key}
        place = machines.index(used["machine"])
        listed[stem] = {**digests, "commit": used["commit"], "seconds": used["seconds"], "machine": place}
    counted = {"from_cache": cells.hits, "computed": cells.misses}
    return {"provenance": {"machines": machines, "cells": listed}, "cells": counted, "commit": commit()}


def _facts(made: Mapping[str, Any]) -> dict[str, str]:
    """Provenance in words."""
    facts = {}
    if provenance := made.get("provenance"):
        listed = list(provenance["cells"].values())
        seconds = sum(one["seconds"] for one in listed)
        commits = sorted({one["commit"] for one in listed if one["commit"]})
        facts["Time"] = f"{seconds:,.0f} s in {len(listed)} cells"
        facts["Machine"] = "; ".join(provenance["machines"])
        facts["Commit"] = ", ".join(commits) or "none"
        facts["Code"] = ", ".join(sorted({one.get("code", "") for one in listed}))
        facts["Data"] = ", ".join(sorted({one.get("data", "") for one in listed} - {""})) or "none"
    else:
        here = made.get("environment", {})
        facts["Machine"] = f"{here.get('cpu')}, {here.get('cpus')} CPUs, torch {here.get('torch')}"
        facts["Commit, code, data"] = "not recorded when these rows were measured"
    facts["Measured"] = str(made.get("created", ""))
    if added := made.get("added"):
        facts["Added"] = "; ".join(f"{one['created']} by `{one['command']}`" for one in added)
    if "judged" in made:
        facts["Judged"] = f"{made['judged']}, from the rows of the JSON file"
    return facts


def _typed(value: Any, field: dataclasses.Field[Any]) -> Any:
    """What JSON made of an option, as its default is."""
    if isinstance(value, list):
        return tuple(_typed(one, field) for one in value)
    return Path(value) if isinstance(field.default, Path) else value


def _now() -> str:
    from zoo.harness.records import now

    return now()


def _options(study: Study, options: Any, fields: Mapping[str, Any]) -> Any:
    expected = study.options
    if options is not None:
        if fields:
            raise ConfigError(f"give either options or single fields to {study.name!r}, not both")
        if not isinstance(options, expected):
            raise ConfigError(
                f"{study.name!r} takes a {expected.__name__}; received {type(options).__name__}"
            )
        return options
    known = [field.name for field in dataclasses.fields(expected)]
    if unknown := sorted(set(fields) - set(known)):
        raise ConfigError(f"study {study.name!r} has no option {unknown[0]!r}; it has: {', '.join(known)}")
    return expected(**fields)
