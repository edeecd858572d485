"""Detector search, ablations, traces and episode statistics on the scripted engine, whose truth is known."""

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

from planted import Runs, thresholds
from steerback.config import build_config
from steerback.data.prompts import load_prompts
from steerback.engines.scripted import RESTART, PlantedModel
from steerback.errors import SteerbackError
from steerback.experiments import episodes as ep
from steerback.experiments.detector_ablation import DetectorAblation
from steerback.experiments.detectors import Detectors, stored_detectors
from steerback.experiments.episode_statistics import aligned, region_values
from steerback.experiments.random_ablation import rank
from steerback.experiments.traces import lead_times, onset, smoothed
from steerback.figures import style
from steerback.jobs import execute
from steerback.jobs.grading import grade_run
from steerback.metrics.regions import auc_of, of_means
from steerback.store.run import Run

DETECTORS, BACKTRACKER = (3, 11, 40), 7
RATE, EFFECT, LEAD = 0.4, 0.5, 4
SMALL = ("options.responses=100",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    patch = pytest.MonkeyPatch()
    model = PlantedModel(
        thresholds=thresholds(),
        restart_rate=RATE,
        detectors=DETECTORS,
        ablation_effect=EFFECT,
        lead=LEAD,
        backtrackers=(BACKTRACKER,),
    )
    found = Runs(tmp_path_factory.mktemp("runs"), patch, model)
    found.run("esr")
    found.run("detectors", *SMALL, base="esr")
    yield found
    patch.undo()


def within(estimate: dict[str, float], truth: float) -> bool:
    return estimate["low"] <= truth <= estimate["high"]


# -- search -----------------------------------------------------------------------------------------------------------
def test_search_finds_the_planted_detectors_on_both_halves_and_never_judges(runs: Runs) -> None:
    folder = runs.root / "detectors"
    assert sorted(json.loads((folder / "off_topic_detectors_planted.json").read_text())) == sorted(DETECTORS)
    with runs.ledger("detectors") as ledger:
        found = stored_detectors(ledger, "planted")
        rows = ledger.rows("planted", "discovery", judge="scripted")
    assert all(e["auc"] == e["held_out_auc"] == 1 for e in found.stored["detectors"])
    assert found.stored["search"]["search"]["perfect"] == {"draws": 200, "observed": 3, **_null(found)}
    assert len(rows) == 100
    assert all(r.judgement is None and not r.trial.interventions for r in rows)
    assert not {r.trial.prompt for r in rows} & set(load_prompts("evaluation"))
    assert execute.judge_run(folder, "scripted") == 0  # nor does a judge that is added later


def _null(found: Detectors) -> dict[str, float]:
    null = found.stored["search"]["search"]["perfect"]
    assert null["expected"] < 0.1
    return {k: null[k] for k in ("expected", "high", "p")}


def test_discovery_prompts_are_many_and_disjoint_from_everything_measured() -> None:
    prompts = load_prompts("discovery")
    assert len(prompts) >= 200
    for other in ("evaluation", "held-out", "organism-discovery", "organism-held-out"):
        assert not set(prompts) & set(load_prompts(other)), other


def test_prompts_that_are_measured_are_refused_for_discovery(runs: Runs) -> None:
    with pytest.raises(SteerbackError, match="share 'Explain how a bill becomes a law"):
        runs.run("detectors", "options.discovery_prompts=evaluation", base="esr", name="shared")


def test_own_detectors_from_list_file_and_run(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text("[40, 5]")
    cases = {"[5, 40]": (5, 40), str(tmp_path / "own.json"): (40, 5), str(runs.root / "detectors"): None}
    for i, (own, expected) in enumerate(cases.items()):
        name = f"own{i}"
        runs.run("detector-statistics", f"options.detectors={own}", base="esr", name=name)
        with runs.ledger(name) as ledger:
            found = stored_detectors(ledger, "planted").latents
        assert found == (expected or stored_detectors(runs.ledger("detectors"), "planted").latents)
    for own, message in (("[99]", "there is no latent 99"), ("nowhere.json", "neither a JSON file nor the folder")):
        with pytest.raises(SteerbackError, match=message):
            runs.run("detector-statistics", f"options.detectors={own}", base="esr", name=f"bad-{len(message)}")


def test_no_detectors_is_one_clear_line(runs: Runs) -> None:
    with pytest.raises(SteerbackError, match=r"no detectors .*AUC >= 0\.9.* lower options\.auc"):
        runs.run("detector-ablation", *SMALL, name="nothing", targets=(blank(runs),))


def blank(runs: Runs) -> str:
    runs.scripts["blank"] = PlantedModel(thresholds=thresholds(), restart_rate=0.0)
    return "blank"


def test_statistics_equal_scipy_on_pairs_that_were_not_searched(runs: Runs) -> None:
    analysis, _ = runs.run("detector-statistics", "options.detectors=[3, 20, 21]", base="esr", name="statistics")
    with runs.ledger("statistics") as ledger:
        stored = ledger.fact("planted", "pair activations")
    a, b = np.array(stored["matched"]), np.array(stored["mismatched"])
    found = analysis.summary["targets"]["planted"]
    assert found["prompts"] == 38
    for k in range(3):
        u = stats.mannwhitneyu(b[:, k], a[:, k]).statistic / (len(a) * len(b))
        assert found["auc"][k]["value"] == pytest.approx(u) == found["separation"]["auc"][k]
        assert found["separation"]["mismatched_median"][k] == pytest.approx(np.median(b[:, k]))
    assert found["auc"][0]["low"] > 0.7
    assert within(found["auc"][1], 0.5)
    assert r"\toprule" in analysis.tables["tableA1"].latex()


# -- ablations --------------------------------------------------------------------------------------------------------
def test_ablation_recovers_the_planted_effect_and_dose(runs: Runs) -> None:
    analysis, _ = runs.run("detector-ablation", "options.levels=[0.5]", base="detectors")
    found = analysis.summary["targets"]["planted"]
    rates = {c: s["headline"]["multi_attempt_rate"] for c, s in found["conditions"].items()}
    assert [d["latents"] for d in found["doses"]] == [0, 3, 1, 2, 3]  # 0.75 of three is two, as is 0.5: measured once
    for dose in found["doses"]:
        assert within(rates[dose["condition"]], RATE * (1 - EFFECT * dose["share"])), dose
    test = found["comparisons"]["ablated"]["tests"]["multi_attempt_rate"]
    assert test["low"] <= -RATE * EFFECT <= test["high"] < 0
    assert test["p_holm"] < 0.05
    assert found["trends"]["multi_attempt_rate"]["high"] < 0
    assert found["comparisons"]["ablated"]["tests"]["mean_first"]["difference"] == pytest.approx(0)
    with runs.ledger("detector-ablation") as ledger:
        held = ledger.rows("planted", "measure", "held at 50%")[0].trial.interventions
        level = stored_detectors(ledger, "planted").levels
    assert {i.latent: i.value for i in held if i.mode == "clamp"} == {k: level[k] / 2 for k in DETECTORS}


def test_dose_options_are_checked() -> None:
    for name, value in (("doses", [1.5]), ("levels", [-1]), ("doses", "x")):
        config = build_config("detector-ablation", ("x",)).model_copy(update={"options": {name: value}})
        with pytest.raises(SteerbackError, match=f"detector-ablation options: {name}"):
            DetectorAblation().conditions(config)


def test_random_sets_leave_the_planted_rate_alone_and_the_detectors_stand_out(runs: Runs) -> None:
    analysis, _ = runs.run("random-ablation", "options.sets=4", base="detectors")
    found = analysis.summary["targets"]["planted"]
    steered = {r.trial.latent for r in runs.ledger("random-ablation").rows("planted", "measure", "baseline")}
    drawn = [set(s) for s in found["random_sets"]["sets"]]
    assert len(drawn) == 4
    assert all(len(s) == 3 and not s & (set(DETECTORS) | steered) for s in drawn)
    for number in range(1, 5):
        assert within(found["conditions"][f"random {number}"]["headline"]["multi_attempt_rate"], RATE)
    ranks = found["ranks"]["multi_attempt_rate"]
    assert (ranks["below"], ranks["above"], ranks["p"]) == (0, 4, 1 / 5)
    assert found["detectors_against_sets"]["random 1"]["tests"]["multi_attempt_rate"]["high"] < 0


def test_rank_p_is_uniform_where_nothing_is_special() -> None:
    class Fixed:
        def __init__(self, values: list[float]) -> None:
            self.values = values

        def of(self, target: str) -> dict[str, dict[str, object]]:
            names = ["ablated", *(f"random {i}" for i in range(len(self.values) - 1))]
            return {n: {"msi": type("E", (), {"value": v})} for n, v in zip(names, self.values, strict=True)}

    rng = np.random.default_rng(0)
    p = [rank(Fixed(rng.normal(size=10).tolist()), "t", "msi").p for _ in range(400)]  # type: ignore[arg-type,union-attr]
    assert np.mean(np.array(p) <= 0.1) == pytest.approx(0.1, abs=0.04)
    assert min(p) == pytest.approx(0.1)


# -- episodes ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def recorded(runs: Runs) -> ep.Recorded:
    runs.run("traces", f"options.backtracking=[{BACKTRACKER}]", base="detectors")
    with runs.ledger("traces") as ledger:
        return ep.recorded(ledger, "planted", "scripted", 50.0)


def test_regions_are_the_words_they_should_be(recorded: ep.Recorded) -> None:
    assert recorded.changed == recorded.lost == 0
    for trace in recorded.episodes:
        assert trace.row.completion is not None
        regions, text = trace.regions(), trace.row.completion.text
        assert "".join(trace.pieces[regions["correction"]]).strip() == RESTART
        assert "".join(trace.pieces[regions["off-topic"]]).strip() == text[: text.index(RESTART)].strip()
        assert trace.pieces[regions["on-topic"].start].strip().startswith("[[score")
    assert all(len(t.attempts) == 1 and t.attempts[0].score < 50 for t in recorded.drifts)
    assert all(not t.row.trial.interventions for t in recorded.unsteered)


def test_recorded_sums_and_region_means_equal_a_loop_over_the_ledger(runs: Runs, recorded: ep.Recorded) -> None:
    rows = {r.trial.key: r for r in runs.ledger("traces").rows("planted", "replay", "episodes", activations=True)}
    values, _ = region_values(recorded, ep.DETECTORS)["off-topic"]
    for trace, value in zip(recorded.twice, values, strict=True):
        row = rows[trace.row.trial.key]
        assert row.completion is not None
        assert row.trial.record is not None
        words = row.completion.text[: row.completion.text.index(RESTART)].split()
        total = 0.0
        for position in range(len(words)):
            for column, latent in enumerate(row.trial.record.latents):
                if latent in DETECTORS:
                    total += float(row.completion.activations[row.completion.prompt_tokens + position, column])
        assert value == pytest.approx(total / len(words))


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


def test_episode_statistics_find_detectors_before_and_backtracking_in_the_correction(runs: Runs) -> None:
    analysis, _ = runs.run("episode-statistics", f"options.backtracking=[{BACKTRACKER}]", base="traces")
    found = analysis.summary["targets"]["planted"]
    assert found["ratios"]["detectors"]["off-topic / unsteered"]["low"] > 2
    assert found["ratios"]["detectors"]["off-topic / steered, no restart"]["low"] > 2
    assert within(found["ratios"]["detectors"]["steered, no restart / unsteered"], 1)
    assert found["ratios"]["backtracking"]["correction / unsteered"]["low"] > 5
    tests = {(t["group"], t["a"], t["b"]): t for t in found["tests"]}
    assert tests["detectors", "off-topic", "correction"]["holm"] < 0.05
    assert tests["detectors", "unsteered", "steered, no restart"]["holm"] > 0.05
    assert tests["detectors", "off-topic", "on-topic"]["cliffs_delta"] < -0.9


def test_aligned_curves_peak_at_the_planted_offsets(recorded: ep.Recorded) -> None:
    curves = aligned(recorded, ep.DETECTORS, 10)
    own = curves["episodes"]
    high = own.offsets[own.mean > 4]
    assert high.tolist() == list(range(-LEAD, 0))
    assert np.nanmax(curves["steered, no restart"].mean) < 2
    assert np.nanmax(curves["unsteered"].mean) < 2


def test_boundaries_that_a_judge_has_marked_bound_the_regions(
    runs: Runs, recorded: ep.Recorded, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(runs.root / "traces", folder)
    assert grade_run(folder, "offline", "boundaries") > 0
    assert grade_run(folder, "offline", "boundaries") == 0  # nothing is graded twice
    with Run.reopen(folder) as run:
        marks = run.ledger.fact("planted", ep.boundaries_fact("offline"))
        run.ledger.set_fact("planted", ep.boundaries_fact("scripted"), marks)
        same = ep.recorded(run.ledger, "planted", "scripted", 50.0)
        assert same.unmarked == 0
        before = {t.row.trial.key: t.regions() for t in recorded.twice}
        assert {t.row.trial.key: t.regions() for t in same.twice} == before
        # off topic from where the planted words begin: all of the region is high; one episode has no mark
        ends = run.ledger.fact("planted", "token ends")
        for trace in recorded.twice:
            key = trace.row.trial.key
            marks[key]["off_topic"] = ([0, *ends[key]])[trace.start - LEAD]
        lost = recorded.twice[0].row.trial.key
        marks[lost]["on_topic"] = None
        run.ledger.set_fact("planted", ep.boundaries_fact("scripted"), marks)
        found = ep.recorded(run.ledger, "planted", "scripted", 50.0)
    assert found.unmarked == 1
    assert len(found.twice) == len(recorded.twice) - 1
    for trace in found.twice:
        region = trace.sums[ep.DETECTORS][trace.regions()["off-topic"]]
        assert len(region) == LEAD
        assert region.min() > 4


def test_a_run_again_changes_nothing(runs: Runs, recorded: ep.Recorded) -> None:
    before = runs.ledger("traces").dump()
    summary = (runs.root / "traces" / "summary.json").read_bytes()
    runs.run("traces", f"options.backtracking=[{BACKTRACKER}]", base="detectors")
    assert runs.ledger("traces").dump() == before
    assert (runs.root / "traces" / "summary.json").read_bytes() == summary


def test_figures_are_drawn_with_and_without_anything_to_show(runs: Runs, recorded: ep.Recorded, tmp_path: Path) -> None:
    blank(runs)
    analyses = [
        runs.run(name, "options.detectors=[3]", name=f"empty-{name}", targets=("blank",))[0]
        for name in ("traces", "episode-statistics")
    ]
    analyses.append(runs.run("detectors", *SMALL, name="none", targets=("blank",))[0])
    from steerback.experiments import get_experiment

    for name in ("detectors", "traces"):
        with runs.ledger(name) as ledger:
            analyses.append(get_experiment(name).analyse(ledger, "scripted", 200))
    for i, analysis in enumerate(analyses):
        for name, draw in analysis.figures.items():
            assert all(p.stat().st_size > 5000 for p in SAVE(draw(), tmp_path, f"{i}-{name}"))
        json.dumps(analysis.summary, allow_nan=False)


SAVE = style.save


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


def test_auc_interval_covers_and_is_never_a_point() -> None:
    rng = np.random.default_rng(3)
    hits = 0
    truth = stats.norm.cdf(1 / np.sqrt(2 * 1.5))
    for i in range(200):
        cluster = np.repeat(np.arange(20), 4)
        shared = rng.normal(0, np.sqrt(0.5), (2, 20))
        a, b = shared[0][cluster] + rng.normal(size=80), 1 + shared[1][cluster] + rng.normal(size=80)
        found = auc_of(a, b, cluster, 200, seed=i)
        assert found.value == pytest.approx(stats.mannwhitneyu(b, a).statistic / 6400)
        hits += found.low <= truth <= found.high
    assert hits / 200 >= 0.9
    sure = auc_of(np.zeros(20), np.ones(20), np.arange(20), 100)
    assert (sure.value, sure.high) == (1, 1)
    assert 0.5 < sure.low < 0.95


def test_bootstrap_of_means_equals_resampling_by_hand() -> None:
    rng = np.random.default_rng(0)
    a, b, cluster = rng.gamma(2, 1, 60), rng.gamma(3, 1, 60), np.repeat(np.arange(12), 5)
    found = of_means([(a, cluster), (b, cluster)], lambda m: m[..., 1] / m[..., 0], 4000)
    drawn = []
    for _ in range(4000):
        rows = np.concatenate([np.flatnonzero(cluster == k) for k in rng.integers(0, 12, 12)])
        drawn.append(b[rows].mean() / a[rows].mean())
    tail = stats.norm.cdf(-stats.t.ppf(0.975, 11) * np.sqrt(12 / 11))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [tail, 1 - tail])), abs=0.04)


def test_search_options_of_a_run_are_not_ignored_where_its_base_has_detectors(runs: Runs) -> None:
    runs.run("detector-statistics", *SMALL, "options.rule=top", "options.limit=1", base="detectors", name="anew")
    with runs.ledger("anew") as ledger:
        assert len(stored_detectors(ledger, "planted").latents) == 1
