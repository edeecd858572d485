"""Figure 3: restarts, recovery and first score against normalised boost, with the peaks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from steerback.figures import panels, style
from steerback.figures.conditions import legend
from steerback.metrics import Peak, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = ("multi_attempt_rate", "improvement_rate", "esr_rate", "msi", "mean_attempts", "mean_first")


@style.styled
def draw(
    curves: Mapping[str, Mapping[float, Summary]],
    peaks: Mapping[str, Mapping[str, Peak | None]],
    sweeps: Mapping[str, Mapping[str, Any]],
    judge: str,
    note: str = "",
) -> Figure:
    """`curves`: per target a summary per level; `peaks`: per target and metric; `sweeps`: sd and what was dropped."""
    fig, drawing = style.new_figure("full", 3.5, _caption(curves, sweeps, judge, note))
    axes = drawing.subplots(2, 3, sharex=True, squeeze=False)
    colours = style.colours(curves)
    for ax, metric in zip(axes.flat, SHOWN, strict=True):
        for i, (target, levels) in enumerate(curves.items()):
            panels.curve(ax, metric, [(x, s[metric]) for x, s in levels.items()], colours[target], target)
            _mark(ax, peaks.get(target, {}).get(metric), i, colours[target])
        ax.axvline(0, color=style.GREY, linewidth=0.6, linestyle=(0, (3, 2)), zorder=0)
        ax.set_ylabel(panels.axis_label(metric))
        ax.grid(axis="y")
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + (0.08 + 0.07 * len(curves)) * (high - low))
        if not any(levels for levels in curves.values()):
            style.message(ax, "nothing was measured")
    for ax in axes[1]:
        ax.set_xlabel("boost − threshold\n(sd of thresholds across latents)")
    legend(drawing, colours)
    return fig


def _mark(ax: Axes, peak: Peak | None, place: int, colour: str) -> None:
    """The peak's position and interval at the top of the panel."""
    if peak is None:
        return
    y = 0.955 - 0.07 * place
    across = ax.get_xaxis_transform()
    ax.plot([peak.low, peak.high], [y, y], color=colour, linewidth=1.0, transform=across)
    ax.plot([peak.at], [y], marker="v", color=colour, markersize=4.5, transform=across)


def _caption(
    curves: Mapping[str, Mapping[float, Summary]], sweeps: Mapping[str, Mapping[str, Any]], judge: str, note: str
) -> str:
    lines = [
        "Bands: 95 % intervals clustered by latent. Triangles: peaks, with intervals from resampled latents. "
        f"Dashed: threshold boost. Judge: {judge}. {note}".strip()
    ]
    for target, levels in curves.items():
        sweep = sweeps[target]
        lost = sum(sweep["dropped"].values())
        lines.append(
            f"{panels.counted(target, levels.values())} 1 sd = {sweep['sd']:.3g} in boost; "
            f"{lost} of {len(sweep['levels']) * sweep['latents']} pairs of latent and level have a negative boost."
        )
    return "\n".join(lines)
