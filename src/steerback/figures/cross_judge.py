"""Figures A2 to A4: rates by judge, agreement of judges, and their first scores against each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from steerback.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from steerback.experiments.cross_judge import Compared

NAMES = {"esr_rate": "ESR rate (%)", "multi_attempt_rate": "Multi-attempt rate (%)"}


@style.styled
def rates(found: Compared, metric: str, note: str = "") -> Figure:
    """One group of bars per judge, one bar per model, with 95 % intervals."""
    caption = (
        f"{NAMES[metric].removesuffix(' (%)')} by judge over the same {found.n:,} responses, a sample "
        f"that takes multi-attempt trials first. 95 % intervals clustered by latent. {note}".strip()
    )
    fig, drawing = style.new_figure("full", 2.3, caption)
    ax = drawing.subplots()
    colours = style.colours(found.targets)
    width = 0.8 / max(len(found.targets), 1)
    for i, target in enumerate(found.targets):
        places = np.arange(len(found.judges)) + (i - (len(found.targets) - 1) / 2) * width
        values = [found.summaries[judge, target][metric] for judge in found.judges]
        heights = [100 * (v.value or 0.0) for v in values]
        low = [h - 100 * (v.low if v.low is not None else h / 100) for h, v in zip(heights, values, strict=True)]
        high = [100 * (v.high if v.high is not None else h / 100) - h for h, v in zip(heights, values, strict=True)]
        spread = np.maximum([low, high], 0)
        ax.bar(places, heights, 0.9 * width, color=colours[target], label=style.plain(target))
        ax.errorbar(places, heights, spread, fmt="none", ecolor=style.INK, elinewidth=0.8, capsize=2)
    ax.set_xticks(range(len(found.judges)), [style.plain(judge) for judge in found.judges])
    ax.set_ylabel(NAMES[metric])
    ax.grid(axis="y")
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=min(len(found.targets), 5))
    return fig


@style.styled
def agreement(found: Compared, note: str = "") -> Figure:
    """Left: share of equal verdicts on several attempts (above) and direction (below). Right: first scores."""
    caption = (
        "Left: agreement of judges in per cent; above the diagonal on whether there are several attempts, below it on "
        "whether the last attempt is better, equal or worse where both see several. Right: first scores of the two "
        f"judges that differ most. n = {found.n:,}. {note}".strip()
    )
    fig, drawing = style.new_figure("full", 2.8, caption)
    left, right = drawing.subplots(1, 2)
    _matrix(left, found)
    _scatter(right, found)
    return fig


def _matrix(ax: Axes, found: Compared) -> None:
    n = len(found.judges)
    table = np.full((n, n), np.nan)
    for (a, b), pair in found.pairs.items():
        i, j = found.judges.index(a), found.judges.index(b)
        table[i, j] = np.nan if pair.several.value is None else 100 * pair.several.value
        table[j, i] = np.nan if pair.direction.value is None else 100 * pair.direction.value
    ax.imshow(table, cmap="Blues", vmin=50, vmax=100)
    for i in range(n):
        for j in range(n):
            if i != j:
                shown = "-" if np.isnan(table[i, j]) else f"{table[i, j]:.1f}"
                dark = not np.isnan(table[i, j]) and table[i, j] > 80
                ax.text(j, i, shown, ha="center", va="center", color="white" if dark else style.INK)
    names = [style.plain(judge) for judge in found.judges]
    ax.set_xticks(range(n), names, rotation=30, ha="right")
    ax.set_yticks(range(n), names)
    ax.set_title("agreement (%)", loc="left")


def _scatter(ax: Axes, found: Compared) -> None:
    known = {pair: p.first.value for pair, p in found.pairs.items() if p.first.value is not None}
    if not known:
        style.message(ax, "no response scored by two judges")
        return
    a, b = min(known, key=lambda pair: known[pair])
    ax.plot([0, 100], [0, 100], color=style.LIGHT, linewidth=0.8)
    ax.scatter(found.first[a], found.first[b], s=5, alpha=0.35, color=style.PALETTE[0], linewidths=0)
    ax.set_xlabel(f"first score, {style.plain(a)}")
    ax.set_ylabel(f"first score, {style.plain(b)}")
    ax.set_xlim(-2, 102)
    ax.set_ylim(-2, 102)
    ax.set_title(f"rank correlation {known[a, b]:.2f}", loc="left")
