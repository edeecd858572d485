"""Figure 3: attempts, improvement and scores against normalised boost, with the peaks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steerback.analysis.boost_sweep import SweepResults
from steerback.figures import panels, style
from steerback.figures.base import Presentation, measured_tables, planted_note
from steerback.figures.tables import Table, number
from steerback.metrics import METRICS, Peak, Summary
from steerback.store.facts import Sweep

SHOWN = ("multi_attempt_rate", "improvement_rate", "esr_rate", "msi", "mean_attempts", "mean_first")


def present(results: SweepResults) -> Presentation:
    """Return Figure 3, the table of conditions and the table of peaks."""
    return Presentation(
        tables={**measured_tables(results.measured), "peaks": peak_table(results.peaks, results.measured.judge)},
        figures={"figure3": lambda: draw(results)},
        lines=[_line(target, sweep) for target, sweep in results.sweeps.items()],
    )


@style.styled
def draw(results: SweepResults) -> Figure:
    """Draw each metric against the level: one curve per target, peaks above, and the numbers of responses below."""
    curves = {target: results.curve(target) for target in results.sweeps}
    strip = 0.26 * max(len(curves), 1) + 0.5
    fig = style.new_figure(3.9 + strip, _caption(results))
    top, bottom = fig.subfigures(2, 1, height_ratios=[3.9, strip], squeeze=False).flat
    axes = top.subplots(3, 2, sharex=True, squeeze=False)
    colours = style.colours(curves)
    for ax, metric in zip(axes.flat, SHOWN, strict=True):
        for i, (target, levels) in enumerate(curves.items()):
            panels.curve(ax, metric, [(x, s[metric]) for x, s in levels.items()], colours[target], target)
            if not any(panels.few(s[metric]) for s in levels.values()):  # as intervals, peaks need several latents
                _mark(ax, results.peaks[target].get(metric), i, colours[target])
        ax.axvline(0, color=style.GREY, linewidth=0.8, linestyle=style.DASHED, zorder=0)
        panels.metric_axis(ax, metric, (s[metric] for levels in curves.values() for s in levels.values()))
        if not any(levels for levels in curves.values()):
            style.message(ax, "nothing was measured")
    for ax in axes[-1]:
        ax.set_xlabel("boost − threshold (sd)")
    _counts(bottom.subplots(), curves, colours)
    peak = panels.line(style.GREY, marker="v", markersize=4.5, linewidth=1.0)
    panels.legend(top, colours, [(peak, "peak, 95 %"), (panels.dashed(), "threshold")])
    return fig


def _counts(ax: Axes, curves: Mapping[str, Mapping[float, Summary]], colours: Mapping[str, str]) -> None:
    """Write the number of responses at each level, and the number of them with several attempts."""
    rows = []
    for target, levels in curves.items():
        name = f"{style.plain(target)}: " if len(curves) > 1 else ""
        rows.append((f"{name}n", colours[target], {x: s["msi"].n for x, s in levels.items()}))
        rows.append((f"{name}multi", colours[target], {x: s["improvement_rate"].n for x, s in levels.items()}))
    panels.level_counts(ax, rows, "numbers of responses (sd from threshold)")


def _mark(ax: Axes, peak: Peak | None, place: int, colour: str) -> None:
    """Draw the position and interval of a peak above the panel."""
    if peak is None:
        return
    y = 1.22 + 0.1 * place
    across = ax.get_xaxis_transform()
    ax.plot([peak.low, peak.high], [y, y], color=colour, linewidth=1.0, transform=across, clip_on=False)
    ax.plot([peak.at], [y], marker="v", color=colour, markersize=4.5, transform=across, clip_on=False)


def _caption(results: SweepResults) -> str:
    words = (
        "Bands: 95 % intervals clustered by latent. Triangles: peaks, with intervals from resampled latents. sd: that "
        "of the thresholds across latents; multi: responses with several attempts, of which a share improves. "
        "Dashed: threshold boost."
    )
    lines = []
    for target, sweep in results.sweeps.items():
        pairs = f"{sum(sweep.dropped.values())} of {len(sweep.levels) * sweep.latents} pairs of latent and level"
        boosts = f"{pairs} have a negative boost."
        if sweep.mean is not None:
            boosts = f"All latents have the same boosts; 0 is the mean threshold, {sweep.mean:.3g}."
        counts = panels.counted(target, results.curve(target).values())
        lines.append(f"{counts} 1 sd = {sweep.sd:.3g} in boost; {boosts}")
    return panels.caption(words, results.measured.judge, planted_note(results), lines)


def peak_table(peaks: Mapping[str, Mapping[str, Peak | None]], judge: str) -> Table:
    """Return one row per target and metric."""
    cells, records = [], []
    for target, by_metric in peaks.items():
        for name, peak in by_metric.items():
            rate = METRICS[name].rate
            shown = ("-", "-", "-")
            if peak is not None:
                at = f"{peak.at:+.2f} [{peak.low:+.2f}, {peak.high:+.2f}]"
                shown = (number(peak.value, rate), at, f"{peak.edge:.0%}")
            cells.append((target, METRICS[name].label, *shown))
            records.append({"target": target, "metric": name, "judge": judge, **({} if peak is None else asdict(peak))})
    return Table(
        ("target", "metric", "peak", "at (sd from threshold)", "at the edge"),
        cells,
        "Peaks of the curves, with 95 % intervals from resampled latents; sd is that of thresholds across latents. "
        "At the edge: share of resamples that peak at the first or last level. Rates in per cent.",
        records,
        left=2,
    )


def _line(target: str, sweep: Sweep) -> str:
    if sweep.mean is not None:
        return (
            f"{target}: all latents at the same boosts; 0 sd: {sweep.mean:.4g}, the mean threshold; sd {sweep.sd:.4g}"
        )
    lost = ", ".join(f"{n} of {sweep.latents} latents at {level}" for level, n in sweep.dropped.items() if n)
    return f"{target}: sd of thresholds across latents {sweep.sd:.4g}; dropped, negative boost: {lost or 'none'}"
