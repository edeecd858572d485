"""Figure 7: episodes token by token, and the distribution of lead times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from steerback.analysis.episodes import Recorded, Trace
from steerback.analysis.traces import ARMS, Leads, TraceResults, onset, smoothed
from steerback.figures import style
from steerback.figures.base import Presentation, planted_note
from steerback.figures.tables import Table, show
from steerback.metrics import Estimate
from steerback.store.facts import BACKTRACKING, DETECTORS, STEERED

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

LINES = {DETECTORS: style.PALETTE[1], BACKTRACKING: style.PALETTE[2], STEERED: style.GREY}
SHADES = {"off-topic": "#fbe3d6", "correction": "#fff3bf", "on-topic": "#dcefe4"}
TOKENS = 78  # of the strip under a trace; more would not be legible


def present(results: TraceResults) -> Presentation:
    """Figure 7, the distribution of the lead times, and their table."""
    return Presentation(
        tables={"table": lead_table(results.estimates, results.judge, results.rule)},
        figures={"figure7": lambda: draw(results), "lead_times": lambda: draw_leads(results)},
        lines=[_line(target, r, results.estimates[target]) for target, r in results.recorded.items()],
    )


def lead_table(estimates: Mapping[str, Mapping[str, Estimate]], judge: str, rule: str) -> Table:
    """One row per target and quantity."""
    cells, records = [], []
    for target, quantities in estimates.items():
        for name, e in quantities.items():
            lead = name.endswith("lead")
            cells.append((target, name + (" (tokens)" if lead else " (%)"), f"{e.n:,}", show(e, rate=not lead)))
            records.append({"target": target, "quantity": name, "judge": judge, **asdict(e)})
    caption = (
        f"Tokens from detector onset to the first token of the correction ({rule}); shares of responses with an onset "
        "before that position, and above the threshold at the last token before it. 95 % intervals clustered by "
        f"latent. Judge: {judge}."
    )
    return Table(("target", "quantity", "episodes", "value"), cells, caption, records, left=2)


def _line(target: str, recorded: Recorded, estimates: Mapping[str, Estimate]) -> str:
    lead = estimates["median lead"]
    text = "no onset before any correction" if lead.value is None else f"median lead {show(lead, False)} tokens"
    return f"{target}: {text}; {group_sizes(recorded)}; {count_list(recorded)}"


def group_sizes(recorded: Recorded) -> str:
    """Numbers of detectors and of backtracking latents, in words."""
    detectors, backtracking = (len(recorded.groups[name]) for name in (DETECTORS, BACKTRACKING))
    return (
        f"{detectors} detector{'s' * (detectors != 1)}, "
        f"{backtracking or 'no'} backtracking latent{'s' * (backtracking != 1)}"
    )


def count_list(recorded: Recorded) -> str:
    """Numbers of responses by kind, in words; replays that went differently only if there are any."""
    return ", ".join(f"{n:,} {name}" for name, n in recorded.counts.items() if n or not name.startswith("replays"))


@style.styled
def draw(results: TraceResults) -> Figure:
    """Chosen episodes: smoothed sums over the strip of tokens, regions shaded, the onset as a triangle."""
    chosen = [(target, trace) for target, traces in results.examples.items() for trace in traces]
    caption = (
        f"Summed activations of the groups, averaged over the last {results.window} tokens and scaled to their "
        "largest value in the panel; recorded before anything is added. Shaded: first attempt, correction, second "
        "attempt. Triangle: onset of the detectors, unless it lies before the panel; dotted: its threshold. "
        f"Judge: {results.judge}. {planted_note(results)}".strip()
    )
    counts = [f"{t}: {group_sizes(r)}; {len(r.episodes):,} episodes." for t, r in results.recorded.items()]
    fig, drawing = style.new_figure("full", 1.75 * max(len(chosen), 1) + 0.2, "\n".join([caption, *counts]))
    axes = drawing.subplots(max(len(chosen), 1), 1, squeeze=False)[:, 0]
    if not chosen:
        style.message(axes[0], "no response stopped itself")
        return fig
    for ax, (target, trace) in zip(axes, chosen, strict=True):
        _episode(ax, target, trace, results.leads[target].threshold, results.window)
    _legend(drawing, {g for _, trace in chosen for g, values in trace.sums.items() if np.any(values > 0)})
    return fig


def _episode(ax: Axes, target: str, trace: Trace, threshold: float, window: int) -> None:
    regions = trace.regions()
    start, stop = regions["correction"].start, regions["on-topic"].stop
    first = max(0, min(start - TOKENS // 2, stop - TOKENS))
    last = min(first + TOKENS, stop)
    x = np.arange(first, last)
    for name, region in regions.items():
        ax.axvspan(max(region.start, first) - 0.5, min(region.stop, last) - 0.5, color=SHADES[name], linewidth=0)
    for name, values in trace.sums.items():
        line = smoothed(values, window)
        peak = float(line[first:last].max(initial=0.0))
        if peak <= 0:
            continue
        ax.plot(x, line[first:last] / peak, color=LINES[name], linewidth=0.9 if name == STEERED else 1.3)
        if name == DETECTORS:
            ax.axhline(threshold / peak, color=LINES[name], linewidth=0.6, linestyle=":")
            at = onset(line, threshold, start)
            if at is not None and at >= first:
                ax.plot([at], [line[at] / peak], marker="v", color=style.INK, markersize=4.5, zorder=4)
    ax.set_ylim(0, 1.12)
    ax.set_xlim(first - 0.5, last - 0.5)
    ax.set_yticks([0, 1])
    ax.set_xticks(x, [_token(trace.pieces[i]) for i in x], rotation=90, fontsize=5)
    ax.tick_params(axis="x", length=0, pad=1)
    scores = " → ".join(f"{a.score:.0f}" for a in trace.row.attempts)
    trial = trace.row.trial
    name = f"{target} {trial.index}: {trial.prompt} (steered: {trial.label or trial.latent}; scores {scores})"
    ax.set_title(style.plain(name), loc="left", fontsize=6.5, pad=2)


def _token(piece: str) -> str:
    shown = piece.replace("\n", "⏎").strip(" ") or "␣"
    return style.plain(shown if len(shown) <= 11 else shown[:10] + "…")


def _legend(fig: SubFigure, shown: set[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = {DETECTORS: "detectors", BACKTRACKING: "backtracking latents", STEERED: "steered latent"}
    handles: list[Artist] = [Line2D([], [], color=LINES[g], label=label) for g, label in names.items() if g in shown]
    handles += [Patch(color=colour, label=name) for name, colour in SHADES.items()]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=6.5, columnspacing=1.2)


@style.styled
def draw_leads(results: TraceResults) -> Figure:
    """Left: lead times of all episodes. Right: shares of responses with an onset before the correction's position."""
    recorded, rule = results.recorded, results.rule
    rows = max(len(recorded), 1)
    lines = [
        f"{rule[0].upper()}{rule[1:]}. Right: responses with an onset before the correction's position (filled), and "
        "above the threshold at the last token before it (open); controls at the same positions. 95 % intervals "
        f"clustered by latent. Judge: {results.judge}. {planted_note(results)}".strip()
    ]
    lines += [f"{target}: {group_sizes(r)}; {count_list(r)}." for target, r in recorded.items()]
    fig, drawing = style.new_figure("full", 1.6 * rows, "\n".join(lines))
    axes = drawing.subplots(rows, 2, squeeze=False, width_ratios=[1.3, 1])
    colours = style.colours(recorded)
    for (left, right), target in zip(axes, recorded, strict=False):
        left.set_title(style.plain(target), loc="left", color=colours[target], fontweight="bold", pad=2)
        _histogram(left, results.leads[target], results.estimates[target]["median lead"], colours[target])
        _shares(right, results.estimates[target], colours[target])
    if not recorded:
        for ax in axes.flat:
            style.message(ax, "nothing was recorded")
    return fig


