"""Other processes that judge give the same verdicts, and a run does not depend on them."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from steerback.judging import JudgeItem, References, offline, processes
from steerback.judging.offline import OfflineJudge
from steerback.records import Judgement
from tools.judge.validity import compose, references

DATA = json.loads((Path(__file__).parent / "data" / "judging" / "dev.json").read_text(encoding="utf-8"))
ITEMS = [case.item for case in compose(DATA)][:100]


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough cores for one process, and none from a test before."""
    monkeypatch.setattr(processes, "CORES", 1)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "2")
    monkeypatch.setattr(offline, "_models", {})
    monkeypatch.setattr(offline, "_processes", {})


def expecting_many() -> References:
    return replace(references(DATA), expected=1000)


def verdicts(judge: OfflineJudge, items: list[JudgeItem]) -> list[Judgement]:
    async def collect() -> list[Judgement]:
        return [verdict async for _, verdict in judge.judge(items)]

    return asyncio.run(collect())


@pytest.mark.parametrize("early", [False, True])
def test_other_processes_give_the_same_verdicts_and_their_end_loses_none(
    early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if early:  # while an engine starts
        processes.start_early("steerback.judging.relevance")
        assert len(processes._early) == 1
    judge, judge_batch = OfflineJudge(), OfflineJudge.judge_batch
    judge.prepare(expecting_many())
    others = judge._processes
    assert others is not None
    assert not processes._early
    with monkeypatch.context() as elsewhere:  # the first verdicts wait for the processes; no model is built here
        elsewhere.setattr(OfflineJudge, "_model", None)
        received = verdicts(judge, ITEMS)
    assert (expected := judge.judge_batch(ITEMS)) == received
    waiting = others.start(judge_batch, ITEMS * 50)
    for process in psutil.Process().children(recursive=True):
        if "popen_loky_posix" in " ".join(process.cmdline()):
            process.kill()
    assert waiting is not None
    with pytest.raises(BrokenExecutor):
        waiting.result()
    assert verdicts(judge, ITEMS) == expected


def test_without_shared_memory_this_process_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(processes, "SharedObject", full)
    judge = OfflineJudge()
    judge.prepare(expecting_many())
    assert verdicts(judge, ITEMS[:5]) == judge.judge_batch(ITEMS[:5])
