"""Figure 2: gain of later attempts, and rates of multi-attempt and ESR responses."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from steerback.analysis.esr import EsrResults
from steerback.calibration import CalibrationReport
from steerback.figures import panels, style
from steerback.figures.base import Presentation, floor_warnings, measured_tables, planted_note
from steerback.figures.calibration import calibration_table, draw_calibration
from steerback.figures.tables import HEADINGS, Table, number, p_value, show_difference
from steerback.metrics import METRICS, Outcomes, Summary, TwoSampleTest, view
from steerback.store.run import plain

BINS = np.arange(-100, 101, 10)
RATES = (("multi_attempt_rate", "multi-attempt", ""), ("esr_rate", "ESR (improved)", "//////"))


def present(results: EsrResults) -> Presentation:
    """Return Figure 2, the table of rates, the calibration figures, and a line about each target's calibration."""
    conditions = results.measured
    data = {
        target: (conditions.outcomes[target, c], conditions.summaries[target, c]) for target, c in conditions.summaries
    }
    tables = measured_tables(conditions)
    if results.between:
        tables["between_models"] = between_table(results.between, conditions.judge)
    figures = {"figure2": lambda: draw(data, conditions.judge, note=planted_note(results))}
    if results.latents:
        tables["calibration"] = calibration_table(results.latents)
    for target, latents in results.latents.items():
        name = "calibration" if len(results.latents) == 1 else f"calibration-{plain(target)}"
        figures[name] = partial(draw_calibration, target, latents, conditions.judge, planted_note(results))
    return Presentation(
        tables=tables,
        figures=figures,
        lines=[_calibrated(target, report) for target, report in results.calibration.items()],
        warnings=floor_warnings(conditions, results.planted),
    )


def between_table(tests: Mapping[tuple[str, str], Mapping[str, TwoSampleTest]], judge: str) -> Table:
    """Return one row per pair of targets and metric: values, difference b - a with interval, p values."""
    cells, records = [], []
    for (a, b), by_metric in tests.items():
        for metric, t in by_metric.items():
            rate = METRICS[metric].rate
            values = (number(t.a, rate), number(t.b, rate), show_difference(t, rate), p_value(t.p), p_value(t.p_holm))
            cells.append((a, b, HEADINGS[metric], *values))
            records.append({"target a": a, "target b": b, "judge": judge, **vars(t)})
    caption = (
        "Models compared: 95 % intervals from resampled latents of both; p from exchanging latents between the models "
        f"(studentized), Holm over the pairs. Judge: {judge}."
    )
    return Table(("a", "b", "metric", "of a", "of b", "b - a", "p", "p (Holm)"), cells, caption, records, left=3)


@style.styled
def draw(data: Mapping[str, tuple[Outcomes, Summary]], judge: str, note: str = "") -> Figure:
    """Draw histograms of last minus first score over multi-attempt trials, and both rates with 95 % intervals.

    `data` maps a target to its outcomes and their summary; `judge` and `note` go into the caption.
    """
    colours = style.colours(data)
    above = max(0.72 * max(len(data), 1) + 0.45, 1.5)
    words = (
        "Top: gain of the last attempt over the first, for responses with two or more attempts. "
        "Bottom: rates over valid responses, 95 % intervals clustered by latent."
    )
    counts = (panels.counted(target, [s]) for target, (_, s) in data.items())
    fig = style.new_figure(above + 2.1, panels.caption(words, judge, note, counts))
    top, bottom = fig.subfigures(2, 1, height_ratios=[above, 2.1], squeeze=False).flat
    _histograms(top, data, colours)
    _bars(bottom.subplots(), {t: s for t, (_, s) in data.items()}, colours)
    return fig


