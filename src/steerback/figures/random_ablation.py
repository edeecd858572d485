"""Figure A9: baseline, detectors clamped to zero, and random sets clamped to zero, every set a point."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from steerback.figures import panels, style
from steerback.figures.conditions import caption
from steerback.metrics import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from steerback.experiments.base import Measured
    from steerback.experiments.random_ablation import Rank

SHOWN = ("multi_attempt_rate", "esr_rate", "msi", "mean_first")
NAMES = ("baseline", "detectors\nat zero", "random\nsets")


@style.styled
def draw(
    found: Measured,
    ranks: Mapping[str, Mapping[str, Rank | None]],
    sets: Mapping[str, Mapping[str, Any]],
    note: str = "",
) -> Figure:
    """One row a target, one panel a metric; the rank of the detectors among the sets stands in the panel."""
    rows = max(len(found.targets), 1)
    words = "Random sets: one point each, their mean as a bar; p from the rank of the detectors among them. "
    told = "\n".join(f"{t}: {_match(s)}" for t, s in sets.items())
    fig, drawing = style.new_figure("full", 1.75 * rows + 0.1, f"{words}{caption(found, note)}\n{told}")
    axes = drawing.subplots(rows, len(SHOWN), squeeze=False)
    colours = style.colours(found.targets)
    for row, target in zip(axes, found.targets, strict=False):
        for ax, metric in zip(row, SHOWN, strict=True):
            _panel(ax, metric, found, target, ranks[target].get(metric), colours[target])
        row[0].set_title(style.plain(target), loc="left", color=colours[target], fontweight="bold", pad=2)
    if not found.targets:
        for ax in axes.flat:
            style.message(ax, "nothing was measured")
    return fig


def _panel(ax: Axes, metric: str, found: Measured, target: str, rank: Rank | None, colour: str) -> None:
    own = found.of(target)
    for x, (condition, filled) in enumerate((("baseline", False), ("ablated", True))):
        shown = panels.span(metric, own[condition][metric]) if condition in own else None
        if shown is not None:
            value, low, high = shown
            face = colour if filled else "white"
            reach = [[value - low], [high - value]]
            ax.errorbar(x, value, reach, fmt="o", color=colour, markerfacecolor=face, elinewidth=1.0, capsize=2)
    values = [s[metric].value for c, s in own.items() if c.startswith("random ")]
    points = [panels.scaled(metric, v) for v in values if v is not None]
    if points:
        beside = 2 + np.linspace(-0.22, 0.22, len(points)) if len(points) > 1 else [2]
        ax.plot(beside, points, "o", color=style.GREY, markersize=2.6, alpha=0.8)
        ax.hlines(float(np.mean(points)), 1.68, 2.32, color=style.INK, linewidth=1.2)
    if rank is not None:
        ax.set_title(f"p = {rank.p:.2f}", loc="right", fontsize=6.5, pad=2)
    ax.set_xticks(range(3), NAMES, fontsize=6)
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(-0.5, 2.5)
    if METRICS[metric].rate:
        ax.set_ylim(bottom=0)
    ax.set_ylabel(panels.axis_label(metric))
    ax.grid(axis="y")


def _match(sets: Mapping[str, Any]) -> str:
    ratios = [q["removed_ratio"] for q in sets["quality"] if q["removed_ratio"] is not None]
    norm = f"; they remove {np.mean(ratios):.2f} times the norm that the detectors' clamp removes" if ratios else ""
    overlap = f", sharing {sets['overlap']:.0%} of their latents" if sets["overlap"] else ""
    size = len(sets["sets"][0])
    return f"{len(sets['sets'])} {sets['method']} sets of {size} latent{'s' * (size != 1)}{overlap}{norm}."
