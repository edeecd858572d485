"""Recovery without a restart phrase in whole runs: scoring of windows, storage and display."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from steerback.cli import main
from steerback.config import RecoveryConfig, build_config
from steerback.errors import SteerbackError
from steerback.figures.recovery import draw_time_course
from steerback.jobs import campaign, judging
from steerback.judging.base import JudgeItem, References
from steerback.judging.offline import OfflineJudge
from steerback.judging.text import words
from steerback.judging.windows import MOST_WINDOWS, WindowScorer, cut, window_scorer
from steerback.records import WindowScores
from steerback.store.ledger import Ledger
from steerback.store.merge import merge
from tests.fake_judges import FakeJudge
from tests.planted import Runs

FEW = ("n_latents=6", "trials_per_latent=8", "recovery.least_windows=2")  # scripted responses are short


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        found = Runs(tmp_path_factory.mktemp("recovery"), patch)
        found.run("esr", *FEW, name="esr")
        yield found


def scored(judge: WindowScorer, items: list[JudgeItem]) -> dict[str, WindowScores]:
    async def all_of() -> dict[str, WindowScores]:
        return {key: found async for key, found in judge.windows(items)}

    return asyncio.run(all_of())


def test_every_measured_response_and_every_one_of_the_floor_has_windows(runs: Runs) -> None:
    with runs.ledger("esr") as ledger:
        kept = ledger.windows("scripted")
        expected = {r.trial.key for s in ("measure", "floor") for r in ledger.rows(stage=s) if r.valid_receipt}
        assert set(kept) == expected
        measured = [r.trial.key for r in ledger.rows(stage="measure")]
        scores = {key: list(kept[key].scores) for key in measured}
        assert ledger.window_scores("scripted", "planted", "measure") == scores
        assert set(ledger.windows("scripted", keys=measured)) == set(measured)
        assert ledger.windows("another") == {}


def test_it_changes_no_other_number(runs: Runs) -> None:
    runs.run("esr", *FEW, "recovery.judge=false", name="without")
    with_it, without = (
        json.loads((runs.root / name / "summary.json").read_text("utf-8")) for name in ("esr", "without")
    )
    assert with_it["targets"]["planted"]["conditions"]["steered"].pop("recovery")
    assert with_it == without
    assert not (runs.root / "without" / "recovery.csv").exists()
    shown = " ".join((runs.root / "without" / "table.txt").read_text("utf-8").split())
    assert "Recovery without a restart phrase is off" in shown


def test_tables_figure_and_summary_show_it_with_both_floors(runs: Runs) -> None:
    analysis = campaign.reanalyse(runs.root / "esr", draws=100)
    stored = analysis.summary["targets"]["planted"]["conditions"]["steered"]["recovery"]  # type: ignore[index]
    assert {"recovered", "silent", "shuffled", "above", "course", "unsteered"} <= set(stored)
    assert stored["unsteered"]["recovered"]["clusters"] <= 38
    table = analysis.shown.tables["recovery"]
    assert [*table.shown.columns][3:9] == [
        "recovered %",
        "without restart %",
        "shuffled %",
        "above shuffled",
        "floor %",
        "floor shuffled %",
    ]
    figure = analysis.shown.figures["time_course"]()
    lines = [line for ax in figure.axes for line in ax.get_lines()]
    drawn = {str(line.get_label()).split(" (")[0]: line.get_ydata() for line in lines}
    assert set(drawn) == {"unsteered", "steered"}
    assert np.allclose(drawn["steered"], [e["value"] for e in stored["course"]])


def test_many_conditions_and_targets_are_drawn(runs: Runs) -> None:
    analysis, _ = runs.run("boost-sweep", base="esr", name="sweep")
    measured = analysis.results.measured  # type: ignore[attr-defined]
    assert len(measured.recovery.conditions) > 7
    assert draw_time_course(measured).get_size_inches()[1] < 6


def test_scoring_goes_on_where_it_was(runs: Runs) -> None:
    folder = runs.root / "esr"
    (runs.root / "again").mkdir()
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as source:
        source.execute("VACUUM INTO ?", (str(runs.root / "again" / "ledger.sqlite"),))
    with Ledger(folder / "ledger.sqlite", read_only=True) as whole:
        expected = whole.dump()
    with closing(sqlite3.connect(runs.root / "again" / "ledger.sqlite")) as file:
        file.execute("DELETE FROM windows WHERE rowid % 3 = 0")
        file.commit()
    judging.judge_run(runs.root / "again", "scripted", makers=runs.makers)
    with Ledger(runs.root / "again" / "ledger.sqlite", read_only=True) as resumed:
        assert resumed.dump()["windows"] == expected["windows"]


def test_a_ledger_without_the_table_opens_and_gets_one(runs: Runs) -> None:
    folder = runs.root / "old"
    folder.mkdir()
    with closing(sqlite3.connect(runs.root / "esr" / "ledger.sqlite")) as source:
        source.execute("VACUUM INTO ?", (str(folder / "ledger.sqlite"),))
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as file:
        file.execute("DROP TABLE windows")
    with Ledger(folder / "ledger.sqlite", read_only=True) as old:
        assert old.windows("scripted") == {}
        assert "windows" not in old.dump()
    judging.score_run_windows(folder, "scripted", makers=runs.makers)
    with Ledger(folder / "ledger.sqlite", read_only=True) as now, runs.ledger("esr") as before:
        assert now.windows("scripted") == before.windows("scripted")


def test_merged_runs_keep_their_windows(runs: Runs) -> None:
    runs.run("esr", "limit=20", *FEW, name="part")
    merge([runs.root / "part", runs.root / "esr"], runs.root / "merged")
    with runs.ledger("merged") as merged, runs.ledger("esr") as whole:
        assert merged.windows("scripted") == whole.windows("scripted")


@pytest.mark.parametrize("name", ["offline", "offline-bayes"])
def test_the_offline_judge_scores_sentences_and_leaves_restart_phrases_out(name: str) -> None:
    on = "Cut the dough into strips. Bake the bread in a hot oven. Let the loaf cool on a rack."
    off = "The tide covers the old harbour wall. Gulls sit on the masts of the boats."
    references = {
        "How do I bake bread?": [on, "Knead the dough well. Bake the loaf until brown."],
        "How do tides work?": [off, "The moon pulls the sea. The tide rises along the harbour."],
    }
    judge = OfflineJudge(name)
    judge.prepare(References(references))
    text = f"{off} Wait, that's not right. {on}"
    found = scored(judge, [JudgeItem("a", "How do I bake bread?", text), JudgeItem("b", "unknown", text)])
    assert [text[s:].split(".")[0] for s in found["a"].starts] == [
        sentence.strip() for part in (off, on) for sentence in part.split(".") if sentence
    ]
    assert max(found["a"].scores[:2]) <= 30
    assert min(found["a"].scores[2:]) >= 70
    assert not found["b"].scores
    assert "no unsteered reference" in found["b"].reason


def test_windows_of_long_texts_are_joined_without_losing_a_word() -> None:
    text = " ".join(f"This is sentence {n}." for n in range(333))
    spans = cut(text)
    assert len(spans) <= MOST_WINDOWS
    assert sum(len(words(text[s.start : s.end])) for s in spans) == 4 * 333
    assert cut("") == []


def test_settings_say_who_scores_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("inspect_ai")
    from steerback.judging.llm import LLMJudge
    from steerback.judging.models import Limits
    from steerback.judging.transport import Transport

    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-planted-1234567890")
    free, paid = OfflineJudge(), LLMJudge("x", Transport("openrouter/some/model", Limits()))
    assert window_scorer(free, RecoveryConfig()) is free
    assert window_scorer(free, RecoveryConfig(judge=False)) is None
    assert window_scorer(paid, RecoveryConfig()) is None
    assert window_scorer(paid, RecoveryConfig(judge=True)) is paid


def test_low_has_to_be_below_high() -> None:
    with pytest.raises(SteerbackError, match=r"recovery.low .80. must be below recovery.high .70."):
        build_config("esr", ("t",), assignments=("recovery.low=80",))


def test_an_llm_judge_scores_the_windows_of_a_response_in_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("inspect_ai")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENROUTER_API_KEY", "sk-planted-1234567890")
    small = [
        *("--preset", "quick", "--engine", "scripted", "--judge", "scripted", "--set", "n_latents=2"),
        *("--set", "trials_per_latent=3", "--set", "draws=100", "--set", "floor_responses=4"),
        *("--set", "calibration.max_iterations=3", "--set", "calibration.verify_trials=0"),
    ]
    with FakeJudge() as server:
        monkeypatch.setenv("OPENROUTER_BASE_URL", server.url + "/v1")
        run = ("run", "esr", "--target", "organism", *small)
        assert _steerback(*run, "--name", "a") == 0
        costly = ("--judge", "openrouter/some/model", "--dry-run", "--name", "b")
        capsys.readouterr()
        assert _steerback(*run, *costly) == 0
        assert "sentences scored" not in capsys.readouterr().out
        assert _steerback(*run, *costly, "--set", "recovery.judge=true") == 0
        assert "sentences scored by openrouter/some/model: at most 10 calls" in capsys.readouterr().out
        scoring = ("judge", "a", "--judge", "openrouter/some/model", "--rubric", "windows")
        assert _steerback(*scoring, "--max-judge-calls", "3") == 2
        assert "budget spent" in capsys.readouterr().err
        assert _steerback(*scoring) == 0
    with Ledger(tmp_path / "runs/a/ledger.sqlite", read_only=True) as ledger:
        kept = ledger.windows("openrouter/some/model")
        rows = {r.trial.key: r for s in ("measure", "floor") for r in ledger.rows(stage=s) if r.valid_receipt}
    assert set(kept) == set(rows)
    assert sum(server.asked.values()) == len(rows)
    for key, found in kept.items():
        text = rows[key].judged_text
        assert found.rubric == "windows-1"
        assert found.scores == tuple(min(len(text[s.start : s.end].split()), 100) for s in cut(text))


def _steerback(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code
