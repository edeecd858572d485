"""Figures of detectors, ablations and recorded activity: legends match the plots, uncertainty is shown."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from steerback.analysis.ablation import RANKED, RandomAblationResults, rank_of
from steerback.analysis.episode_statistics import AlignedCurve
from steerback.figures import ablation, detectors, episode_statistics, panels, style, traces
from steerback.metrics import Estimate
from steerback.store.facts import (
    ABLATED,
    BASELINE,
    DRIFTS,
    EPISODES,
    UNSTEERED,
    ControlSets,
    Detector,
    DetectorSet,
    NullCount,
    Search,
    SearchHalf,
    SetQuality,
)
from test_condition_figures import axes_of, measured


@pytest.mark.parametrize(("sets", "least"), [(3, "0.25"), (19, "0.05")])
def test_random_ablation_says_the_smallest_p_its_sets_can_reach(sets: int, least: str) -> None:
    control = ControlSets(
        sets=[[i] for i in range(sets)],
        method="matched",
        quality=[SetQuality(difference={})],
        n_candidates=9,
        overlap=0,
    )
    data = measured({"organism": (36, 0.4)}, [BASELINE, ABLATED, *control.conditions], latents=6)
    ranks = {"organism": {m: rank_of(data, "organism", control, m) for m in RANKED}}
    results = RandomAblationResults(data, {"organism": control}, ranks, {}, [])
    fig = ablation.draw_random_sets(results)
    titles = [ax.get_title("right") for ax in axes_of(fig)]
    assert all(f"(minimum {least})" in title for title in titles)
    labels = [t.get_text() for t in axes_of(fig)[0].get_xticklabels()]
    assert labels[2] == f"{sets} random\nn = 36"
    assert "1 / (k + 1)" in style.caption_of(fig)


def a_set(label: str | None = None) -> DetectorSet:
    null = NullCount(draws=9, observed=3, expected=1.0, high=2.0, p=0.1)
    half = SearchHalf(n_prompts=4, n_texts=8, perfect=null, high_auc=null, max_auc_null=0.8)
    search = Search(latents=[1], rule="r", n_passed=1, search=half, held_out=half)
    detector = Detector(latent=1, auc=1.0, held_out_auc=0.9, level=1.0, label=label)
    return DetectorSet(source="search", detectors=[detector], search=search)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_long_label_in_wide_letters_is_cut_and_leaves_room_for_the_plot() -> None:
    fig = detectors.draw(
        {"organism": a_set("自由意志在疼痛中的作用, 耐力是一项重要的心理能力, 都能在春天的花叶中绽放")}
    )
    fig.canvas.draw()
    points, counts = axes_of(fig)
    assert points.get_position().width > 0.3
    names = [label.get_window_extent() for label in counts.get_xticklabels()]
    assert all(a.x1 <= b.x0 for a, b in pairwise(names)), "names of the bars overlap"
    drawn = fig.get_tightbbox(fig.canvas.get_renderer())
    assert drawn.x0 >= -0.01
    assert drawn.x1 <= fig.get_size_inches()[0] + 0.01
    assert style.shortened("简单机器", 5) == "简单"
    assert style.shortened("simple", 6) == "simple"


def test_colours_of_the_detectors_legend_are_those_of_the_bars() -> None:
    fig = detectors.draw({"organism-control": a_set()})
    points, counts = axes_of(fig)
    legend = {t.get_text(): h for t, h in zip(fig.legends[0].get_texts(), fig.legends[0].legend_handles, strict=True)}
    bars = {to_hex(bar.get_facecolor()) for bar in counts.patches}
    assert bars == {to_hex(legend[name].get_facecolor()) for name in ("observed", "labels swapped")}
    drawn = {to_hex(line.get_color()) for line in points.lines if line.get_marker() == "o"}
    assert drawn == {to_hex(legend["held-out prompts"].get_color())}


@pytest.mark.parametrize("latents", [4, 5])
def test_aligned_curves_have_the_legends_colours_and_no_band_from_few_latents(latents: int) -> None:
    offsets = np.arange(-6, 7)
    mean = np.linspace(1, 2, 13)
    counts = np.full(13, latents)
    curve = AlignedCurve(offsets, mean, mean - 0.5, mean + 0.5, counts, 7)
    with_style = style.styled(lambda: style.new_figure(2, ""))
    ax = with_style().subplots()
    episode_statistics._aligned(ax, dict.fromkeys((EPISODES, DRIFTS, UNSTEERED), curve))
    assert bool(ax.collections) is (latents >= panels.FEWEST)
    assert {line.get_color() for line in ax.lines[1:]} == {colour for colour, _ in episode_statistics.LOOKS.values()}
    assert "7 episodes" in ax.get_xlabel()


def test_an_attempt_is_shaded_by_its_score_alone() -> None:
    def of(first: float, second: float) -> dict[str, str]:
        trace = SimpleNamespace(row=SimpleNamespace(attempts=[SimpleNamespace(score=s) for s in (first, second)]))
        return traces.shades(trace, 50)  # type: ignore[arg-type]

    assert of(3, 80) == {"off-topic": "off topic", "correction": "correction", "on-topic": "on topic"}
    assert of(3, 18)["on-topic"] == "off topic"
    assert of(70, 50) == {"off-topic": "on topic", "correction": "correction", "on-topic": "on topic"}


@pytest.mark.parametrize("high", [99.0, 100.0])
def test_bars_carry_their_values(high: float) -> None:
    ax: Axes = style.new_figure(1, "").subplots()
    panels.bar(ax, 0, Estimate(0.873, 0.8, high / 100, 40, "", 35, 9), "red")
    assert [t.get_text() for t in ax.texts] == ["87.3"]
