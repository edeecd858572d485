"""Figures of the sweep, meta-prompts, no steering and the controls: legible inside their bounds with any data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import matplotlib.text
import numpy as np
import pytest

from steerback.analysis.base import Measured
from steerback.analysis.boost_sweep import SweepResults
from steerback.analysis.conditions import ConditionResults
from steerback.analysis.meta_prompts import MetaPromptResults
from steerback.analysis.no_steering import NoSteeringResults
from steerback.analysis.prefill_control import PrefillResults
from steerback.figures import boost_sweep, conditions, first_scores, meta_prompts, prefill
from steerback.metrics import Outcomes, compare, find_peak, summarize
from steerback.store.facts import MetaPromptSet, PrefixCounts, Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def outcomes(n: int, rate: float = 0.3, latents: int = 4, seed: int = 0) -> Outcomes:
    rng = np.random.default_rng(seed)
    first, multi = rng.uniform(0, 100, n), rng.random(n) < rate
    last, attempts = np.where(multi, rng.uniform(0, 100, n), first), np.where(multi, 2, 1)
    return Outcomes(
        np.arange(n) % latents, np.arange(n), np.zeros(n), attempts, first, last, attempts, first, last, np.zeros(n)
    )


def measured(targets: Mapping[str, tuple[int, float]], names: list[str]) -> Measured:
    """(trials, rate) per target, the same in every condition, each compared with the first."""
    held = {
        (target, name): outcomes(n, rate, seed=i)
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
    results = MetaPromptResults(measured(targets, VARIANTS), sets, planted(targets))
    return meta_prompts.present(results).figures["figure4"]()


def draw_sweep(targets: Mapping[str, tuple[int, float]]) -> Figure:
    levels = [-1.5, 0.0, 1.5, 3.0]
    names = [Sweep.condition(x) for x in levels]
    conditions_of = measured(targets, names)
    peaks = {
        t: {m: find_peak(levels, [conditions_of.outcomes[t, n] for n in names], m, 50) for m in boost_sweep.SHOWN}
        for t in targets
    }
    sweeps = {t: Sweep(sd=2.5, levels=levels, dropped={"-1.50 sd": 1}, latents=4) for t in targets}
    return boost_sweep.present(SweepResults(conditions_of, sweeps, peaks, planted(targets))).figures["figure3"]()


def draw_prefill(targets: Mapping[str, tuple[int, float]]) -> Figure:
    names = [f"{arm} {k}n" for k in (1, 2, 3) for arm in ("unsteered", "steered")]
    prefixes = {t: PrefixCounts(characters=90, prefixes={"1n": {"used": 3}, "2n": {}}) for t in targets}
    results = PrefillResults(measured(targets, names), prefixes, planted(targets))
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
    assert "Judge: offline" in everything
    assert "planted" in everything
    for target, (n, _) in DATA[name].items():
        assert target.replace("$", r"\$").split()[0] in everything
        assert n == 0 or "n = " in everything
