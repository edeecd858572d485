"""Figures A5 and A6: activity aligned at the correction, and by region, for episodes and their controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from steerback.analysis.episode_statistics import REGIONS, AlignedCurve, EpisodeStatisticsResults, RegionActivity
from steerback.figures import style
from steerback.figures.base import Presentation, planted_note
from steerback.figures.tables import Table, number, p_value, show
from steerback.figures.traces import count_list, group_sizes
from steerback.metrics import Estimate
from steerback.store.facts import DETECTORS, DRIFTS, UNSTEERED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

CONTROLS = {DRIFTS: (style.PALETTE[4], "--"), UNSTEERED: (style.GREY, ":")}


def present(results: EpisodeStatisticsResults) -> Presentation:
    """Figures A5 and A6, and the tables of the regions and of the tests."""
    activity, judge, note = results.activity, results.judge, planted_note(results)
    return Presentation(
        tables={"table": region_table(activity, judge), "tests": test_table(activity, judge)},
        figures={
            "figureA5": lambda: draw_aligned(activity, results.curves, judge, note),
            "figureA6": lambda: draw_regions(activity, judge, note),
        },
        lines=[_line(target, a) for target, a in activity.items()],
    )


def region_table(activity: Mapping[str, RegionActivity], judge: str) -> Table:
    """One row per target, group and region: mean activation, and its ratio to the unsteered responses."""
    cells, records = [], []
    for target, a in activity.items():
        for group in a.groups:
            for region, e in a.means[group].items():
                ratio = a.ratios[group].get(f"{region} / {UNSTEERED}")
                shown = "1" if ratio is None else show(ratio, False)
                cells.append((target, group, region, f"{e.n:,}", f"{e.clusters}", show(e, False), shown))
                record = {"target": target, "group": group, "region": region, "judge": judge, **asdict(e)}
                if ratio is not None:
                    record |= {"ratio_value": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
                records.append(record)
    return Table(
        ("target", "group", "region", "n", "latents", "mean activation", "ratio to unsteered"),
        cells,
        "Mean over the region's tokens of the group's summed activation, episodes of two attempts that improve; 95 % "
        f"intervals clustered by latent. Judge: {judge}.",
        records,
        left=3,
    )


def test_table(activity: Mapping[str, RegionActivity], judge: str) -> Table:
    """One row per test."""
    cells, records = [], []
    for target, a in activity.items():
        for (group, first, second), t in a.tests.items():
            gap = Estimate(t.difference, t.low, t.high, t.n_b, "")
            sizes = f"{t.n_b}" if t.paired else f"{t.n_b}, {t.n_a}"
            effects = ("-" if v is None else f"{v:+.2f}" for v in (t.cohens_d, t.cliffs_delta))
            ps = (p_value(v) for v in (t.p, t.holm, t.t_holm, t.rank_holm))
            cells.append((target, group, f"{second} − {first}", sizes, show(gap, False, sign=True), *ps, *effects))
            records.append({"target": target, "group": group, "a": first, "b": second, "judge": judge, **asdict(t)})
    return Table(
        ("target", "group", "test", "n", "difference", "p", "Holm", "t, Holm", "Wilcoxon, Holm", "d", "Cliff"),
        cells,
        "Within episodes paired, else of separate responses. p swaps the two within latents; t and Wilcoxon (signed "
        "rank or rank sum) take responses as independent; Holm over all tests of a target. d: Cohen's, pooled sd. "
        f"Judge: {judge}.",
        records,
        left=3,
    )


def _line(target: str, a: RegionActivity) -> str:
    if DETECTORS not in a.ratios:
        return f"{target}: {count_list(a.recorded)}"
    unsteered, drifts = (a.ratios[DETECTORS][f"off-topic / {control}"] for control in (UNSTEERED, DRIFTS))
    return (
        f"{target}: detectors off topic {number(unsteered.value)} times as active as in unsteered responses, "
        f"{number(drifts.value)} times as in steered ones without restart; {count_list(a.recorded)}"
    )


@style.styled
def draw_aligned(
    activity: Mapping[str, RegionActivity],
    curves: Mapping[str, Mapping[str, Mapping[str, AlignedCurve]]],
    judge: str,
    note: str = "",
) -> Figure:
    """Figure A5: one row a target, one panel a group; points are means, lines smoothing splines through them."""
    rows, columns = max(len(activity), 1), max((len(a.groups) for a in activity.values()), default=1) or 1
    words = (
        "Summed activation at each token before and after the first token of the correction: means over episodes "
        "(points), smoothing splines on either side (lines), 95 % intervals clustered by latent (band). Controls: "
        "same positions."
    )
    fig, drawing = style.new_figure("full", 1.9 * rows + 0.25, _caption(words, activity, judge, note))
    axes = drawing.subplots(rows, columns, squeeze=False)
    colours = style.colours(activity)
    for row, (target, a) in zip(axes, activity.items(), strict=False):
        for ax, group in zip(row, a.groups, strict=False):
            _aligned(ax, curves[target][group], colours[target])
            ax.set_title(style.plain(f"{target}: {group}"), loc="left", color=colours[target], fontweight="bold", pad=2)
        for ax in row[len(a.groups) :]:
            ax.set_axis_off()
    if not any(a.recorded.twice for a in activity.values()):
        for ax in axes.flat:
            style.message(ax, "no episode with two attempts")
        return fig
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=style.INK, label="episodes")]
    handles += [Line2D([], [], color=c, linestyle=dash, label=name) for name, (c, dash) in CONTROLS.items()]
    drawing.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return fig


def _aligned(ax: Axes, curves: Mapping[str, AlignedCurve], colour: str) -> None:
    ax.axvline(0, color=style.GREY, linewidth=0.6)
    for name, curve in curves.items():
        shade, dash = CONTROLS.get(name, (colour, "-"))
        finite = np.isfinite(curve.mean)
        if not finite.any():
            continue
        x, y = curve.offsets[finite], curve.mean[finite]
        ax.plot(x, y, "o-", color=shade, markersize=2.2, linewidth=0.4, alpha=0.55, markeredgewidth=0)
        for side in (x < 0, x >= 0):  # what comes to a sudden end at the correction must not be smoothed across it
            ax.plot(x[side], spline(x[side], y[side]), color=shade, linestyle=dash)
        banded = np.isfinite(curve.low) & np.isfinite(curve.high)
        if name not in CONTROLS and banded.any():
            at = curve.offsets[banded]
            ax.fill_between(at, curve.low[banded], curve.high[banded], color=shade, alpha=0.14, linewidth=0)
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
def draw_regions(activity: Mapping[str, RegionActivity], judge: str, note: str = "") -> Figure:
    """Figure A6: mean activation by region and of the controls, with the ratio to the unsteered responses."""
    rows, columns = max(len(activity), 1), max((len(a.groups) for a in activity.values()), default=1) or 1
    words = (
        "Mean activation per token by region of episodes with two attempts (filled) and of controls (open), with 95 % "
        "intervals clustered by latent; numbers: ratio to the unsteered responses."
    )
    fig, drawing = style.new_figure("full", 1.55 * rows, _caption(words, activity, judge, note))
    axes = drawing.subplots(rows, columns, squeeze=False)
    colours = style.colours(activity)
    for row, (target, a) in zip(axes, activity.items(), strict=False):
        for ax, group in zip(row, a.groups, strict=False):
            _regions(ax, a, group, colours[target])
            ax.set_title(style.plain(f"{target}: {group}"), loc="left", color=colours[target], fontweight="bold", pad=2)
        for ax in row[len(a.groups) :]:
            ax.set_axis_off()
    if not activity:
        style.message(axes[0, 0], "nothing was recorded")
    return fig


def _regions(ax: Axes, a: RegionActivity, group: str, colour: str) -> None:
    names = (UNSTEERED, DRIFTS, *REGIONS)
    for y, name in enumerate(names):
        e = a.means[group][name]
        if e.value is None:
            ax.annotate("no data", (0.02, y), xycoords=("axes fraction", "data"), fontsize=6, color=style.GREY)
            continue
        low, high = (e.value if end is None else end for end in (e.low, e.high))
        face = colour if name in REGIONS else "white"
        reach = [[max(e.value - low, 0)], [max(high - e.value, 0)]]
        ax.errorbar(e.value, y, xerr=reach, fmt="o", color=colour, markerfacecolor=face, elinewidth=1.0, capsize=2)
        ratio = a.ratios[group].get(f"{name} / {UNSTEERED}")
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


def _caption(words: str, activity: Mapping[str, RegionActivity], judge: str, note: str) -> str:
    lines = [f"{words} Judge: {judge}. {note}".strip()]
    for target, a in activity.items():
        lines.append(f"{target}: {group_sizes(a.recorded)}; {count_list(a.recorded)}.")
    return "\n".join(lines)
