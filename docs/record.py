"""`python docs/record.py docs/terminal.svg`: the README's recording, an SVG that shows commands one by one.

Each command is run on a terminal of 80 columns; what it prints is drawn by rich and shown for some seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from html import escape
from pathlib import Path

from rich.console import Console
from rich.text import Text

from zoo.shared.store.io import atomic_write

COLUMNS = 80
SECONDS = 5  # for which one command is shown
COMMANDS = (
    "zoo list 'vision/*resnet20-cifar10*'",
    "zoo compare graph/dense-gcn-digits graph/teddy-gcn-digits-g30-w80",
    "zoo finetune graph --model graph/teddy-gcn-digits-g30-w80 --dataset digits --epochs 50 --out tuned",
    "zoo export tuned --to tuned.safetensors",
)
# rich's own frame asks another host for its font.
FRAME = """<svg xmlns="http://www.w3.org/2000/svg" width="{terminal_width}" height="{terminal_height}">
<style>.{unique_id}-matrix {{ font: {char_height}px monospace; }} {styles}</style>
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></svg>"""


def output(command: str, folder: Path) -> str:
    """What a command prints on a terminal of 80 columns, with its colours, then its notes but no progress.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    screen, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {
        "TERM": "xterm-256color"
    }
    words = [sys.executable, "-m", *shlex.split(command)]
    shown = b""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as notes:
        done = subprocess.Popen(words, cwd=folder, env=env, stdin=end, stdout=end, stderr=notes)
        os.close(end)
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes to it any more
            while part := os.read(screen, 1 << 16):
                shown += part
        os.close(screen)
        if code := done.wait():
            raise subprocess.CalledProcessError(code, command)
        notes.seek(0)
        told = [line for line in notes if not re.match(r"\[\d+/\d+\]", line)]
    return shown.decode("utf-8").replace("\r\n", "\n") + "".join(told)


def drawing(command: str, text: str, number: int) -> str:
    """One command and what it printed, as an SVG of its own."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ {command}\n", style="bold green"))
    console.print(Text.from_ansi(text))
    return console.export_svg(code_format=FRAME, unique_id=f"c{number}")


def recording(outputs: list[str]) -> str:
    """The drawings of all commands, each shown for its seconds, over and over."""
    drawings = [drawing(*pair, number) for number, pair in enumerate(zip(COMMANDS, outputs, strict=True))]
    sizes = [re.findall(r'<svg [^>]*width="([\d.]+)" height="([\d.]+)"', one)[0] for one in drawings]
    width, height = (max(float(size[side]) for size in sizes) for side in (0, 1))
    total, share = SECONDS * len(drawings), 100 / len(drawings)
    frames = "".join(
        f'<g class="frame" style="animation-delay:{SECONDS * number}s">{one}</g>'
        for number, one in enumerate(drawings)
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" role="img" '
        f'viewBox="-12 -12 {width + 24:.0f} {height + 24:.0f}">'
        f"<title>{escape('; '.join(COMMANDS))}</title>"
        f"<style>.frame {{ opacity: 0; animation: show {total}s step-end infinite }} "
        f"@keyframes show {{ 0% {{ opacity: 1 }} {share:g}% {{ opacity: 0 }} }}</style>"
        f'<rect x="-12" y="-12" width="100%" height="100%" rx="8" fill="#292929"/>{frames}</svg>\n'
    )


def main() -> None:
    """Run the commands in an empty folder and write the recording."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [output(command, Path(folder)) for command in COMMANDS]
    atomic_write(Path(sys.argv[1]), recording(outputs).encode())


if __name__ == "__main__":
    main()
