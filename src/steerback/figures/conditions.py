"""Comparison of conditions: one row per condition, and for each metric a panel of values and a panel of differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from steerback.analysis.base import Measured
from steerback.analysis.conditions import ConditionResults, MatchedPrefixResults
from steerback.figures import panels, style
from steerback.figures.base import Presentation, measured_tables, planted_note
from steerback.metrics import METRICS, Estimate
from steerback.metrics.paired import PairedTest
from steerback.store.facts import BASELINE, MetaPromptSet

CONTINUED = ("mean_first", "multi_attempt_rate", "degraded_share")
USUAL = ("multi_attempt_rate", "esr_rate", "msi", "mean_first")


def present(results: ConditionResults[object]) -> Presentation:
    """Return one figure of all conditions, and their tables."""
    note = planted_note(results)
    if results.experiment == "held-out":
        note = f"Pairs share latent, boost and seed; the prompts differ. {note}"
    name = {"held-out": "held_out"}.get(results.experiment, "conditions")
    return Presentation(measured_tables(results.measured), {name: lambda: draw(results.measured, note=note)})


def matched_prefix(results: MatchedPrefixResults) -> Presentation:
    """Return the figure of continuations, the tables, and the numbers of prefix pairs."""
    note = f"Scores cover only the continuation, under steering. {planted_note(results)}"
    return Presentation(
        tables=measured_tables(results.measured),
        figures={"matched_prefix": lambda: draw(results.measured, CONTINUED, note)},
        lines=[
            f"{target}: " + ", ".join(f"{n} {why}" for why, n in counts.pairs.items())
            for target, counts in results.facts.items()
        ],
    )


@style.styled
def draw(
    measured: Measured, metrics: Sequence[str] = USUAL, note: str = "", shown: Sequence[str] | None = None
) -> Figure:
    """Draw each condition's metrics with 95 % intervals, and the paired differences to their right.

    `shown` restricts the figure to these conditions.
    """
    conditions = list(shown or dict.fromkeys(condition for _, condition in measured.summaries))
    fig = style.new_figure(rows_height(measured, conditions, len(metrics)), caption(measured, note, shown))
    rows_of_conditions(fig, measured, conditions, metrics)
    return fig


def rows_height(measured: Measured, conditions: Sequence[str], metrics: int) -> float:
    """Return the height in inches that `rows_of_conditions` needs."""
    rows = max(len(conditions), 1) * max(len(measured.targets), 1)
    return 0.5 + metrics * max(0.85, 0.11 * rows + 0.07 * len(conditions) + 0.4)


def caption(measured: Measured, note: str, shown: Sequence[str] | None = None) -> str:
    """Return the caption: panels, judge and numbers of responses (of the conditions `shown`, default: all)."""
    differences = (
        f"Right: differences from {', '.join(sorted(set(measured.against.values())))} over pairs of the same latent, "
        "prompt and seed, with intervals from these pairs; dashed: no difference. "
        if measured.comparisons
        else ""
    )
    words = (
        "95 % intervals clustered by latent, over valid responses; n at the right of each row. Dashed: first "
        f"condition. {differences}"
    )
    numbers = (
        panels.counted(target, [s for c, s in measured.of(target).items() if shown is None or c in shown])
        for target in measured.targets
    )
    return panels.caption(words.strip(), measured.judge, note, numbers)


def rows_of_conditions(
    fig: Figure | SubFigure, measured: Measured, conditions: Sequence[str], metrics: Sequence[str]
) -> None:
    """Fill a (sub)figure with one row of panels per metric; conditions run from top to bottom, targets within each."""
    paired = any(c in conditions for _, c in measured.comparisons)
    axes = fig.subplots(len(metrics), 1 + paired, sharey=True, squeeze=False)
    if not conditions:
        for ax in axes.flat:
            style.message(ax, "nothing was measured")
        return
    colours = style.colours(measured.targets)
    for row, metric in zip(axes, metrics, strict=True):
        _values(row[0], measured, conditions, metric, colours)
        if paired:
            _differences(row[1], measured, conditions, metric, colours)
        _sizes(row[-1], measured, conditions, metric, colours)
    axes[0, 0].set_yticks(range(len(conditions)), [style.plain(c) for c in conditions])
    axes[0, 0].set_ylim(len(conditions) - 0.45, -0.55)
    for ax in axes.flat:
        ax.tick_params(axis="y", length=0, labelsize=6)
        ax.grid(axis="x")
    reference = f"{style.plain(conditions[0])}; right: no difference" if paired else conditions[0]
    panels.legend(fig, colours, [(panels.dashed(), reference)])


def _places(measured: Measured, conditions: Sequence[str]) -> list[tuple[str, str, float]]:
    """Return (target, condition, height) of each point."""
    n = len(measured.targets)
    offsets = {t: (i - (n - 1) / 2) * 0.62 / n for i, t in enumerate(measured.targets)}
    return [
        (target, condition, y + offset)
        for target, offset in offsets.items()
        for y, condition in enumerate(conditions)
        if (target, condition) in measured.summaries
    ]


def _values(ax: Axes, measured: Measured, conditions: Sequence[str], metric: str, colours: Mapping[str, str]) -> None:
    for target, condition, y in _places(measured, conditions):
        estimate = measured.summaries[target, condition][metric]
        panels.whisker(ax, y, panels.span(metric, estimate), colours[target])
        if condition == conditions[0] and estimate.value is not None:
            value = panels.scaled(metric, estimate.value)
            ax.axvline(value, color=colours[target], linewidth=0.8, linestyle=style.DASHED, zorder=0)
    ax.set_title(panels.axis_label(metric), loc="right", fontsize=6.5, pad=8)
    panels.bounded(ax, metric, "x")
    panels.note_few(ax, (measured.summaries[t, c][metric] for t, c, _ in _places(measured, conditions)))


def _differences(
    ax: Axes, measured: Measured, conditions: Sequence[str], metric: str, colours: Mapping[str, str]
) -> None:
    against = {measured.against[key] for key in measured.comparisons if key[1] in conditions}
    tested = False
    for target, condition, y in _places(measured, conditions):
        if (target, condition) not in measured.comparisons:
            continue
        test = measured.comparisons[target, condition].tests.get(metric)
        if test is not None:
            tested = True
            panels.whisker(ax, y, panels.span(metric, difference(test)), colours[target])
    ax.axvline(0, color=style.GREY, linewidth=0.8, linestyle=style.DASHED, zorder=0)
    reach = max((abs(x) for x in ax.get_xlim()), default=1.0)
    ax.set_xlim(-reach, reach)
    unit = " (points)" if METRICS[metric].rate or METRICS[metric].unit else ""
    if not tested:
        ax.text(0, (len(conditions) - 1) / 2, "not tested", ha="center", fontsize=6, color=style.GREY)
    words = f"− {BASELINE}" if against == {BASELINE} else "difference"
    ax.set_title(f"{words}{unit}", loc="left", fontsize=6.5, pad=8)


def difference(test: PairedTest) -> Estimate:
    """Return the difference of a paired test with its interval."""
    return Estimate(test.difference, test.low, test.high, 0, test.method, clusters=test.clusters)


def _sizes(ax: Axes, measured: Measured, conditions: Sequence[str], metric: str, colours: Mapping[str, str]) -> None:
    """Write the number of responses of each row at the right of the panel."""
    for target, condition, y in _places(measured, conditions):
        n = measured.summaries[target, condition][metric].n
        colour = colours[target] if len(colours) > 1 else style.INK
        panels.beside(ax, y, f"n = {n:,}", color=colour)


EFFECT = "self-monitor"  # the variant that the paper compares across model sizes


def meta_prompts(results: ConditionResults[MetaPromptSet]) -> Presentation:
    """Return Figure 4, tables, and a line about latents without label."""
    return Presentation(
        tables=measured_tables(results.measured),
        figures={"figure4": lambda: draw_meta_prompts(results)},
        lines=[
            f"{target}: {chosen.cells_without_label} trials without label, excluded from the variants that name the "
            "label"
            for target, chosen in results.facts.items()
            if chosen.cells_without_label
        ],
    )


@style.styled
def draw_meta_prompts(results: ConditionResults[MetaPromptSet]) -> Figure:
    """Draw conditions as rows and, below, the effect of self-monitoring on each target from small to large."""
    measured = results.measured
    conditions = list(dict.fromkeys(condition for _, condition in measured.summaries))
    by_size = [t for t in measured.targets if (t, EFFECT) in measured.comparisons]
    by_size.sort(key=lambda t: results.facts[t].parameters or 0)  # unknown sizes keep their order
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


def _effect(ax: Axes, results: ConditionResults[MetaPromptSet], targets: list[str], metric: str) -> None:
    measured = results.measured
    colours = style.colours(measured.targets)
    for x, target in enumerate(targets):
        gap = difference(measured.comparisons[target, EFFECT][metric])
        panels.whisker(ax, x, panels.span(metric, gap), colours[target], upright=True)
    ax.axhline(0, color=style.GREY, linewidth=0.8, linestyle=style.DASHED)
    sizes = {t: results.facts[t].parameters for t in targets}
    short = {
        t: style.plain(t.rsplit("-", 1)[-1] if len(targets) > 3 else t) for t in targets
    }  # colours tell them apart
    pairs = {t: measured.comparisons[t, EFFECT].pairs for t in targets}
    names = [f"{short[t]}\n" + (f"{n / 1e6:.3g} M\n" if (n := sizes[t]) else "") + f"n = {pairs[t]:,}" for t in targets]
    ax.set_xticks(range(len(targets)), names, fontsize=6)
    ax.set_xlim(-0.6, len(targets) - 0.4)
    ax.set_ylabel(f"{METRICS[metric].label}\n(points)", fontsize=6.5)
    ax.grid(axis="y")
