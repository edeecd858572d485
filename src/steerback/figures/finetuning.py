"""Figure 6: metrics against the share of self-corrections in the training data; and loss curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from steerback.analysis.finetuning import SHOWN, Ending, FinetuningResults, steered_comparisons
from steerback.figures import panels, style
from steerback.figures.base import Presentation, measured_tables, planted_note
from steerback.figures.tables import Table, number
from steerback.metrics import Estimate, Trend
from steerback.store.facts import HELD_OUT_UNSTEERED, STEERED, UNSTEERED

LINES = (
    ("", style.PALETTE[0], "steered"),
    (" held-out", style.PALETTE[1], "steered, held-out"),
    (" unsteered", style.GREY, "unsteered"),
    (" held-out unsteered", style.PALETTE[3], "unsteered, held-out"),
)
"""Lines of each panel: suffix of the condition names, colour, legend text."""
FEWEST = 5
"""Fewest responses for which a base value is drawn: a line without interval would look more certain than it is."""


def present(results: FinetuningResults) -> Presentation:
    """Return Figure 6, tables and trends, and lines on restarts without steering and on responses cut at the limit."""
    trends = {target: mix.trends for target, mix in results.mixes.items()}
    tables = measured_tables(steered_comparisons(results.measured))
    if any(trends.values()):
        tables["trends"] = trend_table(trends, results.measured.judge)
    return Presentation(
        tables=tables,
        figures={"figure6": lambda: draw(results)},
        lines=[
            *(line for target in results.mixes for line in restart_lines(results, target)),
            *(line for name, endings in results.endings.items() for line in ending_lines(name, endings)),
        ],
    )


@style.styled
def draw(results: FinetuningResults) -> Figure:
    """Draw six metrics against the mix, the base model as dashed lines, and the numbers of responses below."""
    measured, note = results.measured, planted_note(results)
    text = (
        "Dashed: the model without adapter, at its own thresholds; each adapter is calibrated separately. "
        "Held-out: prompts outside the training data of all adapters. "
    )
    counts = [panels.counted(target, measured.of(target).values()) for target in measured.targets]
    strip = 0.14 * len(LINES) + 0.5
    caption = panels.caption(f"{text}95 % intervals clustered by latent.", measured.judge, note, counts)
    fig = style.new_figure(4.2 + strip, caption)
    top, bottom = fig.subfigures(2, 1, height_ratios=[4.2, strip], squeeze=False).flat
    axes = top.subplots(3, 2, sharex=True, squeeze=False)
    target = measured.targets[0] if measured.targets else ""
    for ax, metric in zip(axes.flat, SHOWN, strict=True):
        shown: list[Estimate] = []
        for suffix, colour, _ in LINES:
            if suffix.endswith("unsteered") and metric in ("improvement_rate", "esr_rate", "msi"):
                continue  # unsteered responses rarely restart, so these metrics are noise
            levels = results.levels(target, suffix.strip() or STEERED)
            points = [(x, measured.summaries[target, n][metric]) for x, n in levels]
            panels.curve(ax, metric, points, colour)
            shown += [estimate for _, estimate in points]
            base = measured.summaries.get((target, f"base{suffix}"))
            span = None if base is None or base[metric].n < FEWEST else panels.span(metric, base[metric])
            if span is not None:
                ax.axhline(span[0], color=colour, linewidth=0.9, linestyle=style.DASHED, zorder=1)
        panels.metric_axis(ax, metric, shown)
        if not measured.summaries:
            style.message(ax, "nothing was measured")
    _counts(bottom.subplots(), results, target)
    entries = [(panels.line(colour, marker="o"), name) for _, colour, name in LINES]
    panels.legend(top, {}, [*entries, (panels.line(style.INK, linestyle=style.DASHED), "without adapter")])
    return fig


def _counts(ax: Axes, results: FinetuningResults, target: str) -> None:
    """Write the number of responses of each line at each mix."""
    rows = []
    for suffix, colour, words in LINES:
        levels = results.levels(target, suffix.strip() or STEERED)
        if levels:
            rows.append((words, colour, {x: results.measured.summaries[target, n]["msi"].n for x, n in levels}))
    panels.level_counts(ax, rows, "responses; self-corrections in training (%)", margin=0.05)


@style.styled
def draw_losses(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw training and validation losses (trained and masked tokens) by step, one panel per adapter (losses.json)."""
    text = "Loss per token. Training: trained tokens. Validation: trained tokens, and masked tokens separately."
    rows = -(-len(curves) // 2)
    fig = style.new_figure(1.5 * rows + 0.3, text)
    axes = fig.subplots(rows, min(2, len(curves)), squeeze=False, sharey=True)
    for ax in axes.flat[len(curves) :]:
        ax.set_visible(False)
    for ax, (name, losses) in zip(axes.flat, curves.items(), strict=False):
        training, validation = losses["training"], losses["validation"]
        ax.plot([p["step"] for p in training], [p["loss"] for p in training], color=style.LIGHT, label="training")
        for part, colour in (("trained", style.PALETTE[0]), ("masked", style.PALETTE[1])):
            known = [p for p in validation if p[part] is not None]
            ax.plot(
                [p["step"] for p in known], [p[part] for p in known], "o-", color=colour, label=f"validation, {part}"
            )
        ax.set_title(style.plain(name))
        ax.set_xlabel("step")
        ax.grid(axis="y")
    axes[0, 0].set_ylabel("loss")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=2)
    return fig


