"""Prefill control: what follows a drifted prefix, by its length, with steering off and on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from steerback.figures import panels, style
from steerback.figures.conditions import legend
from steerback.metrics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from steerback.experiments.base import Measured

SHOWN = ("multi_attempt_rate", "improvement_rate", "mean_first")
LABELS = {
    "multi_attempt_rate": "restarts after the cut (%)",
    "improvement_rate": "restarts that improve (%)",
    "mean_first": "first score (points)",
}


@style.styled
def draw(found: Measured, facts: Mapping[str, Mapping[str, Any]], note: str = "") -> Figure:
    """Solid: unsteered continuations; dashed: steered ones. x is the length of the prefix in characters."""
    fig, drawing = style.new_figure("full", 2.1, _caption(found, facts, note))
    axes = drawing.subplots(1, len(SHOWN), squeeze=False)[0]
    colours = style.colours(found.targets)
    for ax, metric in zip(axes, SHOWN, strict=True):
        for target in found.targets:
            for arm, dashed in (("unsteered", False), ("steered", True)):
                points = _points(found, target, arm, metric, facts[target]["characters"])
                panels.curve(ax, metric, points, colours[target], arm, "s" if dashed else "o", dashed)
        ax.set_xlabel("prefix (characters)")
        ax.set_ylabel(LABELS[metric])
        ax.set_ylim(bottom=0)
        ax.grid(axis="y")
        if not ax.lines:
            style.message(ax, "no continuation to show")
    from matplotlib.lines import Line2D

    kinds = (("o", "-", "continued unsteered"), ("s", "--", "continued steered"))
    legend(drawing, colours, [(Line2D([], [], color=style.GREY, marker=m, linestyle=d), name) for m, d, name in kinds])
    return fig


def _points(found: Measured, target: str, arm: str, metric: str, characters: int) -> list[tuple[float, Estimate]]:
    """(prefix length, estimate) for each multiple of n that was measured."""
    points = []
    for condition, summary in found.of(target).items():
        name, _, length = condition.partition(" ")
        if name == arm:
            points.append((float(int(length.removesuffix("n")) * characters), summary[metric]))
    return sorted(points, key=lambda point: point[0])


def _caption(found: Measured, facts: Mapping[str, Mapping[str, Any]], note: str) -> str:
    lines = [
        "Continuations of the first characters of steered responses that had not restarted there; prefix and "
        f"continuation judged together. Bands: 95 % intervals clustered by latent. Judge: {found.judge}. {note}".strip()
    ]
    for target in found.targets:
        used = ", ".join(f"{k}: {tally.get('used', 0):,}" for k, tally in facts[target]["prefixes"].items())
        lines.append(f"{target}: n = {facts[target]['characters']} characters; prefixes {used}.")
    return "\n".join(lines)
