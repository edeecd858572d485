"""Figures A7 and A8: first-attempt scores without steering, a histogram per target, alone or beside steered ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from steerback.analysis.no_steering import NoSteeringResults, RestartBound
from steerback.figures import style
from steerback.figures.base import Presentation, measured_tables, planted_note
from steerback.figures.conditions import legend
from steerback.figures.tables import Table, number
from steerback.metrics import Outcomes, view

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = np.arange(0, 101, 5)


def present(results: NoSteeringResults) -> Presentation:
    """Figure A7; Figure A8 where a steered baseline was measured; the bounds on restarts."""
    judge, note = results.measured.judge, planted_note(results)
    unsteered, steered = results.unsteered(), results.steered()
    figures = {"figureA7": lambda: draw(unsteered, judge, note=note)}
    if steered:
        both = {target: unsteered[target] for target in steered}
        figures["figureA8"] = lambda: draw(both, judge, steered=steered, note=note)
    return Presentation({**measured_tables(results.measured), "bounds": bound_table(results.bounds, judge)}, figures)


@style.styled
def draw(
    unsteered: Mapping[str, Outcomes], judge: str, steered: Mapping[str, Outcomes] | None = None, note: str = ""
) -> Figure:
    """Shares of responses by first score; `steered` is outlined over the unsteered bars."""
    columns = max(1, min(len(unsteered), 2))
    rows = max(1, -(-len(unsteered) // columns))
    fig, drawing = style.new_figure("full", 0.35 + 1.25 * rows, _caption(unsteered, judge, steered, note))
    axes = drawing.subplots(rows, columns, sharex=True, squeeze=False)
    colours = style.colours(unsteered)
    for ax, target in zip(axes.flat, unsteered, strict=False):
        ax.set_title(style.plain(target), loc="left", color=colours[target], fontweight="bold", pad=2)
        _histogram(ax, unsteered[target], colours[target], filled=True)
        if steered and target in steered:
            _histogram(ax, steered[target], style.INK, filled=False)
        ax.grid(axis="y")
    for ax in axes.flat[len(unsteered) :]:
        ax.set_axis_off()
    if not unsteered:
        style.message(axes[0, 0], "nothing was measured")
    for ax in axes[-1]:
        ax.set_xlabel("first-attempt score")
        ax.set_xlim(0, 100)
    if steered:
        from matplotlib.patches import Patch

        entries = (("no steering", {"color": style.GREY, "alpha": 0.75}), ("at threshold", {"fill": False}))
        legend(drawing, {}, [(Patch(**how), name) for name, how in entries])
    drawing.supylabel("share of responses (%)", fontsize=7.5)
    return fig


def _histogram(ax: Axes, outcomes: Outcomes, colour: str, filled: bool) -> None:
    first = view(outcomes).first
    if not len(first):
        style.message(ax, "no valid response")
        return
    share = 100 * np.histogram(first, BINS)[0] / len(first)
    ax.stairs(share, BINS, fill=filled, color=colour, alpha=0.75 if filled else 1, linewidth=1.0)
    if filled:
        ax.axvline(float(first.mean()), color=colour, linewidth=0.8)
        ax.set_title(f"mean {first.mean():.1f}, n = {len(first):,}", loc="right", fontsize=6.5, pad=2)


def _caption(unsteered: Mapping[str, Outcomes], judge: str, steered: Mapping[str, Outcomes] | None, note: str) -> str:
    what = "First-attempt scores of responses without steering"
    beside = ", and of the same prompts and seeds steered at threshold (outlined)" if steered else ""
    lines = [f"{what}{beside}. Judge: {judge}. {note}".strip()]
    for target, outcomes in unsteered.items():
        v = view(outcomes)
        lines.append(
            f"{target}: n = {len(v.cluster):,} valid of {len(outcomes):,}, {int(v.multi.sum()):,} with a restart."
        )
    return "\n".join(lines)


def bound_table(bounds: Mapping[str, RestartBound], judge: str) -> Table:
    """One row per target, and one for all together."""
    shown = ("rate", "upper_by_latent", "upper_by_prompt", "upper_clopper_pearson")
    return Table(
        ("target", "n", "multi-attempt", "rate %", "upper % (latents)", "upper % (prompts)", "upper % (independent)"),
        [
            (target, f"{b.n:,}", f"{b.multi_attempt:,}", *(number(getattr(b, name), rate=True) for name in shown))
            for target, b in bounds.items()
        ],
        "Restarts without steering: upper ends of 95 % intervals, clustered by latent, by prompt, and Clopper-Pearson "
        f"as if all trials were independent. Judge: {judge}.",
        [{"target": target, "judge": judge, **asdict(b)} for target, b in bounds.items()],
    )
