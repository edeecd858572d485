"""Figures A5 and A6: activity aligned at the correction, and activity by region, for episodes and controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from steerback.analysis.episode_statistics import REGIONS, AlignedCurve, EpisodeStatisticsResults, RegionActivity
from steerback.figures import panels, style
from steerback.figures.base import Presentation, planted_note
from steerback.figures.tables import Table, number, p_value, show, show_difference
from steerback.figures.traces import count_list, group_sizes
from steerback.metrics.intervals import Floats
from steerback.store.facts import DETECTORS, DRIFTS, EPISODES, REREAD, UNSTEERED

LOOKS = {EPISODES: (style.PALETTE[0], "-"), DRIFTS: (style.PALETTE[4], "--"), UNSTEERED: (style.GREY, ":")}
"""Colour and line style of each curve in all panels: titles name the targets, so one legend serves all."""


def present(results: EpisodeStatisticsResults) -> Presentation:
    """Return Figures A5 and A6, and the tables of regions and tests."""
    activity, judge, note = results.activity, results.judge, planted_note(results)
    return Presentation(
        tables={
            "table": region_table(activity, judge),
            "tests": test_table(activity, judge),
            "latents": latent_table(activity, judge),
        },
        figures={
            "figureA5": lambda: draw_aligned(activity, results.curves, judge, note),
            "figureA6": lambda: draw_regions(activity, judge, note),
        },
        lines=[_line(target, a) for target, a in activity.items()],
    )


def region_table(activity: Mapping[str, RegionActivity], judge: str) -> Table:
    """Return one row per target, group and region: mean activation, and its ratio to the unsteered responses."""
    cells, records = [], []
    for target, a in activity.items():
        for group in a.groups:
            for region, e in a.means[group].items():
                ratios = [a.ratios[group].get(f"{region} / {control}") for control in (UNSTEERED, REREAD)]
                shown = ("-" if ratio is None else show(ratio, False) for ratio in ratios)
                cells.append((target, group, region, f"{e.n:,}", f"{e.clusters}", show(e, False), *shown))
                record = {"target": target, "group": group, "region": region, "judge": judge, **asdict(e)}
                for prefix, control in (("ratio", UNSTEERED), ("ratio_reread", REREAD)):
                    if (x := a.ratios[group].get(f"{region} / {control}")) is not None:
                        record |= {f"{prefix}_value": x.value, f"{prefix}_low": x.low, f"{prefix}_high": x.high}
                records.append(record)
    return Table(
        ("target", "group", "region", "n", "latents", "mean activation", "/ unsteered", "/ re-read"),
        cells,
        "Mean over the region's tokens of the group's summed activation, in episodes of two attempts that improve. "
        f"95 % intervals clustered by latent. {REREAD.capitalize()}: steered responses of one attempt on the topic, "
        f"read again without steering, the authors' baseline. Judge: {judge}.",
        records,
        left=3,
    )


def test_table(activity: Mapping[str, RegionActivity], judge: str) -> Table:
    """Return one row per test."""
    cells, records = [], []
    for target, a in activity.items():
        for (group, first, second), t in a.tests.items():
            sizes = f"{t.n_b}" if t.paired else f"{t.n_b}, {t.n_a}"
            effects = ("-" if v is None else f"{v:+.2f}" for v in (t.cohens_d, t.cliffs_delta))
            ps = (p_value(v) for v in (t.p, t.holm, t.t_holm, t.rank_holm))
            cells.append((target, group, f"{second} − {first}", sizes, show_difference(t, False), *ps, *effects))
            records.append({"target": target, "group": group, "a": first, "b": second, "judge": judge, **asdict(t)})
    return Table(
        ("target", "group", "test", "n", "difference", "p", "Holm", "t, Holm", "Wilcoxon, Holm", "d", "Cliff"),
        cells,
        "Paired within episodes, otherwise between responses. p: permutation within latents. t and Wilcoxon (signed "
        "rank or rank sum) treat responses as independent. Holm over all tests of a target. d: Cohen's d, pooled sd. "
        f"Judge: {judge}.",
        records,
        left=3,
        minor=("d", "n", "Cliff", "t, Holm", "Wilcoxon, Holm"),
    )


def latent_table(activity: Mapping[str, RegionActivity], judge: str) -> Table:
    """One row per latent, as the paper's appendix has them."""
    cells, records = [], []
    for target, a in activity.items():
        for x in a.latents:
            means = [f"{number(v.mean)} ({number(v.sd)})" for v in x.regions.values()]
            effects = ("-" if v is None else f"{v:+.2f}" for v in (x.test.cohens_d, x.test.cliffs_delta))
            ps = (p_value(v) for v in (x.test.p, x.test.holm, x.test.rank_holm))
            cells.append((target, x.group, str(x.latent), x.label or "-", *means, *ps, *effects))
            flat = {f"{region} {name}": v for region, of in x.regions.items() for name, v in asdict(of).items()}
            record = {"target": target, "group": x.group, "latent": x.latent, "label": x.label, "judge": judge}
            records.append(record | flat | asdict(x.test))
    return Table(
        ("target", "group", "latent", "label", *REGIONS, "p", "Holm", "Wilcoxon, Holm", "d", "Cliff"),
        cells,
        "Mean (sd over episodes) of each latent's mean activation in a region, episodes of two attempts that improve. "
        "Tests and effect sizes are of off-topic minus on-topic: p swaps the two within steered latents, Wilcoxon's "
        "signed rank takes responses as independent; Holm over the latents of a target. d: Cohen's, pooled sd. "
        f"Judge: {judge}.",
        records,
        left=4,
    )


