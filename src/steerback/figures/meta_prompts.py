"""Figure 4: meta-prompts against the baseline, and the effect by model size for several models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steerback.analysis.meta_prompts import MetaPromptResults
from steerback.figures import panels, style
from steerback.figures.base import Presentation, measured_tables, planted_note
from steerback.figures.conditions import USUAL, caption, difference, rows_height, rows_of_conditions
from steerback.metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EFFECT = "self-monitor"  # the variant that the paper compares across model sizes


def present(results: MetaPromptResults) -> Presentation:
    """Return Figure 4, tables, and a line about latents without label."""
    return Presentation(
        tables=measured_tables(results.measured),
        figures={"figure4": lambda: draw(results)},
        lines=[
            f"{target}: {chosen.cells_without_label} trials without label, excluded from the variants that name the "
            "label"
            for target, chosen in results.variants.items()
            if chosen.cells_without_label
        ],
    )


@style.styled
def draw(results: MetaPromptResults) -> Figure:
    """Draw conditions as rows and, below, the effect of self-monitoring on each target from small to large."""
    measured = results.measured
    conditions = list(dict.fromkeys(condition for _, condition in measured.summaries))
    by_size = [t for t in measured.targets if (t, EFFECT) in measured.comparisons]
    by_size.sort(key=lambda t: results.variants[t].parameters or 0)  # unknown sizes keep their order
    top = rows_height(measured, conditions, len(USUAL))
    several = len(by_size) > 1
    fig = style.new_figure(top + (3.0 if several else 0), caption(measured, planted_note(results)))
    if several:
        upper, lower = fig.subfigures(2, 1, height_ratios=[top, 3.0], squeeze=False).flat
        axes = lower.subplots(3, 1, sharex=True, squeeze=False)[:, 0]
        for ax, metric in zip(axes, USUAL, strict=False):
            _effect(ax, results, by_size, metric)
        axes[0].set_title(f"{EFFECT} − baseline, by size of the model", loc="left", fontsize=7)
        rows_of_conditions(upper, measured, conditions, USUAL)
    else:
        rows_of_conditions(fig, measured, conditions, USUAL)
    return fig


def _effect(ax: Axes, results: MetaPromptResults, targets: list[str], metric: str) -> None:
    measured = results.measured
    colours = style.colours(measured.targets)
    for x, target in enumerate(targets):
        gap = difference(measured.comparisons[target, EFFECT][metric])
        panels.whisker(ax, x, panels.span(metric, gap), colours[target], upright=True)
    ax.axhline(0, color=style.GREY, linewidth=0.8, linestyle=style.DASHED)
    sizes = {t: results.variants[t].parameters for t in targets}
    short = {
        t: style.plain(t.rsplit("-", 1)[-1] if len(targets) > 3 else t) for t in targets
    }  # colours tell them apart
    pairs = {t: measured.comparisons[t, EFFECT].pairs for t in targets}
    names = [f"{short[t]}\n" + (f"{n / 1e6:.3g} M\n" if (n := sizes[t]) else "") + f"n = {pairs[t]:,}" for t in targets]
    ax.set_xticks(range(len(targets)), names, fontsize=6)
    ax.set_xlim(-0.6, len(targets) - 0.4)
    ax.set_ylabel(f"{METRICS[metric].label}\n(points)", fontsize=6.5)
    ax.grid(axis="y")
