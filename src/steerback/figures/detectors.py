"""Detectors of each target: separation on searched and held-out prompts, compared with chance."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steerback.analysis.detectors import DetectorResults, DetectorStatisticsResults, PairStatistics
from steerback.figures import panels, style
from steerback.figures.base import Presentation, planted_note
from steerback.figures.tables import Table, show
from steerback.store.facts import DetectorSet, Search, SearchHalf

MOST = 30  # more rows would not be legible
OBSERVED = style.PALETTE[0]
"""Colour of observed values in all panels: titles name the targets, so one legend serves all."""


def present(results: DetectorResults) -> Presentation:
    """Return the table and figure of the detectors, and a line about each target."""
    return Presentation(
        tables={"table": detector_table(results.detectors)},
        figures={"detectors": lambda: draw(results.detectors, planted_note(results))},
        lines=[f"{target}: {detector_line(d)}" for target, d in results.detectors.items()],
    )


def detector_line(detectors: DetectorSet) -> str:
    """Return a line with the number of detectors, their source, and how many of them separate held-out prompts."""
    number = len(detectors.detectors)
    line = f"{number} detector{'s' * (number != 1)} ({detectors.source})"
    half = detectors.search.held_out if detectors.search is not None else None
    if half is None or not number:
        return line
    high = half.high_auc
    return (
        f"{line}; on held-out prompts {high.observed} of them at AUC >= 0.9, "
        f"{high.expected:.2g} expected by chance (p = {high.p:.2g})"
    )


def detector_table(results: Mapping[str, DetectorSet]) -> Table:
    """Return one row per detector: separation on the searched and on the held-out half."""

    def shown(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    entries = [(target, d) for target, detectors in results.items() for d in detectors.detectors]
    cells = []
    for target, d in entries:
        values = (shown(d.auc), shown(d.held_out_auc), shown(d.held_out_effect, 2), shown(d.level, 2))
        cells.append((target, str(d.latent), d.label or "-", *values))
    return Table(
        ("target", "latent", "label", "AUC searched", "AUC held out", "d held out", "level"),
        cells,
        "Detectors, best first. AUC: how often a mismatched response is more active than a matched one, on the "
        "searched and on the held-out prompts. Level: mean pooled activation on mismatched pairs of the searched half.",
        [{"target": target, **dict(sorted(d.model_dump().items()))} for target, d in entries],
        left=3,
    )


@style.styled
def draw(results: Mapping[str, DetectorSet], note: str = "") -> Figure:
    """Draw for each target the AUC of each detector on both halves and, below, the number of separating latents."""
    rows = [max(min(len(d.latents), MOST), 4) for d in results.values()] or [4]
    heights = [h for n in rows for h in (0.13 * n + 0.5, 1.3)]
    fig = style.new_figure(sum(heights) + 0.6, _caption(results, note))
    parts = fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = [part.subplots() for part in parts]  # long names above leave the width of the counts below as it is
    for above, below, (target, detectors) in zip(axes[::2], axes[1::2], results.items(), strict=False):
        _separation(above, detectors)
        _counts(below, detectors.search)
        above.set_title(style.plain(target), loc="left", fontweight="bold", pad=3)
    _legend(fig)
    if not results:
        for ax in axes:
            style.message(ax, "no target was searched")
    return fig


def _separation(ax: Axes, detectors: DetectorSet) -> None:
    entries = detectors.detectors[:MOST]
    if not entries:
        style.message(ax, "no latent separates matched from mismatched pairs")
        return
    searched = [d.auc for d in entries]
    held_out = [(d.held_out_auc, y) for y, d in enumerate(entries) if d.held_out_auc is not None]
    half = detectors.search.held_out if detectors.search is not None else None
    if held_out:
        ax.plot(*zip(*held_out, strict=True), "o", color=OBSERVED, clip_on=False, zorder=3)
    if held_out and half is not None:
        ax.axvline(half.max_auc_null, color=style.GREY, linewidth=0.8, linestyle=style.DASHED)
    ax.plot(searched, range(len(entries)), "o", color=OBSERVED, mfc="none", markersize=6, clip_on=False, zorder=3)
    names = [f"{d.latent} {style.shortened(d.label or '', 20)}".strip() for d in entries]
    halves = [] if detectors.search is None else [detectors.search.search, detectors.search.held_out]
    sizes = " / ".join(f"{half.n_texts:,}" for half in halves if half is not None)
    panels.named_rows(ax, [style.plain(n) for n in names], [sizes] * len(entries) if sizes else (), 0.4)
    ax.set_xlabel("AUC, mismatched over matched")
    low, _ = ax.get_xlim()
    ax.set_xlim(low, 1.0)


def _counts(ax: Axes, search: Search | None) -> None:
    """Draw observed counts as bars, and mean counts by chance as bars with a whisker to their 95th percentile."""
    if search is None:
        style.message(ax, "named by hand, not searched")
        return
    halves = [("searched,\nall latents", search.search), ("held out,\ndetectors", search.held_out)]
    levels = [
        (f"{kind}\n{name}\nn = {half.n_texts:,}", null)
        for name, half in halves
        if half is not None
        for kind, null in (("AUC 1", half.perfect), ("AUC ≥ 0.9", half.high_auc))
    ]
    for x, null in enumerate(null for _, null in levels):
        ax.bar(x - 0.18, null.observed, 0.34, color=OBSERVED)
        ax.bar(x + 0.18, null.expected, 0.34, color=style.LIGHT)
        reach = max(null.high - null.expected, 0.0)
        ax.errorbar(x + 0.18, null.expected, [[0.0], [reach]], fmt="none", ecolor=style.INK, elinewidth=0.8, capsize=2)
        at = (x - 0.18, null.observed)
        ax.annotate(f"{null.observed:,}", at, (0, 1.5), textcoords="offset points", ha="center", fontsize=6.5)
    ax.set_xticks(range(len(levels)), [name for name, _ in levels], fontsize=6)
    ax.tick_params(axis="x", length=0)
    ax.set_ylabel("latents")
    ax.margins(y=0.15)
    ax.grid(axis="y")


def _legend(fig: Figure) -> None:
    entries = [
        (panels.line(OBSERVED, ls="none", marker="o", mfc="none", ms=6), "searched prompts"),
        (panels.line(OBSERVED, ls="none", marker="o"), "held-out prompts"),
        (panels.line(style.GREY, linestyle=style.DASHED), "largest by chance (95 %)"),
        (panels.patch(color=OBSERVED), "observed"),
        (panels.patch(color=style.LIGHT), "labels swapped"),
    ]
    panels.legend(fig, {}, entries)


def _caption(results: Mapping[str, DetectorSet], note: str) -> str:
    lines = [
        "Top: separation of responses after another prompt from the same responses after their own prompt, pooled by "
        "maximum. Bottom: number of latents at each level, and the number when labels are swapped by prompt (mean and "
        f"95th percentile). n: responses, searched / held out. No judge is used. {note}".strip()
    ]
    for target, detectors in results.items():
        number = len(detectors.detectors)
        more = f", the best {MOST} shown" if number > MOST else ""
        lines.append(f"{target}: {number} detector{'s' * (number != 1)}{more} ({_source(detectors)}).")
    return "\n".join(lines)


def _source(detectors: DetectorSet) -> str:
    """Return the source of the detectors and the sizes of both halves of the search."""
    if detectors.search is None:
        return "named by hand"
    halves: tuple[tuple[str, SearchHalf | None], ...] = (
        ("searched", detectors.search.search),
        ("held out", detectors.search.held_out),
    )
    sizes = [f"{h.n_texts} responses to {h.n_prompts} prompts {name}" for name, h in halves if h is not None]
    return f"{detectors.source}; {', '.join(sizes)}"


def statistics(results: DetectorStatisticsResults) -> Presentation:
    """Return Table A1 and the figure of its distributions."""
    return Presentation(
        tables={"tableA1": statistics_table(results.statistics)},
        figures={"tableA1": lambda: draw_statistics(results.statistics, planted_note(results))},
        lines=[_statistics_line(target, s) for target, s in results.statistics.items()],
    )


def statistics_table(results: Mapping[str, PairStatistics]) -> Table:
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
                | {name: values[i] for name, values in x.to_json().items()}
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


def _statistics_line(target: str, s: PairStatistics) -> str:
    high = sum(e.value is not None and e.value >= 0.9 for e in s.auc)
    return (
        f"{target}: {high} of {len(s.latents)} detectors at AUC >= 0.9 on {len(s.matched)} pairs of "
        f"{s.prompts} prompts not used by the search"
    )


@style.styled
def draw_statistics(results: Mapping[str, PairStatistics], note: str = "") -> Figure:
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
    shown = zip(s.latents[:MOST], s.labels, strict=False)
    names = [f"{latent} {style.shortened(label or '', 18)}".strip() for latent, label in shown]
    panels.named_rows(ax, [style.plain(n) for n in names], margin=0.45)
    ax.set_xlabel("activation / largest")


def _auc(ax: Axes, s: PairStatistics, colour: str) -> None:
    for y, e in enumerate(s.auc[:MOST]):
        panels.beside(ax, y, f"n = {len(s.matched):,}")
        if e.value is not None:
            panels.whisker(ax, y, panels.ends(e), colour)
    ax.axvline(0.5, color=style.GREY, linewidth=0.8, linestyle=style.DASHED)
    ax.set_xlim(min(0.45, ax.get_xlim()[0]), 1)
    ax.set_xlabel("AUC")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