def _line(target: str, a: RegionActivity) -> str:
    if DETECTORS not in a.ratios:
        return f"{target}: {count_list(a.recorded)}"
    unsteered, drifts = (a.ratios[DETECTORS][f"off-topic / {control}"] for control in (UNSTEERED, DRIFTS))
    reread = a.ratios[DETECTORS].get(f"off-topic / {REREAD}")
    theirs = "" if reread is None else f", {number(reread.value)} times as in on-topic ones re-read unsteered"
    return (
        f"{target}: detectors off topic {number(unsteered.value)} times as active as in unsteered responses, "
        f"{number(drifts.value)} times as in steered ones without restart{theirs}; {count_list(a.recorded)}"
    )


@style.styled
def draw_aligned(
    activity: Mapping[str, RegionActivity],
    curves: Mapping[str, Mapping[str, Mapping[str, AlignedCurve]]],
    judge: str,
    note: str = "",
) -> Figure:
    """Draw Figure A5: one panel per target and group, with means as points and smoothing splines as lines."""
    words = (
        "Summed activation at each token before and after the first token of the correction: means over episodes "
        "(points), smoothing splines on either side (lines), 95 % intervals clustered by latent (band) where at least "
        f"{panels.FEWEST} latents have a token. Controls: same positions. n: responses that have such a position."
    )
    cells = [(target, group) for target, a in activity.items() for group in a.groups]
    fig = style.new_figure(1.65 * max(len(cells), 1) + 0.3, _caption(words, activity, judge, note))
    axes = fig.subplots(max(len(cells), 1), 1, squeeze=False)[:, 0]
    for ax, (target, group) in zip(axes, cells, strict=False):
        _aligned(ax, curves[target][group])
        ax.set_title(style.plain(f"{target}: {group}"), loc="left", fontweight="bold", pad=2)
    if not any(a.recorded.twice for a in activity.values()):
        for ax in axes:
            style.message(ax, "no episode with two attempts")
        return fig
    panels.legend(fig, {}, [(panels.line(c, linestyle=dash), name) for name, (c, dash) in LOOKS.items()], columns=3)
    return fig


