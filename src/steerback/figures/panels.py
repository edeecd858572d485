"""Parts shared by several figures: points, bars and curves with intervals, axis limits, numbers of responses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from steerback.figures import style
from steerback.metrics import METRICS, Estimate, Summary

LEFT_OUT = ("degraded", "unscored", "invalid", "empty")
FEWEST = 5
"""Fewest latents (clusters) for which an interval is drawn: from fewer, the spread cannot be estimated."""
TOO_FEW = f"< {FEWEST} latents: no intervals"
Span = tuple[float, float, float]
"""Value, low end and high end in axis units."""


def left_out(summaries: Sequence[Summary]) -> tuple[str, ...]:
    """Return the names of the counts that the summaries' headline leaves out."""
    return LEFT_OUT[1:] if any(s.include_degraded for s in summaries) else LEFT_OUT


def axis_label(metric: str) -> str:
    """Return a metric's name with its unit."""
    m = METRICS[metric]
    unit = "%" if m.rate else m.unit
    return f"{m.label} ({unit})" if unit else m.label


def scaled(metric: str, value: float) -> float:
    """Return a value in axis units: rates in per cent."""
    return 100 * value if METRICS[metric].rate else value


def few(estimate: Estimate) -> bool:
    """Return whether an estimate has too few latents for an interval."""
    return estimate.value is not None and 0 < estimate.clusters < FEWEST


def ends(estimate: Estimate, scale: float = 1.0) -> Span | None:
    """Return (value, low, high), or None without a value. Ends that are unknown or from too few latents equal the
    value.
    """
    if estimate.value is None:
        return None
    bounds = (None, None) if few(estimate) else (estimate.low, estimate.high)
    low, high = (scale * (estimate.value if end is None else end) for end in bounds)
    return scale * estimate.value, low, high


def span(metric: str, estimate: Estimate) -> Span | None:
    """Return `ends` in the units of the metric's axis."""
    return ends(estimate, scaled(metric, 1.0))


def note_few(ax: Axes, estimates: Iterable[Estimate]) -> None:
    """Write in the panel that intervals are missing if an estimate has too few latents."""
    if any(few(e) for e in estimates):
        say_few(ax)


def say_few(ax: Axes) -> None:
    """Write above the right end of the panel that intervals are missing."""
    ax.annotate(TOO_FEW, (1, 1), (0, 1), "axes fraction", "offset points", ha="right", fontsize=6, color=style.GREY)


def metric_axis(ax: Axes, metric: str, estimates: Iterable[Estimate]) -> None:
    """Finish the y axis of a panel of one metric: label, grid, limits, and a note if intervals are missing."""
    ax.set_ylabel(axis_label(metric), fontsize=6.5)
    ax.grid(axis="y")
    bounded(ax, metric)
    note_few(ax, estimates)


def named_rows(ax: Axes, names: Sequence[str], sizes: Sequence[int | str] = (), margin: float = 0.5) -> None:
    """Make the y axis one of named rows from top to bottom, with `n = SIZE` at the right of each row."""
    ax.set_yticks(range(len(names)), names, fontsize=6)
    ax.set_ylim(max(len(names), 1) - margin, -1 + margin)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    for y, size in enumerate(sizes):
        beside(ax, y, f"n = {size:,}" if isinstance(size, int) else f"n = {size}")


def beside(ax: Axes, y: float, text: str, **look: Any) -> None:
    """Write text at the right of a panel, at height `y` of its axis."""
    ax.annotate(text, (1.03, y), xycoords=("axes fraction", "data"), fontsize=6, va="center", **look)


def bounded(ax: Axes, metric: str, axis: Literal["x", "y"] = "y") -> None:
    """Limit an axis to the metric's possible values; rates start at 0."""
    get, put = (ax.get_ylim, ax.set_ylim) if axis == "y" else (ax.get_xlim, ax.set_xlim)
    least, most = (scaled(metric, end) for end in METRICS[metric].limits)
    low, high = get()
    low = least if METRICS[metric].rate else max(low, least)
    high = min(max(high, 1.0) if METRICS[metric].rate else high, most)
    put(low, high if high > low else low + 1.0)


def curve(
    ax: Axes,
    metric: str,
    points: Sequence[tuple[float, Estimate]],
    colour: str,
    label: str | None = None,
    marker: str = "o",
    dashed: bool = False,
    hatch: str = "",
) -> None:
    """Draw estimates against x as a line with an interval band; points without a value are left out.

    `hatch` replaces the filled band with a hatched one, so that two bands can be told apart.
    """
    shown = [(x, *s) for x, e in points if (s := span(metric, e)) is not None]
    if not shown:
        return
    x, value, low, high = zip(*shown, strict=True)
    face, alpha = ("none", 0.45) if hatch else (colour, 0.18)
    edge = colour if hatch else "none"
    ax.fill_between(x, low, high, facecolor=face, edgecolor=edge, hatch=hatch or None, alpha=alpha, linewidth=0)
    line = "--" if dashed else "-"
    ax.plot(x, value, marker=marker, color=colour, label=label, linestyle=line, clip_on=False, zorder=3)


