"""Figure 5 and the dose curve: resistance against the share of clamped detectors, and under partial clamps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from steerback.analysis.ablation import AblationResults, RandomAblationResults, Rank
from steerback.analysis.base import Measured
from steerback.figures import conditions, panels, style
from steerback.figures.base import Presentation, label_tables, measured_tables, planted_note
from steerback.figures.detectors import detector_line
from steerback.figures.tables import Table, comparison_table, number
from steerback.metrics import METRICS, Estimate, Summary, Trend
from steerback.store.facts import ABLATED, BASELINE, ControlSets, Dose

SHOWN = ("multi_attempt_rate", "esr_rate", "msi", "mean_first")
PARTIAL = {
    True: "all detectors, clamped at each token to a part of their activation there",
    False: "all detectors clamped to a part of their mean level on mismatched pairs",
}


def present_doses(results: AblationResults) -> Presentation:
    """Return Figure 5 (baseline and all detectors at zero), the dose curve, and the tables of the conditions."""
    measured, note = results.measured, planted_note(results)
    return Presentation(
        tables=measured_tables(measured),
        figures={
            "figure5": lambda: conditions.draw(measured, note=note, shown=(BASELINE, ABLATED)),
            "dose_curve": lambda: draw_doses(measured, results.doses, note),
        },
        lines=[
            f"{target}: {detector_line(d)}; {_slope(results.trends[target]['multi_attempt_rate'])}"
            for target, d in results.detectors.items()
        ],
    )


def _slope(trend: Trend) -> str:
    """Return the dose response of the multi-attempt rate in words."""
    if trend.slope is None:
        return "no dose response can be estimated"
    interval = "" if trend.low is None or trend.high is None else f" [{trend.low:+.1%}, {trend.high:+.1%}]"
    p = "" if trend.p is None else f", p = {trend.p:.2g}"
    return f"multi-attempt rate from no to all detectors clamped: slope {trend.slope:+.1%}{interval}{p}"


@style.styled
def draw_doses(measured: Measured, doses: Mapping[str, Sequence[Dose]], note: str = "") -> Figure:
    """Draw one row of panels per metric, against the share of clamped detectors and partial clamps, if any."""
    partial = [dose for points in doses.values() for dose in points if dose.level]
    levels, scaled = bool(partial), all(dose.scaled for dose in partial)
    words = (
        "Left: detectors clamped to zero, best first, by the share that is clamped"
        + (f"; right: {PARTIAL[scaled]}" if levels else "")
        + ". Bottom: numbers of responses. "
    )
    by: tuple[Literal["share", "level"], ...] = ("share", "level") if levels else ("share",)
    strip = 0.14 * max(len(measured.targets), 1) + 0.45
    counts = [panels.counted(target, measured.of(target).values()) for target in measured.targets]
    caption = panels.caption(f"{words}95 % intervals clustered by latent.", measured.judge, note, counts)
    fig = style.new_figure(1.05 * len(SHOWN) + strip + 0.25, caption)
    axes = fig.subplots(len(SHOWN) + 1, len(by), squeeze=False, sharex="col", height_ratios=[1.05] * 4 + [strip])
    colours = style.colours(measured.targets)
    for row, metric in zip(axes, SHOWN, strict=False):
        for ax, kind in zip(row, by, strict=True):
            _curve(ax, metric, measured, doses, kind, colours)
            ax.grid(axis="y")
            panels.bounded(ax, metric)
        row[0].set_ylabel(panels.axis_label(metric), fontsize=6.5)
    for ax, kind in zip(axes[-1], by, strict=True):
        numbers = {t: {100 * x: s["msi"].n for x, s in _along(measured.of(t), p, kind)} for t, p in doses.items()}
        several = len(numbers) > 1
        panels.counts_below(ax, [(style.plain(t) if several else "n", colours[t], n) for t, n in numbers.items()])
        level = f"all clamped to\n(% of {'activation' if scaled else 'level'})"
        ax.set_xlabel({"share": "detectors clamped (%)", "level": level}[kind])
    panels.legend(fig, colours, [(panels.dashed(), f"{BASELINE}: none clamped")], columns=3)
    return fig


def _along(
    summaries: Mapping[str, Summary], points: Sequence[Dose], by: Literal["share", "level"]
) -> list[tuple[float, Summary]]:
    """Return (dose, summary) pairs in order: shares at level 0, or levels at share 1."""
    along = [
        (d.share if by == "share" else d.level, summaries[d.condition])
        for d in points
        if d.condition in summaries and (d.level == 0 if by == "share" else d.share == 1)
    ]
    return sorted(along, key=lambda point: point[0])


def _curve(
    ax: Axes,
    metric: str,
    measured: Measured,
    doses: Mapping[str, Sequence[Dose]],
    by: Literal["share", "level"],
    colours: Mapping[str, str],
) -> None:
    shown: list[Estimate] = []
    for target, points in doses.items():
        summaries = measured.of(target)
        along = [(100 * x, s[metric]) for x, s in _along(summaries, points, by)]
        shown += [estimate for _, estimate in along]
        panels.curve(ax, metric, along, colours[target], target)
        baseline = next((d.condition for d in points if d.share == 0), None)
        value = summaries[baseline][metric].value if baseline in summaries else None
        if value is not None:
            level = panels.scaled(metric, value)
            ax.axhline(level, color=colours[target], linewidth=0.8, linestyle=style.DASHED, zorder=0)
    panels.note_few(ax, shown)
    if not doses:
        style.message(ax, "nothing was measured")


def present_random_sets(results: RandomAblationResults) -> Presentation:
    """Return Figure A9, and tables of conditions, comparisons, ranks and match of the sets."""
    judge = results.measured.judge
    # The table shows only the comparisons of the control; summary.json also compares every set with the baseline.
    pairs = {f"{t}: {c} − {BASELINE}": x for (t, c), x in results.measured.comparisons.items() if c == ABLATED}
    pairs |= {f"{t}: {ABLATED} − {c}": x for (t, c), x in results.against_sets.items()}
    return Presentation(
        tables={
            "table": measured_tables(results.measured)["table"],
            "comparisons": comparison_table(pairs, judge=judge, metrics=("multi_attempt_rate", "msi")),
            "ranks": rank_table(results.ranks),
            "match": match_table(results.sets),
            **label_tables(results.measured),
        },
        figures={"figureA9": lambda: draw_random_sets(results)},
        lines=[_line(target, results.ranks[target], sets) for target, sets in results.sets.items()],
    )


def rank_table(ranks: Mapping[str, Mapping[str, Rank | None]]) -> Table:
    """Return one row per target and metric: baseline, detectors, and the values of the random sets."""
    cells, records = [], []
    for target, by_metric in ranks.items():
        for metric, r in by_metric.items():
            if r is None:
                continue
            values = (r.baseline, r.value, r.mean, r.low, r.high)
            shown = [number(v, METRICS[metric].rate) for v in values]
            cells.append((target, METRICS[metric].label, *shown, f"{r.below} / {r.above} of {r.sets}", f"{r.p:.3f}"))
            records.append({"target": target, "metric": metric, **asdict(r)})
    return Table(
        ("target", "metric", "baseline", "detectors", "sets: mean", "least", "most", "below / above", "p (rank)"),
        cells,
        "Detectors clamped to zero, and random sets clamped to zero. Below / above: sets with a smaller / larger "
        "value than the detectors. p: two-sided, from the rank of the distance to the mean of the other sets.",
        records,
        left=2,
    )


def match_table(sets: Mapping[str, ControlSets]) -> Table:
    """Return one row per random set: its distance from the detectors."""

    def shown(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:{sign}.2f}"

    rows = [
        (target, i, members, quality)
        for target, control in sets.items()
        if control.quality  # imported runs have no qualities
        for i, (members, quality) in enumerate(zip(control.sets, control.quality, strict=True), 1)
    ]
    cells = []
    for target, i, _, q in rows:
        differences = (shown(q.difference[feature], "+") for feature in ("mean", "frequency", "removed"))
        cells.append((target, ControlSets.condition(i), *differences, shown(q.distance), shown(q.removed_ratio)))
    return Table(
        ("target", "set", "mean", "frequency", "norm removed", "distance", "norm, ratio"),
        cells,
        "Log ratio of random sets to detectors, in sd over live latents. Distance: mean distance of each member "
        "to its detector. Ratio: norm that the clamp removes per token, relative to the detectors.",
        [
            {"target": target, "set": i, "latents": " ".join(map(str, members))}
            | {**q.difference, "distance": q.distance, "removed_ratio": q.removed_ratio}
            for target, i, members, q in rows
        ],
        left=2,
    )


def _line(target: str, ranks: Mapping[str, Rank | None], control: ControlSets) -> str:
    """Return a line that compares the ablation of the detectors with those of the random sets."""
    kind = f"{len(control.sets)} {control.method} sets of {len(control.sets[0])}" + (
        "" if control.n_candidates is None else f" from {control.n_candidates} live latents"
    )
    overlap = f", which share {control.overlap:.0%} of their latents" if control.overlap else ""
    r = ranks["multi_attempt_rate"]
    if r is None:
        return f"{target}: {kind}{overlap}; nothing to compare"
    return (
        f"{target}: {kind}{overlap}; multi-attempt rate {r.value:.1%} without the detectors, {r.mean:.1%} "
        f"[{r.low:.1%}, {r.high:.1%}] without a random set (rank p = {r.p:.3f}; the minimum for {r.sets} sets is "
        f"{1 / (r.sets + 1):.3f})"
    )


@style.styled
def draw_random_sets(results: RandomAblationResults) -> Figure:
    """Draw a block of panels for each target, one panel per metric, with the detectors' rank p in the title."""
    measured = results.measured
    targets = measured.targets or [""]
    words = (
        "Random sets: one point each, their mean as a bar. p: two-sided, from the rank of the detectors among the "
        "sets; its minimum for k sets is 1 / (k + 1). 95 % intervals clustered by latent. "
    )
    lines = [panels.counted(target, measured.of(target).values()) for target in measured.targets]
    lines += [f"{target}: {_match(control)}" for target, control in results.sets.items()]
    caption = panels.caption(words.strip(), measured.judge, planted_note(results), lines)
    fig = style.new_figure(3.0 * len(targets), caption)
    blocks = fig.subfigures(len(targets), 1, squeeze=False)[:, 0]
    for block, target in zip(blocks, targets, strict=True):
        axes = block.subplots(2, 2, squeeze=False)
        if target in results.sets:
            _block(block, axes.flat, results, target)
        else:
            for ax in axes.flat:
                style.message(ax, "nothing was measured")
    return fig