def _aligned(ax: Axes, curves: Mapping[str, AlignedCurve]) -> None:
    ax.axvline(0, color=style.GREY, linewidth=0.6)
    for name, curve in curves.items():
        shade, dash = LOOKS[name]
        finite = np.isfinite(curve.mean)
        if not finite.any():
            continue
        x, y = curve.offsets[finite], curve.mean[finite]
        ax.plot(x, y, "o-", color=shade, ms=2.2, linewidth=0.4, alpha=0.55, markeredgewidth=0, clip_on=False)
        for side in (x < 0, x >= 0):  # smoothing across the correction would hide a sudden change
            ax.plot(x[side], spline(x[side], y[side]), color=shade, linestyle=dash)
        banded = np.isfinite(curve.low) & np.isfinite(curve.high) & (curve.clusters >= panels.FEWEST)
        if name == EPISODES and banded.any():
            low, high = (np.where(banded, end, np.nan) for end in (curve.low, curve.high))
            ax.fill_between(curve.offsets, low, high, color=shade, alpha=0.18, linewidth=0)
        elif name == EPISODES:
            panels.say_few(ax)
    sizes = ", ".join(f"{curve.n:,} {name}" for name, curve in curves.items())
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"tokens from the correction\nn: {sizes}", fontsize=6.5)
    ax.set_ylabel("summed activation")
    ax.grid(axis="y")


def spline(x: NDArray[np.int64], y: Floats) -> Floats:
    """Return a cubic smoothing spline at `x`, its smoothness set by cross-validation; fewer than five values stay as
    they are.
    """
    if len(x) < 5 or np.ptp(y) == 0:
        return y
    from scipy.interpolate import make_smoothing_spline

    smooth: Floats = np.maximum(make_smoothing_spline(x.astype(np.float64), y)(x), 0.0)
    return smooth


@style.styled
def draw_regions(activity: Mapping[str, RegionActivity], judge: str, note: str = "") -> Figure:
    """Draw Figure A6: mean activation by region and of the controls, with the ratio to the unsteered responses."""
    words = (
        "Mean activation per token by region, for episodes with two attempts (filled) and controls (open), with 95 % "
        "intervals clustered by latent. Numbers: ratio to the unsteered responses."
    )
    cells = [(target, group) for target, a in activity.items() for group in a.groups]
    fig = style.new_figure(1.85 * max(len(cells), 1), _caption(words, activity, judge, note))
    axes = fig.subplots(max(len(cells), 1), 1, squeeze=False)[:, 0]
    colours = style.colours(activity)
    for ax, (target, group) in zip(axes, cells, strict=False):
        _regions(ax, activity[target], group, colours[target])
        title = style.plain(f"{target}: {group}")
        ax.set_title(title, loc="left", color=colours[target], fontweight="bold", pad=2)
    if not cells:
        style.message(axes[0], "nothing was recorded")
    return fig


def _regions(ax: Axes, a: RegionActivity, group: str, colour: str) -> None:
    names = [name for name in (UNSTEERED, REREAD, DRIFTS, *REGIONS) if name in a.means[group]]
    for y, name in enumerate(names):
        e = a.means[group][name]
        panels.whisker(ax, y, panels.ends(e), colour, filled=name in REGIONS)
        ratio = a.ratios[group].get(f"{name} / {UNSTEERED}")
        if ratio is not None and ratio.value is not None:
            known = ratio.low is not None and e.clusters >= panels.FEWEST
            ends = f"\n[{ratio.low:.1f}, {ratio.high:.1f}]" if known else ""
            panels.beside(ax, y, f"× {ratio.value:.1f}{ends}")
    panels.note_few(ax, a.means[group].values())
    panels.named_rows(ax, [f"{name}\nn = {a.means[group][name].n:,}" for name in names])
    ax.set_xlim(left=0)
    ax.set_xlabel("mean summed activation per token")


def _caption(words: str, activity: Mapping[str, RegionActivity], judge: str, note: str) -> str:
    counts = (f"{target}: {group_sizes(a.recorded)}; {count_list(a.recorded)}." for target, a in activity.items())
    return panels.caption(words, judge, note, counts)
