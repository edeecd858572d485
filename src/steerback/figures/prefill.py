"""Prefill control: continuations of a drifted prefix, by prefix length, with steering off and on."""

from __future__ import annotations

from matplotlib.figure import Figure, SubFigure

from steerback.analysis.base import Measured
from steerback.analysis.conditions import ConditionResults
from steerback.figures import panels, style
from steerback.figures.base import Presentation, measured_tables, planted_note
from steerback.metrics import Estimate
from steerback.store.facts import PREFILL_ARMS, PrefixCounts

SHOWN = ("multi_attempt_rate", "improvement_rate", "mean_first")
LOOKS = dict(zip(PREFILL_ARMS, ((style.GREY, "o", "-", ""), (style.PALETTE[1], "s", "--", "//////")), strict=True))
"""Colour, marker, line and hatching of each arm; the bands overlap."""
LABELS = {
    "multi_attempt_rate": "restarts after\nthe cut (%)",
    "improvement_rate": "restarts that\nimprove (%)",
    "mean_first": "first score\n(points)",
}


def present(results: ConditionResults[PrefixCounts]) -> Presentation:
    """Return the figure, the tables, and the numbers of prefixes of each length."""
    return Presentation(
        tables=measured_tables(results.measured),
        figures={"prefill_control": lambda: draw(results)},
        lines=[_line(target, counts) for target, counts in results.facts.items()],
    )


@style.styled
def draw(results: ConditionResults[PrefixCounts]) -> Figure:
    """Draw a block of panels for each target: unsteered and steered continuations against prefix length."""
    targets = results.measured.targets or [""]
    fig = style.new_figure(2.7 * len(targets) + 0.5, _caption(results))
    blocks = fig.subfigures(len(targets), 1, squeeze=False)[:, 0]
    for block, target in zip(blocks, targets, strict=True):
        _block(block, results, target)
        if len(targets) > 1:
            block.suptitle(style.plain(target), x=0.02, ha="left", fontsize=8, fontweight="bold")
    panels.legend(
        fig,
        {},
        [
            entry
            for name, (colour, marker, line, hatch) in LOOKS.items()
            for entry in (
                (panels.line(colour, marker=marker, linestyle=line), f"continued {name}"),
                (panels.patch(facecolor="none" if hatch else colour, edgecolor=colour, hatch=hatch, alpha=0.4), "95 %"),
            )
        ],
    )
    return fig


def _block(block: SubFigure, results: ConditionResults[PrefixCounts], target: str) -> None:
    axes = block.subplots(2, 2, squeeze=False, sharex=True)
    if target not in results.facts:
        for ax in axes.flat:
            style.message(ax, "no continuation to show")
        return
    characters = results.facts[target].characters
    for ax, metric in zip(axes.flat, SHOWN, strict=False):
        shown = {arm: _points(results.measured, target, arm, metric, characters) for arm in PREFILL_ARMS}
        for arm, points in shown.items():
            colour, marker, line, hatch = LOOKS[arm]
            panels.curve(ax, metric, points, colour, arm, marker, line == "--", hatch)
        ax.set_ylabel(LABELS[metric], fontsize=6.5)
        ax.grid(axis="y")
        panels.bounded(ax, metric)
        panels.note_few(ax, (e for points in shown.values() for _, e in points))
        if not ax.lines:
            style.message(ax, "no continuation to show")
    numbers = {arm: _points(results.measured, target, arm, "msi", characters) for arm in PREFILL_ARMS}
    panels.counts_below(
        axes[1, 1], [(f"n, {arm}", LOOKS[arm][0], {x: e.n for x, e in points}) for arm, points in numbers.items()]
    )
    for ax in axes[1]:
        ax.set_xlabel("prefix (characters)")


def _points(measured: Measured, target: str, arm: str, metric: str, characters: int) -> list[tuple[float, Estimate]]:
    """Return (prefix length, estimate) for each measured multiple of n."""
    points = []
    for condition, summary in measured.of(target).items():
        name, _, length = condition.partition(" ")
        if name == arm:
            points.append((float(int(length.removesuffix("n")) * characters), summary[metric]))
    return sorted(points, key=lambda point: point[0])


def _caption(results: ConditionResults[PrefixCounts]) -> str:
    words = (
        "Continuations of prefixes of steered responses, cut before any restart; prefix and continuation judged "
        "together. Bands: 95 % intervals clustered by latent."
    )
    lines = []
    for target, counts in results.facts.items():
        used = ", ".join(f"{k}: {tally.get('used', 0):,}" for k, tally in counts.prefixes.items())
        lines.append(f"{target}: n = {counts.characters} characters; prefixes {used}.")
    return panels.caption(words, results.measured.judge, planted_note(results), lines)


def _line(target: str, counts: PrefixCounts) -> str:
    used = "; ".join(
        f"{k}: " + ", ".join(f"{n} {why}" for why, n in sorted(tally.items(), key=lambda item: item[0] != "used"))
        for k, tally in counts.prefixes.items()
    )
    return f"{target}: n = {counts.characters} characters; prefixes {used}"