def _block(block: SubFigure, axes: Iterable[Axes], results: RandomAblationResults, target: str) -> None:
    summaries, ranks = results.measured.of(target), results.ranks[target]
    colour = style.colours(results.measured.targets)[target]
    random = [summaries[c] for c in results.sets[target].conditions if c in summaries]
    for ax, metric in zip(axes, SHOWN, strict=True):
        _panel(ax, metric, summaries, random, colour)
        rank = ranks.get(metric)
        if rank is not None:
            ax.set_title(f"p = {rank.p:.2f} (minimum {1 / (rank.sets + 1):.2f})", loc="right", fontsize=6, pad=2)
    block.suptitle(style.plain(target), x=0.02, ha="left", color=colour, fontsize=8, fontweight="bold")


def _panel(ax: Axes, metric: str, summaries: Mapping[str, Summary], random: Sequence[Summary], colour: str) -> None:
    names = []
    for x, (condition, name) in enumerate(((BASELINE, "none"), (ABLATED, "\n\ndetectors"))):
        estimate = summaries[condition][metric] if condition in summaries else None
        shown = None if estimate is None else panels.span(metric, estimate)
        panels.whisker(ax, x, shown, colour, filled=condition == ABLATED, upright=True)
        names.append(f"{name}\nn = {estimate.n if estimate else 0:,}")
    points = [panels.scaled(metric, v) for s in random if (v := s[metric].value) is not None]
    if points:
        places = 2 + np.linspace(-0.22, 0.22, len(points)) if len(points) > 1 else [2]
        ax.plot(places, points, "o", color=style.GREY, markersize=2.6, alpha=0.8, clip_on=False, zorder=3)
        ax.hlines(float(np.mean(points)), 1.68, 2.32, color=style.INK, linewidth=1.2)
    sizes = sorted({s[metric].n for s in random}) or [0]
    each = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    names.append(f"{len(random)} random\nn = {each}")
    ax.set_xticks(range(3), names, fontsize=6)
    ax.tick_params(axis="x", length=0)
    ax.set_xlabel("clamped to zero", fontsize=6.5, labelpad=0)
    ax.set_xlim(-0.5, 2.6)
    panels.metric_axis(ax, metric, (summaries[c][metric] for c in (BASELINE, ABLATED) if c in summaries))


def _match(control: ControlSets) -> str:
    """Return the number and kind of the sets, and the norm that they remove relative to the detectors."""
    ratios = [q.removed_ratio for q in control.quality if q.removed_ratio is not None]
    norm = f"; they remove {np.mean(ratios):.2f} times the norm removed by clamping the detectors" if ratios else ""
    overlap = f", sharing {control.overlap:.0%} of their latents" if control.overlap else ""
    size = len(control.sets[0])
    return f"{len(control.sets)} {control.method} sets of {size} latent{'s' * (size != 1)}{overlap}{norm}."
