"""Calibration of each latent: a table, and the curves as small multiples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    # all panels set one range themselves: `sharey` would make the time quadratic in their number
    axes = fig.subplots(rows, min(COLUMNS, max(len(latents), 1)), squeeze=False)
    for ax in axes[:, 1:].flat:
        ax.tick_params(axis="y", labelleft=False)
    panels = list(axes.flat)
    for ax in panels[len(latents) :]:
        ax.set_axis_off()
    for ax, x in zip(panels, latents, strict=False):
        _panel(ax, x)
    fig.supylabel("mean first score", fontsize=7.5)
    fig.supxlabel("boost", fontsize=7.5)
    return fig


def _panel(ax: Axes, x: CalibratedLatent) -> None:
    t = x.threshold
    colour = style.PALETTE[0] if t.usable else style.GREY
    boosts = sorted({b for b, score in x.tried if score is not None})
    scores = [[s for b, s in x.tried if b == boost and s is not None] for boost in boosts]
    if fitted := curve(t, x.tried):
        ax.plot(fitted["boost"], fitted["score"], color=colour, linewidth=0.9)
        ax.fill_between(fitted["boost"], fitted["low"], fitted["high"], color=colour, alpha=0.16, linewidth=0)
    ax.scatter(boosts, [np.mean(s) for s in scores], s=[1.2 * len(s) for s in scores], color=style.INK, linewidths=0)
    ax.axhline(t.target_score, color=style.INK, linewidth=0.5, linestyle=(0, (3, 2)))
    ax.axvspan(t.low, t.high, color=colour, alpha=0.12, linewidth=0)
    ax.axvline(t.boost, color=colour, linewidth=0.8)
    if check := t.verification:
        error = [[check.score - check.low], [check.high - check.score]]
        ax.errorbar(t.boost, check.score, error, fmt="x", color=style.PALETTE[1], elinewidth=0.8, markersize=4)
    ax.set_ylim(-3, 103)
    ax.set_yticks((0, 50, 100))
    name = style.shortened(f"{x.latent} {x.label}", 17)  # as wide as the panel
    # fixed places: matplotlib would measure all ticks again to find them, a third of the time of 50 panels
    ax.set_title(style.plain(name), fontsize=6, loc="left", y=1.0, pad=2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_label_coords(0, 0)
    if not t.usable:
        ax.text(0.03, 0.04, t.status, transform=ax.transAxes, fontsize=5.5, color=style.GREY)
