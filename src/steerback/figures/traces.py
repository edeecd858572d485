"""Figure 7: episodes token by token, and the distribution of lead times."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steerback.analysis.episodes import Recorded, Trace
from steerback.analysis.traces import ARMS, Leads, TraceResults, onset, smoothed
from steerback.figures import panels, style
from steerback.figures.base import Presentation, planted_note
from steerback.figures.tables import Table, show
from steerback.metrics import Estimate
from steerback.store.facts import BACKTRACKING, DETECTORS, STEERED

LINES = {DETECTORS: style.PALETTE[1], BACKTRACKING: style.PALETTE[2], STEERED: style.GREY}
SHADES = {"off topic": "#fbd9c4", "correction": "#fff3bf", "on topic": "#cfe4f5", "unscored": "#ffffff"}
TOKENS, BEFORE = 34, 14  # tokens under a trace (more would not be legible), and how many of them precede the correction


def present(results: TraceResults) -> Presentation:
    """Return Figure 7, the distribution of the lead times, and their table."""
    return Presentation(
        tables={"table": lead_table(results.estimates, results.judge, results.rule)},
        figures={"figure7": lambda: draw(results), "lead_times": lambda: draw_leads(results)},
        lines=[_line(target, r, results.estimates[target]) for target, r in results.recorded.items()],
    )


def lead_table(estimates: Mapping[str, Mapping[str, Estimate]], judge: str, rule: str) -> Table:
    """Return one row per target and quantity."""
    cells, records = [], []
    for target, quantities in estimates.items():
        for name, e in quantities.items():
            lead = name.endswith("lead")
            cells.append((target, name + (" (tokens)" if lead else " (%)"), f"{e.n:,}", show(e, rate=not lead)))
            records.append({"target": target, "quantity": name, "judge": judge, **asdict(e)})
    caption = (
        f"Tokens from detector onset to the first token of the correction ({rule}); shares of responses with an onset "
        "before the correction, and above the threshold at the last token before it. 95 % intervals clustered by "
        f"latent. Judge: {judge}."
    )
    return Table(("target", "quantity", "episodes", "value"), cells, caption, records, left=2)


def _line(target: str, recorded: Recorded, estimates: Mapping[str, Estimate]) -> str:
    lead = estimates["median lead"]
    text = "no onset before any correction" if lead.value is None else f"median lead {show(lead, False)} tokens"
    return f"{target}: {text}; {group_sizes(recorded)}; {count_list(recorded)}"


def group_sizes(recorded: Recorded) -> str:
    """Return the numbers of detectors and of backtracking latents in words."""
    detectors, backtracking = (len(recorded.groups[name]) for name in (DETECTORS, BACKTRACKING))
    return (
        f"{detectors} detector{'s' * (detectors != 1)}, "
        f"{backtracking or 'no'} backtracking latent{'s' * (backtracking != 1)}"
    )


def count_list(recorded: Recorded) -> str:
    """Return the numbers of responses by kind in words; replays that differ are named only if there are any."""
    return ", ".join(f"{n:,} {name}" for name, n in recorded.counts.items() if n or not name.startswith("replays"))


@style.styled
def draw(results: TraceResults) -> Figure:
    """Draw chosen episodes: smoothed sums above the tokens, attempts shaded by their scores, and the onset."""
    chosen = [(target, trace) for target, traces in results.examples.items() for trace in traces]
    words = (
        f"Summed activations of the groups, averaged over the last {results.window} tokens and scaled to their "
        "largest value in the panel; recorded before additions and clamps. Shading: attempts by the score of the judge "
        f"(on topic from {results.drift_below:g}), and the restart phrase. Triangle: onset of the detectors, "
        "unless it lies before the panel; dotted: its threshold."
    )
    counts = (f"{t}: {group_sizes(r)}; {len(r.episodes):,} episodes." for t, r in results.recorded.items())
    caption = panels.caption(words, results.judge, planted_note(results), counts)
    fig = style.new_figure(1.85 * max(len(chosen), 1) + 0.4, caption)
    axes = fig.subplots(max(len(chosen), 1), 1, squeeze=False)[:, 0]
    if not chosen:
        style.message(axes[0], "no response with a restart")
        return fig
    for ax, (target, trace) in zip(axes, chosen, strict=True):
        _episode(ax, target, trace, results)
    shown = {g for _, trace in chosen for g, values in trace.sums.items() if np.any(values > 0)}
    _legend(fig, shown, results.drift_below)
    return fig


def shades(trace: Trace, on_topic: float) -> dict[str, str]:
    """Return the shade of each region of an episode; an attempt's shade depends on its score."""

    def of(score: float | None) -> str:
        return "unscored" if score is None else "on topic" if score >= on_topic else "off topic"

    first, second = (a.score for a in trace.row.attempts[:2])
    return {"off-topic": of(first), "correction": "correction", "on-topic": of(second)}


