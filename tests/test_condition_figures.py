"""Figures of sweep, meta-prompts, no steering and controls: legible and within bounds for any data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import matplotlib.text
import numpy as np
import pytest
from matplotlib.axes import Axes

from steerback.analysis.base import Measured
from steerback.analysis.boost_sweep import SweepResults
from steerback.analysis.conditions import ConditionResults
from steerback.analysis.no_steering import NoSteeringResults
from steerback.figures import boost_sweep, conditions, first_scores, panels, prefill, style
from steerback.metrics import Outcomes, compare, find_peak, summarize
from steerback.store.facts import META_PROMPTS, PREFILL, MetaPromptSet, PrefixCounts, Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def outcomes(n: int, rate: float = 0.3, latents: int = 4, seed: int = 0) -> Outcomes:
    rng = np.random.default_rng(seed)
    first, multi = rng.uniform(0, 100, n), rng.random(n) < rate
    last, attempts = np.where(multi, rng.uniform(0, 100, n), first), np.where(multi, 2, 1)
    return Outcomes(
        np.arange(n) % latents, np.arange(n), np.zeros(n), attempts, first, last, attempts, first, last, np.zeros(n)
    )


def measured(targets: Mapping[str, tuple[int, float]], names: list[str], latents: int = 4) -> Measured:
    """(trials, rate) per target, the same in every condition, each compared with the first."""
    held = {
        (target, name): outcomes(n, rate, latents, seed=i)
        for target, (n, rate) in targets.items()
        for i, name in enumerate(names)
    }
    pairs = {key: names[0] for key in held if key[1] != names[0]}
    return Measured(
        judge="offline",
        outcomes=held,
        summaries={key: summarize(x, 50) for key, x in held.items()},
        comparisons={key: compare(held[key[0], other], held[key], draws=50) for key, other in pairs.items()},
        against=pairs,
    )


DATA: dict[str, dict[str, tuple[int, float]]] = {
    "usual": {"organism": (200, 0.3), "organism-control": (200, 0.0)},
    "five": dict.fromkeys(("llama-3.3-70b", "llama-3.1-8b", "gemma-2-2b", "gemma-2-9b", "gemma-2-27b"), (60, 0.2)),
    "nothing": {},
    "no trial": {"organism": (0, 0.0)},
    "one trial": {"my_model $x$ with quite a long name": (1, 1.0)},
}
VARIANTS = ["baseline", "stay-on-topic", "self-monitor", "distracted-with-label"]


def planted(targets: Mapping[str, object]) -> list[str]:
    """All targets count as planted, so that the caption has to say so."""
    return list(targets) or ["organism"]


def draw_conditions(targets: Mapping[str, tuple[int, float]]) -> Figure:
    results = ConditionResults("imported", measured(targets, VARIANTS), planted(targets))
    return conditions.present(results).figures["conditions"]()


def draw_meta_prompts(targets: Mapping[str, tuple[int, float]]) -> Figure:
    sets = {t: MetaPromptSet(variants={}, parameters=1_000_000 if t == "organism" else None) for t in targets}
    results = ConditionResults("meta-prompts", measured(targets, VARIANTS), planted(targets), sets, META_PROMPTS)
    return conditions.meta_prompts(results).figures["figure4"]()


def draw_sweep(targets: Mapping[str, tuple[int, float]], latents: int = 12) -> Figure:
    levels = [-1.5, 0.0, 1.5, 3.0]
    names = [Sweep.condition(x) for x in levels]
    conditions_of = measured(targets, names, latents=latents)
    peaks = {
        t: {m: find_peak(levels, [conditions_of.outcomes[t, n] for n in names], m, 50) for m in boost_sweep.SHOWN}
        for t in targets
    }
    sweeps = {t: Sweep(sd=2.5, levels=levels, dropped={"-1.50 sd": 1}, latents=4) for t in targets}
    return boost_sweep.present(SweepResults(conditions_of, sweeps, peaks, planted(targets))).figures["figure3"]()


def draw_prefill(targets: Mapping[str, tuple[int, float]]) -> Figure:
    names = [f"{arm} {k}n" for k in (1, 2, 3) for arm in ("unsteered", "steered")]
    prefixes = {t: PrefixCounts(characters=90, prefixes={"1n": {"used": 3}, "2n": {}}) for t in targets}
    results = ConditionResults("prefill-control", measured(targets, names), planted(targets), prefixes, PREFILL)
    return prefill.present(results).figures["prefill_control"]()


def draw_first_scores(targets: Mapping[str, tuple[int, float]]) -> Figure:
    results = NoSteeringResults(measured(targets, ["baseline", "unsteered"]), {}, planted(targets))
    figures = first_scores.present(results).figures
    return figures.get("figureA8", figures["figureA7"])()


DRAW = (draw_conditions, draw_meta_prompts, draw_sweep, draw_prefill, draw_first_scores)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("draw", DRAW, ids=lambda f: f.__name__)
def test_figures_stay_within_their_bounds(draw: Callable[[Any], Figure], name: str) -> None:
    fig = draw(DATA[name])
    fig.canvas.draw()
    drawn, (width, height) = fig.get_tightbbox(fig.canvas.get_renderer()), fig.get_size_inches()  # type: ignore[attr-defined]
    assert drawn.x0 >= -0.02, "cut at the left"
    assert drawn.y0 >= -0.02, "cut at the bottom"
    assert drawn.x1 <= width + 0.02, "cut at the right"
    assert drawn.y1 <= height + 0.02, "cut at the top"
    shown = [t for t in fig.findobj(matplotlib.text.Text) if t.get_text() and t.get_visible()]  # type: ignore[attr-defined]
    assert min(t.get_fontsize() for t in shown) >= 6
    everything = " ".join(t.get_text() for t in shown).replace("\n", " ")
    caption = style.caption_of(fig)
    assert "Judge: offline" in caption
    assert "planted" in caption
    for target, (n, _) in DATA[name].items():
        assert target.replace("$", r"\$").split()[0] in everything or len(DATA[name]) == 1
        assert target in caption
        assert n == 0 or "n = " in caption
        assert n == 0 or str(n) in everything, "the number of responses is in the figure"


def axes_of(fig: Figure) -> list[Axes]:
    return [ax for ax in fig.findobj(Axes) if isinstance(ax, Axes)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("latents", [4, 5])
def test_peaks_from_few_latents_are_not_drawn(latents: int) -> None:
    lines = [line for ax in axes_of(draw_sweep({"organism": (240, 0.3)}, latents)) for line in ax.lines]
    assert any(line.get_marker() == "v" for line in lines) is (latents >= 5)


def test_differences_stand_beside_the_rates_with_their_own_intervals() -> None:
    data = {"organism": (240, 0.3)}
    results = ConditionResults("imported", measured(data, VARIANTS, latents=12), planted(data))
    fig = conditions.present(results).figures["conditions"]()
    rates, differences = axes_of(fig)[:2]
    test = results.measured.comparisons["organism", "self-monitor"]["multi_attempt_rate"]
    points = [float(c.lines[0].get_xdata()[0]) for c in differences.containers]  # type: ignore[index]
    assert any(x == pytest.approx(100 * test.difference) for x in points if test.difference is not None)
    assert len(differences.containers) == len(VARIANTS) - 1
    assert "baseline" in differences.get_title("left")
    base = results.measured.summaries["organism", "baseline"]["multi_attempt_rate"].value
    assert base is not None
    assert [100 * base] * 2 in [
        [float(x) for x in line.get_xdata()] for line in rates.lines if len(line.get_xdata()) == 2
    ]
    assert any("baseline" in t.get_text() for legend in fig.legends for t in legend.get_texts())


def test_the_sweep_never_runs_past_100_and_counts_every_level() -> None:
    fig = draw_sweep({"organism": (60, 0.97)})
    rates = [ax for ax in axes_of(fig) if "%" in ax.get_ylabel()]
    assert len(rates) == 3
    assert all(ax.get_ylim()[0] == 0 and ax.get_ylim()[1] <= 100 for ax in rates)
    strip = next(ax for ax in axes_of(fig) if "numbers of responses" in ax.get_xlabel())
    assert [t.get_text() for t in strip.texts].count("60") == 4


def test_levels_are_written_with_two_decimals() -> None:
    """Eight evenly spaced levels were written as -0.857143-0.2142860.428571: one ran into the next."""
    fig = style.new_figure(2.0, "levels")
    levels = np.linspace(-1.5, 3.0, 8).tolist()
    panels.level_counts(fig.subplots(), [("n", "#000000", dict.fromkeys(levels, 430))], "levels")
    labels = [t.get_text() for t in fig.axes[0].get_xticklabels()]
    assert labels == ["-1.5", "-0.86", "-0.21", "0.43", "1.07", "1.71", "2.36", "3"]


def test_the_bands_of_the_prefill_arms_differ_in_more_than_colour() -> None:
    fig = draw_prefill({"organism": (60, 0.3)})
    first = axes_of(fig)[0]
    assert {bool(band.get_hatch()) for band in first.collections} == {True, False}
    patches = [h for legend in fig.legends for h in legend.get_patches()]
    assert {bool(patch.get_hatch()) for patch in patches} == {True, False}


def test_figure_a8_shows_paired_differences_and_a7_scores() -> None:
    data = {"organism": (60, 0.3)}
    results = NoSteeringResults(measured(data, ["baseline", "unsteered"]), {}, planted(data))
    figures = first_scores.present(results).figures
    seven, eight = axes_of(figures["figureA7"]())[0], axes_of(figures["figureA8"]())[0]
    assert (seven.get_xlim(), eight.get_xlim()) == ((0, 100), (-100, 100))
    gaps = first_scores.paired_gaps(*(results.measured.outcomes["organism", c] for c in ("unsteered", "baseline")))
    test = results.measured.comparisons["organism", "unsteered"]["mean_first"]
    assert len(gaps) == 60
    assert test.difference == pytest.approx(gaps.mean())
    assert f"mean {gaps.mean():+.1f}, n = 60" in eight.get_title("right")
