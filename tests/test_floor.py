"""The judge's floor in whole runs: measurement, display, reuse from a base run, and `floor_responses=0`."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from steerback.config import build_config
from steerback.engines.options import VllmOptions
from steerback.engines.scripted import RESTART, PlantedModel
from steerback.jobs import campaign, estimate, execute
from steerback.jobs.check import check
from steerback.records import Request
from steerback.store.progress import Plain
from steerback.store.run import stored_config
from steerback.study.floor import floor_prompts
from steerback.study.seeds import SEED_OFFSETS
from tests.planted import Runs, thresholds


@dataclass(frozen=True)
class Noisy(PlantedModel):
    """A judge sees a restart in every unsteered response, as one that invents them would."""

    def __call__(self, request: Request) -> str:
        if request.interventions:
            return super().__call__(request)
        return f"[[score 90]] It is so. {RESTART} [[score 95]] It is so."


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        found = Runs(tmp_path_factory.mktemp("floor"), patch)
        found.run("esr", "floor_responses=150", name="esr")
        yield found


@pytest.fixture
def noisy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch, Noisy(thresholds=thresholds()))


def test_a_run_measures_its_floor_with_seeds_of_its_own(runs: Runs) -> None:
    ledger = runs.ledger("esr")
    rows = ledger.rows(stage="floor", judge="scripted")
    assert len(rows) == 152  # 4 to each of 38 prompts: at least 150
    assert all(r.judgement is not None and not r.trial.interventions for r in rows)
    seeds = {r.trial.seed for r in rows}
    assert len(seeds) == len(rows)
    assert not seeds & {r.trial.seed for r in ledger.rows() if r.trial.stage != "floor"}
    first = 44 + SEED_OFFSETS["reference"]
    assert all(first <= seed < 44 + SEED_OFFSETS["discovery"] for seed in seeds)
    assert {r.trial.label for r in rows} == {r.trial.label for r in ledger.rows(stage="measure")}


def test_table_and_summary_show_the_floor_with_its_interval(runs: Runs) -> None:
    analysis = campaign.reanalyse(runs.root / "esr", draws=100)
    table = analysis.shown.tables["table"]
    assert list(table.shown.columns)[2:4] == ["multi-attempt %", "floor %"]
    assert re.fullmatch(r"0\.00 \[0\.00, \d+\.\d+\]", table.shown["floor %"][0])
    assert "152 unsteered responses" in table.caption
    (headline,) = [r for r in table.numbers.to_dict("records") if r["variant"] == "headline"]
    assert (headline["floor_multi_attempt_rate_n"], headline["floor_multi_attempt_rate_value"]) == (152, 0.0)
    assert headline["multi_attempt_rate_above_floor_p"] < 0.01
    stored = analysis.summary["targets"]["planted"]["conditions"]["steered"]["floor"]  # type: ignore[index]
    assert stored["multi_attempt_rate"]["clusters"] == 38  # prompts
    assert stored["multi_attempt_rate"]["p"] < 0.01
    assert not analysis.shown.warnings
    assert not any("not distinguishable" in line for line in analysis.shown.lines)


def test_a_floor_above_the_rate_is_said_before_the_table(noisy: Runs) -> None:
    analysis, _ = noisy.run("esr", "n_latents=4", "trials_per_latent=5", "floor_responses=150")
    printed = campaign.report(analysis)
    assert printed[0].startswith("planted: judge scripted marks restarts in 100.0")
    assert "152 unsteered" in printed[0]
    (line,) = [line for line in printed if "not distinguishable" in line]
    assert "multi-attempt rate of steered (p = 1.000)" in line
    assert "one-sided two-sample permutation test of whole clusters" in line


def test_a_run_that_starts_from_another_takes_its_floor_over(runs: Runs) -> None:
    answered: list[str] = []
    script = runs.scripts["planted"]

    def counting(request: Request) -> str:
        answered.append(request.key)
        return script(request)

    runs.scripts["planted"] = counting
    try:
        runs.run("no-steering", base="esr", name="from")
    finally:
        runs.scripts["planted"] = script
    assert answered
    assert not [key for key in answered if "/floor/" in key]
    kept = [(r.trial, r.completion, r.judgement) for r in runs.ledger("esr").rows(stage="floor", judge="scripted")]
    assert kept == [
        (r.trial, r.completion, r.judgement) for r in runs.ledger("from").rows(stage="floor", judge="scripted")
    ]


def test_other_sampling_measures_another_floor(runs: Runs) -> None:
    runs.run("no-steering", "sampling.temperature=1", "floor_responses=10", base="esr", name="warm")
    rows = runs.ledger("warm").rows(stage="floor", judge="scripted")
    assert len(rows) == 10
    assert len({r.trial.prompt for r in rows}) == 10


def test_zero_switches_the_floor_off_and_the_table_says_so(runs: Runs) -> None:
    analysis, _ = runs.run("no-steering", "floor_responses=0", "limit=10", name="none")
    assert not runs.ledger("none").rows(stage="floor")
    table = analysis.shown.tables["table"]
    assert "floor %" not in table.shown.columns
    assert "floor was not measured (floor_responses is 0" in table.caption


def test_the_estimate_counts_the_floor(runs: Runs) -> None:
    config = build_config("esr", ("planted",), "quick", overrides={"engine": "scripted", "judge": "scripted"})
    job = check(config, runs.makers)
    assert estimate.of_experiment(job, "planted")["floor"] == 152
    assert any("152 floor" in line for line in estimate.plan_lines(job, Path("x")))
    from_esr = check(
        build_config("no-steering", ("planted",), base=(str(runs.root / "esr"), stored_config(runs.root / "esr"))),
        runs.makers,
    )
    assert "floor" not in estimate.of_experiment(from_esr, "planted")


def test_prompts_of_the_floor_take_equal_part() -> None:
    assert floor_prompts(("a", "b", "c"), 4) == ["a", "b", "c", "a", "b", "c"]
    assert floor_prompts(("a", "b", "c", "d"), 2) == ["a", "c"]
    assert floor_prompts(("a",), 0) == []


def test_on_vllm_the_floor_is_measured_beside_the_experiment(runs: Runs) -> None:
    """The same trials with the same verdicts as one after the other, in a run that counts them all."""
    before = stored_config(runs.root / "esr")
    job = replace(check(before, runs.makers), engine=VllmOptions())
    shown = io.StringIO()
    execute.run(job, runs.root / "beside", Plain(shown))
    lines = shown.getvalue().splitlines()
    assert lines.index("planted: judge's floor: 152 responses, beside the next stage") + 1 == next(
        n for n, line in enumerate(lines) if line.startswith("planted: calibration: 0/")
    )
    rows = [
        sorted((r.trial.key, str(r.completion), str(r.attempts)) for r in runs.ledger(name).rows(judge="scripted"))
        for name in ("esr", "beside")
    ]
    assert rows[0] == rows[1]
