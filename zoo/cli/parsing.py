"""Options from dataclasses, by tyro, with usage errors of one line."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import tyro

from zoo.errors import ConfigError

T = TypeVar("T")

#: Makes an argument positional: `name: Annotated[str, Positional, metavar("MODEL")]`.
Positional: Any = tyro.conf.Positional


def metavar(name: str) -> Any:
    """How an argument is shown in the usage."""
    return tyro.conf.arg(metavar=name)


def parse(
    options: type[T],
    argv: Sequence[str],
    command: str,
    description: str | None = None,
    others: Sequence[str] = (),
) -> T:
    """Read the options of a command; those of `others` were taken before and are only suggested.

    Raises:
        ConfigError: wrong usage, in one line.
        SystemExit: with code 0 after `--help` was printed.
    """
    arguments = _joined(options, argv)
    printed, errors = _Capture(), _Capture()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            return tyro.cli(
                options,
                args=arguments,
                prog=f"zoo {command}",
                description=description,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as error:
        if not error.code:
            print(_readable(printed.text()), end="")
            raise
        said = _misspelt(options, argv, others) or _condense(errors.text(), others)
        raise ConfigError(f"{said}; see `zoo {command} --help`") from None


def parse_with(
    common: type,
    part: type,
    argv: Sequence[str],
    command: str,
    description: str | None = None,
    others: Sequence[str] = (),
) -> tuple[Any, Any]:
    """Read the options of a command together with those of a method or experiment, as one flat list.

    Args:
        common: dataclass of the command's own options.
        part: dataclass of the options of what the command runs.
        argv: what was typed.
        command: for messages and usage.
        description: for the help.
        others: options that were taken before, to be suggested.

    Raises:
        ConfigError: wrong usage, or a `part` whose fields hide those of `common`.
    """
    own = {field.name for field in dataclasses.fields(common)}
    if clash := own & {field.name for field in dataclasses.fields(part)}:
        raise ConfigError(
            f"{part.__name__} has the option {sorted(clash)[0]!r}, which `zoo {command}` has itself"
        )
    flat = tyro.conf.arg(name="")
    fields: list[Any] = [("common", Annotated[common, flat]), ("part", Annotated[part, flat])]
    both = dataclasses.make_dataclass("Options", fields)
    read: Any = parse(both, argv, command, description, others)
    return read.common, read.part


def _joined(options: type, argv: Sequence[str]) -> list[str]:
    """The arguments with the values of options that were typed twice in one place: `--task a --task b` is
    `--task a b`, where tyro would keep the last one without a word.

    Raises:
        ConfigError: an option of one value was typed twice.
    """
    typed = [word.partition("=")[0] for word in argv if word.startswith("--")]
    if len(set(typed)) == len(typed):
        return list(argv)
    several = _options_of_several_values(options)
    rest: list[str] = []
    values: dict[str, list[str]] = {}
    index = 0
    while index < len(argv):
        name, equals, value = argv[index].partition("=")
        index += 1
        if not name.startswith("--") or name == "--":
            rest.append(argv[index - 1])
            continue
        taken = [value] if equals else []
        while not equals and index < len(argv) and not argv[index].startswith("--"):
            taken.append(argv[index])
            index += 1
        if name in values and name[2:].replace("_", "-") not in several:
            raise ConfigError(f"{name} is given twice; give it once")
        values.setdefault(name, []).extend(taken)
    return [*rest, *(word for name, taken in values.items() for word in (name, *taken))]


def _options_of_several_values(options: type) -> set[str]:
    """Names of the options that take any number of values, as they are typed."""
    found: set[str] = set()
    for name, hint in typing.get_type_hints(options).items():
        kinds = [hint, *typing.get_args(hint)]
        if any(typing.get_origin(kind) in (tuple, list) for kind in kinds):
            found.add(name.replace("_", "-"))
        elif dataclasses.is_dataclass(hint):
            found |= _options_of_several_values(typing.cast(type, hint))
    return found


def _misspelt(options: type, argv: Sequence[str], others: Sequence[str]) -> str:
    """Which option that was typed is none, and what was probably meant; nothing if all are known. tyro takes
    the next word for its value, and then misses that one."""
    known = [*_option_names(options), *others]
    for word in argv[: argv.index("--")] if "--" in argv else argv:
        name = word.partition("=")[0].replace("_", "-")
        if name.startswith("--") and "." not in name and name not in known:
            close = difflib.get_close_matches(name, known, n=2, cutoff=0.7)
            if close:
                return f"Unrecognized option {name}; did you mean {' or '.join(close)}?"
    return ""


def _option_names(options: type) -> list[str]:
    """The options of a dataclass and of those in it, as they are typed."""
    found = ["--help"]
    for field in dataclasses.fields(options):
        hint = typing.get_type_hints(options)[field.name]
        if dataclasses.is_dataclass(hint):
            found += _option_names(typing.cast(type, hint))
        else:
            found.append(f"--{'no-' if field.default is True else ''}{field.name.replace('_', '-')}")
    return found


def take_option(argv: Sequence[str], name: str, default: str) -> tuple[str, list[str]]:
    """The value of `--name VALUE` or `--name=VALUE`, and the arguments without it.

    Raises:
        ConfigError: the value is missing.
    """
    rest, value = list(argv), default
    for index, argument in enumerate(argv):
        if argument == f"--{name}":
            if index + 1 >= len(argv) or argv[index + 1].startswith("-"):
                raise ConfigError(f"--{name} needs a value")
            return argv[index + 1], rest[:index] + rest[index + 2 :]
        if argument.startswith(f"--{name}="):
            return argument.partition("=")[2], rest[:index] + rest[index + 1 :]
    return value, rest


def command_line(command: str, argv: Sequence[str]) -> str:
    """What the user typed, for cards and reports."""
    import shlex

    return shlex.join(["zoo", command, *argv])


class _Capture(io.TextIOWrapper):
    """Collects text; says that it is UTF-8, without which tyro would draw its boxes in ASCII."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def text(self) -> str:
        """All that was written."""
        self.seek(0)
        return self.read()