def _histogram(ax: Axes, leads: Leads, median: Estimate, colour: str) -> None:
    lead = leads.lead[np.isfinite(leads.lead)]
    if not len(lead):
        style.message(ax, f"no onset before any of {len(leads.lead)} corrections")
        return
    width = max(1, int(np.ceil(lead.max() / 40)))
    ax.hist(
        lead,
        [float(e) for e in np.arange(0.5, lead.max() + width + 0.5, width)],
        color=colour,
        edgecolor="white",
        linewidth=0.4,
    )
    if median.value is not None:
        ax.axvline(median.value, color=style.INK, linewidth=0.9)
        if median.low is not None and median.high is not None:
            ax.axvspan(median.low, median.high, color=style.INK, alpha=0.12, linewidth=0)
        reach = "" if median.low is None else f" [{median.low:.0f}, {median.high:.0f}]"
        ax.set_title(f"median {median.value:.0f}{reach}", loc="right", fontsize=6.5, pad=2)
    ax.set_xlim(left=0)
    ax.set_xlabel("lead: tokens from detector onset to correction")
    ax.set_ylabel("episodes")
    ax.locator_params(axis="y", integer=True)


def _shares(ax: Axes, estimates: Mapping[str, Estimate], colour: str) -> None:
    """Filled: any onset before the correction's position; open: above the threshold at the last token before it."""
    names = ("episodes", "steered,\nno restart", "unsteered")
    for kind, offset, face in (("onset", -0.14, colour), ("active at last token", 0.14, "white")):
        for y, arm in enumerate(ARMS):
            e = estimates[f"{kind}, {arm}"]
            if e.value is None:
                ax.text(2, y + offset, "no data", fontsize=6, color=style.GREY, va="center")
                continue
            low, high = (100 * (e.value if end is None else end) for end in (e.low, e.high))
            value = 100 * e.value
            reach = [[max(value - low, 0)], [max(high - value, 0)]]
            ax.errorbar(
                value, y + offset, xerr=reach, fmt="o", color=colour, markerfacecolor=face, elinewidth=1, capsize=2
            )
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(0, 102)
    ax.set_xlabel("responses (%)")
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
