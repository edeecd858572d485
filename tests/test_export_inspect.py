"""Inspect AI logs: Inspect's reader gives the ledger's numbers, and missing numbers stay missing."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("inspect_ai")
from inspect_ai.log import EvalLog, read_eval_log

from planted import Runs, thresholds
from steerback.cli import main
from steerback.engines.scripted import PlantedModel
from steerback.records import Attempt, Completion, Judgement, Receipt, Trial
from steerback.report import inspect_logs
from steerback.report.inspect_logs import export_inspect
from steerback.store.ledger import Ledger, Row
from steerback.store.run import Run

HOSTILE = (
    "<script>document.title='taken'</script> <img src=x onerror=\"document.title='taken'\"> "
    "attachment://0123 \u202etfel\x1b[31m \x00 [link](javascript:alert(1)) {{ braces }}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a finished run with restarts, unscored and empty verdicts, and a second judge on some trials."""
    with pytest.MonkeyPatch.context() as patch:
        model = PlantedModel(thresholds=thresholds(), restart_rate=0.3, unscored_rate=0.05, empty_rate=0.05)
        made = Runs(tmp_path_factory.mktemp("runs"), patch, model)
        made.run("esr", "n_latents=5", "trials_per_latent=8")
        folder = made.root / "esr"
        with Ledger(folder / "ledger.sqlite") as ledger:
            _add_hard_cases(ledger)
        yield folder


def _add_hard_cases(ledger: Ledger) -> None:
    """Add a hostile response with prefill and meta-prompt, a wrong receipt, an engine error, and no response."""
    model = ledger.rows(stage="measure")[0].trial
    trials = [
        dataclasses.replace(model, key=f"planted/measure/hard/{i}", condition="hard", index=i, **more)
        for i, more in enumerate([{"prefill": "Sure. ", "meta_prompt": "Check yourself."}, {}, {}, {}])
    ]
    ledger.add_trials(trials)
    whole, wrong = Receipt(5, 2, 1.0), Receipt(0, 0, 0.0)
    ledger.add_completions(
        [
            (trials[0].key, Completion(HOSTILE, (1, 2, 3), 5, "length", whole), "e"),
            (trials[1].key, Completion("Fine.", (1, 2, 3), 5, "stop", wrong), "e"),
            (trials[2].key, Completion("", (), 5, "error", wrong), "e"),
        ]
    )
    two = (Attempt(0, 10, 20.0), Attempt(10, 40, 60.0, HOSTILE[:5]))
    one = (Attempt(0, 5, 90.0),)
    ledger.add_judgements(
        [
            (trials[0].key, Judgement("scripted", "r", "scored", two)),
            (trials[0].key, Judgement("second", "r", "unscored", (), "reply was no JSON", HOSTILE)),
            (trials[1].key, Judgement("scripted", "r", "scored", one)),
        ]
    )


@pytest.fixture(scope="module")
def logs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, EvalLog]:
    with Run.read(base) as run:
        paths = export_inspect(run, tmp_path_factory.mktemp("logs"), run.ledger.judges())
    return {path.stem: read_eval_log(path.as_posix()) for path in paths}


def rows_of(base: Path, judge: str) -> dict[str, Row]:
    with Ledger(base / "ledger.sqlite", read_only=True) as ledger:
        return {row.trial.key: row for row in ledger.rows(judge=judge)}


