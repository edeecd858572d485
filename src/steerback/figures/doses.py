"""Figure 5 and the dose curve: resistance against the share of clamped detectors, and under partial clamps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from steerback.analysis.base import Measured
from steerback.analysis.detector_ablation import AblationResults
from steerback.figures import conditions, panels, style
from steerback.figures.base import Presentation, measured_tables, planted_note
from steerback.figures.detectors import detector_line
from steerback.metrics import Estimate, Summary, Trend
from steerback.store.facts import ABLATED, BASELINE, Dose

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = ("multi_attempt_rate", "esr_rate", "msi", "mean_first")
PARTIAL = {
    True: "all detectors, clamped at each token to a part of their activation there",
    False: "all detectors clamped to a part of their mean level on mismatched pairs",
}


def present(results: AblationResults) -> Presentation:
    """Return Figure 5 (baseline and all detectors at zero), the dose curve, and the tables of the conditions."""
    measured, note = results.measured, planted_note(results)
    return Presentation(
        tables=measured_tables(measured),
        figures={
            "figure5": lambda: conditions.draw(measured, note=note, shown=(BASELINE, ABLATED)),
            "dose_curve": lambda: draw(measured, results.doses, note),
        },
        lines=[
            f"{target}: {detector_line(d)}; {_slope(results.trends[target]['multi_attempt_rate'])}"
            for target, d in results.detectors.items()
        ],
    )


def _slope(trend: Trend) -> str:
    """Return the dose response of the multi-attempt rate in words."""
    if trend.slope is None:
        return "no dose response can be estimated"
    interval = "" if trend.low is None or trend.high is None else f" [{trend.low:+.1%}, {trend.high:+.1%}]"
    p = "" if trend.p is None else f", p = {trend.p:.2g}"
    return f"multi-attempt rate from no to all detectors clamped: slope {trend.slope:+.1%}{interval}{p}"


@style.styled
def draw(measured: Measured, doses: Mapping[str, Sequence[Dose]], note: str = "") -> Figure:
    """Draw one row of panels per metric, against the share of clamped detectors and partial clamps, if any."""
    partial = [dose for points in doses.values() for dose in points if dose.level]
    levels, scaled = bool(partial), all(dose.scaled for dose in partial)
    words = (
        "Left: detectors clamped to zero, best first, by the share that is clamped"
        + (f"; right: {PARTIAL[scaled]}" if levels else "")
        + ". Bottom: numbers of responses. "
    )
    by: tuple[Literal["share", "level"], ...] = ("share", "level") if levels else ("share",)
    strip = 0.14 * max(len(measured.targets), 1) + 0.45
    counts = [panels.counted(target, measured.of(target).values()) for target in measured.targets]
    caption = panels.caption(f"{words}95 % intervals clustered by latent.", measured.judge, note, counts)
    fig = style.new_figure(1.05 * len(SHOWN) + strip + 0.25, caption)
    axes = fig.subplots(len(SHOWN) + 1, len(by), squeeze=False, sharex="col", height_ratios=[1.05] * 4 + [strip])
    colours = style.colours(measured.targets)
    for row, metric in zip(axes, SHOWN, strict=False):
        for ax, kind in zip(row, by, strict=True):
            _curve(ax, metric, measured, doses, kind, colours)
            ax.grid(axis="y")
            panels.bounded(ax, metric)
        row[0].set_ylabel(panels.axis_label(metric), fontsize=6.5)
    for ax, kind in zip(axes[-1], by, strict=True):
        numbers = {t: {100 * x: s["msi"].n for x, s in _along(measured.of(t), p, kind)} for t, p in doses.items()}
        several = len(numbers) > 1
        panels.counts_below(ax, [(style.plain(t) if several else "n", colours[t], n) for t, n in numbers.items()])
        level = "all clamped to (% of activation)" if scaled else "all clamped to (% of level)"
        ax.set_xlabel({"share": "detectors clamped (%)", "level": level}[kind])
    panels.legend(fig, colours, [(panels.dashed(), f"{BASELINE}: none clamped")], columns=3)
    return fig


def _along(
    summaries: Mapping[str, Summary], points: Sequence[Dose], by: Literal["share", "level"]
) -> list[tuple[float, Summary]]:
    """Return (dose, summary) pairs in order: shares at level 0, or levels at share 1."""
    along = [
        (d.share if by == "share" else d.level, summaries[d.condition])
        for d in points
        if d.condition in summaries and (d.level == 0 if by == "share" else d.share == 1)
    ]
    return sorted(along, key=lambda point: point[0])


def _curve(
    ax: Axes,
    metric: str,
    measured: Measured,
    doses: Mapping[str, Sequence[Dose]],
    by: Literal["share", "level"],
    colours: Mapping[str, str],
) -> None:
    shown: list[Estimate] = []
    for target, points in doses.items():
        summaries = measured.of(target)
        along = [(100 * x, s[metric]) for x, s in _along(summaries, points, by)]
        shown += [estimate for _, estimate in along]
        panels.curve(ax, metric, along, colours[target], target)
        baseline = next((d.condition for d in points if d.share == 0), None)
        value = summaries[baseline][metric].value if baseline in summaries else None
        if value is not None:
            level = panels.scaled(metric, value)
            ax.axhline(level, color=colours[target], linewidth=0.8, linestyle=style.DASHED, zorder=0)
    panels.note_few(ax, shown)
    if not doses:
        style.message(ax, "nothing was measured")
