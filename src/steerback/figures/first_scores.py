"""Figures A7 and A8: first scores without steering, and their paired difference to steered ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from steerback.analysis.no_steering import NoSteeringResults, RestartBound
from steerback.figures import panels, style
from steerback.figures.base import Presentation, measured_tables, planted_note
from steerback.figures.tables import Table, number
from steerback.metrics import Outcomes, view
from steerback.metrics.intervals import Floats
from steerback.metrics.outcomes import VALID

BINS = np.arange(0, 101, 5)


def present(results: NoSteeringResults) -> Presentation:
    """Return Figure A7, Figure A8 if a steered baseline was measured, and the table of bounds on restarts."""
    measured, note = results.measured, planted_note(results)
    unsteered, steered = results.unsteered(), results.steered()
    figures = {"figureA7": lambda: draw(unsteered, measured.judge, note)}
    if steered:
        both = {target: (unsteered[target], steered[target]) for target in steered}
        figures["figureA8"] = lambda: draw_differences(both, measured.judge, note)
    return Presentation({**measured_tables(measured), "bounds": bound_table(results.bounds, measured.judge)}, figures)


@style.styled
def draw(unsteered: Mapping[str, Outcomes], judge: str, note: str = "") -> Figure:
    """Draw Figure A7: shares of unsteered responses by first score."""
    words = "First-attempt scores of responses without steering; line: mean."
    fig, axes = _panels(unsteered, _caption(words, unsteered, judge, note))
    for ax, (target, outcomes) in zip(axes, unsteered.items(), strict=False):
        _histogram(ax, view(outcomes).first, BINS, style.colours(unsteered)[target], "mean {:.1f}")
    axes[-1].set_xlabel("first score without steering")
    axes[-1].set_xlim(0, 100)
    return fig


@style.styled
def draw_differences(both: Mapping[str, tuple[Outcomes, Outcomes]], judge: str, note: str = "") -> Figure:
    """Draw Figure A8: unsteered minus steered first score over pairs of the same prompt and seed."""
    words = (
        "First score without steering minus first score steered at threshold, over pairs of the same latent, prompt "
        "and seed; dashed: no difference; line: mean."
    )
    unsteered = {target: pair[0] for target, pair in both.items()}
    fig, axes = _panels(unsteered, _caption(words, unsteered, judge, note))
    for ax, (target, (without, steered)) in zip(axes, both.items(), strict=False):
        gaps = paired_gaps(without, steered)
        _histogram(ax, gaps, 2 * BINS - 100, style.colours(both)[target], "mean {:+.1f}")
        ax.axvline(0, color=style.INK, linewidth=0.8, linestyle=style.DASHED)
    axes[-1].set_xlabel("unsteered − steered first score (points)")
    axes[-1].set_xlim(-100, 100)
    return fig


def paired_gaps(a: Outcomes, b: Outcomes) -> Floats:
    """Return first scores of `a` minus those of `b`, (pairs,), over pairs that are valid and not degraded on both
    sides.
    """

    def sound(x: Outcomes) -> Outcomes:
        return x.take((x.state == VALID) & ~x.degraded)

    a, b = sound(a), sound(b)
    _, in_a, in_b = np.intersect1d(a.pair, b.pair, return_indices=True)
    gaps: Floats = a.first[in_a] - b.first[in_b]
    return gaps


def _panels(targets: Mapping[str, Outcomes], caption: str) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure with an empty panel for each target, titled in the target's colour."""
    rows = max(1, len(targets))
    fig = style.new_figure(0.4 + 1.2 * rows, caption)
    axes = fig.subplots(rows, 1, sharex=True, squeeze=False)[:, 0].tolist()
    colours = style.colours(targets)
    for ax, target in zip(axes, targets, strict=False):
        ax.set_title(style.plain(target), loc="left", color=colours[target], fontweight="bold", pad=2)
        ax.set_ylabel("responses (%)")
        ax.grid(axis="y")
    if not targets:
        style.message(axes[0], "nothing was measured")
    return fig, axes


def _histogram(ax: Axes, values: Floats, bins: NDArray[np.int64], colour: str, mean: str) -> None:
    if not len(values):
        style.message(ax, "no valid response")
        return
    share = 100 * np.histogram(values, bins)[0] / len(values)
    ax.stairs(share, bins, fill=True, color=colour, alpha=0.75)
    ax.axvline(float(values.mean()), color=style.INK, linewidth=0.9)
    ax.set_title(f"{mean.format(values.mean())}, n = {len(values):,}", loc="right", fontsize=6.5, pad=2)
    ax.set_ylim(0, min(100.0, 1.08 * float(share.max())))


def _caption(words: str, unsteered: Mapping[str, Outcomes], judge: str, note: str) -> str:
    views = {target: (view(outcomes), len(outcomes)) for target, outcomes in unsteered.items()}
    counts = (
        f"{target}: n = {len(v.cluster):,} valid of {n:,} without steering, "
        f"{int(v.multi.sum()):,} of them with a restart."
        for target, (v, n) in views.items()
    )
    return panels.caption(words, judge, note, counts)


def bound_table(bounds: Mapping[str, RestartBound], judge: str) -> Table:
    """Return one row per target, and one for all together."""
    shown = ("rate", "upper_by_latent", "upper_by_prompt", "upper_clopper_pearson")
    return Table(
        ("target", "n", "multi-attempt", "rate %", "upper % (latents)", "upper % (prompts)", "upper % (independent)"),
        [
            (target, f"{b.n:,}", f"{b.multi_attempt:,}", *(number(getattr(b, name), rate=True) for name in shown))
            for target, b in bounds.items()
        ],
        "Restarts without steering: upper ends of 95 % intervals, clustered by latent, by prompt, and by "
        f"Clopper-Pearson for independent trials. Judge: {judge}.",
        [{"target": target, "judge": judge, **asdict(b)} for target, b in bounds.items()],
    )
