"""Figures A5 and A6: activity aligned at the correction, and by region, for episodes and their controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from steerback.experiments.episode_statistics import NO_RESTART, QUIET, REGIONS, Activity, Curve
from steerback.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

CONTROLS = {NO_RESTART: (style.PALETTE[4], "--"), QUIET: (style.GREY, ":")}


@style.styled
def draw_aligned(
    found: Mapping[str, Activity], curves: Mapping[str, Mapping[str, Mapping[str, Curve]]], judge: str, note: str = ""
) -> Figure:
    """Figure A5: one row a target, one panel a group; points are means, lines smoothing splines through them."""
    rows, columns = max(len(found), 1), max((len(a.groups) for a in found.values()), default=1) or 1
    words = (
        "Summed activation at each token before and after the first token of the correction: means over episodes "
        "(points), smoothing splines on either side (lines), 95 % intervals clustered by latent (band). Controls: "
        "same positions."
    )
    fig, drawing = style.new_figure("full", 1.9 * rows + 0.25, _caption(words, found, judge, note))
    axes = drawing.subplots(rows, columns, squeeze=False)
    colours = style.colours(found)
    for row, (target, a) in zip(axes, found.items(), strict=False):
        for ax, group in zip(row, a.groups, strict=False):
            _aligned(ax, curves[target][group], colours[target])
            ax.set_title(style.plain(f"{target}: {group}"), loc="left", color=colours[target], fontweight="bold", pad=2)
        for ax in row[len(a.groups) :]:
            ax.set_axis_off()
    if not any(a.recorded.twice for a in found.values()):
        for ax in axes.flat:
            style.message(ax, "no episode with two attempts")
        return fig
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=style.INK, label="episodes")]
    handles += [Line2D([], [], color=c, linestyle=dash, label=name) for name, (c, dash) in CONTROLS.items()]
    drawing.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return fig


def _aligned(ax: Axes, curves: Mapping[str, Curve], colour: str) -> None:
    ax.axvline(0, color=style.GREY, linewidth=0.6)
    for name, curve in curves.items():
        own, dash = CONTROLS.get(name, (colour, "-"))
        there = np.isfinite(curve.mean)
        if not there.any():
            continue
        x, y = curve.offsets[there], curve.mean[there]
        ax.plot(x, y, "o-", color=own, markersize=2.2, linewidth=0.4, alpha=0.55, markeredgewidth=0)
        for side in (x < 0, x >= 0):  # what comes to a sudden end at the correction must not be smoothed across it
            ax.plot(x[side], spline(x[side], y[side]), color=own, linestyle=dash)
        banded = np.isfinite(curve.low) & np.isfinite(curve.high)
        if name not in CONTROLS and banded.any():
            at = curve.offsets[banded]
            ax.fill_between(at, curve.low[banded], curve.high[banded], color=own, alpha=0.14, linewidth=0)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("tokens from the correction")
    ax.set_ylabel("summed activation")
    ax.grid(axis="y")


def spline(x: NDArray[np.int64], y: Floats) -> Floats:
    """Cubic smoothing spline, its smoothness chosen by cross-validation; the values where there are too few for one."""
    if len(x) < 5 or np.ptp(y) == 0:
        return y
    from scipy.interpolate import make_smoothing_spline

    smooth: Floats = np.maximum(make_smoothing_spline(x.astype(np.float64), y)(x), 0.0)
    return smooth


@style.styled
def draw_regions(found: Mapping[str, Activity], judge: str, note: str = "") -> Figure:
    """Figure A6: mean activation by region beside the controls, with the ratio to the unsteered responses."""
    rows, columns = max(len(found), 1), max((len(a.groups) for a in found.values()), default=1) or 1
    words = (
        "Mean activation per token by region of episodes with two attempts (filled) and of controls (open), with 95 % "
        "intervals clustered by latent; numbers: ratio to the unsteered responses."
    )
    fig, drawing = style.new_figure("full", 1.55 * rows, _caption(words, found, judge, note))
    axes = drawing.subplots(rows, columns, squeeze=False)
    colours = style.colours(found)
    for row, (target, a) in zip(axes, found.items(), strict=False):
        for ax, group in zip(row, a.groups, strict=False):
            _regions(ax, a, group, colours[target])
            ax.set_title(style.plain(f"{target}: {group}"), loc="left", color=colours[target], fontweight="bold", pad=2)
        for ax in row[len(a.groups) :]:
            ax.set_axis_off()
    if not found:
        style.message(axes[0, 0], "nothing was recorded")
    return fig


def _regions(ax: Axes, a: Activity, group: str, colour: str) -> None:
    names = (QUIET, NO_RESTART, *REGIONS)
    for y, name in enumerate(names):
        e = a.means[group][name]
        if e.value is None:
            ax.annotate("no data", (0.02, y), xycoords=("axes fraction", "data"), fontsize=6, color=style.GREY)
            continue
        low, high = (e.value if end is None else end for end in (e.low, e.high))
        face = colour if name in REGIONS else "white"
        reach = [[max(e.value - low, 0)], [max(high - e.value, 0)]]
        ax.errorbar(e.value, y, xerr=reach, fmt="o", color=colour, markerfacecolor=face, elinewidth=1.0, capsize=2)
        ratio = a.ratios[group].get(f"{name} / {QUIET}")
        if ratio is not None and ratio.value is not None:
            ends = "" if ratio.low is None else f" [{ratio.low:.1f}, {ratio.high:.1f}]"
            ax.annotate(
                f"× {ratio.value:.1f}{ends}", (1.02, y), xycoords=("axes fraction", "data"), fontsize=6, va="center"
            )
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(left=0)
    ax.set_xlabel("mean summed activation per token")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")


def _caption(words: str, found: Mapping[str, Activity], judge: str, note: str) -> str:
    lines = [f"{words} Judge: {judge}. {note}".strip()]
    for target, a in found.items():
        lines.append(f"{target}: {a.recorded.watched}; {a.recorded.told}.")
    return "\n".join(lines)
