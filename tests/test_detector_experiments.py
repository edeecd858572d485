"""Detector search, Table A1 and the ablations on the scripted engine with known detectors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from planted import Runs, inside
from planted_detectors import DETECTORS, EFFECT, FEW_RESPONSES, RATE, detector_runs, without_restarts
from steerback.analysis.ablation import rank
from steerback.config import build_config
from steerback.data.prompts import load_prompts
from steerback.errors import SteerbackError
from steerback.experiments import make_experiment
from steerback.experiments.ablation import distinct
from steerback.experiments.detectors import _same_search
from steerback.jobs import check, judging
from steerback.published.comparison import our_number, table_of_numbers
from steerback.store.facts import DETECTOR_SET, PAIR_ACTIVATIONS, DetectorSet, Dose
from steerback.store.run import stored_config


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with detector_runs(tmp_path_factory.mktemp("runs")) as made:
        yield made


def detectors_in(runs: Runs, name: str) -> DetectorSet:
    with runs.ledger(name) as ledger:
        stored = ledger.get("planted", DETECTOR_SET)
    assert stored is not None
    return stored


# -- search -----------------------------------------------------------------------------------------------------------
def test_search_finds_the_planted_detectors_on_both_halves_and_never_judges(runs: Runs) -> None:
    folder = runs.root / "detectors"
    assert sorted(json.loads((folder / "off_topic_detectors_planted.json").read_text())) == sorted(DETECTORS)
    stored = detectors_in(runs, "detectors")
    assert all(d.auc == d.held_out_auc == 1 for d in stored.detectors)
    assert stored.search is not None
    (row,) = [r for r in table_of_numbers().rows if r.quantity == "number of off-topic detectors, before the cap"]
    summary = json.loads((folder / "summary.json").read_text())["targets"]["planted"]
    counted = our_number(summary, row)
    assert counted is not None
    assert counted.value == stored.search.n_passed == 3
    null = stored.search.search.perfect
    assert (null.draws, null.observed) == (200, 3)
    assert null.expected < 0.1
    with runs.ledger("detectors") as ledger:
        rows = ledger.rows("planted", "discovery", judge="scripted")
    assert len(rows) == 100
    assert all(r.judgement is None and not r.trial.interventions for r in rows)
    assert not {r.trial.prompt for r in rows} & set(load_prompts("evaluation"))
    assert judging.judge_run(folder, "scripted") == 0  # nor does a judge that is added later


def test_discovery_prompts_are_many_and_disjoint_from_everything_measured() -> None:
    prompts = load_prompts("discovery")
    assert len(prompts) >= 200
    for other in ("evaluation", "held-out", "organism-discovery", "organism-held-out"):
        assert not set(prompts) & set(load_prompts(other)), other


def test_prompts_that_are_measured_are_refused_for_discovery(runs: Runs) -> None:
    with pytest.raises(SteerbackError, match="share 'Explain how a bill becomes a law"):
        runs.run("detectors", "options.discovery_prompts=evaluation", base="esr", name="shared")


def test_named_detectors_come_from_a_list_a_file_or_a_run(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "named.json").write_text("[40, 5]")
    searched = detectors_in(runs, "detectors").latents
    cases = {"[5, 40]": (5, 40), str(tmp_path / "named.json"): (40, 5), str(runs.root / "detectors"): searched}
    for i, (source, expected) in enumerate(cases.items()):
        runs.run("detector-statistics", f"options.detectors={source}", base="esr", name=f"named{i}")
        assert detectors_in(runs, f"named{i}").latents == expected


def test_detectors_that_cannot_be_used_are_one_clear_line(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text('"no list"')
    cases = {
        "[99]": "there is no latent 99",
        "nowhere.json": "neither a JSON file nor the folder",
        str(tmp_path / "text.json"): "expected a list of latents, not 'no list'",
        "5": "detectors: expected a list of latents, a JSON file or the folder of a run, not 5",
    }
    for i, (source, message) in enumerate(cases.items()):
        with pytest.raises(SteerbackError, match=message):
            runs.run("detector-statistics", f"options.detectors={source}", base="esr", name=f"bad{i}")


def test_no_detectors_is_one_clear_line(runs: Runs) -> None:
    with pytest.raises(SteerbackError, match=r"no detectors .*AUC >= 0\.9.* lower options\.auc"):
        runs.run("detector-ablation", FEW_RESPONSES, name="nothing", targets=(without_restarts(runs),))


def test_search_options_of_a_run_are_not_ignored_where_its_base_has_detectors(runs: Runs) -> None:
    runs.run("detector-statistics", FEW_RESPONSES, "options.rule=top", "options.limit=1", base="detectors", name="anew")
    assert len(detectors_in(runs, "anew").latents) == 1


def test_options_of_the_search_are_those_of_the_base_unless_changed(runs: Runs) -> None:
    few = {"responses": 100}

    def options(experiment: str, *settings: str) -> tuple[dict[str, object], bool]:
        """The options that the manifest will hold, and whether the detectors of the base run are used."""
        folder = str(runs.root / "detectors")
        built = build_config(experiment, (), assignments=settings, base=(folder, stored_config(Path(folder))))
        job = check.check(built, runs.makers)
        study = SimpleNamespace(config=job.config)
        return job.config.options, _same_search(study, job.experiment.options)  # type: ignore[arg-type]

    assert options("traces") == (few, True)
    assert options("traces", "options.limit=25", "options.window=2") == ({**few, "limit": 25, "window": 2}, True)
    assert options("traces", "options.rule=top") == ({**few, "rule": "top"}, False)
    assert options("detector-ablation", "options.detectors=[3]") == ({"detectors": [3]}, False)
    with pytest.raises(SteerbackError, match="detectors sets the latents, so these have no effect: limit, rule"):
        options("traces", "options.detectors=[3]", "options.rule=top", "options.limit=2")


# -- statistics -------------------------------------------------------------------------------------------------------
def test_statistics_equal_scipy_on_pairs_that_were_not_searched(runs: Runs) -> None:
    _, folder = runs.run("detector-statistics", "options.detectors=[3, 20, 21]", base="esr", name="statistics")
    with runs.ledger("statistics") as ledger:
        pairs = ledger.get("planted", PAIR_ACTIVATIONS)
    assert pairs is not None
    a, b = np.array(pairs.matched), np.array(pairs.mismatched)
    found = json.loads((folder / "summary.json").read_text())["targets"]["planted"]
    assert found["prompts"] == 38
    for k in range(3):
        u = stats.mannwhitneyu(b[:, k], a[:, k]).statistic / (len(a) * len(b))
        assert found["auc"][k]["value"] == pytest.approx(u) == found["separation"]["auc"][k]
        assert found["separation"]["mismatched_median"][k] == pytest.approx(np.median(b[:, k]))
    assert found["auc"][0]["low"] > 0.7
    assert inside(found["auc"][1], 0.5)
    assert r"\toprule" in (folder / "tableA1.tex").read_text()


# -- ablations --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("partial", ["scale", "level"])
def test_ablation_recovers_the_planted_effect_and_dose(runs: Runs, partial: str) -> None:
    options = ("options.levels=[0.5]", *([] if partial == "scale" else ["options.partial=level"]))
    name = f"detector-ablation-{partial}"
    _, folder = runs.run("detector-ablation", *options, base="detectors", name=name)
    found = json.loads((folder / "summary.json").read_text())["targets"]["planted"]
    rates = {c: s["headline"]["multi_attempt_rate"] for c, s in found["conditions"].items()}
    assert [d["latents"] for d in found["doses"]] == [0, 3, 1, 2, 3]  # 0.75 of three is two, as is 0.5: measured once
    for dose in found["doses"]:
        kept = dose["level"] if partial == "scale" else 0.0
        assert inside(rates[dose["condition"]], RATE * (1 - EFFECT * dose["share"] * (1 - kept))), dose
    test = found["comparisons"]["ablated"]["tests"]["multi_attempt_rate"]
    assert test["low"] <= -RATE * EFFECT <= test["high"] < 0
    assert test["p_holm"] < 0.05
    assert found["trends"]["multi_attempt_rate"]["high"] < 0
    assert found["comparisons"]["ablated"]["tests"]["mean_first"]["difference"] == pytest.approx(0)
    condition, mode = {"scale": ("scaled to 50%", "scale"), "level": ("held at 50%", "clamp")}[partial]
    with runs.ledger(name) as ledger:
        held = ledger.rows("planted", "measure", condition)[0].trial.interventions
    half = {d.latent: 0.5 if partial == "scale" else d.level / 2 for d in detectors_in(runs, name).detectors}
    assert {i.latent: i.value for i in held if i.mode == mode} == half
    assert set(half) == set(DETECTORS)
    assert len(held) == 1 + len(half)


def test_doses_that_come_to_the_same_number_of_detectors_are_measured_once() -> None:
    shares = {"none": 0.0, "all": 1.0, "quarter": 0.25, "half": 0.5, "most": 0.75}
    doses = [Dose(condition=name, share=share, level=0.0) for name, share in shares.items()]
    for size, expected in {1: {0, 1}, 2: {0, 1, 2}, 3: {0, 1, 2, 3}, 4: {0, 1, 2, 3, 4}}.items():
        kept = distinct([*doses, Dose(condition="held", share=1.0, level=0.5)], size)
        assert {d.latents for d in kept if not d.level} == expected
        assert len(kept) == len(expected) + 1
        assert all(d.share == d.latents / size for d in kept)
        assert {"none", "all", "held"} <= {d.condition for d in kept}  # the first name stands for all


def test_dose_options_are_checked() -> None:
    for name, value in (("doses", [1.5]), ("levels", [-1]), ("doses", "x")):
        config = build_config("detector-ablation", ("x",)).model_copy(update={"options": {name: value}})
        with pytest.raises(SteerbackError, match=f"detector-ablation options: {name}"):
            make_experiment(config)


def test_random_sets_leave_the_planted_rate_alone_and_the_detectors_stand_out(runs: Runs) -> None:
    _, folder = runs.run("random-ablation", "options.sets=4", base="detectors")
    found = json.loads((folder / "summary.json").read_text())["targets"]["planted"]
    with runs.ledger("random-ablation") as ledger:
        steered = {r.trial.latent for r in ledger.rows("planted", "measure", "baseline")}
    drawn = [set(s) for s in found["random_sets"]["sets"]]
    assert len(drawn) == 4
    assert all(len(s) == 3 and not s & (set(DETECTORS) | steered) for s in drawn)
    for number in range(1, 5):
        assert inside(found["conditions"][f"random {number}"]["headline"]["multi_attempt_rate"], RATE)
    ranks = found["ranks"]["multi_attempt_rate"]
    assert (ranks["below"], ranks["above"], ranks["p"]) == (0, 4, 1 / 5)
    assert found["detectors_against_sets"]["random 1"]["tests"]["multi_attempt_rate"]["high"] < 0
    assert (folder / "match.csv").read_text().count("planted") == 4


def test_rank_p_is_uniform_where_nothing_is_special() -> None:
    rng = np.random.default_rng(0)
    ranks = [rank(value, others) for value, *others in rng.normal(size=(400, 10)).tolist()]
    p = [r.p for r in ranks if r is not None]
    assert len(p) == 400
    assert np.mean(np.array(p) <= 0.1) == pytest.approx(0.1, abs=0.04)
    assert min(p) == pytest.approx(0.1)


def test_rank_counts_the_sets_on_either_side() -> None:
    r = rank(3.0, [1.0, 2.0, 5.0], baseline=4.0)
    assert r is not None
    assert (r.below, r.above, r.sets, r.low, r.high, r.mean, r.baseline) == (2, 1, 3, 1, 5, pytest.approx(8 / 3), 4)
    assert rank(None, [1.0]) is None
    assert rank(1.0, []) is None
