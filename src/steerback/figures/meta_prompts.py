"""Figure 4: meta-prompts against the baseline, and the effect by model size where there are several models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from steerback.analysis.meta_prompts import MetaPromptResults
from steerback.figures import panels, style
from steerback.figures.base import Presentation, measured_tables, planted_note
from steerback.figures.conditions import caption, rows_of_conditions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EFFECT = "self-monitor"  # the variant that the paper follows over model sizes


def present(results: MetaPromptResults) -> Presentation:
    """Figure 4, tables, and a line where cells without a label were left out."""
    return Presentation(
        tables=measured_tables(results.measured),
        figures={"figure4": lambda: draw(results)},
        lines=[
            f"{target}: {chosen.cells_without_label} cells without label, left out of the variants that name it"
            for target, chosen in results.variants.items()
            if chosen.cells_without_label
        ],
    )


@style.styled
def draw(results: MetaPromptResults) -> Figure:
    """Conditions as rows; below, the effect of self-monitoring on each target, smallest model first."""
    measured = results.measured
    conditions = list(dict.fromkeys(condition for _, condition in measured.summaries))
    by_size = [t for t in measured.targets if (t, EFFECT) in measured.comparisons]
    by_size.sort(key=lambda t: results.variants[t].parameters or 0)  # where sizes are unknown, the order stays
    rows = max(len(conditions), 1)
    top = max(1.4, 0.15 * rows * max(len(measured.targets), 1) + 0.12 * rows + 0.7)
    several = len(by_size) > 1
    fig, drawing = style.new_figure("full", top + (1.7 if several else 0), caption(measured, planted_note(results)))
    if several:
        upper, lower = drawing.subfigures(2, 1, height_ratios=[top, 1.7], squeeze=False).flat
        for ax, metric in zip(
            lower.subplots(1, 3, squeeze=False)[0], ("multi_attempt_rate", "esr_rate", "msi"), strict=True
        ):
            _effect(ax, results, by_size, metric)
    else:
        upper = drawing
    rows_of_conditions(upper, measured, conditions, ("multi_attempt_rate", "esr_rate", "msi", "mean_first"))
    return fig


def _effect(ax: Axes, results: MetaPromptResults, targets: list[str], metric: str) -> None:
    measured = results.measured
    colours = style.colours(measured.targets)
    for x, target in enumerate(targets):
        test = measured.comparisons[target, EFFECT][metric]
        if test.difference is None:
            continue
        value = panels.scaled(metric, test.difference)
        ends = [value if end is None else panels.scaled(metric, end) for end in (test.low, test.high)]
        spread = np.abs([[value - ends[0]], [ends[1] - value]])
        ax.errorbar(x, value, yerr=spread, fmt="o", color=colours[target], capsize=2, elinewidth=1.0)
    ax.axhline(0, color=style.GREY, linewidth=0.6, linestyle=(0, (3, 2)))
    sizes = {t: results.variants[t].parameters for t in targets}
    short = {t: style.plain(t.rsplit("-", 1)[-1] if len(targets) > 3 else t) for t in targets}  # colours say which
    names = [short[t] + (f"\n{n / 1e6:.3g} M" if (n := sizes[t]) else "") for t in targets]
    ax.set_xticks(range(len(targets)), names, fontsize=6)
    ax.set_xlim(-0.6, len(targets) - 0.4)
    ax.set_ylabel(f"{EFFECT} − baseline:\n{panels.axis_label(metric)}", fontsize=6.5)
    ax.grid(axis="y")
