"""Table A1 and its distributions: pooled activation of each detector on matched and on shuffled pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from steerback.analysis.detector_statistics import DetectorStatisticsResults, PairStatistics
from steerback.figures import panels, style
from steerback.figures.base import Presentation, planted_note
from steerback.figures.tables import Table, show
from steerback.latents.separation import Separation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 30  # more rows would not be legible


def present(results: DetectorStatisticsResults) -> Presentation:
    """Return Table A1 and the figure of its distributions."""
    return Presentation(
        tables={"tableA1": table(results.statistics)},
        figures={"tableA1": lambda: draw(results.statistics, planted_note(results))},
        lines=[_line(target, s) for target, s in results.statistics.items()],
    )


def table(results: Mapping[str, PairStatistics]) -> Table:
    """Return one row per detector, with both arms in each cell."""
    cells, records = [], []
    for target, s in results.items():
        x = s.separation
        both = (
            (x.matched_mean, x.mismatched_mean, ".2f"),
            (x.matched_sd, x.mismatched_sd, ".2f"),
            (x.matched_median, x.mismatched_median, ".2f"),
            (x.matched_frequency, x.mismatched_frequency, ".0%"),
        )
        for i, (latent, label, auc) in enumerate(zip(s.latents, s.labels, s.auc, strict=True)):
            arms = [f"{matched[i]:{form}} / {mismatched[i]:{form}}" for matched, mismatched, form in both]
            effect = f"{x.effect[i]:.2f}" if np.isfinite(x.effect[i]) else "∞"
            cells.append((target, str(latent), label or "-", *arms, show(auc, False), effect))
            records.append(
                {"target": target, "latent": latent, "label": label}
                | _record(x, i)
                | {"auc_low": auc.low, "auc_high": auc.high, "pairs": len(s.matched), "prompts": s.prompts}
            )
    return Table(
        ("target", "latent", "label", "mean", "sd", "median", "active", "AUC", "d"),
        cells,
        "Matched / shuffled pairs: largest activation in a response after its own prompt / another prompt. Active: "
        "share of responses with any activation. Prompts not used by the search. AUC with a 95 % interval from "
        "resampled prompts. d: Cohen's d, pooled sd.",
        records,
        left=3,
    )


def _record(separation: Separation, i: int) -> dict[str, float | None]:
    """Return every statistic of detector `i`; None for infinite values."""
    return {name: values[i] for name, values in separation.to_json().items()}


def _line(target: str, s: PairStatistics) -> str:
    high = sum(e.value is not None and e.value >= 0.9 for e in s.auc)
    return (
        f"{target}: {high} of {len(s.latents)} detectors at AUC >= 0.9 on {len(s.matched)} pairs of "
        f"{s.prompts} prompts not used by the search"
    )


@style.styled
def draw(results: Mapping[str, PairStatistics], note: str = "") -> Figure:
    """Draw one row per detector: boxes of both arms (quartiles, whiskers from the 5th to the 95th percentile), scaled
    alike.
    """
    rows = [max(min(len(s.latents), MOST), 2) for s in results.values()] or [3]
    lines = [
        "Largest activation in a response after its own prompt (grey) and after another one (colour), relative to the "
        "detector's maximum. Boxes: quartiles. Whiskers: 5th to 95th percentile. Right: AUC with 95 % interval from "
        f"resampled prompts. Dashed: chance. No judge is used. {note}".strip()
    ]
    lines += [
        f"{target}: n = {len(s.matched)} pairs, {s.prompts} prompts not used by the search."
        for target, s in results.items()
    ]
    fig = style.new_figure(0.2 * sum(rows) + 0.75 * len(rows) + 0.2, "\n".join(lines))
    axes = fig.subplots(len(rows), 2, squeeze=False, width_ratios=[1.5, 1], height_ratios=rows, sharey="row")
    colours = dict.fromkeys(results, style.PALETTE[0])  # the titles name the targets, and the legend holds for all
    for (left, right), (target, s) in zip(axes, results.items(), strict=False):
        title = f"{target}: n = {len(s.matched):,} pairs"
        left.set_title(style.plain(title), loc="left", color=colours[target], fontweight="bold", pad=2)
        _boxes(left, s, colours[target])
        _auc(right, s, colours[target])
    if not results:
        for ax in axes.flat:
            style.message(ax, "nothing was read")
        return fig
    faces = {"own prompt": style.LIGHT, "another prompt": style.PALETTE[0]}
    boxes = {name: panels.patch(facecolor=face, edgecolor=style.INK, linewidth=0.5) for name, face in faces.items()}
    panels.legend(fig, {}, [(box, name) for name, box in boxes.items()])
    return fig


def _boxes(ax: Axes, s: PairStatistics, colour: str) -> None:
    for y in range(min(len(s.latents), MOST)):
        scale = max(float(s.matched[:, y].max()), float(s.mismatched[:, y].max())) or 1.0
        for arm, offset, face in ((s.matched, -0.18, style.LIGHT), (s.mismatched, 0.18, colour)):
            boxes = ax.boxplot(
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
    names = [f"{k} {(label or '')[:18]}".strip() for k, label in zip(s.latents[:MOST], s.labels, strict=False)]
    ax.set_yticks(range(len(names)), [style.plain(n) for n in names], fontsize=6)
    ax.set_ylim(max(len(names), 1) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("activation / largest")
    ax.grid(axis="x")


def _auc(ax: Axes, s: PairStatistics, colour: str) -> None:
    for y, e in enumerate(s.auc[:MOST]):
        ax.annotate(f"n = {len(s.matched):,}", (1.03, y), xycoords=("axes fraction", "data"), fontsize=6, va="center")
        if e.value is not None:
            panels.whisker(ax, y, panels.ends(e), colour)
    ax.axvline(0.5, color=style.GREY, linewidth=0.8, linestyle=style.DASHED)
    ax.set_xlim(min(0.45, ax.get_xlim()[0]), 1)
    ax.set_xlabel("AUC")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