def steerback(*words: str) -> object:
    """Return the exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main([*words])
    return ended.value.code


def samples_of(logs: dict[str, EvalLog]) -> dict[str, Any]:
    return {sample.id: sample for log in logs.values() for sample in log.samples or []}


def test_every_trial_is_a_sample_of_the_log_of_its_stage(base: Path, logs: dict[str, EvalLog]) -> None:
    rows = rows_of(base, "scripted")
    samples = samples_of(logs)
    assert samples.keys() == rows.keys()
    assert sum(len(log.samples or []) for log in logs.values()) == len(rows)
    for name, log in logs.items():
        assert {rows[str(s.id)].trial.stage for s in log.samples or []} == {name.removeprefix("planted-")}


def test_the_numbers_are_the_ledgers(base: Path, logs: dict[str, EvalLog]) -> None:
    samples, seen = samples_of(logs), set()
    for judge in ("scripted", "second"):
        for key, row in rows_of(base, judge).items():
            scores = samples[key].scores or {}
            if row.judgement is None:
                assert judge not in scores
                continue
            score = scores[judge]
            if row.attempts:
                first, last = row.attempts[0].score, row.attempts[-1].score
                assert score.value == {
                    "attempts": len(row.attempts),
                    "first": first,
                    "last": last,
                    "gain": last - first,
                    "multi_attempt": len(row.attempts) > 1,
                    "esr": row.is_episode,
                }
            else:
                assert isinstance(score.value, float)
                assert math.isnan(score.value)
                assert score.reason == ("invalid" if not row.valid_receipt else row.judgement.status)
            seen.add(score.reason)
            assert [(a["start"], a["end"], a["score"]) for a in score.metadata["attempts"]] == [
                (a.start, a.end, a.score) for a in row.judgement.attempts
            ]
            assert score.metadata["raw"] == row.judgement.raw
    assert seen == {None, "unscored", "empty", "invalid"}


def test_messages_are_those_the_model_saw(base: Path, logs: dict[str, EvalLog]) -> None:
    samples = samples_of(logs)
    for key, row in rows_of(base, "scripted").items():
        trial: Trial = row.trial
        user, *rest = samples[key].messages
        assert user.text == (f"{trial.prompt} {trial.meta_prompt}" if trial.meta_prompt else trial.prompt)
        assert [m.text for m in rest if m.metadata] == ([trial.prefill] if trial.prefill else [])
        assert [m.text for m in rest if not m.metadata] == ([row.completion.text] if row.completion else [])
        metadata = samples[key].metadata
        assert (metadata["latent"], metadata["boost"], metadata["seed"]) == (trial.latent, trial.boost, trial.seed)
        assert metadata["interventions"] == [dataclasses.asdict(i) for i in trial.interventions]
        if row.completion:
            assert metadata["receipt"]["generated_positions"] == row.completion.receipt.generated_positions
            assert metadata["valid_receipt"] == row.valid_receipt


def test_hostile_text_arrives_unchanged(logs: dict[str, EvalLog]) -> None:
    sample = samples_of(logs)["planted/measure/hard/0"]
    assert sample.output.completion == HOSTILE
    assert sample.output.stop_reason == "max_tokens"
    assert sample.scores["second"].metadata["raw"] == HOSTILE
    assert sample.scores["scripted"].metadata["attempts"][0]["text"] == ("Sure. " + HOSTILE)[:10]


def test_a_failed_response_is_an_error_and_a_missing_one_leaves_the_log_unfinished(logs: dict[str, EvalLog]) -> None:
    samples = samples_of(logs)
    assert samples["planted/measure/hard/2"].error is not None
    assert samples["planted/measure/hard/3"].output.choices == []
    assert logs["planted-measure"].status == "cancelled"
    assert logs["planted-calibration"].status == "success"


def test_the_log_says_how_tokens_were_drawn_and_holds_the_manifest(base: Path, logs: dict[str, EvalLog]) -> None:
    with Run.read(base) as run:
        sampling = run.config.sampling
    spec = logs["planted-measure"].eval
    config = spec.model_generate_config
    assert (config.temperature, config.top_p, config.max_tokens, config.seed) == (
        sampling.temperature,
        sampling.top_p,
        sampling.max_new_tokens,
        44,
    )
    assert spec.metadata is not None
    assert spec.metadata["manifest"]["versions"]["steerback"] == spec.packages["steerback"]


def test_metrics_are_those_of_the_summary(base: Path, logs: dict[str, EvalLog]) -> None:
    summary = json.loads((base / "summary.json").read_text())
    condition, measured = next(iter(summary["targets"]["planted"]["conditions"].items()))
    expected = measured["headline"]["multi_attempt_rate"]
    results = logs["planted-measure"].results
    assert results is not None
    found = results.scores[0].metrics[f"{condition}: multi_attempt_rate"]
    assert found.value == expected["value"]
    assert found.metadata is not None
    assert (found.metadata["low"], found.metadata["n"]) == (expected["low"], expected["n"])


def test_a_large_stage_is_split_without_losing_a_trial(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspect_logs, "SAMPLES_PER_LOG", 7)
    with Run.read(base) as run:
        paths = export_inspect(run, tmp_path, ["scripted"])
    ids = [s.id for path in paths for s in read_eval_log(path.as_posix()).samples or []]
    assert sorted(map(str, ids)) == sorted(rows_of(base, "scripted"))
    assert (tmp_path / "planted-measure-2.eval").is_file()


def test_a_run_without_a_manifest_keeps_its_config(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "imported"
    shutil.copytree(base, folder)
    (folder / "manifest.json").unlink()
    with Run.read(folder) as run:
        path = export_inspect(run, tmp_path, ["scripted"])[0]
    metadata = read_eval_log(path.as_posix(), header_only=True).eval.metadata
    assert metadata is not None
    assert metadata["manifest"]["config"]["experiment"] == "esr"


def test_the_command_writes_logs_of_all_judges_or_of_the_named_one(base: Path, tmp_path: Path) -> None:
    assert steerback("export", str(base), "--format", "inspect", "--out", str(tmp_path)) == 0
    path = (tmp_path / "inspect" / "planted-measure.eval").as_posix()
    both = samples_of({"": read_eval_log(path)})["planted/measure/hard/0"]
    assert steerback("export", str(base), "--format", "inspect", "--out", str(tmp_path), "--judge", "second") == 0
    one = samples_of({"": read_eval_log(path)})["planted/measure/hard/0"]
    assert (set(both.scores), set(one.scores)) == ({"scripted", "second"}, {"second"})


def test_without_inspect_one_line_names_the_package(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    assert steerback("export", str(base), "--format", "inspect", "--out", str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert "pip install 'steerback[judges]'" in said
    assert len(said.strip().splitlines()) == 1
