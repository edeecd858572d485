"""Forks: planted rates, paired by seed, and no other change to the run."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from forking import SMALL, Continuing, a_trial, counting, files, forked
from planted import Runs, thresholds
from steerback.analysis.forks import forks
from steerback.cli import main
from steerback.engines.scripted import RESTART
from steerback.errors import SteerbackError
from steerback.figures.forks import fork_table
from steerback.jobs import execute, judging
from steerback.jobs.campaign import compared
from steerback.jobs.check import check
from steerback.jobs.fork import ForkSettings, place, prepare_fork
from steerback.records import Intervention
from steerback.report.export import export_flat
from steerback.store.facts import DETECTOR_SET, FORK, FORKS, Detector, DetectorSet
from steerback.store.merge import merge
from steerback.store.run import Run, stored_config
from steerback.study.forks import edits_of, parse_arm

ADD, OTHER, CLAMP = Intervention("add", 3, 9.0), Intervention("add", 3, 5.0), Intervention("clamp", 7, 0.0)


def planted(root: Path, patch: pytest.MonkeyPatch) -> Runs:
    return Runs(root, patch, Continuing(thresholds=thresholds(), restart_rate=0.5))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that every test forks a copy of."""
    with pytest.MonkeyPatch.context() as patch:
        return planted(tmp_path_factory.mktemp("base"), patch).run("esr", *SMALL)[1]


