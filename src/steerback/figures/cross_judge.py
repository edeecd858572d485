"""Figures A2 to A4: rates by judge, agreement between judges, and first scores of two judges."""

from __future__ import annotations

import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steerback.analysis.cross_judge import Compared
from steerback.figures import panels, style
from steerback.figures.base import Presentation, planted_note
from steerback.figures.tables import Table, number, show
from steerback.metrics import METRICS

NAMES = {"esr_rate": "ESR rate (%)", "multi_attempt_rate": "Multi-attempt rate (%)"}


def present(results: Compared) -> Presentation:
    """Return Figures A2 to A4, the tables of agreement and rates, and a line about the ranking of the models."""
    return Presentation(
        tables={"agreement": agreement_table(results), "judges": judge_table(results)},
        figures={
            "figureA2": lambda: rates(results, "esr_rate"),
            "figureA3": lambda: rates(results, "multi_attempt_rate"),
            "figureA4": lambda: agreement(results),
        },
        lines=[ranking_line(results)],
    )


@style.styled
def rates(results: Compared, metric: str) -> Figure:
    """Draw one group of bars per judge and one bar per model, with 95 % intervals."""
    caption = (
        f"{NAMES[metric].removesuffix(' (%)')} by judge over the same {results.n:,} responses, a sample "
        f"that prefers multi-attempt trials. 95 % intervals clustered by latent. {planted_note(results)}".strip()
    )
    fig = style.new_figure(2.6, caption)
    ax = fig.subplots()
    colours = style.colours(results.targets)
    width = min(0.8 / max(len(results.targets), 1), 0.4)
    top, estimates = 1.0, []
    for i, target in enumerate(results.targets):
        for x, judge in enumerate(results.judges):
            estimate = results.summaries[judge, target][metric]
            at = x + (i - (len(results.targets) - 1) / 2) * width
            top = max(top, panels.bar(ax, at, estimate, colours[target], 0.9 * width, crowded=True))
            estimates.append(estimate)
    ax.set_ylim(0, min(100, 1.15 * top))
    sizes = {j: sorted({results.summaries[j, t][metric].n for t in results.targets}) or [0] for j in results.judges}
    shown = {j: f"{n[0]:,}" if len(n) == 1 else f"{n[0]:,} to {n[-1]:,}" for j, n in sizes.items()}
    names = [f"{style.plain(textwrap.fill(judge, 14))}\nn = {shown[judge]}" for judge in results.judges]
    ax.set_xticks(range(len(results.judges)), names, fontsize=6)
    ax.tick_params(axis="x", length=0)
    ax.set_ylabel(NAMES[metric])
    ax.grid(axis="y")
    panels.note_few(ax, estimates)
    panels.legend(fig, colours)
    return fig


@style.styled
def agreement(results: Compared) -> Figure:
    """Draw the agreement on several attempts and direction as a matrix (top), and first scores as a scatter plot
    (bottom).
    """
    caption = (
        "Top: agreement of judges in per cent. Above the diagonal: whether a response has several attempts. Below it: "
        "whether the last attempt is better, equal or worse, if both see several. Bottom: first scores of the two "
        f"judges that differ most. n = {results.n:,}. {planted_note(results)}".strip()
    )
    fig = style.new_figure(4.6, caption)
    above, below = fig.subplots(2, 1)
    _matrix(above, results)
    _scatter(below, results)
    return fig


def _matrix(ax: Axes, results: Compared) -> None:
    n = len(results.judges)
    table = np.full((n, n), np.nan)
    for (a, b), pair in results.pairs.items():
        i, j = results.judges.index(a), results.judges.index(b)
        table[i, j] = np.nan if pair.several.value is None else 100 * pair.several.value
        table[j, i] = np.nan if pair.direction.value is None else 100 * pair.direction.value
    ax.imshow(table, cmap="Blues", vmin=50, vmax=100)
    for i in range(n):
        for j in range(n):
            if i != j:
                shown = "-" if np.isnan(table[i, j]) else f"{table[i, j]:.1f}"
                dark = not np.isnan(table[i, j]) and table[i, j] > 80
                ax.text(j, i, shown, ha="center", va="center", color="white" if dark else style.INK)
    names = [style.plain(judge) for judge in results.judges]
    ax.set_xticks(range(n), names, rotation=30, ha="right")
    ax.set_yticks(range(n), names)
    ax.set_title("agreement (%)", loc="left")


