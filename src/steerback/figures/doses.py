"""Figure 5 and the dose curve: resistance against the share of detectors clamped to zero, and partial clamps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from steerback.analysis.base import Measured
from steerback.analysis.detector_ablation import AblationResults
from steerback.figures import conditions, panels, style
from steerback.figures.base import Presentation, measured_tables, planted_note
from steerback.figures.conditions import caption, legend
from steerback.figures.detectors import detector_line
from steerback.metrics import Trend
from steerback.store.facts import ABLATED, BASELINE, Dose

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = ("multi_attempt_rate", "esr_rate", "msi", "mean_first")


def present(results: AblationResults) -> Presentation:
    """Figure 5 (baseline and all detectors at zero), the dose curve, and the conditions' tables."""
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
    """The dose response of the multi-attempt rate, in words."""
    if trend.slope is None:
        return "no dose response can be said"
    interval = "" if trend.low is None or trend.high is None else f" [{trend.low:+.1%}, {trend.high:+.1%}]"
    p = "" if trend.p is None else f", p = {trend.p:.2g}"
    return f"multi-attempt rate from no to all detectors clamped: slope {trend.slope:+.1%}{interval}{p}"


@style.styled
def draw(measured: Measured, doses: Mapping[str, Sequence[Dose]], note: str = "") -> Figure:
    """One panel a metric; partial clamps in a second row, if there are any. `doses`: those of each target."""
    levels = any(dose.level for points in doses.values() for dose in points)
    words = (
        "Upper row: the best detectors clamped to zero, by the share of them that is clamped; dashed: baseline. "
        + ("Lower row: all of them held at a part of their mean level on mismatched pairs. " if levels else "")
    )
    fig, drawing = style.new_figure("full", 3.4 if levels else 1.9, words + caption(measured, note))
    axes = drawing.subplots(2 if levels else 1, len(SHOWN), squeeze=False, sharey="col")
    colours = style.colours(measured.targets)
    for column, metric in enumerate(SHOWN):
        _curve(axes[0, column], metric, measured, doses, "share", colours)
        axes[0, column].set_xlabel("detectors clamped (%)")
        if levels:
            _curve(axes[1, column], metric, measured, doses, "level", colours)
            axes[1, column].set_xlabel("all held at (% of level)")
        for ax in axes[:, column]:
            ax.set_ylabel(panels.axis_label(metric))
            ax.grid(axis="y")
    if len(measured.targets) > 1:
        legend(drawing, colours)
    return fig


def _curve(
    ax: Axes,
    metric: str,
    measured: Measured,
    doses: Mapping[str, Sequence[Dose]],
    by: Literal["share", "level"],
    colours: Mapping[str, str],
) -> None:
    """Shares are those at level 0, levels those at share 1 (or, in the first row, the baseline at share 0)."""
    for target, points in doses.items():
        summaries = measured.of(target)
        along = [
            (d.share if by == "share" else d.level, summaries[d.condition][metric])
            for d in points
            if d.condition in summaries and (d.level == 0 if by == "share" else d.share == 1)
        ]
        along.sort(key=lambda point: point[0])
        panels.curve(ax, metric, [(100 * x, estimate) for x, estimate in along], colours[target], target)
        baseline = next((d.condition for d in points if d.share == 0), None)
        value = summaries[baseline][metric].value if baseline in summaries else None
        if value is not None:
            level = panels.scaled(metric, value)
            ax.axhline(level, color=colours[target], linewidth=0.6, linestyle=(0, (3, 2)), zorder=0)
    if not doses:
        style.message(ax, "nothing was measured")
