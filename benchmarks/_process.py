"""A rival in a process of its own that does what it is told, a line of JSON at a time.

Its turns alternate with ours in one run, and its libraries, threads and Python are its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

Kind = TypeVar("Kind", bound="Rival")


class Rival:
    """The running process, as seen from the zoo's."""

    def __init__(self, process: subprocess.Popen[str], ready: dict[str, Any]) -> None:
        self._process = process
        self.ready = ready

    @classmethod
    def launch(cls: type[Kind], command: list[str], packages: str) -> Kind | None:
        """The process when it is ready; None, and a line that says so, where a module is missing there."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        found = cls(process, {})
        found.ready = found._answer()
        if "missing" in found.ready:
            print(
                f"{cls.__name__} is not compared: {command[0]} has no module {found.ready['missing']} "
                f"(pip install {packages})",
                file=sys.stderr,
            )
            return None
        return found

    def token(self) -> float:
        """One token after a context of some 32; returns the program's own seconds for it."""
        return float(self._ask(length=32, cached=True)["seconds"])

    def prompt(self, length: int) -> float:
        """A prompt of that many tokens, read anew; returns the program's own seconds for it."""
        return float(self._ask(length=length, cached=False)["seconds"])

    def peak(self) -> float:
        """The most bytes that the process held."""
        return float(self._ask(length=0)["peak"])

    def stop(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # the program itself may print, too
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"{type(self).__name__} ended with exit code {self._process.wait()}")


def answer(ready: dict[str, Any], seconds_of: Callable[[int, bool], float]) -> None:
    """Say in the process that it is ready, then answer requests until there are no more.

    Args:
        ready: what there is to say.
        seconds_of: (tokens, whether they are in the cache, and one more is asked for) -> seconds.
    """
    import resource

    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["length"]:
            reply = {"seconds": seconds_of(asked["length"], asked["cached"])}
        else:
            reply = {"peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
        print(json.dumps(reply), flush=True)
