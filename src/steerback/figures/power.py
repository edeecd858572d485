"""Study plan: its table, its assumptions, and power against the number of latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from steerback.figures import style
from steerback.figures.tables import Table, number

if TYPE_CHECKING:
    from steerback.metrics.power import Effect

Curve = tuple[str, int, int, float]
"""Point of a power curve: (question, trials per latent, latents, power)."""


@style.styled
def draw(curves: Sequence[Curve], effect: Effect, power: float, target: str) -> Figure:
    """Draw one panel per question and one curve per number of trials."""
    caption = (
        f"Simulated power for {target}: multi-attempt rate {effect.rate:.2%}, floor {effect.floor:.2%}, drop "
        f"{effect.drop:.0%}, ICC {effect.icc:.3f}; latents are clusters. Dotted: power {power:g}."
    )
    questions = list(dict.fromkeys(curve[0] for curve in curves))
    fig = style.new_figure(1.6 * max(len(questions), 1) + 0.3, caption)
    axes = fig.subplots(max(len(questions), 1), 1, sharex=True, squeeze=False)[:, 0]
    for ax, question in zip(axes, questions, strict=False):
        for i, trials in enumerate(dict.fromkeys(curve[1] for curve in curves)):
            points = [(latents, p) for q, t, latents, p in curves if (q, t) == (question, trials)]
            label = f"{trials} trials per latent"
            ax.plot(*zip(*points, strict=True), marker="o", color=style.PALETTE[i], clip_on=False, label=label)
        ax.axhline(power, color=style.GREY, linewidth=0.8, linestyle=":")
        ax.set_title(question, loc="left")
        ax.set_xscale("log")
        ax.set_ylabel("power")
        ax.set_ylim(0, 1)
    axes[-1].set_xlabel("latents")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return fig


def curve_table(curves: Sequence[Curve], effect: Effect) -> Table:
    """Return the numbers behind the figure."""
    columns = ("question", "trials per latent", "latents", "power")
    records = [dict(zip(columns, curve, strict=True)) | asdict(effect) for curve in curves]
    cells = [(q, str(trials), str(latents), number(power)) for q, trials, latents, power in curves]
    return Table(columns, cells, records=records)
