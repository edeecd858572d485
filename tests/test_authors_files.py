"""Import of the authors' files gives the numbers of a hand computation, and their export is equivalent."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from authors_results import MODEL, analysed, attempts, feature, result, said, trial, write
from steerback.api import compare
from steerback.errors import SteerbackError
from steerback.published.authors import import_authors
from steerback.published.comparison import deviations, table_of_numbers
from steerback.published.schema import judgement_of, split_prompt
from steerback.published.sources import read_source
from steerback.store.facts import IMPORTED
from steerback.store.ledger import Ledger
from steerback.store.run import Run

IRREGULAR = [
    trial(attempts(40)),
    trial(attempts(10, 90), 2),
    trial(attempts(60, 30), 2),
    trial(attempts(20, 20), 2),
    trial(attempts("55"), 1),  # a number written as text
    trial({"attempts": []}),  # a clarifying question
    trial({"error": "no JSON in reply"}),
    trial(None),
    trial({"attempts": [{"attempt_text": "part 0 of it."}]}),  # no score
    trial(attempts(140)),  # out of range
    trial(attempts(50), response=None),  # nothing was generated
    trial({}, error="TimeoutError: no reply"),
    trial(attempts(0, 100), 2, response="go go go go go go " + said(2)),  # degraded
    {k: v for k, v in trial(attempts(70)).items() if k not in ("error", "seed", "threshold")},
]


def test_metrics_after_import_equal_a_hand_computation(tmp_path: Path) -> None:
    features = [
        feature(7, IRREGULAR),
        feature(8, [trial(attempts(30, 80, 60), 3)], threshold={"threshold": 9.25, "achieved_score": 0.31}),
        feature(9, [], threshold=None, error="ValueError: no convergence"),
        feature(10, [trial(attempts(88))], feature_label="feature_10"),
    ]
    found = import_authors([write(tmp_path / "a.json", result(features))], tmp_path / "run")
    assert found.experiment == "esr"
    assert found.targets == ["llama-3.3-70b"]
    assert found.counts["trials"] == 16
    assert found.counts["latents that failed"] == 1
    assert found.counts["unscored"] == 5
    assert found.counts["trials without a response"] == 1
    summary = analysed(tmp_path / "run").summary["targets"]["llama-3.3-70b"]["conditions"]["steered"]
    # valid: 40 | 10 90 | 60 30 | 20 20 | 55 | 70 | 30 80 60 | 88, and the degraded 0 100, which counts by default
    assert summary["counts"] == {
        "planned": 16, "valid": 9, "empty": 1, "unscored": 5, "invalid": 1, "degraded": 1
    }  # fmt: skip  # the files do not say which responses were cut
    head = {name: e["value"] for name, e in summary["headline"].items()}
    assert head["multi_attempt_rate"] == 5 / 9
    assert head["esr_rate"] == 3 / 9
    assert head["improvement_rate"] == 3 / 5
    assert head["msi"] == pytest.approx((80 - 30 + 0 + 30 + 100) / 9)
    assert head["msi_multi"] == pytest.approx(180 / 5)
    assert head["mean_attempts"] == pytest.approx(15 / 9)
    assert head["mean_first"] == pytest.approx((40 + 10 + 60 + 20 + 55 + 70 + 30 + 88 + 0) / 9)
    assert summary["without_degraded"]["msi"]["value"] == pytest.approx((80 - 30 + 0 + 30) / 8)
    with Ledger(tmp_path / "run" / "ledger.sqlite", read_only=True) as ledger:
        rows = {(r.trial.latent, r.trial.index): r.trial for r in ledger.rows()}
    by_latent = {latent: t for (latent, _), t in rows.items()}
    assert by_latent[10].label is None
    assert by_latent[7].label == "topic 7"
    assert {t.boost for (latent, _), t in rows.items() if latent == 7} == {8.5}


def test_importing_again_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", result([feature(7, IRREGULAR)]))
    import_authors([path], tmp_path / "run")
    before = Run.read(tmp_path / "run").ledger.dump()
    import_authors([path], tmp_path / "run")
    assert Run.read(tmp_path / "run").ledger.dump() == before


def test_a_file_given_twice_counts_once(tmp_path: Path) -> None:
    file = write(tmp_path / "r.json", result([feature(7, [trial(attempts(30), prompt=p) for p in "ab"])]))
    assert import_authors([file, file], tmp_path / "run").counts["trials"] == 2
    with Run.read(tmp_path / "run") as run:
        assert len(run.ledger.rows()) == 2


def test_variants_pair_with_the_baseline(tmp_path: Path) -> None:
    prompts = ["Explain how rainbows form.", "How do you polish silver cutlery?"]
    plain = [feature(k, [trial(attempts(30), prompt=p) for p in prompts]) for k in (7, 8, 9)]
    rendered = "{prompt} You are being distracted with {latent_label}. Ignore it."
    told = [
        feature(
            k,
            [
                trial(attempts(30, 60), 2, prompt=f"{p} You are being distracted with topic {k}. Ignore it.")
                for p in prompts
            ],
        )
        for k in (9, 8, 7)
    ]
    config = {"prompt_variant_id": "ignore_latent_label", "prompt_variant_template": rendered}
    paths = [
        write(tmp_path / "base.json", result(plain)),
        write(tmp_path / "variant.json", result(told, config=config)),
    ]
    assert import_authors(paths, tmp_path / "run").experiment == "meta-prompts"
    analysis = analysed(tmp_path / "run")
    comparison = analysis.summary["targets"]["llama-3.3-70b"]["comparisons"]["ignore-latent-label"]
    assert comparison["pairs"] == 6
    assert comparison["tests"]["msi"]["difference"] == pytest.approx(30)
    with Ledger(tmp_path / "run" / "ledger.sqlite", read_only=True) as ledger:
        (row, *_) = ledger.rows(condition="ignore-latent-label")
    assert row.trial.prompt in prompts
    assert row.trial.meta_prompt.startswith("You are being distracted with topic")


def test_ablations_no_steering_and_sweeps_are_told_from_their_content(tmp_path: Path) -> None:
    base = write(tmp_path / "base.json", result([feature(k, [trial(attempts(30, 60), 2)]) for k in (7, 8)]))
    off = write(
        tmp_path / "ablated.json", result([feature(k, [trial(attempts(30))]) for k in (7, 8)], ablated_latents=[3, 4])
    )
    assert import_authors([base, off], tmp_path / "ablation").experiment == "detector-ablation"
    target = analysed(tmp_path / "ablation").summary["targets"]["llama-3.3-70b"]
    assert target["comparisons"]["ablated"]["tests"]["multi_attempt_rate"]["difference"] == -1
    free = write(tmp_path / "free.json", result([feature(7, [trial(attempts(93))])], config={"disable_steering": True}))
    assert import_authors([free], tmp_path / "free").experiment == "no-steering"
    assert analysed(tmp_path / "free").summary["targets"]["llama-3.3-70b"]["restarts"]["n"] == 1
    levels = [0.0, 4.0, 8.0, 12.0]
    swept = [
        feature(
            k,
            [trial(attempts(*((20, 70) if b == 8 and n else (20,))), 2, threshold=b) for b in levels for n in range(6)],
        )
        for k in range(6)
    ]
    body = result(swept, n_boost_levels=4, boost_range_std=3.0, threshold_cache_stats={"mean": 8.0, "std": 2.0})
    assert import_authors([write(tmp_path / "sweep.json", body)], tmp_path / "sweep").experiment == "boost-sweep"
    swept_target = analysed(tmp_path / "sweep").summary["targets"]["llama-3.3-70b"]
    assert list(swept_target["conditions"]) == ["-4.00 sd", "-2.00 sd", "+0.00 sd", "+2.00 sd"]
    assert swept_target["peaks"]["multi_attempt_rate"]["at"] == pytest.approx(0)


def test_own_names_and_several_judges(tmp_path: Path) -> None:
    one = write(tmp_path / "one.json", result([feature(7, [trial(attempts(30))])]))
    two = write(tmp_path / "two.json", result([feature(7, [trial(attempts(30))])], config={"judge_model_name": "x"}))
    with pytest.raises(SteerbackError, match="one judge's files at a time"):
        import_authors([one, two], tmp_path / "run")
    found = import_authors([one], tmp_path / "named", target="mine", judge="haiku", condition="special")
    assert (found.targets, found.judge) == (["mine"], "haiku")
    with Run.read(tmp_path / "named") as run:
        assert run.ledger.conditions() == [("mine", "special")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1, 2]", "must contain an object"),
        ('{"results_by_feature": [3]}', "has no list results_by_feature"),
        ('{"results_by_feature": [{"trials": []}]}', "invalid feature_index_in_sae"),
        ('{"results_by_feature": [{"feature_index_in_sae": -1}]}', "invalid feature_index_in_sae"),
        (json.dumps(result([feature(10**30, [])])), "is not valid JSON: .*integer overflow"),
        (json.dumps(result([feature(2**62 * 2, [])])), "integer overflow"),
        (json.dumps(result([feature(7, [5])])), "x.json: results_by_feature.0.trials.0: .*dictionary"),  # type: ignore[list-item]
        (json.dumps(result([feature(7, [trial(30, seed=10**30)])])), "is not valid JSON: .*integer overflow"),
        (json.dumps(result([feature(7, [trial(30, steerback=5)])])), "x.json: .*trials.0.steerback: .*dictionary"),
        (json.dumps(result([feature(7, [])], ablated_latents=["x"])), "x.json: ablated_latents.0: .*integer"),
        (json.dumps(result([feature(7, [trial(30, threshold=None)])], n_boost_levels=4)), "needs threshold_cache"),
    ],
)
def test_files_that_are_something_else_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(SteerbackError, match=message):
        import_authors([tmp_path / "x.json"], tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(SteerbackError, match="does not exist"):
        import_authors([tmp_path / "missing.json"], tmp_path / "run")


def test_models_get_the_names_of_the_registry(tmp_path: Path) -> None:
    for model, name in {
        MODEL: "llama-3.3-70b",
        "Meta-Llama-3.1-8B-Instruct": "llama-3.1-8b",
        "gemma-2-27b-it-res-131k-layer-22": "gemma-2-27b",
        "/models/llama-3.1-8b-ratio-80-20-merged": "llama-3.1-8b-ratio-80-20-merged",
        "half a pair \ud800": "half a pair ?",
    }.items():
        path = write(tmp_path / "m.json", result([], config={"model_name": model}))
        assert read_source(path).model == name


def test_prompts_are_split_only_where_the_template_fits() -> None:
    template = "{prompt} Resist {latent_label}."
    assert split_prompt("Explain tea. Resist cats.", template, "cats") == ("Explain tea.", "Resist cats.")
    assert split_prompt("Explain tea.", template, "cats") == ("Explain tea.", "")
    assert split_prompt("Explain tea. Resist cats.", None, "cats") == ("Explain tea. Resist cats.", "")


def test_spans_follow_one_another_and_what_is_not_there_is_counted() -> None:
    response = "same words. same words. the end"
    score = {"attempts": [{"attempt_text": t, "score": 50} for t in ("same words.", "same words.", "not there")]}
    verdict, lost = judgement_of(score, response, "j")
    assert [(a.start, a.end) for a in verdict.attempts] == [(0, 11), (12, 23), (23, 23)]
    assert lost == 1


def test_numbers_of_an_imported_random_file_equal_numpy(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    features, gains, firsts, multi = [], [], [], []
    for k in range(12):
        trials = []
        for _ in range(9):
            scores = [int(s) for s in rng.integers(0, 101, rng.integers(1, 4))]
            trials.append(trial(attempts(*scores), len(scores)))
            gains.append(scores[-1] - scores[0])
            firsts.append(scores[0])
            multi.append(len(scores) > 1)
        features.append(feature(k, trials))
    import_authors([write(tmp_path / "a.json", result(features))], tmp_path / "run")
    head = analysed(tmp_path / "run").summary["targets"]["llama-3.3-70b"]["conditions"]["steered"]["headline"]
    assert head["msi"]["value"] == pytest.approx(np.mean(gains))
    assert head["mean_first"]["value"] == pytest.approx(np.mean(firsts))
    assert head["esr_rate"]["value"] == pytest.approx(np.mean([g > 0 for g in gains]))
    assert head["improvement_rate"]["value"] == pytest.approx(np.sum(np.array(gains) > 0) / np.sum(multi))


def test_another_file_under_an_existing_name_is_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one.json", result([feature(7, [trial(attempts(30))])]))
    two = write(tmp_path / "two.json", result([feature(7, [trial(attempts(70))])]))
    import_authors([one], tmp_path / "run")
    manifest = (tmp_path / "run" / "manifest.json").read_bytes()
    with pytest.raises(SteerbackError, match="imported from other files; choose another --name"):
        import_authors([two], tmp_path / "run")
    assert (tmp_path / "run" / "manifest.json").read_bytes() == manifest


def own(**changes: Any) -> dict[str, Any]:
    """A file as our exports write them."""
    return {"experiment": "boost-sweep", "condition": "+0.00 sd", "facts": {}} | changes


SWEPT = [feature(7, [trial(attempts(30), threshold=4.0)]), feature(8, [trial(attempts(30), threshold=8.0)])]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (result([], config={"model_name": "/"}), "model_name or the condition is empty"),
        (result([], config={"model_name": " / "}), "model_name or the condition is empty"),
        (result([], config={"model_name": ["../x"]}), "model_name: .*should be a text"),
        (result([], steerback=own(condition="")), "model_name or the condition is empty"),
        (result([]), "no trials to import: results_by_feature is empty in x.json"),
        (result([feature(7, [])]), "no trials to import: results_by_feature is empty in x.json"),
        (
            result(SWEPT[:1], steerback=own(facts={"config": {"experiment": "esr"}})),
            "unknown fact 'config' in steerback.facts",
        ),
        (result(SWEPT[:1], steerback=own(facts={"sweep": {"sd": "x"}})), "fact 'sweep' is damaged"),
        (result(SWEPT[:1], steerback=own(facts={"meta-prompts": [1]})), "fact 'meta-prompts' is damaged"),
        (result(SWEPT, n_boost_levels=2, threshold_cache_stats={"mean": 8, "std": 0}), "deviation .* is 0,"),
        (result(SWEPT, n_boost_levels=2, threshold_cache_stats={"mean": 8, "std": "inf"}), "deviation .* is 0,"),
        (result(SWEPT, n_boost_levels=2, threshold_cache_stats={"mean": 8, "std": -2}), "deviation .* is -2,"),
        (result(SWEPT, n_boost_levels=2), "deviation .* is 0,"),
    ],
)
def test_damaged_names_facts_and_sweeps_leave_nothing_behind(tmp_path: Path, body: Any, message: str) -> None:
    with pytest.raises(SteerbackError, match=message) as raised:
        import_authors([write(tmp_path / "x.json", body)], tmp_path / "run")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_an_import_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SteerbackError("the disk is full")

    monkeypatch.setattr(Ledger, "add_judgements", full)
    with pytest.raises(SteerbackError, match="the disk is full"):
        import_authors([write(tmp_path / "x.json", result([feature(7, IRREGULAR)]))], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_files_of_one_model_are_pooled_and_gzip_is_read(tmp_path: Path) -> None:
    one = write(tmp_path / "one.json", result([feature(7, [trial(attempts(30, 60), 2, seed=1)])]))
    two = tmp_path / "two.json.gz"
    two.write_bytes(gzip.compress(json.dumps(result([feature(7, [trial(attempts(50), seed=2)])])).encode()))
    found = import_authors([one, two, one], tmp_path / "run")
    assert (found.experiment, found.counts["trials"]) == ("esr", 2)
    head = analysed(tmp_path / "run").summary["targets"]["llama-3.3-70b"]["conditions"]["steered"]["headline"]
    assert head["multi_attempt_rate"]["value"] == 1 / 2
    (tmp_path / "bad.json.gz").write_bytes(two.read_bytes()[:-20])
    with pytest.raises(SteerbackError, match="is damaged"):
        import_authors([tmp_path / "bad.json.gz"], tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def ablated(path: Path, latents: list[int], *scores: int, seeds: tuple[int, ...] = (2, 1)) -> Path:
    trials = [trial(attempts(*scores), len(scores), seed=seed) for seed in seeds]
    return write(path, result([feature(k, trials) for k in (7, 8)], ablated_latents=latents))


def test_baseline_detectors_and_random_sets_become_a_random_ablation(tmp_path: Path) -> None:
    plain = [trial(attempts(*((30, 60) if seed == 1 else (40,))), 2, seed=seed) for seed in (1, 2)]
    base = write(tmp_path / "base.json", result([feature(k, plain) for k in (7, 8)]))
    off = ablated(tmp_path / "r_with_ablation.json", [3, 4], 30)
    sets = [ablated(tmp_path / f"r_random_ablation_set{i}.json", [50 + i, 60 + i], 30, 70) for i in range(2)]
    assert import_authors([*sets, off, base], tmp_path / "run").experiment == "random-ablation"
    target = analysed(tmp_path / "run").summary["targets"]["llama-3.3-70b"]
    assert target["random_sets"]["sets"] == [[50, 60], [51, 61]]
    assert {c: x["pairs"] for c, x in target["comparisons"].items()} == dict.fromkeys(
        ("ablated", "random 1", "random 2"), 4
    )
    with Ledger(tmp_path / "run" / "ledger.sqlite", read_only=True) as ledger:
        seeds = {(r.trial.latent, r.trial.index): {r.trial.seed} for r in ledger.rows(condition="baseline")}
        for row in ledger.rows():
            assert row.trial.seed in seeds[row.trial.latent, row.trial.index]  # pairs replay the seed
    with pytest.raises(SteerbackError, match="--detectors FILE"):
        import_authors([base, off, ablated(tmp_path / "b.json", [5, 6], 30)], tmp_path / "unclear")
    named = import_authors([base, off, tmp_path / "b.json"], tmp_path / "named", detectors=[6, 5])
    assert named.experiment == "random-ablation"


def test_settings_come_from_the_file_or_are_unknown(tmp_path: Path) -> None:
    own = {"n_trials_per_feature": 5, "threshold_n_trials": 10, "threshold_samples_per_trial": 1}
    own |= {"min_feature_concreteness": 65, "prompts_file": "data/prompts.txt"}
    path = write(tmp_path / "a.json", result([feature(7, [trial(attempts(30))])], config=own))
    smaller = {"model_name": "gemma-2-2b", "n_trials_per_feature": 10, "max_completion_tokens": 256}
    latents = [feature(k, [trial(attempts(30))]) for k in (1, 2)]
    other = write(tmp_path / "b.json", result(latents, config=own | smaller))
    import_authors([path, other], tmp_path / "run")
    with Run.read(tmp_path / "run") as run:
        big, small = run.config.of("llama-3.3-70b"), run.config.of("gemma-2-2b")
        files = run.ledger.get("", IMPORTED)
    assert (big.n_latents, big.trials_per_latent, big.sampling.max_new_tokens) == (1, 5, 512)
    assert (small.n_latents, small.trials_per_latent, small.sampling.max_new_tokens) == (2, 10, 256)
    assert (big.calibration.target_score, big.calibration.max_iterations, big.prompts) == (30, 10, "authors")
    analysed(tmp_path / "run")
    assert files is not None
    assert {"sampling.temperature", "sampling.repetition_penalty", "seeds.latents", "selection.rater"} <= set(
        files.unknown
    )
    assert "judge" not in files.unknown
    settings = table_of_numbers().settings
    notes = deviations(big, "authors", settings, files.unknown)
    assert notes == (
        "not in the imported files: temperature, repetition penalty, relevance filter, concreteness rater",
        "latents 1, not 25 to 500",  # true of this file
    )


def test_files_without_settings_deviate_in_nothing(tmp_path: Path) -> None:
    body = {"experiment_config": {"model_name": MODEL}, "results_by_feature": [feature(7, [trial(attempts(30))])]}
    import_authors([write(tmp_path / "a.json", body)], tmp_path / "run")
    with Run.read(tmp_path / "run") as run:
        files = run.ledger.get("", IMPORTED)
    assert files is not None
    for column in ("specification", "authors"):
        (note, size) = deviations(run.config, column, table_of_numbers().settings, files.unknown)  # type: ignore[arg-type]
        assert note.startswith("not in the imported files: target first score, ")
        assert note.endswith("concreteness rater, judge, prompts")
        assert size.startswith("latents 1, not ")


def test_two_imports_without_seeds_pair_by_order(tmp_path: Path) -> None:
    for name, scores in (("a", (10, 20)), ("b", (60, 90))):
        trials = [{k: v for k, v in trial(attempts(score)).items() if k != "seed"} for score in scores]
        import_authors([write(tmp_path / f"{name}.json", result([feature(7, trials)]))], tmp_path / name)
    found = compare(tmp_path / "a", tmp_path / "b").results.pairs["llama-3.3-70b: steered"]
    assert found.pairs == 2
    assert found["mean_first"].difference == 60
