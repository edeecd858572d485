"""Parts that several figures share: points, bars and curves with intervals, limits of axes, numbers of responses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from steerback.figures import style
from steerback.metrics import METRICS, Estimate, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEFT_OUT = ("degraded", "unscored", "invalid", "empty")
FEWEST = 5
"""Latents (clusters) below which no interval is drawn: the spread between so few is not known."""
TOO_FEW = f"< {FEWEST} latents: no intervals"
Span = tuple[float, float, float]
"""Value, low end and high end, as axes show them."""


def left_out(summaries: Sequence[Summary]) -> tuple[str, ...]:
    """Return the counts of what the headline of the summaries leaves out."""
    return LEFT_OUT[1:] if any(s.include_degraded for s in summaries) else LEFT_OUT


def axis_label(metric: str) -> str:
    """A metric's name with its unit, as axes show it."""
    m = METRICS[metric]
    unit = "%" if m.rate else m.unit
    return f"{m.label} ({unit})" if unit else m.label


def scaled(metric: str, value: float) -> float:
    """A value as axes show it: rates in per cent."""
    return 100 * value if METRICS[metric].rate else value


def few(estimate: Estimate) -> bool:
    """Return whether an estimate rests on too few latents for an interval."""
    return estimate.value is not None and 0 < estimate.clusters < FEWEST


def ends(estimate: Estimate, scale: float = 1.0) -> Span | None:
    """(value, low, high); ends that are not known, or rest on too few latents, are the value. None without a value."""
    if estimate.value is None:
        return None
    bounds = (None, None) if few(estimate) else (estimate.low, estimate.high)
    low, high = (scale * (estimate.value if end is None else end) for end in bounds)
    return scale * estimate.value, low, high


def span(metric: str, estimate: Estimate) -> Span | None:
    """`ends` in the unit of the metric's axis."""
    return ends(estimate, scaled(metric, 1.0))


def note_few(ax: Axes, estimates: Iterable[Estimate]) -> None:
    """Say in the panel that intervals are missing because there are too few latents."""
    if any(few(e) for e in estimates):
        say_few(ax)


def say_few(ax: Axes) -> None:
    """Write above the right end of the panel that it has no intervals."""
    ax.annotate(TOO_FEW, (1, 1), (0, 1), "axes fraction", "offset points", ha="right", fontsize=6, color=style.GREY)


def bounded(ax: Axes, metric: str, axis: Literal["x", "y"] = "y") -> None:
    """Keep an axis within what the metric can be; rates start at 0."""
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
    """Estimates against x as a line with a band for their intervals; points without a value are left out.

    `hatch`: the band is hatched instead of filled, so that two bands can be told apart.
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


def whisker(
    ax: Axes, at: float, shown: Span | None, colour: str, filled: bool = True, upright: bool = False, marker: str = "o"
) -> None:
    """A point with its interval at `at` on the other axis; never clipped, so that a point at 0 is whole."""
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
        fmt=marker,
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
    """One rate as a bar with its interval and its number; returns the height it reaches, in per cent."""
    found = ends(estimate, 100)
    if found is None:
        ax.text(x, 0, "no\ndata", ha="center", va="bottom", fontsize=6, color=style.GREY)
        return 0.0
    value, low, high = found
    ax.bar(x, value, width, color="white" if hatch else colour, edgecolor=colour, hatch=hatch, linewidth=0.8)
    if high > low:
        reach = [[value - low], [high - value]]
        ax.errorbar(x, value, reach, fmt="none", ecolor=style.INK, elinewidth=0.8, capsize=2)
    digits = 1 if high >= 1 or crowded else 2
    bound = f"\n(≤ {high:.{digits}f})" if high > low else ""
    label = f"{value:.{digits}f}" if value else f"0{bound}"
    ax.annotate(label, (x, high), xytext=(0, 1.5), textcoords="offset points", ha="center", va="bottom", fontsize=6)
    return high


def counts_below(ax: Axes, rows: Sequence[tuple[str, str, Mapping[float, int]]]) -> None:
    """Write the number of responses at each x, one line a row (name, colour, n by x), into a panel of their own."""
    ax.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    ax.set_yticks(range(len(rows)), [name for name, _, _ in rows], fontsize=6)
    for y, (_, colour, numbers) in enumerate(rows):
        ax.plot([*numbers], [y] * len(numbers), linestyle="none")  # texts alone would not widen the axis
        for x, n in numbers.items():
            ax.text(x, y, f"{n:,}", ha="center", va="center", fontsize=6, color=colour)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.tick_params(length=0)


def counted(name: str, summaries: Iterable[Summary]) -> str:
    """`organism: n = 3,840 in 8 conditions, 12 latents; left out: 12 degraded.`"""
    found = list(summaries)
    n = sum(s["msi"].n for s in found)
    clusters = max((s["msi"].clusters for s in found), default=0)
    out = {key: sum(s.counts[key] for s in found) for key in left_out(found)}
    said = ", ".join(f"{count:,} {key}" for key, count in out.items() if count) or "none"
    spread = f" in {len(found)} conditions" if len(found) > 1 else ""
    return f"{name}: n = {n:,}{spread}, {clusters:,} latents; left out: {said}."
