"""Calibration of each latent: a table, and the curves as small multiples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D

from steerback.analysis.calibration import CalibratedLatent, curve
from steerback.figures import style
from steerback.figures.tables import Table

COLUMNS = 3


def calibration_table(latents: Mapping[str, Sequence[CalibratedLatent]]) -> Table:
    """Return one row per target and latent: threshold with interval, status, verified mean first score, and reason."""
    cells, records = [], []
    for target, calibrated in latents.items():
        for x in calibrated:
            t, check = x.threshold, x.threshold.verification
            score = "-" if check is None else f"{check.score:.0f} [{check.low:.0f}, {check.high:.0f}]"
            boost = f"{t.boost:.4g} [{t.low:.4g}, {t.high:.4g}]"
            cells.append((target, str(x.latent), x.label, boost, t.status, score, t.reason))
            fields = asdict(t)
            fields.pop("verification")
            names = ("score", "low", "high", "n_trials", "n_unscored")
            verified = {f"verified_{name}": getattr(check, name, None) for name in names}
            records.append({"target": target, "latent": x.latent, "label": x.label, **fields, **verified})
    caption = (
        "Threshold boost of each latent with its 95 % interval. Verified: mean first score of fresh trials at it, with "
        "its 95 % interval. Only converged thresholds are used."
    )
    columns = ("target", "latent", "label", "threshold", "status", "verified", "why")
    return Table(columns, cells, caption, records, left=3, minor=("why",))


@style.styled
def draw_calibration(target: str, latents: Sequence[CalibratedLatent], judge: str, note: str = "") -> Figure:
    """Draw one panel per latent: mean first score at each tested boost, fitted curve with band, and threshold."""
    rows = max(-(-len(latents) // COLUMNS), 1)
    caption = (
        f"{target}: calibration of each latent. Points: mean first score at each tested boost, with areas by number of "
        "trials. Line and band: fitted curve with 95 % interval. Dashed: target score. Vertical: threshold with its "
        f"interval (grey: not used). Cross: fresh trials with 95 % interval. Judge: {judge}. {note}"
    ).strip()
    fig = style.new_figure(0.95 * rows + 0.4, caption)
    # one pair of axes for all panels: fifty pairs take twice as long to lay out and draw
    ax = fig.subplots()
    ax.set_axis_off()
    ax.set(xlim=(0, min(COLUMNS, max(len(latents), 1))), ylim=(rows, 0), autoscale_on=False)
    for number, x in enumerate(latents):
        _panel(ax, *divmod(number, COLUMNS), x)
    _beside(ax, "boost", (0.5, 0), (0, -1), va="top", ha="center")
    _beside(ax, "mean first score", (0, 0.5), (-19, 0), va="center", ha="right", rotation=90)
    return fig


def _beside(ax: Axes, words: str, place: tuple[float, float], away: tuple[float, float], **more: Any) -> None:
    """Write the name of an axis at a place of the frame, some points away."""
    ax.annotate(words, place, away, "axes fraction", "offset points", fontsize=7.5, annotation_clip=False, **more)


WIDE, HIGH, TOP = 0.86, 0.62, 0.17
"""Width and height of a panel's frame, and the space above it, as shares of the panel."""
LOWEST, HIGHEST = -3.0, 103.0
"""Range of the scores in a frame."""


def _panel(ax: Axes, row: int, column: int, x: CalibratedLatent) -> None:
    t = x.threshold
    colour = style.PALETTE[0] if t.usable else style.GREY
    boosts = sorted({b for b, score in x.tried if score is not None})
    scores = [[s for b, s in x.tried if b == boost and s is not None] for boost in boosts]
    fitted = curve(t, x.tried)
    low, high = _frame(ax, row, column, [*boosts, t.low, t.high, *(fitted["boost"] if fitted else ())])
    inside = (
        Affine2D().translate(-low, -HIGHEST).scale(WIDE / (high - low), HIGH / (LOWEST - HIGHEST))
        .translate(column, row + TOP) + ax.transData
    )  # fmt: skip

    def line(boosts: Sequence[float], scores: Sequence[float], color: str, width: float, **more: Any) -> None:
        ax.plot(boosts, scores, color=color, linewidth=width, transform=inside, **more)

    def band(boosts: Sequence[float], low: Sequence[float], high: Sequence[float], alpha: float) -> None:
        ax.fill_between(boosts, low, high, color=colour, alpha=alpha, linewidth=0, transform=inside)

    band([t.low, t.high], [LOWEST] * 2, [HIGHEST] * 2, 0.12)
    if fitted:
        band(fitted["boost"], fitted["low"], fitted["high"], 0.16)
        line(fitted["boost"], fitted["score"], colour, 0.9)
    line([low, high], [t.target_score] * 2, style.INK, 0.5, linestyle=(0, (3, 2)))
    line([t.boost] * 2, [LOWEST, HIGHEST], colour, 0.8)
    areas = [1.2 * len(s) for s in scores]
    ax.scatter(boosts, [np.mean(s) for s in scores], areas, style.INK, linewidths=0, transform=inside, zorder=3)
    if check := t.verification:
        line([t.boost] * 2, [check.low, check.high], style.PALETTE[1], 0.8, zorder=4)
        line([t.boost], [check.score], style.PALETTE[1], 0.8, marker="x", markersize=4, zorder=4)
    name = style.shortened(f"{x.latent} {x.label}", 17)  # as wide as the panel
    ax.text(column, row + TOP - 0.03, style.plain(name), fontsize=6)
    if not t.usable:
        ax.text(column + 0.03, row + TOP + HIGH - 0.03, t.status, fontsize=5.5, color=style.GREY)


def _frame(ax: Axes, row: int, column: int, boosts: Sequence[float]) -> tuple[float, float]:
    """Draw the frame of a panel with its ticks, and return its range of boosts."""
    margin = 0.05 * (max(boosts) - min(boosts)) or 1.0
    low, high = min(boosts) - margin, max(boosts) + margin
    left, bottom, mark = column, row + TOP + HIGH, 0.03
    side = 0.01 * ax.get_xlim()[1]  # length of marks at the side, whatever the width of a panel
    ax.plot([left, left, left + WIDE], [row + TOP, bottom, bottom], color=style.INK, linewidth=0.6)
    for boost in MaxNLocator(3, steps=[1, 2, 5, 10]).tick_values(low, high):
        if low <= boost <= high:
            at = left + WIDE * (boost - low) / (high - low)
            ax.plot([at, at], [bottom, bottom + mark], color=style.INK, linewidth=0.6)
            ax.text(at, bottom + 1.7 * mark, f"{boost:g}", fontsize=7, ha="center", va="top")
    for score in (0, 50, 100):
        at = bottom - HIGH * (score - LOWEST) / (HIGHEST - LOWEST)
        ax.plot([left - side, left], [at, at], color=style.INK, linewidth=0.6, clip_on=False)
        if column == 0:
            ax.text(left - 1.7 * side, at, f"{score}", fontsize=7, ha="right", va="center_baseline")
    return low, high