def _episode(ax: Axes, target: str, trace: Trace, results: TraceResults) -> None:
    threshold, window = results.leads[target].threshold, results.window
    regions = trace.regions()
    start, stop = regions["correction"].start, regions["on-topic"].stop
    first = max(0, min(start - BEFORE, stop - TOKENS))
    last = min(first + TOKENS, stop)
    x = np.arange(first, last)
    kinds = shades(trace, results.drift_below)
    for name, region in regions.items():
        left, right = max(region.start, first), min(region.stop, last)
        if right > left:
            ax.axvspan(left - 0.5, right - 0.5, color=SHADES[kinds[name]], linewidth=0)
    for name, values in trace.sums.items():
        line = smoothed(values, window)
        peak = float(line[first:last].max(initial=0.0))
        if peak <= 0:
            continue
        width = 0.9 if name == STEERED else 1.3
        ax.plot(x, line[first:last] / peak, color=LINES[name], linewidth=width, clip_on=False)
        if name == DETECTORS:
            ax.axhline(threshold / peak, color=LINES[name], linewidth=0.8, linestyle=style.DOTTED)
            at = onset(line, threshold, start)
            if at is not None and at >= first:
                ax.plot([at], [line[at] / peak], marker="v", color=style.INK, markersize=4.5, zorder=4, clip_on=False)
    ax.set_ylim(0, 1.05)
    ax.set_xlim(first - 0.5, last - 0.5)
    ax.set_yticks([0, 0.5, 1])
    ax.set_ylabel("share of largest\nsummed activation", fontsize=6)
    ax.set_xticks(x, [_token(trace.pieces[i]) for i in x], rotation=90, fontsize=6)
    ax.tick_params(axis="x", length=0, pad=1)
    _name(ax, target, trace)


def _name(ax: Axes, target: str, trace: Trace) -> None:
    """Set the panel's title: target, trial, steering label, prompt, and scores of the attempts."""
    scores = " → ".join("unscored" if a.score is None else f"{a.score:.0f}" for a in trace.row.attempts)
    trial = trace.row.trial
    lines = (
        f"{target}, trial {trial.index}, steered towards {trial.label or f'latent {trial.latent}'}",
        f"{trial.prompt}",
        f"scores of the attempts: {scores}",
    )
    ax.set_title(
        style.plain("\n".join(textwrap.shorten(x, 62, placeholder=" …") for x in lines)), loc="left", fontsize=6
    )


def _token(piece: str) -> str:
    shown = piece.replace("\n", "⏎").strip(" ") or "␣"
    return style.plain(shown if len(shown) <= 11 else shown[:10] + "…")


def _legend(fig: Figure, shown: set[str], on_topic: float) -> None:
    names = {DETECTORS: "detectors", BACKTRACKING: "backtracking latents", STEERED: "steered latent"}
    entries = [(panels.line(LINES[g]), label) for g, label in names.items() if g in shown]
    entries.append((panels.line(style.INK, marker="v", markersize=4.5, linestyle="none"), "onset"))
    words = {
        "off topic": f"off topic (< {on_topic:g})",
        "correction": "restart phrase",
        "on topic": f"on topic (≥ {on_topic:g})",
    }
    entries += [(panels.patch(color=SHADES[kind]), label) for kind, label in words.items()]
    panels.legend(fig, {}, entries, columns=3)


