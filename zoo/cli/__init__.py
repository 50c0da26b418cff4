"""The command line `zoo`.

Exit codes: 0 done; 1 a check failed (verify, compare --margin, bench); 2 bad usage or input; 3 the
environment (disk, network, memory, or what a check needs is not here); 70 an error inside the zoo; 130
interrupted.

This module is light: each command's module is imported when the command is typed.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import gc
import importlib
import io
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence

from zoo.shared.store.kept import forget, goes_on

OK, CHECK_FAILED, USAGE, ENVIRONMENT, INTERNAL, INTERRUPTED = 0, 1, 2, 3, 70, 130

#: command -> (module under zoo.cli with a function of the command's name, summary)
COMMANDS = {
    "list": ("browse", "list models, tasks, methods, studies"),
    "show": ("browse", "everything on a model's card"),
    "eval": ("measure", "evaluate models on tasks; table, JSON, Markdown or HTML page"),
    "compare": ("measure", "compare models sample by sample, with an interval and a test"),
    "verify": ("measure", "measure every figure on a card again"),
    "make": ("remake", "make bundles again from their recipes"),
    "recipes": ("recipes", "recipes for models that people know"),
    "pretrain": ("make", "train a model without labels, to be fine-tuned"),
    "sparsify": ("make", "make a sparse model from a dense one, by any method"),
    "finetune": ("make", "fine-tune a sparse model; its zeros stay"),
    "generate": ("write", "let a language model write, with tokens per second"),
    "reproduce": ("studies", "run a paper's study, or list all: published, measured, verdict"),
    "bench": ("bench", "run the speed and size benchmarks of a source checkout"),
    "pull": ("ship", "fetch a model from a hub into the local cache"),
    "push": ("ship", "publish a model on a hub"),
    "rebase": ("make", "store a model on another one's weights, or whole again"),
    "export": ("ship", "write a model's dense weights as plain safetensors"),
    "completion": ("completion", "complete commands, options and names in bash, zsh or fish"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _mend_streams()
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    _show_warnings()
    forget()
    try:
        code = dispatch(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        text = "interrupted"
        if goes_on():
            text += "; finished work is kept, run the same command to go on"
        return _tell("KeyboardInterrupt", text, INTERRUPTED, as_json="--json" in arguments)
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        _close_stdout()
        return OK
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else OK if error.code is None else USAGE
    except Exception as error:  # the top of the program: every error becomes a message and an exit code
        if debug:
            traceback.print_exc()
        return _report(error, as_json="--json" in arguments)


def _mend_streams() -> None:
    """Let closed streams swallow what they are given, and streams of few characters show others as ASCII."""
    from zoo.report.plain import as_ascii

    codecs.register_error("zoo", as_ascii)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the end
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="zoo")


def _close_stdout() -> None:
    """Send what is still to be written nowhere, as nobody can take it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_warnings() -> None:
    """Send what the zoo logs to stderr through the console, once in a process."""
    from zoo.cli.console import Notes

    log = logging.getLogger("zoo")
    if not any(isinstance(handler, Notes) for handler in log.handlers):
        handler = Notes(logging.WARNING)
        log.addHandler(handler)


def dispatch(arguments: list[str]) -> int:
    """Run one command and return its exit code; errors pass."""
    if arguments[:1] == ["help"] and arguments[1:]:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return OK
    name, *rest = arguments
    if name == "--version":
        from zoo.cli.console import print_json, versions

        found = versions()
        if "--json" in rest:
            print_json(found)
        else:
            print("zoo {zoo} (torch {torch}, Python {python})".format(**found))
        return OK
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, [*COMMANDS, "help", "--version"], n=1, cutoff=0.6)
        hint = f"did you mean `zoo {close[0]}`?" if close else "see `zoo --help`"
        from zoo.errors import ConfigError

        raise ConfigError(f"unknown command {name!r}; {hint}")
    with nothing_collected():
        module = importlib.import_module(f"zoo.cli.{COMMANDS[name][0]}")
    return int(getattr(module, f"{name}_command")(rest))


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """Leave Python's cycle collector off while much is built that stays: it would look through all of it
    again and again, for a fifth of a listing's time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: zoo COMMAND ...     (zoo COMMAND --help for its options)",
            "",
            "Sparse models by name: load, evaluate, fine-tune, verify.",
            "",
            *lines,
            "",
            "Everywhere: --json for machines, --debug for a traceback. zoo --version prints the version.",
            "Exit codes: 0 done, 1 a check failed, 2 bad usage or input,",
            "            3 disk, network, memory or missing data, 70 an error inside the zoo,",
            "            130 interrupted.",
            "",
            "Try: zoo list",
        ]
    )


def _report(error: Exception, *, as_json: bool) -> int:
    """Print an error in one or two lines and return its exit code."""
    code, text = _classify(error)
    return _tell(type(error).__name__, text, code, as_json=as_json)


def _tell(kind: str, text: str, code: int, *, as_json: bool) -> int:
    """Say why a command ended, for machines on stdout too."""
    from zoo.cli.console import note

    text = re.sub(r"\S{500,}", lambda long: f"{long[0][:100]}... ({len(long[0])} characters)", text)
    if as_json:
        try:
            print(json.dumps({"error": {"type": kind, "message": text, "exit_code": code}}), flush=True)
        except OSError:  # said on stderr, then
            _close_stdout()
    with contextlib.suppress(OSError):  # nobody can be told; the exit code says it
        note(f"zoo: {text}")
    return code


def _classify(error: Exception) -> tuple[int, str]:
    from zoo.errors import HubError, MissingDataError
    from zoo.shared.errors import SparseError, StorageError

    if isinstance(error, (HubError, MissingDataError, StorageError)):
        return ENVIRONMENT, str(error)
    if isinstance(error, SparseError):
        return USAGE, str(error)
    if isinstance(error, MemoryError):
        return ENVIRONMENT, "out of memory; close other programs or take a smaller model"
    if isinstance(error, OSError):
        place = f"{error.filename or 'a file or the output'}: "
        return (
            ENVIRONMENT,
            f"{place}{error.strerror or error}; check the path, its permissions and the free space",
        )
    return INTERNAL, f"internal error: {type(error).__name__}: {error}; run again with --debug and report it"
