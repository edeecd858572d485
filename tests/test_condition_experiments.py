"""Experiments on the scripted engine: intervals contain the planted rates, plans match the specification."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planted import Held, Peaked, Runs, headline, inside, thresholds
from steerback.calibration import Calibrator, Threshold
from steerback.calibration.thresholds import THRESHOLDS, LatentThreshold
from steerback.data.prompts import META_PROMPTS, load_prompts
from steerback.engines.scripted import PlantedModel, ScriptedEngine
from steerback.errors import SteerbackError
from steerback.experiments.boost_sweep import BoostSweep, SweepOptions
from steerback.judging.scripted import ScriptedJudge
from steerback.records import LatentKey, Request
from steerback.store.ledger import Row
from steerback.study import pipeline
from steerback.study.pipeline import complete
from steerback.study.study import Study

MODEL = Peaked(
    thresholds=thresholds(),
    restart_rate=0.5,
    success_rate=0.75,
    prompt_factors={"notice yourself going off-topic": 1.8},
    unscored_rate=0.02,
    degraded_rate=0.02,
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished ESR run that the experiments start from."""
    with pytest.MonkeyPatch.context() as patch:
        made = Runs(tmp_path_factory.mktemp("runs"), patch, MODEL)
        made.run("esr")
        yield made


async def in_lockstep(self: Study) -> dict[LatentKey, Threshold]:
    """The calibration of before, one batch a round: the reference for the one that lets latents advance."""
    latents, settings = await self.latents(), self.config.calibration
    found = {x.key: Calibrator(settings.prior(self.target.prior_of(x.key)), settings) for x in latents}
    per_round = settings.trials_per_iteration
    for number in range(settings.max_iterations):
        boosts = {key: c.next_boost() for key, c in found.items()}
        plan = [
            self._at_boost("calibration", place, latent, boost, number * per_round + i)
            for place, latent in enumerate(latents)
            if (boost := boosts[latent.key]) is not None
            for i in range(per_round)
        ]
        scores: dict[Any, list[float | None]] = {}
        for row in await complete(self.bench, plan):
            scores.setdefault(row.trial.latent, []).append(row.attempts[0].score if row.attempts else None)
        for key, own in scores.items():
            found[key].update(boosts[key] or 0.0, own)
    return {key: c.finish() for key, c in found.items()}


