"""How numbers look in every report."""

from __future__ import annotations

import math


def value(number: float | int, stderr: float | int | None = None) -> str:
    """A metric: four significant digits, or as many decimals as two digits of its standard error need."""
    if not math.isfinite(number):
        return str(number)
    if stderr is not None and math.isfinite(stderr) and stderr > 0:
        decimals = max(0, 1 - math.floor(math.log10(stderr)))
        return f"{number:.{min(decimals, 6)}f} ± {stderr:.{min(decimals, 6)}f}"
    if number == 0:
        return "0"
    decimals = max(0, 3 - math.floor(math.log10(abs(number))))
    return f"{number:.{min(decimals, 6)}f}"


def signed(number: float | int) -> str:
    """A difference, with its sign."""
    return f"{number:+.4f}".replace("-", "−") if number else "0"


def percent(share: float | int) -> str:
    """A share as per cent: 0.9 is `90.0 %`, and shares near one keep the digits that matter."""
    decimals = 1 if share < 0.99 or share == 1 else 2
    return f"{100 * share:.{decimals}f} %"


def count(number: float | int) -> str:
    """A count with k, M, G, T."""
    return _scaled(number, 1000, ("", "k", "M", "G", "T"), "")


def size(number: float | int) -> str:
    """Bytes in decimal units, as disks and networks count them."""
    return _scaled(number, 1000, (" B", " kB", " MB", " GB", " TB"), " B")


def seconds(number: float | int) -> str:
    """A duration."""
    if number < 1:
        return f"{1000 * number:.0f} ms"
    if number < 90:
        return f"{number:.1f} s"
    minutes, rest = divmod(round(number), 60)
    return f"{minutes} min {rest} s"


def _scaled(number: float | int, step: int, units: tuple[str, ...], plain: str) -> str:
    scaled = float(number)
    for unit in units:
        if abs(scaled) < step or unit == units[-1]:
            return f"{scaled:.0f}{unit}" if unit in ("", plain) else f"{scaled:.3g}{unit}"
        scaled /= step
    raise AssertionError("unreachable: the last unit always returns")