def _scatter(ax: Axes, results: Compared) -> None:
    known = {pair: p.first.value for pair, p in results.pairs.items() if p.first.value is not None}
    if not known:
        style.message(ax, "no response scored by two judges")
        return
    a, b = min(known, key=lambda pair: known[pair])
    ax.plot([0, 100], [0, 100], color=style.LIGHT, linewidth=0.8)
    ax.scatter(results.first[a], results.first[b], s=5, alpha=0.35, color=style.PALETTE[0], linewidths=0, clip_on=False)
    ax.set_xlabel(f"first score, {style.plain(a)}")
    ax.set_ylabel(f"first score, {style.plain(b)}")
    ax.set_xlim(0, 100)
    ax.set_ylim(0, 100)
    ax.set_aspect("equal")
    n = int(np.sum(np.isfinite(results.first[a]) & np.isfinite(results.first[b])))
    ax.set_title(f"rank correlation {known[a, b]:.2f}, n = {n:,}", loc="left")


def agreement_table(results: Compared) -> Table:
    """Return one row per pair of labeller and judge (if there are human labels), then one per pair of judges."""
    cells = []
    for (a, b), p in [*results.with_labels.items(), *results.pairs.items()]:
        several = (f"{p.several.n:,}", show(p.several, rate=True), show(p.several_kappa, rate=False))
        direction = (f"{p.direction.n:,}", show(p.direction, rate=True), show(p.direction_kappa, rate=False))
        cells.append((f"{a} / {b}", *several, *direction, show(p.first, rate=False)))
    columns = ("judges", "n", "same count %", "kappa", "n multi", "same direction %", "its kappa", "first scores")
    caption = (
        "Agreement on whether a response has several attempts, on better / same / worse if both see several, and "
        "rank correlation of first scores. Krippendorff's alpha over all judges: several "
        f"{show(results.alpha_several, False)}, first score {show(results.alpha_first, False)}. "
        "95 % intervals clustered by latent."
    )
    return Table(columns, cells, caption)


def judge_table(results: Compared) -> Table:
    """Return one row per judge and target: rates over the sample, and rates weighted back to the runs."""
    cells = []
    for judge in results.judges:
        for target in results.targets:
            summary, back = results.summaries[judge, target], results.weighted[judge, target]
            metrics = ("multi_attempt_rate", "esr_rate", "msi")
            sampled = (show(summary[m], METRICS[m].rate) for m in metrics)
            weighted = (number(back[m], METRICS[m].rate) for m in metrics)
            cells.append((judge, target, f"{summary['msi'].n:,}", *sampled, *weighted))
    rates = ("multi-attempt %", "ESR %", "MSI", "multi (runs) %", "ESR (runs) %", "MSI (runs)")
    columns = ("judge", "target", "n", *rates)
    caption = (
        "Over the sample, which prefers multi-attempt trials, with 95 % intervals; "
        "(runs): weighted back to the runs it was drawn from."
    )
    return Table(columns, cells, caption, left=2)


def ranking_line(results: Compared) -> str:
    """Return a sentence that says whether all judges rank the models alike."""
    if len(results.targets) < 2:
        return "only one model, so there is no ranking to compare"
    alike = results.same_order("esr_rate")
    shown = "; ".join(f"{j}: {' > '.join(results.orders['esr_rate'][j])}" for j in results.judges)
    return f"models by ESR rate: {'all judges rank them alike' if alike else 'judges differ'} ({shown})"
