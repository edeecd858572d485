"""Effects of settings: seeds, calibration range, degraded responses, and values reused with `--from`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerback.calibration.thresholds import THRESHOLDS
from steerback.config import CalibrationConfig, build_config, parse_config
from steerback.engines.base import Arriving
from steerback.engines.scripted import PlantedModel, ScriptedEngine
from steerback.errors import SteerbackError
from steerback.jobs.check import _same_judge, check, start_from
from steerback.records import BoostPrior, Completion, Request
from steerback.store.run import stored_config
from steerback.study.seeds import FAR, SEED_OFFSETS, seed_offset
from steerback.targets import read_targets, resolve
from tests.planted import Runs, thresholds

PLACES = st.tuples(st.sampled_from(list(SEED_OFFSETS)), st.integers(0, FAR - 1) | st.integers(0, 2_000_000))


@given(PLACES, PLACES)
def test_no_two_trials_of_a_run_share_a_seed(a: tuple[str, int], b: tuple[str, int]) -> None:
    assert (seed_offset(*a) == seed_offset(*b)) == (a == b)


def test_a_seed_of_boosts_is_no_setting_and_old_runs_still_open() -> None:
    with pytest.raises(SteerbackError, match=r"unknown setting 'seeds\.boosts'"):
        build_config("esr", ("organism",), assignments=("seeds.boosts=7",))
    stored = build_config("esr", ("organism",)).model_dump(mode="json")
    stored["seeds"]["boosts"] = 43
    assert parse_config(stored).seeds.generation == 44


def test_the_range_of_calibration_is_a_setting() -> None:
    usual = BoostPrior(150, 75, 0, 300)
    assert CalibrationConfig().prior(usual) == usual
    assert CalibrationConfig(high=900).prior(usual) == BoostPrior(150, 75, 0, 900)
    assert CalibrationConfig(low=200).prior(usual) == BoostPrior(250, 25, 200, 300)
    with pytest.raises(SteerbackError, match=r"400 to 300.*set both"):
        CalibrationConfig(low=400).prior(usual)
    with pytest.raises(SteerbackError, match=r"calibration\.low \(5\) must be below calibration\.high \(5\)"):
        build_config("esr", ("organism",), assignments=("calibration.low=5", "calibration.high=5"))


def test_a_range_that_holds_no_threshold_is_widened_by_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted thresholds lie around 60, beyond the target's own range of 0 to 40."""
    runs = Runs(tmp_path, monkeypatch, PlantedModel(thresholds=thresholds(60)))
    with pytest.raises(SteerbackError, match=r"no latent reached target score 50.*calibration\.high"):
        runs.run("esr", name="narrow")
    runs.run("esr", "calibration.low=40", "calibration.high=80", name="wide")
    found = runs.ledger("wide").get("planted", THRESHOLDS) or []
    assert sum(e.threshold.usable for e in found) >= 8


def test_a_file_of_targets_changes_single_values_of_a_built_in_target(tmp_path: Path) -> None:
    file = tmp_path / "targets.toml"
    file.write_text("['llama-3.1-8b']\nboost_prior = [9, 3, 0, 20]\n")
    tables = read_targets(file)
    usual, changed = resolve("llama-3.1-8b"), resolve("llama-3.1-8b", tables)
    assert changed.boost_prior == BoostPrior(9, 3, 0, 20)
    assert dict(changed.provenance)["boost_prior"] == "the user's file of targets"
    assert (changed.model, changed.sae, changed.steer_layer) == (usual.model, usual.sae, usual.steer_layer)
    variant = resolve("llama-3.1-8b@authors", tables)
    assert (variant.boost_prior, variant.steer_layer) == (BoostPrior(9, 3, 0, 20), 12)
    file.write_text("[organism]\nboost_prior = [9, 3, 0, 20]\n")
    assert resolve("organism", read_targets(file)).boost_prior == BoostPrior(9, 3, 0, 20)
    file.write_text("[organism]\nboost_priors = [9, 3, 0, 20]\n")
    with pytest.raises(SteerbackError, match="'organism': unknown setting 'boost_priors'"):
        read_targets(file)


