"""How many seeds would settle the claims of diffusion's studies that cannot be told.

From each kept result's interval comes the spread of the paired difference over seeds; if mean and spread
stayed as they are, so many seeds would bring Student's test against the bar below 5 % over the number of the
study's claims that cannot be told. Where the mean lies on the bar no number of seeds would.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from zoo.shared.store.io import atomic_write
from zoo.studies.verdict import LEVEL

RESULTS = Path(__file__).parent / "results" / "diffusion"
MEASURED = re.compile(
    r"(?P<mean>[+-][\d.]+) ± (?P<half>[\d.]+) .*\((?P<n>\d+) seeds\)(?:, bar (?P<bar>[+-][\d.]+))?"
)
MOST = 200


def needed(mean: float, half: float, n: int, bar: float, claims: int) -> int | None:
    """The fewest seeds at which the test would tell, or None beyond `MOST`."""
    from scipy.stats import t

    ratio = abs(mean - bar) / (half / float(t.ppf(0.975, n - 1)) * n**0.5) if half else float("inf")
    told = (k for k in range(n, MOST + 1) if 2 * float(t.sf(ratio * k**0.5, k - 1)) < LEVEL / claims)
    return next(told, None)


def rows() -> Iterator[str]:
    """A line of the table for every such claim, study after study."""
    for path in sorted(RESULTS.glob("*.json")):
        kept = json.loads(path.read_text())
        open_ones = [v for v in kept["result"]["verdicts"] if v["verdict"] == "cannot be told"]
        for verdict in open_ones:
            found = MEASURED.search(verdict["measured"])
            if found is None:
                continue
            n = int(found["n"])
            count = needed(
                float(found["mean"]), float(found["half"]), n, float(found["bar"] or 0), len(open_ones)
            )
            more = f"more than {MOST}" if count is None else str(count)
            cost = sum(cell["seconds"] for cell in kept["provenance"]["cells"].values()) / n
            yield f"| {path.stem} | {verdict['claim']} | {verdict['measured']} | {more} | {cost:.0f} |"


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", metavar="FILE", help="write a page")
    options = parser.parse_args()
    head = ["| study | claim | measured | seeds needed | seconds a seed |", "| --- | --- | --- | --- | --- |"]
    lines = [*head, *rows()]
    page = ["# Seeds that claims would need", "", *" ".join(__doc__.split("\n\n")[1].split("\n")).split("\n")]
    page += ["", "Made by `python benchmarks/diffusion_seeds.py --markdown FILE`.", "", *lines, ""]
    if options.markdown:
        atomic_write(options.markdown, "\n".join(page).encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
