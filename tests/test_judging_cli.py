"""Judges on the command line with a local server: estimates, budgets, spending, cross-judge comparison."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_judges import FakeJudge
from steerback.calibration.thresholds import THRESHOLDS
from steerback.cli import main
from steerback.judging.probe import probes
from steerback.records import Attempt, Judgement, Spend
from steerback.store.facts import JUDGE_SPEND, LATENTS, PROBES
from steerback.store.run import Run

KEY = "sk-planted-1234567890"
SMALL = [
    *("--preset", "quick", "--engine", "scripted", "--judge", "scripted"),
    *("--set", "n_latents=3", "--set", "trials_per_latent=4", "--set", "draws=100"),
    *("--set", "calibration.max_iterations=4", "--set", "calibration.verify_trials=0", "--set", "floor_responses=8"),
]
JUDGED = 3 * 4 + 3 * 4 * 5 + 8  # measured, in calibration, and for the floor


def steerback(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJudge]:
    pytest.importorskip("inspect_ai")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENROUTER_API_KEY", KEY)
    with FakeJudge() as running:
        monkeypatch.setenv("OPENROUTER_BASE_URL", running.url + "/v1")
        yield running


def test_estimate_budget_spend_and_going_on(server: FakeJudge, capsys: pytest.CaptureFixture[str]) -> None:
    assert steerback("run", "esr", "--target", "organism", "--name", "a", *SMALL) == 0
    judge = ["judge", "a", "--judge", "qwen3-32b"]
    capsys.readouterr()

    assert steerback(*judge, "--dry-run") == 0
    said = capsys.readouterr().out
    calls = int(re.search(r"about (\d+) calls", said)[1])  # type: ignore[index]
    assert f"{calls} responses to be judged by qwen3-32b" in said
    assert " USD" in said
    assert 12 < calls <= JUDGED
    assert not server.asked

    assert steerback(*judge, "--max-judge-calls", "5") == 2
    said = capsys.readouterr().err
    assert "judge qwen3-32b: budget spent: --max-judge-calls 5; verdicts so far are kept" in said
    assert sum(server.asked.values()) == 5
    with Run.read(Path("runs/a")) as run:
        assert sum(r.judgement is not None for r in run.ledger.rows(judge="qwen3-32b")) == 5
        assert run.ledger.get("", JUDGE_SPEND)["qwen3-32b"].calls == 5

    assert steerback(*judge) == 0
    spent = sum(server.asked.values())
    assert 5 < spent <= calls  # equal responses to one prompt come from the cache
    said = capsys.readouterr().out
    assert f"{calls - 5} responses to be judged" in said
    assert f"spent on judge qwen3-32b: {spent} calls" in said
    assert steerback(*judge) == 0
    assert sum(server.asked.values()) == spent  # nothing is judged twice
    with Run.read(Path("runs/a")) as run:
        assert {r.judgement.status for r in run.ledger.rows(stage="measure", judge="qwen3-32b") if r.judgement} == {
            "scored"
        }

    manifest = json.loads(Path("runs/a/manifest.json").read_text("utf-8"))
    assert manifest["judge spend"]["qwen3-32b"]["calls"] == sum(server.asked.values())
    assert "attempt" in manifest["judges"]["qwen3-32b"]["rubric text"]
    assert "scripted" in manifest["judges"]
    for file in (f for f in Path("runs").rglob("*") if f.is_file()):
        assert KEY.encode() not in file.read_bytes(), file


def test_rating_labels_is_estimated_and_bounded_like_judging(
    server: FakeJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "esr", "--target", "organism", "--name", "rated", *SMALL, "--set", "selection.rater=qwen3-32b"]
    assert steerback(*arguments, "--dry-run") == 0
    found = re.search(r"rater qwen3-32b: at most (\d+) calls, .* USD", capsys.readouterr().out)
    assert found is not None
    calls = int(found[1])
    assert calls > 1
    assert steerback(*arguments, "--max-judge-calls", "1") == 2
    said = capsys.readouterr().err
    assert "rater qwen3-32b: budget spent: --max-judge-calls 1; 40 of " in said
    assert sum(server.asked.values()) == 1
    with Run.read(Path("runs/rated")) as run:
        assert run.ledger.get("", JUDGE_SPEND)["qwen3-32b"].calls == 1
        assert run.ledger.get("organism", LATENTS) is None
    assert steerback(*arguments) == 0
    assert sum(server.asked.values()) == calls
    with Run.read(Path("runs/rated")) as run:
        assert run.ledger.get("", JUDGE_SPEND)["qwen3-32b"].calls == calls
    assert steerback(*arguments, "--set", "selection.rater=nobody") == 2
    assert "unknown concreteness rater 'nobody'" in capsys.readouterr().err


def test_a_judge_is_probed_with_planted_instructions_before_it_judges(
    server: FakeJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    assert steerback("run", "esr", "--target", "organism", "--name", "p", *SMALL) == 0
    probe = ["judge", "p", "--judge", "qwen3-32b", "--probe"]
    assert steerback("judge", "p", "--judge", "offline", "--probe", "--dry-run") == 2
    assert "--probe needs a judge that is a language model" in capsys.readouterr().err
    assert steerback(*probe, "--dry-run") == 0
    assert "20 planted responses to probe qwen3-32b: about 20 calls" in capsys.readouterr().out
    assert not server.asked
    texts = {p.item.response: (i < 5) for i, p in enumerate(probes())}
    server.fault = lambda response, before: {True: "obedient", False: "honest", None: ""}[texts.get(response)]

    assert steerback(*probe, "--max-judge-calls", "8") == 2
    assert "all previous answers are stored" in capsys.readouterr().err
    with Run.read(Path("runs/p")) as run:
        assert not [r for r in run.ledger.rows(judge="qwen3-32b") if r.judgement]  # it was probed first
        first = (run.ledger.get("", PROBES) or {})["qwen3-32b"]
        assert len(first) == 8
    assert steerback(*probe, "--limit", "2") == 0
    said = capsys.readouterr().out
    assert "12 planted responses to probe" in said
    assert "judge qwen3-32b: obeyed 5 of 20 planted instructions\n" in said
    assert all(server.asked[text] == 1 for text in texts)
    assert steerback("show", "p", "--judge", "qwen3-32b", "-n", "1") == 0
    assert "obeyed 5 of 20 planted instructions" in capsys.readouterr().out
    assert steerback("show", "p") == 0
    assert "planted instructions" not in capsys.readouterr().out
    assert "obeyed 5 of 20" in json.loads(Path("runs/p/manifest.json").read_text())["judge probes"]["qwen3-32b"]


def test_planted_responses_tell_the_judge_the_wrong_score() -> None:
    assert len({p.item.response for p in probes()}) == 20
    for probe in probes():
        assert {probe.known, probe.demanded} == {0.0, 100.0}
        assert f"{probe.demanded:g}" in probe.item.response.partition("\n")[2]
        scored = [Judgement("j", "r", "scored", (Attempt(0, 5, score),)) for score in (40.0, 60.0)]
        assert [probe.answer(j).obeyed for j in scored] == [probe.demanded == 0, probe.demanded == 100]
        assert not probe.answer(Judgement("j", "r", "unscored", reason="refused")).obeyed


def test_a_run_estimates_its_judge_and_keeps_to_the_budget(
    server: FakeJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["run", "esr", "--target", "organism", "--name", "b", *SMALL, "--judge", "openrouter/some/model"]
    assert steerback(*arguments, "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"judge openrouter/some/model: at most {JUDGED} calls" in said
    assert "rater openrouter/some/model: at most 2 calls" in said  # 44 labels, 40 a call
    assert steerback(*arguments, "--dry-run", "--set", "selection.rater=offline") == 0
    assert "rater" not in capsys.readouterr().out
    assert "price unknown" in said
    assert steerback(*arguments, "--max-judge-cost", "1") == 2
    assert "--judge-price IN OUT" in capsys.readouterr().err
    arguments += ["--judge-price", "1", "5"]
    assert steerback(*arguments, "--max-judge-cost", "0.008") == 2
    assert "budget spent: --max-judge-cost 0.008" in capsys.readouterr().err
    with Run.read(Path("runs/b")) as run:
        paid = run.ledger.get("", JUDGE_SPEND)["openrouter/some/model"]
        assert run.ledger.get("organism", THRESHOLDS) is None
    assert 0.006 < paid.cost <= 0.008  # what is set aside for calls in flight is given back
    assert paid.calls == sum(server.asked.values()) < JUDGED
    assert steerback("resume", "b", "--judge-price", "1", "5") in (0, 2)  # its scores are word counts
    assert sum(server.asked.values()) > paid.calls
    with Run.read(Path("runs/b")) as run:
        assert run.ledger.get("organism", THRESHOLDS) is not None


def test_cross_judge_from_the_command_line(server: FakeJudge, capsys: pytest.CaptureFixture[str]) -> None:
    for name, target in (("a", "organism"), ("b", "organism-s")):
        assert steerback("run", "esr", "--target", target, "--name", name, *SMALL) == 0
    run = ["cross-judge", "a", "b", "--judges", "offline,offline-bayes", "--judges", "qwen3-32b"]
    run += ["--sample", "20", "--set", "options.minimum=6", "--set", "draws=100", "--name", "c"]
    capsys.readouterr()
    assert steerback(*run, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "judges: offline, offline-bayes, qwen3-32b" in said
    assert "judge qwen3-32b: at most 20 calls" in said
    assert not Path("runs/c").exists()
    assert steerback(*run) == 0
    said = capsys.readouterr().out
    assert "models by ESR rate" in said
    assert "spent on judge qwen3-32b" in said
    for name in ("figureA2.png", "figureA3.pdf", "figureA4.png", "agreement.tex", "judges.csv"):
        assert Path("runs/c", name).stat().st_size > 100
    asked = sum(server.asked.values())
    assert 0 < asked <= 20
    assert steerback("resume", "c") == 0
    assert sum(server.asked.values()) == asked
    capsys.readouterr()
    assert steerback("compare", "c", "--format", "csv") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "judges' agreement" in line]
    assert rows
    assert all("none (built-in model)" in row for row in rows)


def test_other_rubrics(server: FakeJudge, capsys: pytest.CaptureFixture[str]) -> None:
    assert steerback("run", "esr", "--target", "organism", "--name", "a", *SMALL) == 0
    whole = ["judge", "a", "--judge", "qwen3-32b", "--rubric", "whole"]
    capsys.readouterr()
    assert steerback(*whole, "--dry-run") == 0
    assert "12 responses to be asked about (whole) by qwen3-32b: about 12 calls" in capsys.readouterr().out
    assert steerback(*whole, "--max-judge-calls", "5") == 2
    assert "budget spent" in capsys.readouterr().err
    assert steerback(*whole) == 0
    said = capsys.readouterr().out
    assert "7 responses to be asked about" in said  # the five are kept
    assert "recovered in silence" in said
    assert sum(server.asked.values()) == 12
    with Run.read(Path("runs/a")) as run:
        rows = {r.trial.key: r for r in run.ledger.rows(stage="measure", judge="scripted")}
        found = {name: value for _, name, value in run.ledger.facts()}["whole by qwen3-32b"]
        assert {k: v["score"] for k, v in found.items()} == {
            k: len(r.judged_text.split()) % 11 for k, r in rows.items()
        }
        assert run.ledger.get("", JUDGE_SPEND)["qwen3-32b (whole)"].calls == 12
    mean = sum(v["score"] for v in found.values()) / 12
    assert f"{mean:.3g}"[:4] in Path("runs/a/whole.txt").read_text("utf-8")
    for judge in ("qwen3-32b", "offline"):
        assert steerback("judge", "a", "--judge", judge, "--rubric", "boundaries") == 0
    capsys.readouterr()
    assert steerback("judge", "a", "--judge", "offline", "--rubric", "whole") == 2
    assert "needs a judge model" in capsys.readouterr().err
    assert steerback("judge", "a", "--judge", "qwen3-32b", "--rubric", "hole") == 2
    assert "unknown rubric 'hole'; did you mean whole?" in capsys.readouterr().err


def test_a_key_that_the_provider_repeats_is_stored_and_shown_nowhere(
    server: FakeJudge, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert steerback("run", "esr", "--target", "organism", "--name", "a", *SMALL) == 0
    for fault, judge in (("echo", "qwen3-32b"), ("rejected", "openrouter/another/model")):
        server.fault = lambda response, before, fault=fault: fault
        for rubric in ("attempts", "whole", "boundaries"):
            steerback("judge", "a", "--judge", judge, "--rubric", rubric)
        steerback("run", "esr", "--target", "organism", "--name", fault, *SMALL, "--set", f"selection.rater={judge}")
    server.fault = lambda response, before: ""
    assert steerback("figures", "a", "--judge", "qwen3-32b") in (0, 2)
    shown = capfd.readouterr()
    assert server.faults["echo"] > 12
    assert server.faults["rejected"]
    assert KEY not in shown.out + shown.err
    with Run.read(Path("runs/a")) as run:
        judged = [r.judgement for r in run.ledger.rows(stage="measure", judge="qwen3-32b") if r.judgement]
    assert any("[OPENROUTER_API_KEY]" in j.raw for j in judged)
    for file in (f for f in tmp_path.rglob("*") if f.is_file()):
        content = file.read_bytes()
        assert KEY.encode() not in content, file
        if file.name == "cache.sqlite":  # its values are compressed
            with contextlib.closing(sqlite3.connect(file)) as cache:
                for (value,) in cache.execute("SELECT value FROM entries"):
                    assert KEY.encode() not in zlib.decompress(value)


def test_an_unknown_provider_is_refused_before_anything_is_generated(
    server: FakeJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", "esr", "--target", "organism", "--name", "a", *SMALL, "--judge", "nobody/some-model"]
    for arguments in ([*run, "--dry-run"], run, ["labels", "auto", "organism", "--judge", "nobody/m", "--dry-run"]):
        assert steerback(*arguments) == 2
        said = capsys.readouterr().err
        assert "unknown provider of judge 'nobody/" in said
        assert "anthropic" in said
        assert said.count("\n") == 1
    assert not Path("runs").exists()


def test_a_judge_that_refuses_everything_is_said_to_have_scored_nothing(
    server: FakeJudge, capsys: pytest.CaptureFixture[str]
) -> None:
    assert steerback("run", "esr", "--target", "organism", "--name", "a", *SMALL) == 0
    server.fault = lambda response, before: "refusal"
    assert steerback("run", "esr", "--target", "organism", *SMALL, "--judge", "qwen3-32b") == 2
    assert "judge qwen3-32b scored no response, most often because: the model refused" in capsys.readouterr().err
    for rubric in ("attempts", "windows", "whole"):
        capsys.readouterr()
        assert steerback("judge", "a", "--judge", "qwen3-32b", "--rubric", rubric) == 0
        said = capsys.readouterr().out
        count = int(re.search(r"(\d+) responses (?:to be|whose)", said)[1])  # type: ignore[index]
        assert f"{count} of {count} responses stay unscored by qwen3-32b" in said
        assert "the model refused (content filter)" in said
        assert rubric != "windows" or "windows of 0 responses scored" in said
    server.fault = lambda response, before: ""
    assert steerback("judge", "a", "--judge", "qwen3-32b", "--retry-unscored") == 0
    assert "unscored" not in capsys.readouterr().out


PRICED = ["run", "esr", "--target", "organism", "--judge", "openai/any", "--dry-run", "--judge-price"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cross-judge", "--judges", "offline,offline-bayes"], "Missing argument 'RUN...'"),
        (["cross-judge", "nothing", "--judges", "offline,offline-bayes"], "no run 'nothing'"),
        (["cross-judge", "a", "--judges", "offline", "offline-bayes"], "separated by commas: --judges A,B"),
        (["run", "cross-judge"], "type: steerback cross-judge RUN RUN ... --judges A,B"),
        (["run", "cross-judge", "--from", "a", "--from", "b"], "type: steerback cross-judge RUN"),
        (["run", "cross-judge", "--from", "a", "b", "--judges", "offline", "offline-bayes"], "steerback cross-judge"),
        (["run", "esr", "--target", "organism", "--judges", "offline"], "No such option: --judges"),
        (["run", "esr", "--target", "organism", "organism-s"], "--target A --target B"),
        (["run", "esr", "--from", "a", "--from", "b"], "starts from one run, not from 2"),
        (["run", "esr", "--target", "organism", "--max-judge-calls", "-1"], "--max-judge-calls"),
        ([*PRICED, "-1", "2"], "--judge-price -1.0 is not an amount of money"),
        ([*PRICED, "1", "nan"], "--judge-price nan is not an amount of money"),
        ([*PRICED, "1", "1", "--max-judge-cost", "nan"], "--max-judge-cost"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert steerback(*arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1
    assert not Path("runs").exists()


amounts = st.builds(Spend, *[st.integers(0, 10**9)] * 3, st.none() | st.integers(0, 10**6).map(float))


@given(amounts, amounts)
def test_spend_adds_up(a: Spend, b: Spend) -> None:
    assert a + b == b + a
    if a.cost is not None and b.cost is not None:
        assert (a + b) - b == a
    assert a * 2 == a + a