def trend_table(trends: Mapping[str, Mapping[str, Trend]], judge: str) -> Table:
    """Return one row per metric and condition: the slope per ten percent more self-corrections."""
    rows, records = [], []
    for target, by_metric in trends.items():
        for name, t in by_metric.items():
            ends = [None if x is None else 10 * x for x in (t.slope, t.low, t.high)]
            rate = name.split()[0].endswith("rate")
            p = "-" if t.p is None else f"{t.p:.4f}"
            rows.append((target, name, *(number(x, rate=rate) for x in ends), p))
            records.append({"target": target, "condition": name, "judge": judge, **t.to_json()})
    return Table(
        ("target", "metric", "per 10 %", "low", "high", "p"),
        rows,
        "Trend over the mixes: least-squares slope per ten percent more self-corrections (rates in percent), 95 % "
        f"interval clustered by latent, p from permuting the mixes within latents. Judge: {judge}.",
        records,
    )


def restart_lines(results: FinetuningResults, target: str) -> list[str]:
    """Return lines on restarts of unsteered responses, one per mix and kind of prompts that shows any."""
    lines: list[str] = []
    for condition in (UNSTEERED, HELD_OUT_UNSTEERED):
        along = results.levels(target, condition)
        rates = {name: results.measured.summaries[target, name]["multi_attempt_rate"] for _, name in along}
        for name, rate in rates.items():
            if rate.events and rate.value is not None:
                ends = "" if rate.low is None or rate.high is None else f" [{rate.low:.1%}, {rate.high:.1%}]"
                lines.append(f"{target}: {name} restarts in {rate.value:.1%}{ends} of {rate.n} responses")
        highs = [rate.high for rate in rates.values() if rate.high is not None]
        if rates and not any(rate.events for rate in rates.values()):
            bound = f" (95 % upper bound of a mix at most {max(highs):.1%})" if highs else ""
            lines.append(f"{target}: no {condition} restart at any mix{bound}")
    return lines


def ending_lines(name: str, endings: Mapping[str, Ending]) -> list[str]:
    """Return a line on responses that were cut at the length limit during a self-correction."""
    if "cut" not in endings:
        return []
    cut, ended = endings["cut"], endings.get("ended")
    others = f", {ended.gain:+.1f} in the {ended.n} others" if ended else ""
    return [
        f"{name}: {cut.n} multi-attempt responses were cut at the length limit: last minus first attempt "
        f"{cut.gain:+.1f} points there{others}"
    ]
