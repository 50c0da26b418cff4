"""Plots from data: PNG for files, SVG that follows the page's light or dark theme for HTML."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from zoo.report import numbers
from zoo.studies.tables import Plot, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which stay apart under the common kinds of colour blindness; the black one is left
# out, since it is the ink. In dark theme each has a lighter partner (see `html.STYLE`).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#3f8fc0", "#7a4fbf", "#6b6b6b")
MARKERS = "os^Dvp*X"
INK, FAINT = "#1b1f24", "#c9ced6"
FONT = ["DejaVu Sans", "sans-serif"]


def png(plot: Plot, *, dpi: int = 150) -> bytes:
    """The plot as PNG on white, in 256 colours. Its text entry `Plot` is the digest of what is drawn."""
    return in_palette(_render(plot, "png", dpi=dpi))


def in_palette(picture: bytes) -> bytes:
    """A PNG in 64 colours, a quarter of the size for a plot, with the text entry `Plot` and the resolution of
    the given one; or the given one where that is smaller."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    given, stream, text = Image.open(io.BytesIO(picture)), io.BytesIO(), PngInfo()
    kept = {"dpi": given.info["dpi"]} if "dpi" in given.info else {}
    if "Plot" in given.info:
        text.add_text("Plot", given.info["Plot"])
    colours = given.convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    colours.save(stream, "PNG", optimize=True, pnginfo=text, **kept)
    return min(picture, stream.getvalue(), key=len)


def digest(plot: Plot) -> str:
    """SHA-256 of what a plot shows, by which a picture that is older than its data is found."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(plot), sort_keys=True).encode()).hexdigest()


def svg(plot: Plot) -> str:
    """The plot as inline SVG whose colours are the CSS variables `--ink`, `--faint` and `--series-N`.

    The element carries role="img" and the plot's title and description, so that screen readers announce it.
    """
    text = _render(plot, "svg").decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Identifiers must stay apart when several plots share one page.
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{_slug(plot.name)}-", text)
    colours = {INK: "var(--ink)", FAINT: "var(--faint)"}
    colours |= {colour: f"var(--series-{i + 1})" for i, colour in enumerate(PALETTE)}
    for colour, variable in colours.items():
        text = text.replace(colour, variable)
    label = f"<title>{escape(plot.title)}</title><desc>{escape(plot.alt or plot.title)}</desc>"
    opening, rest = text.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    quoted = escape(plot.title, {'"': "&quot;"})
    return f'{opening} role="img" aria-label="{quoted}">{label}{rest}'


def pareto_front(points: Iterable[tuple[float, float]], direction: int) -> list[tuple[float, float]]:
    """The points that no other beats on both axes: cost x (lower is better) and quality y (`direction` +1 or
    -1).

    Returned by rising cost; of equal points one is kept.
    """
    front: list[tuple[float, float]] = []
    best = -math.inf
    for x, y in sorted(set(points), key=lambda point: (point[0], -direction * point[1])):
        if direction * y > best:
            best = direction * y
            front.append((x, y))
    return front


def _render(plot: Plot, kind: str, *, dpi: int = 100) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[str, Any] = {
        "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
        "svg.hashsalt": plot.name,  # the same plot gives the same bytes
        "font.family": FONT,
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": FAINT,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        _draw(axes, plot)
        handles, labels = axes.get_legend_handles_labels()
        if labels and plot.x_label:
            # Below the axes, where it hides no point.
            columns = 1 if max(map(len, labels)) > 40 else min(len(labels), 3)
            figure.legend(
                handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False
            )
        stream = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {"Software": None, "Plot": digest(plot)}
        figure.savefig(stream, format=kind, dpi=dpi, metadata=metadata, transparent=kind == "svg")
    return stream.getvalue()


def _draw(axes: Axes, plot: Plot) -> None:
    if plot.log_x:
        axes.set_xscale("log")
    elif all(float(x).is_integer() for series in plot.series for x in series.x):
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no seed or level 0.25
    _set_range(axes, [x for series in plot.series for x in series.x], plot.log_x)
    colours: dict[str, int] = {}
    for series in plot.series:
        index = colours.setdefault(series.group or series.label, len(colours))
        _draw_series(axes, series, PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)])
    if not plot.x_label:  # the names of the series stand on the axis
        import textwrap

        names = ["\n".join(textwrap.wrap(series.label, 18)) for series in plot.series]
        axes.set_xticks([float(series.x[0]) for series in plot.series], names)
        axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_title(plot.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(plot.x_label)
    axes.set_ylabel(plot.y_label)
    axes.grid(True, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    if plot.log_x:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: numbers.count(x) if x >= 1000 else f"{x:g}")
        )


def _set_range(axes: Axes, xs: Sequence[float | int], log: bool) -> None:
    """A margin left and right of all points, set before anything is drawn.

    matplotlib cannot place a line over a range that is empty but for rounding, as when the first series
    has one point.
    """
    if not xs:
        return
    low, high = (math.log(min(xs)), math.log(max(xs))) if log else (min(xs), max(xs))
    margin = 0.06 * (high - low)
    if margin <= 1e-7 * max(abs(low), abs(high)):
        margin = 0.25 * (1.0 if log else abs(low) or 1.0)
    low, high = low - margin, high + margin
    axes.set_xlim(*((math.exp(low), math.exp(high)) if log else (low, high)))


def _draw_series(axes: Axes, series: Series, colour: str, marker: str) -> None:
    if series.kind == "reference" and not series.x:
        label = series.label if series.label not in axes.get_legend_handles_labels()[1] else "_nolegend_"
        axes.axhline(series.y[0], color=colour, linestyle=(0, (5, 3)), linewidth=1.3, label=label)
        return
    if series.kind == "front":
        # Between two points of the front one gets the quality of the cheaper one.
        where: Any = "post" if list(series.y) == sorted(series.y) else "pre"
        axes.step(series.x, series.y, where=where, color=INK, linewidth=1.0, alpha=0.55, label=series.label)
        return
    dashed = series.kind == "reference"
    linestyle = "none" if series.kind == "points" else (0, (5, 3)) if dashed else "-"
    axes.plot(
        series.x,
        series.y,
        color=colour,
        linestyle=linestyle,
        linewidth=1.6,
        marker=None if dashed else marker,
        markersize=6,
        label=series.label,
    )
    if series.spread is not None:
        if series.kind == "points":
            axes.errorbar(
                series.x, series.y, yerr=series.spread, fmt="none", ecolor=colour, elinewidth=1, capsize=2
            )
        else:
            low = [y - s for y, s in zip(series.y, series.spread, strict=True)]
            high = [y + s for y, s in zip(series.y, series.spread, strict=True)]
            axes.fill_between(series.x, low, high, color=colour, alpha=0.15, linewidth=0)
    for x, y, mark in zip(series.x, series.y, series.marks or (), strict=False):
        axes.annotate(mark, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text)