def _histograms(fig: SubFigure, data: Mapping[str, tuple[Outcomes, Summary]], colours: Mapping[str, str]) -> None:
    axes = fig.subplots(max(len(data), 1), 1, sharex=True, squeeze=False)[:, 0]
    if not data:
        style.message(axes[0], "no target to show")
    for ax, (target, (outcomes, _)) in zip(axes, data.items(), strict=False):
        trials = view(outcomes)
        gain = trials.gain[trials.multi]
        ax.set_title(style.plain(target), loc="left", color=colours[target], fontweight="bold", pad=2)
        if not len(gain):
            style.message(ax, f"no second attempt in {len(trials.cluster):,} responses")
            continue
        ax.hist(np.clip(gain, -100, 100), BINS, color=colours[target], edgecolor="white", linewidth=0.4)
        ax.axvline(0, color=style.INK, linewidth=0.6, linestyle=(0, (3, 2)))
        label = f"{len(gain):,} of {len(trials.cluster):,}\nmean {gain.mean():+.1f}"
        # Write on the emptier side, so that the text does not cover bars.
        right = np.sum(gain > 30) <= np.sum(gain < -30)
        x, side = (0.99, "right") if right else (0.01, "left")
        ax.text(x, 0.97, label, transform=ax.transAxes, ha=side, va="top", fontsize=6.5)
        ax.yaxis.get_major_locator().set_params(integer=True, nbins=4)
    axes[-1].set_xlim(-100, 100)
    axes[-1].set_xlabel("last − first score (points)")
    fig.supylabel("multi-attempt responses", fontsize=7.5)


def _bars(ax: Axes, summaries: Mapping[str, Summary], colours: Mapping[str, str]) -> None:
    ax.set_ylabel("share of responses (%)")
    ax.grid(axis="y")
    top = 1.0
    crowded = len(summaries) > 3
    for i, (target, summary) in enumerate(summaries.items()):
        for j, (metric, _, hatch) in enumerate(RATES):
            estimate = summary.headline[metric]
            x = i + (j - 0.5) * 0.38
            top = max(top, panels.bar(ax, x, estimate, colours[target], hatch=hatch, crowded=crowded))
    ax.set_ylim(0, min(100, top * 1.18))
    margin = 0.6 if len(summaries) > 1 else 1.0  # two bars would look too wide across the whole panel
    ax.set_xlim(-margin, max(len(summaries), 1) - 1 + margin)
    names = [style.plain(t).replace("-", "-\n") if crowded else style.plain(t) for t in summaries]
    sizes = [f"{name}\nn = {s.headline['msi'].n:,}" for name, s in zip(names, summaries.values(), strict=True)]
    ax.set_xticks(range(len(summaries)), sizes, fontsize=6 if crowded else 7)
    ax.tick_params(axis="x", length=0)
    if not summaries:
        style.message(ax, "no target to show")
        return
    panels.note_few(ax, (s.headline[metric] for s in summaries.values() for metric, _, _ in RATES))
    fills = [panels.patch(facecolor="white" if h else style.GREY, edgecolor=style.GREY, hatch=h) for _, _, h in RATES]
    ax.figure.legend(fills, [name for _, name, _ in RATES], loc="outside upper center", ncols=2)


def _calibrated(target: str, report: CalibrationReport) -> str:
    if not report.n:
        return f"{target}: no calibration in this ledger (imported results contain only thresholds)"
    if report.mean_score is None:
        return f"{target}: no latent has a usable threshold ({report.statuses})"
    interval = "" if report.mean_low is None else f" [{report.mean_low:.1f}, {report.mean_high:.1f}]"
    # of the verified scores: with few trials per latent, sampling noise dominates
    spread = "" if report.spread is None else f", spread beyond noise {report.spread:.0f} points"
    states = ", ".join(f"{n} {status}" for status, n in report.statuses.items() if n)
    return (
        f"{target}: calibrated mean first score {report.mean_score:.1f}{interval} over {report.n_judged} latents "
        f"({states}; {report.share_outside:.0%} of latents off by more than the tolerance{spread})"
    )