def whisker(ax: Axes, at: float, shown: Span | None, colour: str, filled: bool = True, upright: bool = False) -> None:
    """Draw a point with its interval at position `at`; it is never clipped, so that a point at 0 is whole."""
    if shown is None:
        place = (at, 0.02) if upright else (0.02, at)
        frame = ("data", "axes fraction") if upright else ("axes fraction", "data")
        ax.annotate("no data", place, xycoords=frame, fontsize=6, color=style.GREY, va="center")
        return
    value, low, high = shown
    reach = [[max(value - low, 0.0)], [max(high - value, 0.0)]] if high > low else None
    x, y = (at, value) if upright else (value, at)
    drawn = ax.errorbar(
        x,
        y,
        yerr=reach if upright else None,
        xerr=None if upright else reach,
        fmt="o",
        color=colour,
        markerfacecolor=colour if filled else "white",
        elinewidth=1.0,
        capsize=2,
        zorder=3,
    )
    for part in drawn.get_children():
        part.set_clip_on(False)


def bar(
    ax: Axes, x: float, estimate: Estimate, colour: str, width: float = 0.34, hatch: str = "", crowded: bool = False
) -> float:
    """Draw a rate as a bar with its interval and value; return the height it reaches, in per cent."""
    shown = ends(estimate, 100)
    if shown is None:
        ax.text(x, 0, "no\ndata", ha="center", va="bottom", fontsize=6, color=style.GREY)
        return 0.0
    value, low, high = shown
    ax.bar(x, value, width, color="white" if hatch else colour, edgecolor=colour, hatch=hatch, linewidth=0.8)
    if high > low:
        reach = [[value - low], [high - value]]
        ax.errorbar(x, value, reach, fmt="none", ecolor=style.INK, elinewidth=0.8, capsize=2)
    digits = 1 if high >= 1 or crowded else 2
    bound = f"\n(≤ {high:.{digits}f})" if high > low else ""
    label = f"{value:.{digits}f}" if value else f"0{bound}"
    ax.annotate(label, (x, high), xytext=(0, 1.5), textcoords="offset points", ha="center", va="bottom", fontsize=6)
    return high


def legend(
    fig: Figure | SubFigure, colours: Mapping[str, str], more: Sequence[tuple[Artist, str]] = (), columns: int = 2
) -> None:
    """Draw a legend above the panels: the targets in their colours (if several), then further entries."""
    several = colours if len(colours) > 1 else {}
    entries = [*((line(c, marker="o", linestyle="none"), style.plain(t)) for t, c in several.items()), *more]
    if entries:
        handles, names = zip(*entries, strict=True)
        columns = min(len(entries), columns)
        fig.legend(handles, names, loc="outside upper center", ncols=columns, columnspacing=1.2, fontsize=6.5)


def line(colour: str, **look: Any) -> Artist:
    """Return a line or marker for a legend, with matplotlib's Line2D properties."""
    return Line2D([], [], color=colour, **look)


def dashed() -> Artist:
    """Return the legend entry of the dashed reference lines."""
    return line(style.GREY, linewidth=0.8, linestyle=style.DASHED)


def patch(**look: Any) -> Artist:
    """Return a filled area for a legend, with matplotlib's Patch properties."""
    return Patch(**look)


def caption(words: str, judge: str, note: str, lines: Iterable[str] = ()) -> str:
    """Return a caption: one paragraph of words with judge and note, then one line per target."""
    return "\n".join([f"{words} Judge: {judge}. {note}".strip(), *lines])


def level_counts(
    ax: Axes, rows: Sequence[tuple[str, str, Mapping[float, int]]], label: str, margin: float = 0.06
) -> None:
    """Write counts with `counts_below` on a shared axis of levels; `margin` is a share of the axis."""
    counts_below(ax, rows)
    ticks = sorted({x for _, _, numbers in rows for x in numbers})
    ax.set_xticks(ticks, [f"{round(x, 2):g}" for x in ticks], fontsize=6)
    if len(ticks) > 1:
        reach = margin * (ticks[-1] - ticks[0])
        ax.set_xlim(ticks[0] - reach, ticks[-1] + reach)
    ax.set_xlabel(label)


def counts_below(ax: Axes, rows: Sequence[tuple[str, str, Mapping[float, int]]]) -> None:
    """Write the number of responses at each x into a separate panel, one row per (name, colour, n by x)."""
    ax.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    ax.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=6)
    for y, (_, colour, numbers) in enumerate(rows):
        ax.plot([*numbers], [y] * len(numbers), linestyle="none")  # text does not extend the axis limits, a line does
        for x, n in numbers.items():
            ax.text(x, y, f"{n:,}", ha="center", va="center", fontsize=6, color=colour)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.tick_params(length=0)


def counted(name: str, summaries: Iterable[Summary]) -> str:
    """Return the numbers of a target: `organism: n = 3,840 in 8 conditions, 12 latents; left out: 12 degraded.`"""
    summaries = list(summaries)
    n = sum(s["msi"].n for s in summaries)
    clusters = max((s["msi"].clusters for s in summaries), default=0)
    out = {key: sum(s.counts[key] for s in summaries) for key in left_out(summaries)}
    excluded = ", ".join(f"{count:,} {key}" for key, count in out.items() if count) or "none"
    spread = f" in {len(summaries)} conditions" if len(summaries) > 1 else ""
    return f"{name}: n = {n:,}{spread}, {clusters:,} latents; left out: {excluded}."