@style.styled
def draw_leads(results: TraceResults) -> Figure:
    """Draw for each target the lead times of all episodes and, below, shares with an onset before the correction."""
    recorded, rule = results.recorded, results.rule
    targets = list(recorded) or [""]
    words = (
        f"{rule[0].upper()}{rule[1:]}. Top: line and band show the median and its 95 % interval. Bottom: responses "
        "with an onset before the correction's position (filled), and above the threshold at the last token before it "
        "(open); controls at the same positions. n: responses that reach this position. 95 % intervals clustered by "
        "latent."
    )
    counts = (f"{target}: {group_sizes(r)}; {count_list(r)}." for target, r in recorded.items())
    caption = panels.caption(words, results.judge, planted_note(results), counts)
    fig = style.new_figure(2.9 * len(targets) + 0.2, caption)
    axes = fig.subplots(2 * len(targets), 1, squeeze=False)[:, 0]
    colours = style.colours(recorded)
    if not recorded:
        for ax in axes:
            style.message(ax, "nothing was recorded")
        return fig
    for above, below, target in zip(axes[::2], axes[1::2], recorded, strict=True):
        above.set_title(style.plain(target), loc="left", color=colours[target], fontweight="bold", pad=2)
        _histogram(above, results.leads[target], results.estimates[target]["median lead"], colours[target])
        _shares(below, results.estimates[target], colours[target])
    median = (panels.line(style.INK, linewidth=0.9), "median lead")
    panels.legend(fig, {}, [median, (panels.patch(color=style.INK, alpha=0.15, linewidth=0), "its 95 % interval")])
    return fig


def _histogram(ax: Axes, leads: Leads, median: Estimate, colour: str) -> None:
    lead = leads.lead[np.isfinite(leads.lead)]
    if not len(lead):
        style.message(ax, f"no onset before any of {len(leads.lead)} corrections")
        return
    width = max(1, int(np.ceil(lead.max() / 40)))
    edges = [float(e) for e in np.arange(0.5, lead.max() + width + 0.5, width)]
    ax.hist(lead, edges, color=colour, edgecolor="white", linewidth=0.4)
    if median.value is not None:
        _, low, high = panels.ends(median) or (0.0, 0.0, 0.0)
        ax.axvline(median.value, color=style.INK, linewidth=0.9)
        reach = ""
        if high > low:
            ax.axvspan(low, high, color=style.INK, alpha=0.15, linewidth=0)
            reach = f" [{low:.0f}, {high:.0f}]"
        lacking = f" ({panels.TOO_FEW})" if panels.few(median) else ""
        ax.set_title(f"median {median.value:.0f}{reach}, n = {len(lead):,}{lacking}", loc="right", fontsize=6, pad=2)
    ax.set_xlim(left=0)
    ax.set_xlabel("lead: tokens from detector onset to correction")
    ax.set_ylabel("episodes")
    ax.locator_params(axis="y", integer=True)


def _shares(ax: Axes, estimates: Mapping[str, Estimate], colour: str) -> None:
    """Draw responses with an onset before the correction (filled), and active at the last token before it (open)."""
    for kind, offset, filled in (("onset", -0.16, True), ("active at last token", 0.16, False)):
        for y, arm in enumerate(ARMS):
            panels.whisker(ax, y + offset, panels.ends(estimates[f"{kind}, {arm}"], 100), colour, filled)
    panels.note_few(ax, estimates.values())
    names = ("episodes", "steered,\nno restart", "unsteered")
    sizes = [f"{name}\nn = {estimates[f'onset, {arm}'].n:,}" for name, arm in zip(names, ARMS, strict=True)]
    panels.named_rows(ax, sizes)
    ax.set_xlim(0, 100)
    ax.set_xlabel("responses (%)")
