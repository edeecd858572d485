"""Parts that several figures share: a point with its interval, a curve with its band, what a caption counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from steerback.figures import style
from steerback.metrics import METRICS, Estimate, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEFT_OUT = ("degraded", "unscored", "invalid", "empty")


def axis_label(metric: str) -> str:
    """A metric's name with its unit, as axes show it."""
    m = METRICS[metric]
    unit = "%" if m.rate else m.unit
    return f"{m.label} ({unit})" if unit else m.label


def scaled(metric: str, value: float) -> float:
    """A value as axes show it: rates in per cent."""
    return 100 * value if METRICS[metric].rate else value


def span(metric: str, estimate: Estimate) -> tuple[float, float, float] | None:
    """(value, low, high) as axes show them; an end that is not known is the value. None without a value."""
    if estimate.value is None:
        return None
    ends = (estimate.value if end is None else end for end in (estimate.low, estimate.high))
    value, low, high = (scaled(metric, x) for x in (estimate.value, *ends))
    return value, low, high


def curve(
    ax: Axes,
    metric: str,
    points: Sequence[tuple[float, Estimate]],
    colour: str,
    label: str | None = None,
    marker: str = "o",
    dashed: bool = False,
) -> None:
    """Estimates against x as a line with a band for their intervals; points without a value are left out."""
    shown = [(x, *s) for x, e in points if (s := span(metric, e)) is not None]
    if not shown:
        return
    x, value, low, high = zip(*shown, strict=True)
    ax.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    ax.plot(x, value, marker=marker, color=colour, label=label, linestyle="--" if dashed else "-", clip_on=False)


def dot(ax: Axes, metric: str, estimate: Estimate, y: float, colour: str, filled: bool = True) -> None:
    """An estimate with its interval as a horizontal whisker at height y."""
    found = span(metric, estimate)
    if found is None:
        ax.annotate("no data", (0, y), xycoords=("axes fraction", "data"), fontsize=6, color=style.GREY, va="center")
        return
    value, low, high = found
    face = colour if filled else "white"
    ax.errorbar(
        value,
        y,
        xerr=[[value - low], [high - value]],
        fmt="o",
        color=colour,
        markerfacecolor=face,
        elinewidth=1.0,
        capsize=2,
    )


def counted(name: str, summaries: Iterable[Summary]) -> str:
    """`organism: n = 3,840 in 8 conditions, 12 latents; left out: 12 degraded.`"""
    found = list(summaries)
    n = sum(s["msi"].n for s in found)
    clusters = max((s["msi"].clusters for s in found), default=0)
    out = {key: sum(s.counts[key] for s in found) for key in LEFT_OUT}
    said = ", ".join(f"{count:,} {key}" for key, count in out.items() if count) or "none"
    spread = f" in {len(found)} conditions" if len(found) > 1 else ""
    return f"{name}: n = {n:,}{spread}, {clusters:,} latents; left out: {said}."