def _condense(box: str, others: Sequence[str]) -> str:
    """tyro's framed message as one line: the culprit, then the near misses."""
    lines = [re.sub(r"^[│╭╰][ ─]*|[ ─]*[│╮╯]$", "", line).strip() for line in box.splitlines()]
    parts: list[list[str]] = [[]]
    for line, raw in zip(lines, box.splitlines(), strict=True):
        if raw.startswith(("╭", "╰")):
            continue
        if not line or set(line) <= {"─"}:
            parts.append([])
        else:
            parts[-1].append(line)
    filled = [part for part in parts if part]
    if filled and (missing := _missing(filled[0], box)):
        return missing
    message = " ".join(filled[0]).replace("{None}|", "").rstrip(":.") if filled else "wrong usage"
    for part in filled[1:]:
        options = [line.split()[0] for line in part[1:] if line.startswith("--")]
        if part[0].startswith("Perhaps you meant") and options:
            return f"{message}; did you mean {' or '.join(options[:2])}?"
    for word in re.findall(r"--[\w-]+", message) if message.startswith("Unrecognized") else ():
        if close := difflib.get_close_matches(word, others, n=1, cutoff=0.75):
            return f"{message}; did you mean {close[0]}?"
    return _number(message) or message


def _number(message: str) -> str:
    """What to type where a number was expected and something else was typed; nothing for other messages."""
    found = re.match(
        r"Error parsing (\S+): (?:no type matching (INT|FLOAT) could .*|invalid literal for (int)\(\).*|"
        r"could not convert string to (float): )\W*('[^']*')",
        message,
    )
    if found is None:
        return ""
    kind = "a whole number" if "int" in (found[2] or found[3] or "").lower().split() else "a number"
    return f"{found[1]} takes {kind}; received {found[5]}"


def _missing(part: Sequence[str], box: str) -> str:
    """What a command needs and was not given, each with its help; nothing if nothing is missing."""
    found = re.match(r"Missing from (.*):$", part[0])
    if found is None:
        return ""
    needed: dict[str, list[str]] = {}
    for line in part[1:]:
        if re.search(rf"^│ {{5}}{re.escape(line)}", box, re.MULTILINE):  # not as deep as its help
            name = line
            needed[name] = []
        else:
            needed[name].append(line)
    helps = {name: " ".join(lines).removesuffix("(required)").rstrip(" .") for name, lines in needed.items()}
    return f"{found[1]} needs " + " and ".join(f"{name} ({text})" for name, text in helps.items())


def _readable(text: str) -> str:
    """tyro's help without `{None}|` before the type of an option that may be left out and without defaults
    that are empty, columns aligned."""
    usage, corner, boxes = text.partition("╭")
    boxes = re.sub(r"\{None\}\|(\S+)", lambda found: found[1] + " " * len("{None}|"), boxes)
    boxes = boxes.replace(" (default: )", " " * len(" (default: )"))
    return usage.replace("{None}|", "") + corner + boxes


def is_help(argv: Sequence[str]) -> bool:
    """Whether help was asked for."""
    return "-h" in argv or "--help" in argv