@pytest.mark.parametrize("stop", ["none", "tolerance"])
def test_calibration_equals_lockstep_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str) -> None:
    """Equal ledgers row by row, their order aside, and equal thresholds, whichever response is finished first."""

    asked: list[int] = []

    def script(request: Request) -> str:
        if "/calibration/" in request.key:
            asked.append(int(request.key.rpartition("/")[2]) % 10_000 // 6)
        return MODEL(request)

    def calibrated(
        name: str, shuffled: bool, judge: ScriptedJudge | None = None
    ) -> tuple[list[Row], list[LatentThreshold]]:
        asked.clear()
        made = Runs(tmp_path / name, monkeypatch, MODEL)
        made.makers = replace(
            made.makers,
            judge=lambda _: judge or ScriptedJudge(),
            engine=lambda t, _: ScriptedEngine(script, target=t.name, n_latents=64, shuffled=shuffled),
        )
        made.run("esr", "n_latents=6", "trials_per_latent=1", f"calibration.stop={stop}", "draws=100")
        with made.ledger("esr") as ledger:
            rows = ledger.rows(judge="scripted")
            thresholds = ledger.get("planted", THRESHOLDS)
        assert thresholds is not None
        return rows, thresholds

    monkeypatch.setattr(pipeline, "FLUSH_ROWS", 1)  # a latent advances while others are still in their round
    first, second = calibrated("a", False), calibrated("b", True)
    assert asked != sorted(asked)  # rounds of different latents overlapped
    if stop == "none":  # the first latent gets a verdict only once another one is in its last round
        first_trial, last_trial = (f"planted/calibration/threshold/{n}" for n in (0, 5 * 10_000 + 8 * 6 - 1))
        assert calibrated("slow", False, Held(first_trial, last_trial)) == first
    monkeypatch.setattr(Study, "_calibrate", in_lockstep)
    lockstep = calibrated("c", False)
    assert first == second == lockstep
    assert asked == sorted(asked)
    used = [r for r in first[0] if r.trial.stage == "calibration"]
    assert len(used) == 6 * 8 * 6 if stop == "none" else len(used) < 6 * 8 * 6


def test_boost_sweep_recovers_rates_and_the_peak(runs: Runs) -> None:
    runs.draw = True
    analysis, folder = runs.run("boost-sweep", base="esr")
    runs.draw = False
    found = analysis.summary["targets"]["planted"]
    sd, levels = found["sweep"]["sd"], found["sweep"]["levels"]
    assert levels[0] == -1.5
    assert levels[-1] == 3.0
    assert len(levels) == 8
    used = {r.trial.latent: r.trial.boost for r in runs.ledger("esr").rows(stage="measure")}
    assert sd == pytest.approx(np.std(list(used.values()), ddof=1))
    hits = 0
    for level in levels:
        rows = runs.ledger("boost-sweep").rows(stage="measure", condition=f"{level:+.2f} sd")
        assert all(r.trial.boost == pytest.approx(used[r.trial.latent] + level * sd) for r in rows)
        truth = np.mean([MODEL.restart_probability(r.trial.request(None)) for r in rows])  # type: ignore[arg-type]
        hits += inside(headline(analysis.summary, f"{level:+.2f} sd")["multi_attempt_rate"], truth)
    assert hits >= 7
    peak = found["peaks"]["multi_attempt_rate"]
    assert peak["low"] <= MODEL.offset / sd + 0.15
    assert peak["high"] >= MODEL.offset / sd - 0.15
    assert peak["edge"] < 0.05
    assert (folder / "figure3.pdf").is_file()
    assert "sd" in (folder / "peaks.csv").read_text() or "at" in (folder / "peaks.csv").read_text()


def test_levels_below_zero_are_dropped_and_counted(runs: Runs) -> None:
    analysis, _ = runs.run("boost-sweep", "options.low=-6", "options.levels=3", "limit=48", base="esr", name="low")
    sweep = analysis.summary["targets"]["planted"]["sweep"]
    rows = runs.ledger("low").rows(stage="measure")
    assert sweep["dropped"]["-6.00 sd"] > 0
    assert min(r.trial.boost for r in rows if r.trial.boost is not None) >= 0
    kept = {r.trial.latent for r in rows if r.trial.condition == "-6.00 sd"}
    assert len(kept) + sweep["dropped"]["-6.00 sd"] == sweep["latents"]
    assert any("negative" in line for line in analysis.shown.lines)


def test_authors_preset_sweeps_from_minus_three() -> None:
    from steerback.config import authors
    from steerback.experiments import make_experiment

    sweep = make_experiment(authors("boost-sweep", ("x",)))
    assert isinstance(sweep, BoostSweep)
    assert (sweep.levels()[0], sweep.levels()[-1], len(sweep.levels())) == (-3.0, 3.0, 10)
    # mean 5 and population sd 2 by hand; the sample's would be 2.138
    found, boosts = sweep.plan([2, 4, 4, 4, 5, 5, 7, 9], "x")
    assert (found.mean, found.sd, found.boosts, found.dropped) == (5, 2, "absolute", {})
    assert boosts == pytest.approx([0, 1 / 3, 5 / 3, 3, 13 / 3, 17 / 3, 7, 25 / 3, 29 / 3, 11])
    assert found.levels == pytest.approx([-2.5, -7 / 3, -5 / 3, -1, -1 / 3, 1 / 3, 1, 5 / 3, 7 / 3, 3], abs=1e-6)
    # mean 4 and sd 4 by hand: -8, -16/3, -8/3 and 0 are all 0
    found, boosts = sweep.plan([0, 8], "x")
    assert boosts == pytest.approx([0, 8 / 3, 16 / 3, 8, 32 / 3, 40 / 3, 16])
    assert found.levels[0] == -1
    # 5, 5.004 and 5.008 by hand: the first two are both named +0.00 sd
    close = BoostSweep(SweepOptions(boosts="shared", levels=3, low=0, high=0.008))
    assert close.plan([4, 6], "x")[1] == pytest.approx([5, 5.008])
    with pytest.raises(SteerbackError, match="all thresholds are 3"):
        sweep.plan([3, 3], "x")


def test_shared_boosts_are_the_same_for_all_latents(runs: Runs) -> None:
    options = ("options.boosts=shared", "options.levels=3", "options.low=-9", "options.high=1", "limit=48")
    analysis, _ = runs.run("boost-sweep", *options, base="esr", name="shared")
    sweep = analysis.summary["targets"]["planted"]["sweep"]
    trials = [r.trial for r in runs.ledger("shared").rows(stage="measure")]
    used = {r.trial.latent: r.trial.boost for r in runs.ledger("esr").rows(stage="measure")}
    mean, sd = np.mean(list(used.values())), np.std(list(used.values()))
    wanted = sorted({max(mean + k * sd, 0) for k in (-9, -4, 1)})
    assert wanted[0] == 0
    by_condition = {c: {t.boost for t in trials if t.condition == c} for c in {t.condition for t in trials}}
    assert sorted(b for boosts in by_condition.values() for b in boosts) == pytest.approx(wanted)
    assert len({(t.latent, t.seed, t.condition) for t in trials}) == len(trials) == 48 * len(sweep["levels"])
    assert sweep["levels"][0] == pytest.approx(-mean / sd, abs=1e-6)
    assert any("all latents at the same boosts" in line for line in analysis.shown.lines)


@pytest.mark.parametrize("wrong", ["options.levels=1", "options.low=4", "options.high=many"])
def test_boost_sweep_refuses_senseless_levels(runs: Runs, wrong: str) -> None:
    with pytest.raises(SteerbackError, match="boost-sweep"):
        runs.run("boost-sweep", wrong, base="esr", name="none")


def test_meta_prompts_find_the_one_that_works(runs: Runs) -> None:
    analysis, _ = runs.run("meta-prompts", base="esr")
    found = analysis.summary["targets"]["planted"]
    assert list(found["conditions"]) == ["baseline", *META_PROMPTS]
    tests = {name: c["tests"]["multi_attempt_rate"] for name, c in found["comparisons"].items()}
    assert tests["self-monitor"]["p_holm"] < 0.01
    assert tests["self-monitor"]["low"] > 0
    assert all(t["difference"] == 0 for name, t in tests.items() if name != "self-monitor")
    rows = {r.trial.condition: r.trial for r in runs.ledger("meta-prompts").rows(stage="measure")}
    named = rows["steered-with-label"]
    assert f"with label concrete thing {named.latent}." in named.meta_prompt
    assert named.request(None).prompt == f"{named.prompt} {named.meta_prompt}"  # type: ignore[arg-type]
    assert rows["self-monitor"].seed == rows["baseline"].seed


def test_meta_prompt_sets_and_lists(runs: Runs) -> None:
    from steerback.config import authors, specification
    from steerback.experiments import make_experiment

    four = make_experiment(authors("meta-prompts", ("x",))).variants()
    assert tuple(four) == ("dont-get-distracted", "distracted-with-label", "self-monitor", "resist-manipulation")
    chosen = specification("meta-prompts", ("x",)).model_copy(
        update={"options": {"variants": "self-monitor, stay-on-topic"}}
    )
    assert tuple(make_experiment(chosen).variants()) == ("self-monitor", "stay-on-topic")
    with pytest.raises(SteerbackError, match=r"unknown meta-prompt 'shout'.*self-monitor"):
        runs.run("meta-prompts", "options.variants=shout", base="esr", name="none")


def test_no_steering_bounds_the_rate(runs: Runs) -> None:
    runs.draw = True
    analysis, folder = runs.run("no-steering", base="esr")
    runs.draw = False
    restarts = analysis.summary["targets"]["planted"]["restarts"]
    assert restarts["multi_attempt"] == 0
    assert restarts["upper_clopper_pearson"] == pytest.approx(1 - 0.025 ** (1 / restarts["n"]))
    assert restarts["upper"] == max(restarts["upper_by_latent"], restarts["upper_by_prompt"])
    assert restarts["upper"] > restarts["upper_clopper_pearson"]
    assert inside(headline(analysis.summary, "baseline")["mean_first"], 50)
    rows = runs.ledger("no-steering").rows(stage="measure", condition="unsteered")
    steered = runs.ledger("esr").rows(stage="measure")
    assert [(r.trial.latent, r.trial.label, r.trial.prompt, r.trial.seed) for r in rows] == [
        (r.trial.latent, r.trial.label, r.trial.prompt, r.trial.seed) for r in steered
    ]
    assert all(r.trial.interventions == () for r in rows)
    assert (folder / "figureA8.png").is_file()


def test_no_steering_alone_needs_no_calibration(runs: Runs) -> None:
    analysis, _ = runs.run("no-steering", name="alone")
    assert list(analysis.summary["targets"]["planted"]["conditions"]) == ["unsteered"]
    assert not runs.ledger("alone").rows(stage="calibration")
    assert "figureA8" not in analysis.shown.figures


def test_several_targets_are_pooled(runs: Runs) -> None:
    runs.scripts["second"] = PlantedModel(thresholds=thresholds(12), restart_rate=0.0)
    analysis, _ = runs.run(
        "no-steering", "n_latents=4", "trials_per_latent=5", targets=("planted", "second"), name="two"
    )
    pooled = analysis.summary["pooled"]
    assert pooled["n"] == sum(t["restarts"]["n"] for t in analysis.summary["targets"].values())
    esr, _ = runs.run("esr", "n_latents=6", targets=("planted", "second"), name="esr-two")
    rates = {t: headline(esr.summary, "steered", t)["multi_attempt_rate"] for t in ("planted", "second")}
    assert rates["planted"]["low"] > rates["second"]["value"] == 0
    assert rates["second"]["high"] > 0
    assert "figure2" in esr.shown.figures


def test_held_out_prompts_are_measured_and_disjoint(runs: Runs) -> None:
    analysis, _ = runs.run("held-out", base="esr")
    own = set(load_prompts("held-out"))
    assert len(own) == 20
    for other in ("evaluation", "organism-discovery", "organism-held-out", "discovery"):
        assert not own & set(load_prompts(other))
    rows = runs.ledger("held-out").rows(stage="measure", condition="held-out")
    assert {r.trial.prompt for r in rows} == own
    truth = np.mean([MODEL.restart_probability(r.trial.request(None)) for r in rows])  # type: ignore[arg-type]
    assert inside(headline(analysis.summary, "held-out")["multi_attempt_rate"], truth)
    assert analysis.summary["targets"]["planted"]["comparisons"]["held-out"]["against"] == "baseline"
    with pytest.raises(SteerbackError, match="share"):
        runs.run("held-out", "options.prompts=evaluation", base="esr", name="none")


def test_organisms_have_held_out_prompts_of_their_own() -> None:
    from types import SimpleNamespace

    from steerback.experiments.conditions import held_out_prompts
    from steerback.targets import resolve

    study: Any = SimpleNamespace(target=resolve("organism-s"), prompts=())
    assert held_out_prompts(study, "auto") == load_prompts("organism-held-out")


def test_an_experiment_resumed_changes_nothing(runs: Runs) -> None:
    _, folder = runs.run("no-steering", base="esr", name="again")
    before = (folder / "summary.json").read_bytes(), runs.ledger("again").dump()
    runs.run("no-steering", base="esr", name="again")
    assert before == ((folder / "summary.json").read_bytes(), runs.ledger("again").dump())


@pytest.mark.rendered("png")
def test_nothing_restarts_and_everything_still_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = Runs(tmp_path, monkeypatch, PlantedModel(thresholds=thresholds(), restart_rate=0.0))
    quiet.draw = True
    small = ("n_latents=3", "trials_per_latent=4")
    quiet.run("esr", *small)
    for name in ("boost-sweep", "meta-prompts", "no-steering", "held-out", "prefill-control", "matched-prefix"):
        analysis, folder = quiet.run(name, base="esr")
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["experiment"] == name
        assert all((folder / f"{figure}.png").stat().st_size > 5000 for figure in analysis.shown.figures)


def test_thresholds_of_other_weights_are_not_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(tmp_path, monkeypatch, PlantedModel(thresholds=thresholds()))
    weights = {"files": "before"}
    monkeypatch.setattr(ScriptedEngine, "describe", lambda self: {"engine": "scripted", **weights})
    runs.run("esr", "n_latents=3", "trials_per_latent=3")
    runs.run("no-steering", base="esr", name="same")
    weights["files"] = "after"
    with pytest.raises(SteerbackError, match="another planted: files differ"):
        runs.run("no-steering", base="esr", name="other")
