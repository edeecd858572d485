"""Figure A9: baseline, detectors clamped to zero, and random sets clamped to zero (one point per set)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from steerback.analysis.random_ablation import RandomAblationResults, Rank
from steerback.figures import panels, style
from steerback.figures.base import Presentation, label_tables, measured_tables, planted_note
from steerback.figures.tables import Table, comparison_table, number
from steerback.metrics import METRICS, Summary
from steerback.store.facts import ABLATED, BASELINE, ControlSets

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

SHOWN = ("multi_attempt_rate", "esr_rate", "msi", "mean_first")


def present(results: RandomAblationResults) -> Presentation:
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
        figures={"figureA9": lambda: draw(results)},
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
    return Table(
        ("target", "set", "mean", "frequency", "norm removed", "distance", "norm, ratio"),
        [
            (
                target,
                ControlSets.condition(i),
                *(shown(q.difference[feature], "+") for feature in ("mean", "frequency", "removed")),
                shown(q.distance),
                shown(q.removed_ratio),
            )
            for target, i, _, q in rows
        ],
        "Log ratio of random sets to detectors, in sd over live latents. Distance: mean distance of each member "
        "to its detector. Ratio: norm that the clamp removes per token, relative to the detectors.",
        [
            {
                "target": target,
                "set": i,
                "latents": " ".join(map(str, members)),
                **q.difference,
                "distance": q.distance,
                "removed_ratio": q.removed_ratio,
            }
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
def draw(results: RandomAblationResults) -> Figure:
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
    ax.set_ylabel(panels.axis_label(metric), fontsize=6.5)
    ax.grid(axis="y")
    panels.bounded(ax, metric)
    panels.note_few(ax, (summaries[c][metric] for c in (BASELINE, ABLATED) if c in summaries))


def _match(control: ControlSets) -> str:
    """Return the number and kind of the sets, and the norm that they remove relative to the detectors."""
    ratios = [q.removed_ratio for q in control.quality if q.removed_ratio is not None]
    norm = f"; they remove {np.mean(ratios):.2f} times the norm removed by clamping the detectors" if ratios else ""
    overlap = f", sharing {control.overlap:.0%} of their latents" if control.overlap else ""
    size = len(control.sets[0])
    return f"{len(control.sets)} {control.method} sets of {size} latent{'s' * (size != 1)}{overlap}{norm}."
