"""Judges on a local server (vLLM, Ollama, any OpenAI-compatible server): base URL without a key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fake_judges import FakeJudge
from steerback.cli import main
from steerback.errors import SteerbackError
from steerback.judging.models import check_key, is_near
from steerback.store.run import Run

SMALL = [
    *("--preset", "quick", "--engine", "scripted", "--judge", "scripted"),
    *("--set", "n_latents=3", "--set", "trials_per_latent=4", "--set", "draws=100"),
    *("--set", "calibration.max_iterations=4", "--set", "calibration.verify_trials=0"),
]
JUDGES = {
    "openai-api/lab/some-model": "LAB_BASE_URL",
    "vllm/Qwen/Qwen2.5-7B-Instruct": "VLLM_BASE_URL",
    "ollama/llama3.1:8b": "OLLAMA_BASE_URL",
}


def steerback(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with one that is judged by the scripted judge alone."""
    pytest.importorskip("inspect_ai")
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEERBACK_CACHE", str(runs / "cache"))
        assert steerback("run", "esr", "--target", "organism", "--name", "a", *SMALL, "--runs", str(runs)) == 0
    return runs


@pytest.fixture
def server(measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJudge]:
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for variable in ("LAB_API_KEY", "VLLM_API_KEY", "OLLAMA_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    with FakeJudge() as running:
        for variable in JUDGES.values():
            monkeypatch.setenv(variable, running.url + "/v1")
        yield running


@pytest.mark.parametrize("judge", JUDGES)
def test_a_local_server_judges_without_a_key(
    judge: str, server: FakeJudge, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert steerback("judge", "a", "--judge", judge, "--limit", "3", "--no-cache", "--runs", str(measured)) == 0
    assert f"3 responses judged by {judge}" in capsys.readouterr().out
    assert server.requests[0]["model"] == judge.partition("/")[2].removeprefix("lab/")
    with Run.read(measured / "a") as run:
        rows = [r for r in run.ledger.rows(judge=judge) if r.judgement is not None]
    assert [r.judgement.status for r in rows if r.judgement] == ["scored"] * 3
    assert {r.trial.stage for r in rows} == {"measure"}


def test_measured_trials_are_judged_first_and_a_stage_can_be_chosen(
    server: FakeJudge, measured: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judge = ["judge", "a", "--judge", "openai-api/lab/other", "--no-cache", "--runs", str(measured)]
    assert steerback(*judge, "--max-judge-calls", "12") == 2
    with Run.read(measured / "a") as run:
        rows = [r.trial.stage for r in run.ledger.rows(judge=judge[3]) if r.judgement is not None]
    assert rows == ["measure"] * 12
    assert steerback(*judge, "--max-judge-calls", "20") == 2
    with Run.read(measured / "a") as run:
        stages = [r.trial.stage for r in run.ledger.rows(judge=judge[3]) if r.judgement is not None]
    assert set(stages) == {"measure", "floor"}
    capsys.readouterr()
    assert steerback(*judge, "--stage", "measure", "--dry-run") == 0
    assert "0 responses to be judged" in capsys.readouterr().out
    assert steerback(*judge, "--stage", "calibration", "--dry-run") == 0
    assert "\n" in (said := capsys.readouterr().out)
    assert int(said.split(" responses")[0]) > 12
    assert steerback(*judge, "--stage", "measured") == 2
    assert (
        "unknown stage 'measured'; did you mean measure? choose one of: calibration, floor, measure"
        in capsys.readouterr().err
    )


def test_only_servers_nearby_need_no_key() -> None:
    near = ("http://localhost:8000/v1", "http://127.0.0.1:1/v1", "http://[::1]:8", "http://10.0.0.7", "http://gpu:8000")
    assert all(is_near(address) for address in near)
    far = ("https://api.example.com/v1", "http://8.8.8.8/v1")
    assert not any(is_near(address) for address in far)
    with pytest.raises(SteerbackError, match="is not an address of the form"):
        is_near("nonsense")
    check_key("openai-api/my-lab/m", {"MY_LAB_BASE_URL": near[0]})
    with pytest.raises(SteerbackError, match="no key; set MY_LAB_API_KEY"):
        check_key("openai-api/my-lab/m", {"MY_LAB_BASE_URL": far[0]})
