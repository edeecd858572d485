"""Recorded episodes, lead times and statistics of regions on the scripted engine with known activity."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from planted import Runs, inside
from planted_detectors import BACKTRACKER, DETECTORS, FEW_RESPONSES, LEAD, detector_runs, without_restarts
from steerback.analysis import episodes as ep
from steerback.analysis.episode_statistics import aligned, latent_regions, region_values
from steerback.analysis.traces import lead_times, onset, smoothed
from steerback.engines.scripted import RESTART
from steerback.figures import style
from steerback.jobs.execute import analysed
from steerback.jobs.grading import grade_run
from steerback.store.facts import DETECTORS as DETECTOR_GROUP
from steerback.store.facts import TOKEN_ENDS, boundaries
from steerback.store.run import Run

WITH_BACKTRACKER = f"options.backtracking=[{BACKTRACKER}]"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with detector_runs(tmp_path_factory.mktemp("runs")) as made:
        yield made


@pytest.fixture(scope="module")
def recorded(runs: Runs) -> ep.Recorded:
    runs.run("traces", WITH_BACKTRACKER, base="detectors")
    with runs.ledger("traces") as ledger:
        return ep.recorded(ledger, "planted", "scripted", 50.0)


# -- regions ----------------------------------------------------------------------------------------------------------
def test_regions_are_the_words_they_should_be(recorded: ep.Recorded) -> None:
    assert recorded.changed == recorded.lost == 0
    for trace in recorded.episodes:
        assert trace.row.completion is not None
        regions, text = trace.regions(), trace.row.completion.text
        assert "".join(trace.pieces[regions["correction"]]).strip() == RESTART
        assert "".join(trace.pieces[regions["off-topic"]]).strip() == text[: text.index(RESTART)].strip()
        assert trace.pieces[regions["on-topic"].start].strip().startswith("[[score")
    assert all(len(t.row.attempts) == 1 and t.row.attempts[0].score < 50 for t in recorded.drifts)
    assert all(not t.row.trial.interventions for t in recorded.unsteered)


def test_recorded_sums_and_region_means_equal_a_loop_over_the_ledger(runs: Runs, recorded: ep.Recorded) -> None:
    with runs.ledger("traces") as ledger:
        rows = {r.trial.key: r for r in ledger.rows("planted", "replay", "episodes", activations=True)}
    values, _ = region_values(recorded, DETECTOR_GROUP)["off-topic"]
    for trace, value in zip(recorded.twice, values, strict=True):
        row = rows[trace.row.trial.key]
        assert row.completion is not None
        assert row.completion.activations is not None
        assert row.trial.record is not None
        words = row.completion.text[: row.completion.text.index(RESTART)].split()
        total = 0.0
        for position in range(len(words)):
            for column, latent in enumerate(row.trial.record.latents):
                if latent in DETECTORS:
                    total += float(row.completion.activations[row.completion.prompt_tokens + position, column])
        assert value == pytest.approx(total / len(words))


def test_boundaries_that_a_judge_has_marked_bound_the_regions(
    runs: Runs, recorded: ep.Recorded, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(runs.root / "traces", folder)
    assert grade_run(folder, "offline", "boundaries") > 0
    assert grade_run(folder, "offline", "boundaries") == 0  # nothing is graded twice
    with Run.reopen(folder) as run:
        marks = run.ledger.get("planted", boundaries("offline"))
        ends = run.ledger.get("planted", TOKEN_ENDS)
        assert marks is not None
        assert ends is not None
        run.ledger.put("planted", boundaries("scripted"), marks)
        same = ep.recorded(run.ledger, "planted", "scripted", 50.0)
        assert same.unmarked == 0
        before = {t.row.trial.key: t.regions() for t in recorded.twice}
        assert {t.row.trial.key: t.regions() for t in same.twice} == before
        # off topic from where the planted words begin: all of the region is high; one episode has no mark
        for trace in recorded.twice:
            key = trace.row.trial.key
            assert trace.start is not None
            begin = ([0, *ends[key]])[trace.start - LEAD]
            marks[key] = marks[key].model_copy(update={"off_topic": begin})
        lost = recorded.twice[0].row.trial.key
        marks[lost] = marks[lost].model_copy(update={"on_topic": None})
        run.ledger.put("planted", boundaries("scripted"), marks)
        found = ep.recorded(run.ledger, "planted", "scripted", 50.0)
    assert found.unmarked == 1
    assert len(found.twice) == len(recorded.twice) - 1
    for trace in found.twice:
        region = trace.sums[DETECTOR_GROUP][trace.regions()["off-topic"]]
        assert len(region) == LEAD
        assert region.min() > 4


# -- lead times and activity ------------------------------------------------------------------------------------------
def test_lead_time_is_the_planted_one(runs: Runs, recorded: ep.Recorded) -> None:
    found = lead_times(recorded, window=1, quantile=0.95).estimates(200)
    assert found["median lead"].value == LEAD  # without smoothing the onset is the first planted word
    assert found["onset, episodes"].value == 1
    assert found["active at last token, episodes"].value == 1
    assert found["onset, unsteered"].value < 0.15
    assert lead_times(recorded, window=1, quantile=1.0).estimates(200)["onset, unsteered"].value == 0
    assert found["onset, steered without restart"].high < 0.2
    summary = json.loads((runs.root / "traces" / "summary.json").read_text())["targets"]["planted"]
    assert summary["lead"]["median lead"]["value"] == LEAD - 1  # three tokens' mean passes the threshold one later
    assert summary["counts"]["episodes"] == len(recorded.episodes)


def test_episode_statistics_find_detectors_before_and_backtracking_in_the_correction(
    runs: Runs, recorded: ep.Recorded
) -> None:
    _, folder = runs.run("episode-statistics", WITH_BACKTRACKER, base="traces")
    found = json.loads((folder / "summary.json").read_text())["targets"]["planted"]
    assert found["ratios"]["detectors"]["off-topic / unsteered"]["low"] > 2
    assert found["ratios"]["detectors"]["off-topic / steered, no restart"]["low"] > 2
    assert inside(found["ratios"]["detectors"]["steered, no restart / unsteered"], 1)
    assert found["ratios"]["backtracking"]["correction / unsteered"]["low"] > 5
    tests = {(t["group"], t["a"], t["b"]): t for t in found["tests"]}
    assert tests["detectors", "off-topic", "correction"]["holm"] < 0.05
    assert tests["detectors", "unsteered", "steered, no restart"]["holm"] > 0.05
    assert tests["detectors", "off-topic", "on-topic"]["cliffs_delta"] < -0.9
    assert {b for _, a, b in tests if a == "re-read unsteered"} == {"off-topic", "correction", "on-topic"}


def test_the_authors_baseline_is_single_attempts_of_at_least_fifty_read_without_steering(
    runs: Runs, recorded: ep.Recorded
) -> None:
    _, folder = runs.run("episode-statistics", WITH_BACKTRACKER, "options.max_episodes=1000", base="traces", name="all")
    found = json.loads((folder / "summary.json").read_text())["targets"]["planted"]
    with runs.ledger("all") as ledger:
        rows = [r for r in ledger.rows("planted", "measure", "baseline", judge="scripted") if r.judgement is not None]
    chosen = [r for r in rows if len(r.judgement.attempts) == 1 and r.judgement.attempts[0].score >= 50]
    engine = runs.makers.engine(runs.makers.target("planted", {}), None)
    read = engine.activations(
        [r.trial.prompt for r in chosen], [r.completion.text for r in chosen], [BACKTRACKER], pool="mean"
    ).astype(float)
    mean = found["means"]["backtracking"]["re-read unsteered"]
    assert (mean["value"], mean["n"]) == (pytest.approx(read.sum(axis=1).mean()), len(chosen))
    off = found["means"]["backtracking"]["off-topic"]["value"]
    ratio = found["ratios"]["backtracking"]["off-topic / re-read unsteered"]
    assert ratio["value"] == pytest.approx(off / read.sum(axis=1).mean())
    assert found["means"]["detectors"]["re-read unsteered"]["value"] == 0  # planted: the texts fit their prompts
    assert found["ratios"]["detectors"]["off-topic / re-read unsteered"]["value"] is None
    assert "authors' baseline" in (folder / "table.txt").read_text()


def test_regions_of_each_latent_equal_numpy_and_scipy(runs: Runs, recorded: ep.Recorded) -> None:
    found = latent_regions(recorded)
    assert {(x.group, x.latent) for x in found} == {
        *(("detectors", k) for k in DETECTORS),
        ("backtracking", BACKTRACKER),
    }
    for x in found:
        assert x.label == f"concrete thing {x.latent}"
        off, correction, on = [], [], []
        for trace in recorded.twice:
            row = trace.row
            z = row.completion.activations[row.completion.prompt_tokens :, row.trial.record.latents.index(x.latent)]
            text, words = row.completion.text, row.completion.text.split()
            first = len(text[: text.index(RESTART)].split())
            restart = len(RESTART.split())
            off.append(z[:first].mean(dtype=float))
            correction.append(z[first : first + restart].mean(dtype=float))
            on.append(z[first + restart : len(words)].mean(dtype=float))
        for name, values in (("off-topic", off), ("correction", correction), ("on-topic", on)):
            region = x.regions[name]
            assert (region.mean, region.sd) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
            assert region.active == np.mean(np.array(values) > 0)
        pooled = np.sqrt((np.var(off, ddof=1) + np.var(on, ddof=1)) / 2)
        assert x.test.cohens_d == pytest.approx((np.mean(off) - np.mean(on)) / pooled)
        pairs = np.sign(np.subtract.outer(off, on))
        assert x.test.cliffs_delta == pytest.approx(pairs.mean())
        assert x.test.rank_p == pytest.approx(stats.wilcoxon(np.subtract(off, on)).pvalue)
    effects = [x.test.cohens_d for x in found if x.group == "detectors"]
    assert effects == sorted(effects, reverse=True)
    assert effects[-1] > 1


def test_aligned_curves_peak_at_the_planted_offsets(recorded: ep.Recorded) -> None:
    curves = aligned(recorded, DETECTOR_GROUP, 10)
    episodes = curves["episodes"]
    high = episodes.offsets[episodes.mean > 4]
    assert high.tolist() == list(range(-LEAD, 0))
    assert np.nanmax(curves["steered, no restart"].mean) < 2
    assert np.nanmax(curves["unsteered"].mean) < 2


# -- runs and figures -------------------------------------------------------------------------------------------------
def test_a_run_again_changes_nothing(runs: Runs, recorded: ep.Recorded) -> None:
    def content() -> tuple[object, bytes]:
        with runs.ledger("traces") as ledger:
            return ledger.dump(), (runs.root / "traces" / "summary.json").read_bytes()

    before = content()
    runs.run("traces", WITH_BACKTRACKER, base="detectors")
    assert content() == before


@pytest.mark.rendered
def test_figures_are_drawn_with_and_without_anything_to_show(runs: Runs, recorded: ep.Recorded, tmp_path: Path) -> None:
    blank = without_restarts(runs)
    for name in ("traces", "episode-statistics"):
        runs.run(name, "options.detectors=[3]", name=f"empty-{name}", targets=(blank,))
    runs.run("detectors", FEW_RESPONSES, name="none", targets=(blank,))
    for folder in ("empty-traces", "empty-episode-statistics", "none", "detectors", "traces"):
        with Run.read(runs.root / folder) as run:
            analysis = analysed(run, "scripted", draws=200)
        assert analysis.shown.figures
        for name, draw in analysis.shown.figures.items():
            assert all(p.stat().st_size > 5000 for p in style.save(draw(), tmp_path, f"{folder}-{name}")[:2])
        json.dumps(analysis.results.to_json(), allow_nan=False)


# -- numbers ----------------------------------------------------------------------------------------------------------
@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.integers(1, 8), st.integers(0, 29))
def test_smoothing_is_causal_and_a_mean_of_the_last_tokens(values: list[float], window: int, cut: int) -> None:
    x = np.array(values)
    found = smoothed(x, window)
    assert found == pytest.approx([x[max(0, t - window + 1) : t + 1].mean() for t in range(len(x))], abs=1e-9)
    changed = x.copy()
    changed[cut + 1 :] = 99.0
    assert smoothed(changed, window)[: cut + 1] == pytest.approx(found[: cut + 1])


def test_onset_is_the_first_position_above_and_before() -> None:
    x = np.array([0.0, 2.0, 0.0, 3.0])
    assert (onset(x, 1.0, 4), onset(x, 2.0, 4), onset(x, 2.0, 3), onset(x, 1.0, 1)) == (1, 3, None, None)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.data())
def test_token_at_finds_the_token_of_every_character(lengths: list[int], data: st.DataObject) -> None:
    ends = np.cumsum(lengths).tolist()
    owner = [i for i, n in enumerate(lengths) for _ in range(n)]
    character = data.draw(st.integers(0, len(owner)))
    assert ep.token_at(ends, character) == ([*owner, len(lengths)])[character]