class Repeats(PlantedModel):
    """A planted model whose degraded responses score 0."""

    def __call__(self, request: Request) -> str:
        text = super().__call__(request)
        return re.sub(r"score [0-9.]+", "score 0.0", text) if " stone stone" in text else text


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, float, float]]:
    """By reading: headline's mean first score, the other reading's, and mean first score at calibration."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        runs = Runs(tmp_path_factory.mktemp("degraded"), patch, Repeats(thresholds=thresholds(), degraded_rate=0.3))
        for reading in ("include", "exclude"):
            analysis, _ = runs.run("esr", f"degraded={reading}", "calibration.trials_per_iteration=12", name=reading)
            summary = analysis.results.measured.summaries["planted", "steered"]  # type: ignore[attr-defined]
            assert summary.counts["degraded"] > 20
            report = analysis.results.calibration["planted"]  # type: ignore[attr-defined]
            found[reading] = (summary["mean_first"].value, summary.other["mean_first"].value, report.mean_score)
    return found


@pytest.mark.parametrize("reading", ["include", "exclude"])
def test_calibration_and_headline_count_the_same_trials(
    counted: dict[str, tuple[float, float, float]], reading: str
) -> None:
    headline, other, calibrated = counted[reading]
    assert abs(headline - 50) < 9 > abs(calibrated - 50)
    assert abs(other - 50) > abs(headline - 50) + 5


@pytest.mark.parametrize(
    "setting",
    ["calibration.target_score=30", "seeds.latents=7", "selection.concreteness=off", "degraded=exclude", "n_latents=3"],
)
def test_a_setting_that_the_base_run_has_decided_is_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, base: Runs, setting: str
) -> None:
    with pytest.raises(SteerbackError, match=rf"uses the .* of run base.*{setting.split('=')[0]}.*run without --from"):
        base.run("meta-prompts", setting, base="base", name="refused")
    assert not (base.root / "refused").exists()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    with pytest.MonkeyPatch.context() as patch:
        runs = Runs(tmp_path_factory.mktemp("from"), patch)
        runs.run("esr", name="base")
        return runs


def test_another_judge_than_that_of_the_thresholds_is_refused_by_name(base: Runs) -> None:
    start = ("base", stored_config(base.root / "base"))
    other = build_config("meta-prompts", (), overrides={"judge": "offline"}, base=(str(base.root / "base"), start[1]))
    with pytest.raises(
        SteerbackError,
        match=r"thresholds of run base, which were calibrated with judge scripted, not with judge offline",
    ):
        check(other, base.makers)
    own = {"judge": "a/model+mine", "rubrics": {"mine": "one"}}
    before = start[1].model_copy(update=own)
    after = other.model_copy(update=own | {"rubrics": {"mine": "two"}})
    with pytest.raises(SteerbackError, match=r"the rubric of judge a/model\+mine"):
        _same_judge(after, before, base.root / "base")
    _same_judge(after, before.model_copy(update={"rubrics": {"mine": "two", "else": "x"}}), base.root / "base")


def test_a_target_that_is_defined_otherwise_now_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"model": "/nowhere", "prior": {"mean": 3}}
    config = build_config("esr", ("mine",), overrides={"definitions": {"mine": model}})
    monkeypatch.setattr("steerback.jobs.check.stored_config", lambda folder: config)
    monkeypatch.setattr("steerback.jobs.check.user_tables", lambda: {"mine": model, "else": {"model": "x"}})
    assert start_from(tmp_path)[1] == config
    for changed in ({"mine": {"model": "/nowhere"}}, {"mine": {**model, "prior": {"mean": 4}}}):
        monkeypatch.setattr("steerback.jobs.check.user_tables", lambda tables=changed: tables)
        with pytest.raises(SteerbackError, match=r"definition of target mine has changed since run .* \(prior\)"):
            start_from(tmp_path)


def test_settings_of_the_measurement_are_applied(base: Runs) -> None:
    runs = base
    runs.run("esr", "seeds.generation=900", "trials_per_latent=2", base="base", name="applied")
    rows = runs.ledger("applied").rows(stage="measure")
    assert {r.trial.seed for r in rows} == {900 + r.trial.index for r in rows}
    with pytest.raises(SteerbackError, match=r"preset authors: --from"):
        build_config("esr", ("planted",), "authors", base=("base", build_config("esr", ("planted",), "quick")))


def test_targets_of_a_run_keep_their_own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes, penalty and the limit of tokens in calibration reach the engine, per target and stage."""
    runs = Runs(tmp_path, monkeypatch)
    runs.scripts["other"] = next(iter(runs.scripts.values()))
    asked: dict[tuple[str, str], set[tuple[float, int]]] = {}
    generate = ScriptedEngine.generate

    def note(requests: Sequence[Request] | None) -> Sequence[Request] | None:
        for r in requests or ():
            name, stage, *_ = r.key.split("/")
            asked.setdefault((name, stage), set()).add((r.sampling.repetition_penalty, r.sampling.max_new_tokens))
        return requests

    def watched(
        engine: ScriptedEngine, requests: Sequence[Request], more: Arriving | None = None
    ) -> AsyncIterator[tuple[str, Completion]]:
        async def noted() -> Sequence[Request] | None:
            return note(await more()) if more is not None else None

        note(requests)
        return generate(engine, requests, noted if more is not None else None)

    monkeypatch.setattr(ScriptedEngine, "generate", watched)
    row = "by_target={other: {trials_per_latent: 3, sampling: {repetition_penalty: 1.2}}}"
    runs.run("esr", row, "calibration.max_new_tokens=256", targets=("planted", "other"), name="two")
    assert asked["planted", "calibration"] == {(1.0, 256)}
    assert asked["planted", "measure"] == asked["planted", "verification"] == {(1.0, 512)}
    assert asked["other", "calibration"] == {(1.2, 256)}
    assert asked["other", "measure"] == {(1.2, 512)}
    rows = runs.ledger("two").rows(stage="measure")
    counts = {name: Counter(r.trial.latent for r in rows if r.trial.target == name) for name in ("planted", "other")}
    assert {name: set(c.values()) for name, c in counts.items()} == {"planted": {20}, "other": {3}}
    with pytest.raises(SteerbackError, match=r"of run two, .*selection"):
        row = "by_target={other: {selection: {concreteness: off}}}"
        runs.run("no-steering", row, base="two", targets=("other",), name="refused")