@pytest.fixture
def runs(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    shutil.copytree(base, tmp_path / "esr")
    return planted(tmp_path, monkeypatch)


def test_planted_rates_come_back_with_the_same_seeds_in_each_arm(runs: Runs) -> None:
    key = a_trial(runs, "esr", 1)
    result = forked(runs, "esr", key, ForkSettings("5", 200, ablate="12,40"))
    assert [a.name for a in result.arms] == ["steering on", "steering off", "12, 40 clamped"]
    on, off, held = (a.summary["multi_attempt_rate"] for a in result.arms)
    draws = [random.Random(seed).random() for seed in range(5_000_044, 5_000_244)]
    for estimate, rate in ((on, 0.3), (off, 0.8), (held, 0.1)):
        assert estimate.value == np.mean([draw < rate for draw in draws])
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low < estimate.value < estimate.high
        assert estimate.n == 200
    seeds = [[r.trial.seed for r in a.rows] for a in result.arms]
    assert seeds[0] == seeds[1] == seeds[2] == list(range(5_000_044, 5_000_244))
    assert all(r.valid_receipt for a in result.arms for r in a.rows)
    parent = runs.ledger("esr").rows(keys=[key])[0]
    assert parent.completion is not None
    for row in (row for arm in result.arms for row in arm.rows):
        assert row.trial.prefix is not None
        assert row.trial.prefix.token_ids == parent.completion.token_ids[:5]
        assert parent.completion.text.startswith(row.trial.prefix.text)
        assert row.judged_text.startswith(row.trial.prefix.text + " and further on.")
    assert result.arms[1].rows[0].trial.boost == 0
    assert result.arms[0].rows[0].trial.boost == parent.trial.boost


def test_the_paired_test_is_the_exact_test_of_discordant_seeds(runs: Runs) -> None:
    """McNemar's exact test, here where every discordant seed speaks for the same arm."""
    result = forked(runs, "esr", a_trial(runs, "esr", 1), ForkSettings("5", 16))
    on, off = ([len(r.attempts) > 1 for r in a.rows] for a in result.arms)
    only_off = int(np.sum(~np.array(on) & np.array(off)))
    assert not np.any(np.array(on) & ~np.array(off))
    comparison = result.arms[1].comparison
    assert comparison is not None
    test = comparison["multi_attempt_rate"]
    assert 0 < only_off <= 12
    assert test.p == pytest.approx(binomtest(only_off, only_off).pvalue)
    assert test.p_holm == test.p
    assert test.difference == pytest.approx(np.mean(off) - np.mean(on))
    described = json.dumps(result.to_json())
    assert "seeds of one response" in described
    assert "latent" not in described.replace("latents_as_trials", "")


def test_restarts_before_the_fork_do_not_count(runs: Runs) -> None:
    key = a_trial(runs, "esr", 2)
    parent = runs.ledger("esr").rows(keys=[key], judge="scripted")[0]
    assert parent.completion is not None
    words = parent.completion.text.split()
    result = forked(runs, "esr", key, ForkSettings(str(len(words) - 2), 20))
    for arm in result.arms:
        restarts = sum(r.completion is not None and RESTART in r.completion.text for r in arm.rows)
        assert arm.summary["multi_attempt_rate"].events == restarts < 20
    second = forked(runs, "esr", key, ForkSettings("attempt:2", 4))
    prefix = second.arms[0].rows[0].trial.prefix
    assert prefix is not None
    assert prefix.text == parent.completion.text[: parent.completion.text.index(RESTART)].rstrip()


def test_every_number_of_the_run_stays_what_it_was(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs.root / "esr"

    def numbers() -> tuple[object, ...]:
        with Run.read(folder) as opened:
            table = pd.read_csv(export_flat(opened.ledger, runs.root / "trials.csv", "scripted", "csv"), dtype=str)
        execute.run(check(stored_config(folder), runs.makers), folder)  # as `resume` does
        rows = table[table.stage != FORK].reset_index(drop=True)
        return files(folder), compared([folder], "csv", None), rows

    before = numbers()
    key = a_trial(runs, "esr", 1)
    forked(runs, "esr", key, ForkSettings("4", 6))
    after = numbers()
    assert before[:2] == after[:2]
    pd.testing.assert_frame_equal(before[2], after[2])  # type: ignore[arg-type]
    made = counting(runs)
    execute.run(check(stored_config(folder), runs.makers), folder)
    assert sum(e.generated for e in made) == 0


def test_it_goes_on_where_it_was_and_adds_seeds_and_arms_alone(runs: Runs) -> None:
    key, folder = a_trial(runs, "esr", 1), runs.root / "esr"
    made = counting(runs)
    runs_engine = runs.makers.engine

    def breaking(target, options):  # type: ignore[no-untyped-def]
        engine = runs_engine(target, options)
        engine.raise_on = lambda request: request.key.endswith("/3")  # type: ignore[attr-defined]
        return engine

    with pytest.raises(SteerbackError, match="scripted failure"):
        fork_with = replace(runs.makers, engine=breaking)
        from steerback.jobs.fork import fork_trial

        fork_trial(folder, key, ForkSettings("6", 8), makers=fork_with)
    kept = made[-1].generated
    assert 0 < kept < 16
    first = forked(runs, "esr", key, ForkSettings("6", 8))
    assert kept + made[-1].generated == 16
    forked(runs, "esr", key, ForkSettings("6", 8))
    assert made[-1].generated == 0
    more = forked(runs, "esr", key, ForkSettings("6", 12, boosts=(2.0,)))
    assert made[-1].generated == 12 + 4 * 2
    assert [len(a.rows) for a in more.arms] == [12, 12, 12]
    assert [r.completion for r in more.arms[0].rows[:8]] == [r.completion for r in first.arms[0].rows]
    other = forked(runs, "esr", key, ForkSettings("9", 4))
    with Run.read(folder) as opened:
        assert [f.fork.tokens for f in forks(opened.ledger, "scripted", key)] == [6, 9]
        prepared = prepare_fork(opened, key, ForkSettings("6", 20), runs.makers)
        assert prepared.responses(opened.ledger) == (60, 24)
    assert len(other.arms) == 2
    with pytest.raises(SteerbackError, match=r"'mine'.*other edits"):
        forked(runs, "esr", key, ForkSettings("6", 4, arms=("mine=boost:3",)))
        forked(runs, "esr", key, ForkSettings("6", 4, arms=("mine=boost:4",)))


def test_a_continuation_can_be_forked_itself(runs: Runs) -> None:
    key = a_trial(runs, "esr", 1)
    result = forked(runs, "esr", key, ForkSettings("5", 2))
    on, off = (arm.rows[0] for arm in result.arms)
    deeper = forked(runs, "esr", on.trial.key, ForkSettings("2", 2))
    prefix = deeper.arms[0].rows[0].trial.prefix
    assert on.trial.prefix is not None
    assert on.completion is not None
    assert prefix is not None
    assert prefix.token_ids == (*on.trial.prefix.token_ids, *on.completion.token_ids[:2])
    assert prefix.text == on.trial.prefix.text + " and further"
    with pytest.raises(SteerbackError, match="edits differ between positions"):
        forked(runs, "esr", off.trial.key, ForkSettings("2", 2))


def test_forks_are_judged_exported_and_merged_with_the_run(runs: Runs, tmp_path: Path) -> None:
    key = a_trial(runs, "esr", 1)
    runs.run("esr", *SMALL, name="twin")
    forked(runs, "esr", key, ForkSettings("4", 3))
    forked(runs, "twin", key, ForkSettings("7", 3))
    work = judging.judge_run(runs.root / "esr", "offline", makers=replace(runs.makers), scope=judging.Scope(FORK))
    assert work == 6
    merge([runs.root / "esr", runs.root / "twin"], tmp_path / "both")
    joined = runs.ledger("both")
    assert set(joined.get("planted", FORKS) or {}) == {f"{key.partition('/')[2]}@{n}" for n in (4, 7)}
    assert {f.fork.tokens for f in forks(joined, "scripted")} == {4, 7}
    assert {r.trial.key for r in joined.rows(stage=FORK)} == {
        r.trial.key for name in ("esr", "twin") for r in runs.ledger(name).rows(stage=FORK)
    }
    assert joined.rows(stage=FORK)[0].trial.prefix == runs.ledger("esr").rows(stage=FORK)[0].trial.prefix


def test_where_a_response_drifts(runs: Runs) -> None:
    """The scripted judge scores a sentence as its attempt; a response drifts at its first sentence below 30."""
    folder = runs.root / "esr"
    with Run.reopen(folder) as opened:
        rows = [r for r in opened.ledger.rows(stage="measure", judge="scripted") if r.attempts]
        for row in rows:
            if row.attempts[0].score < 30:
                first = opened.ledger.windows("scripted")[row.trial.key].starts[0]
                assert place(opened, row, "drift", "scripted") == first
            else:
                with pytest.raises(SteerbackError, match="scores no sentence in the first attempt"):
                    place(opened, row, "drift", "scripted")
        with pytest.raises(SteerbackError, match="has not scored the sentences"):
            place(opened, rows[0], "drift", "offline")
        known = ", ".join(f"attempt:{n + 1}" for n in range(len(rows[0].attempts)))
        with pytest.raises(SteerbackError, match=known):
            place(opened, rows[0], "attempt:9", "scripted")
        with pytest.raises(SteerbackError, match=r"choose one of: a number of tokens, attempt:2, drift"):
            place(opened, rows[0], "tomorrow", "scripted")


def test_detectors_come_from_the_run_or_from_one_that_is_named(runs: Runs) -> None:
    key = a_trial(runs, "esr", 1)
    with pytest.raises(SteerbackError, match="has no detectors of planted"):
        forked(runs, "esr", key, ForkSettings("4", 2, ablate="detectors"))
    found = DetectorSet(source="test", detectors=[Detector(latent=k, level=1.0, auc=1.0) for k in (5, 6)])
    with Run.reopen(runs.root / "esr") as opened:
        opened.ledger.put("planted", DETECTOR_SET, found)
    result = forked(runs, "esr", key, ForkSettings("4", 2, ablate="detectors"))
    assert [(e.mode, e.latent, e.positions) for e in result.arms[2].rows[0].trial.interventions][-2:] == [
        ("clamp", 5, "generated"),
        ("clamp", 6, "generated"),
    ]


def test_edits_of_a_continuation_are_those_of_the_past_before_it_and_of_the_arm_after() -> None:
    assert edits_of([ADD], [ADD], False) == (ADD,)
    assert edits_of([ADD], [], False) == (replace(ADD, positions="prompt"),)
    assert edits_of([ADD], [OTHER, CLAMP], False) == (
        replace(OTHER, positions="generated"),
        replace(CLAMP, positions="generated"),
        replace(ADD, positions="prompt"),
    )
    assert edits_of([ADD], [OTHER, CLAMP], True) == (OTHER, CLAMP)


def test_own_arms_are_read(runs: Runs) -> None:
    trial = runs.ledger("esr").rows(stage="measure")[0].trial
    (add,) = trial.interventions
    assert parse_arm(trial, "calm = clamp:7:2.5; add:9:-1").edits == [
        add,
        Intervention("clamp", 7, 2.5),
        Intervention("add", 9, -1.0),
    ]
    assert parse_arm(trial, "x=boost:0;clamp:7:1;clamp:7:2").edits == [Intervention("clamp", 7, 2.0)]
    for wrong in ("nothing", "=add:1:2", "a/b=add:1:2", "x=add:1", "x=push:1:2", "x=add:1:two", "x=boost:1:2"):
        with pytest.raises(SteerbackError):
            parse_arm(trial, wrong)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say where to fork with --at"),
        (["--at", "400"], "choose a token from 0 to"),
        (["--at", "3", "--ablate", "x"], "give `detectors`, or latents"),
        (["--at", "3", "--detectors", "other"], "goes with --ablate detectors"),
        (["--at", "3", "--arm", "broken"], "must have the form NAME=EDIT"),
        (["--at", "3", "--arm", "steering off=boost:3"], "two arms are called 'steering off'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    runs: Runs, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("steerback.cli.options.Budget.makers", lambda *given: runs.makers)
    before = runs.ledger("esr").dump()
    with pytest.raises(SystemExit) as stopped:
        main(["fork", str(runs.root / "esr"), a_trial(runs, "esr", 1), *words, "--no-cache"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert runs.ledger("esr").dump() == before


def test_the_command_counts_before_it_starts_and_prints_a_table(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("steerback.cli.options.Budget.makers", lambda *given: runs.makers)
    key, place_of = a_trial(runs, "esr", 1), str(runs.root / "esr")
    for extra, said in (
        (["--dry-run"], "10 responses in 2 arms"),
        ([], "steering off"),
        (["--dry-run"], "0 of them new"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["fork", place_of, key, "--at", "5", "--n", "5", "--no-cache", *extra])
        assert stopped.value.code == 0
        assert said in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["fork", place_of])
    out = capsys.readouterr().out
    assert "hold only for this response" in " ".join(out.split())
    with Run.read(Path(place_of)) as opened:
        (one,) = forks(opened.ledger, "scripted")
    assert " ".join(fork_table(one).text().split()) in " ".join(out.split())  # lines are as wide as the terminal
