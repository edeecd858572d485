"""Dose curve of a detector ablation: resistance against the share of detectors clamped to zero, and partial clamps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steerback.figures import panels, style
from steerback.figures.conditions import caption, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from steerback.experiments.base import Measured

SHOWN = ("multi_attempt_rate", "esr_rate", "msi", "mean_first")


@style.styled
def draw(found: Measured, doses: Mapping[str, Sequence[Mapping[str, Any]]], note: str = "") -> Figure:
    """`doses`: per target its conditions with share (0-1), number of latents and level (0-1)."""
    levels = any(dose["level"] for points in doses.values() for dose in points)
    words = (
        "Upper row: the best detectors clamped to zero, by the share of them that is clamped; dashed: baseline. "
        + ("Lower row: all of them held at a part of their mean level on mismatched pairs. " if levels else "")
    )
    fig, drawing = style.new_figure("full", 3.4 if levels else 1.9, words + caption(found, note))
    axes = drawing.subplots(2 if levels else 1, len(SHOWN), squeeze=False, sharey="col")
    colours = style.colours(found.targets)
    for column, metric in enumerate(SHOWN):
        _curve(axes[0, column], metric, found, doses, "share", colours)
        axes[0, column].set_xlabel("detectors clamped (%)")
        if levels:
            _curve(axes[1, column], metric, found, doses, "level", colours)
            axes[1, column].set_xlabel("all held at (% of level)")
        for ax in axes[:, column]:
            ax.set_ylabel(panels.axis_label(metric))
            ax.grid(axis="y")
    if len(found.targets) > 1:
        legend(drawing, colours)
    return fig


def _curve(
    ax: Axes,
    metric: str,
    found: Measured,
    doses: Mapping[str, Sequence[Mapping[str, Any]]],
    by: str,
    colours: Mapping[str, str],
) -> None:
    """Shares are those at level 0, levels those at share 1 (or, in the first row, the baseline at share 0)."""
    for target, points in doses.items():
        own = found.of(target)
        fixed, at = ("level", 0.0) if by == "share" else ("share", 1.0)
        chosen = sorted((p for p in points if p[fixed] == at and p["condition"] in own), key=lambda p: float(p[by]))
        panels.curve(ax, metric, [(100 * p[by], own[p["condition"]][metric]) for p in chosen], colours[target], target)
        baseline = next((p["condition"] for p in points if p["share"] == 0), None)
        value = own[baseline][metric].value if baseline in own else None
        if value is not None:
            level = panels.scaled(metric, value)
            ax.axhline(level, color=colours[target], linewidth=0.6, linestyle=(0, (3, 2)), zorder=0)
    if not doses:
        style.message(ax, "nothing was measured")
