"""`zoo completion`: what a shell needs to complete commands, options and the names of models."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence

from zoo.cli import COMMANDS, OK, main
from zoo.errors import ConfigError

_BASH = """\
_zoo() {
    local IFS=$'\\n'
    COMPREPLY=($(compgen -W "$(zoo completion words "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)" \\
        -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _zoo zoo
"""
SCRIPTS = {
    "bash": _BASH,
    "zsh": f"autoload -Uz compinit bashcompinit && compinit && bashcompinit\n{_BASH}",
    "fish": 'complete -c zoo -a "(zoo completion words (commandline -opc)[2..-1] (commandline -ct))"\n',
}


def completion_command(argv: Sequence[str]) -> int:
    """Print the script of a shell; `words WORD ...`, which the scripts call, prints what may stand last."""
    shell, *words = argv or [""]
    if shell == "words":
        print("\n".join(candidates(words)))
        return OK
    if shell in ("-h", "--help"):
        print("usage: zoo completion SHELL\n")
        print("Print a script that completes commands, options and names of models. SHELL is one of")
        print(f'{", ".join(SCRIPTS)}; for bash: eval "$(zoo completion bash)" in ~/.bashrc.')
        return OK
    if shell not in SCRIPTS or words:
        raise ConfigError(f"zoo completion takes one of {', '.join(SCRIPTS)}; received {' '.join(argv)!r}")
    print(SCRIPTS[shell], end="")
    return OK


def candidates(words: Sequence[str]) -> list[str]:
    """What the last of these words, which follow `zoo`, may be; the shell keeps what begins like it."""
    if len(words) <= 1:
        return list(COMMANDS)
    command, *rest = words
    last, before = rest[-1], rest[:-1]
    if command not in COMMANDS:
        return []
    if last.startswith("-"):
        return _options(command, before)
    return _names(command, before)


def _options(command: str, before: list[str]) -> list[str]:
    """Those of the command's help, and of the method, study or domain that was typed."""
    asks = [word for word in before[:1] if command in ("finetune", "pretrain", "reproduce")]
    if "--method" in before[:-1]:
        asks += ["--method", before[before.index("--method") + 1]]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(io.StringIO()):
        main([command, *asks, "--help"])
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", shown.getvalue())))


def _names(command: str, before: list[str]) -> list[str]:
    from zoo import registry

    registries = {"--method": registry.METHODS, "--task": registry.TASKS}
    if before and before[-1] in registries:
        return registries[before[-1]].names()
    if command == "reproduce" and not before:
        return registry.STUDIES.names()
    if command in ("finetune", "pretrain") and not before:
        return list(registry.DOMAINS)
    from zoo.bundles.catalog import select

    return [bundle.card.name for bundle in select()]
