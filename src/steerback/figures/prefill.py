"""Prefill control: what follows a drifted prefix, by its length, with steering off and on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steerback.analysis.base import Measured
from steerback.analysis.prefill_control import PrefillResults
from steerback.figures import panels, style
from steerback.figures.base import Presentation, measured_tables, planted_note
from steerback.figures.conditions import legend
from steerback.metrics import Estimate
from steerback.store.facts import PREFILL_ARMS, PrefixCounts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("multi_attempt_rate", "improvement_rate", "mean_first")
LABELS = {
    "multi_attempt_rate": "restarts after the cut (%)",
    "improvement_rate": "restarts that improve (%)",
    "mean_first": "first score (points)",
}


def present(results: PrefillResults) -> Presentation:
    """The figure, the tables, and how many prefixes of each length there were."""
    return Presentation(
        tables=measured_tables(results.measured),
        figures={"prefill_control": lambda: draw(results)},
        lines=[_line(target, counts) for target, counts in results.prefixes.items()],
    )


@style.styled
def draw(results: PrefillResults) -> Figure:
    """Solid: unsteered continuations; dashed: steered ones. x is the length of the prefix in characters."""
    measured = results.measured
    fig, drawing = style.new_figure("full", 2.1, _caption(results))
    axes = drawing.subplots(1, len(SHOWN), squeeze=False)[0]
    colours = style.colours(measured.targets)
    for ax, metric in zip(axes, SHOWN, strict=True):
        for target in measured.targets:
            for arm, dashed in zip(PREFILL_ARMS, (False, True), strict=True):
                points = _points(measured, target, arm, metric, results.prefixes[target].characters)
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


def _points(measured: Measured, target: str, arm: str, metric: str, characters: int) -> list[tuple[float, Estimate]]:
    """(prefix length, estimate) for each multiple of n that was measured."""
    points = []
    for condition, summary in measured.of(target).items():
        name, _, length = condition.partition(" ")
        if name == arm:
            points.append((float(int(length.removesuffix("n")) * characters), summary[metric]))
    return sorted(points, key=lambda point: point[0])


def _caption(results: PrefillResults) -> str:
    lines = [
        "Continuations of the first characters of steered responses that had not restarted there; prefix and "
        "continuation judged together. Bands: 95 % intervals clustered by latent. "
        f"Judge: {results.measured.judge}. {planted_note(results)}".strip()
    ]
    for target, counts in results.prefixes.items():
        used = ", ".join(f"{k}: {tally.get('used', 0):,}" for k, tally in counts.prefixes.items())
        lines.append(f"{target}: n = {counts.characters} characters; prefixes {used}.")
    return "\n".join(lines)


def _line(target: str, counts: PrefixCounts) -> str:
    used = "; ".join(
        f"{k}: " + ", ".join(f"{n} {why}" for why, n in sorted(tally.items(), key=lambda item: item[0] != "used"))
        for k, tally in counts.prefixes.items()
    )
    return f"{target}: n = {counts.characters} characters; prefixes {used}"
