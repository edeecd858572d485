"""The distributions behind Table A1: each detector's pooled activation on matched and on shuffled pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from steerback.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from steerback.experiments.detector_statistics import Statistics

MOST = 30  # rows that stay legible


@style.styled
def draw(found: Mapping[str, Statistics], note: str = "") -> Figure:
    """One row a detector: boxes of both arms (quartiles, whiskers to the 5th and 95th percentile), scaled together."""
    rows = [max(min(len(s.latents), MOST), 2) for s in found.values()] or [3]
    lines = [
        "Largest activation in a response after its own (grey) and after another prompt (colour), relative to the "
        "detector's largest. Boxes: quartiles; whiskers: 5th to 95th percentile. Right: AUC with 95 % interval from "
        f"resampled prompts. Not judged. {note}".strip()
    ]
    lines += [f"{t}: n = {len(s.matched)} pairs, {s.prompts} prompts that were not searched." for t, s in found.items()]
    fig, drawing = style.new_figure("full", 0.19 * sum(rows) + 0.65 * len(rows), "\n".join(lines))
    axes = drawing.subplots(len(rows), 2, squeeze=False, width_ratios=[2, 1], height_ratios=rows, sharey="row")
    colours = style.colours(found)
    for (left, right), (target, s) in zip(axes, found.items(), strict=False):
        left.set_title(style.plain(target), loc="left", color=colours[target], fontweight="bold", pad=2)
        _boxes(left, s, colours[target])
        _auc(right, s, colours[target])
    if not found:
        for ax in axes.flat:
            style.message(ax, "nothing was read")
    return fig


def _boxes(ax: Axes, s: Statistics, colour: str) -> None:
    for y in range(min(len(s.latents), MOST)):
        scale = max(float(s.matched[:, y].max()), float(s.mismatched[:, y].max())) or 1.0
        for arm, offset, face in ((s.matched, -0.18, style.LIGHT), (s.mismatched, 0.18, colour)):
            boxes: dict[str, Any] = ax.boxplot(
                [(arm[:, y] / scale).tolist()],
                positions=[y + offset],
                widths=0.3,
                whis=(5, 95),
                orientation="horizontal",
                showfliers=False,
                patch_artist=True,
                manage_ticks=False,
                medianprops={"color": style.INK, "linewidth": 0.9},
                whiskerprops={"linewidth": 0.6},
                capprops={"linewidth": 0.6},
            )
            boxes["boxes"][0].set(facecolor=face, linewidth=0.5)
    names = [f"{k} {(label or '')[:30]}".strip() for k, label in zip(s.latents[:MOST], s.labels, strict=False)]
    ax.set_yticks(range(len(names)), [style.plain(n) for n in names], fontsize=6)
    ax.set_ylim(max(len(names), 1) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("activation / largest")
    ax.grid(axis="x")


def _auc(ax: Axes, s: Statistics, colour: str) -> None:
    for y, e in enumerate(s.auc[:MOST]):
        if e.value is None:
            continue
        low, high = (e.value if end is None else end for end in (e.low, e.high))
        reach = [[max(e.value - low, 0)], [max(high - e.value, 0)]]
        ax.errorbar(e.value, y, xerr=reach, fmt="o", color=colour, elinewidth=1.0, capsize=2)
    ax.axvline(0.5, color=style.GREY, linewidth=0.6, linestyle=(0, (3, 2)))
    ax.set_xlim(right=1.02)
    ax.set_xlabel("AUC")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
