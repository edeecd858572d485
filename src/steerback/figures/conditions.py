"""Conditions side by side: one row each, one panel a metric, a point with its interval for every target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from steerback.analysis.base import Measured
from steerback.analysis.conditions import ConditionResults
from steerback.figures import panels, style
from steerback.figures.base import Presentation, measured_tables, planted_note

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

USUAL = ("multi_attempt_rate", "esr_rate", "msi", "mean_first")


def present(results: ConditionResults) -> Presentation:
    """One figure of all conditions, and their tables."""
    note = planted_note(results)
    if results.experiment == "held-out":
        note = f"Pairs share latent, boost and seed; the prompts differ. {note}"
    name = {"held-out": "held_out"}.get(results.experiment, "conditions")
    return Presentation(measured_tables(results.measured), {name: lambda: draw(results.measured, note=note)})


@style.styled
def draw(
    measured: Measured, metrics: Sequence[str] = USUAL, note: str = "", shown: Sequence[str] | None = None
) -> Figure:
    """Every condition's metrics with 95 % intervals; a faint line marks the first condition of each target.

    `shown`: these conditions only.
    """
    conditions = list(shown or dict.fromkeys(condition for _, condition in measured.summaries))
    rows = max(len(conditions), 1) * max(len(measured.targets), 1)
    fig, drawing = style.new_figure(
        "full", max(1.2, 0.17 * rows + 0.12 * len(conditions) + 0.75), caption(measured, note, shown)
    )
    rows_of_conditions(drawing, measured, conditions, metrics)
    return fig


def caption(measured: Measured, note: str, shown: Sequence[str] | None = None) -> str:
    """What is shown, by which judge, over how many responses (of the conditions `shown`, default: all)."""
    lines = [f"95 % intervals clustered by latent, over valid responses. Judge: {measured.judge}. {note}".strip()]
    for target in measured.targets:
        lines.append(panels.counted(target, [s for c, s in measured.of(target).items() if shown is None or c in shown]))
    return "\n".join(lines)


def rows_of_conditions(
    fig: SubFigure, measured: Measured, conditions: Sequence[str], metrics: Sequence[str]
) -> list[Axes]:
    """Fills a (sub)figure: conditions from top to bottom, targets within each, one panel a metric."""
    axes = list(fig.subplots(1, len(metrics), sharey=True, squeeze=False)[0])
    if not conditions:
        style.message(axes[0], "nothing was measured")
        return axes
    colours = style.colours(measured.targets)
    offsets = {
        t: (i - (len(measured.targets) - 1) / 2) * 0.62 / len(measured.targets) for i, t in enumerate(measured.targets)
    }
    for ax, metric in zip(axes, metrics, strict=True):
        for target, offset in offsets.items():
            own = measured.of(target)
            for y, condition in enumerate(conditions):
                if condition in own:
                    panels.dot(ax, metric, own[condition][metric], y + offset, colours[target])
            first = own[conditions[0]][metric].value if conditions[0] in own else None
            if first is not None:
                ax.axvline(panels.scaled(metric, first), color=colours[target], linewidth=0.6, alpha=0.5, zorder=0)
        ax.set_xlabel(panels.axis_label(metric))
        ax.grid(axis="x")
    axes[0].set_yticks(range(len(conditions)), [style.plain(c) for c in conditions])
    axes[0].set_ylim(len(conditions) - 0.45, -0.55)
    for ax in axes:
        ax.tick_params(axis="y", length=0)
    legend(fig, colours)
    return axes


def legend(fig: SubFigure, colours: Mapping[str, str], more: Sequence[tuple[Artist, str]] = ()) -> None:
    """Names of the targets in their colours (where there are several) and further entries, above the panels."""
    from matplotlib.lines import Line2D

    several = colours if len(colours) > 1 else {}
    entries: list[tuple[Artist, str]] = [
        *((Line2D([], [], color=c, marker="o", linestyle="none"), style.plain(t)) for t, c in several.items()),
        *more,
    ]
    if entries:
        handles, names = zip(*entries, strict=True)
        fig.legend(handles, names, loc="outside upper center", ncols=min(len(entries), 6), columnspacing=1.2)
