"""A run killed at any moment and resumed ends with the ledger of an uninterrupted one.

The child counts its own function calls and kills itself with SIGKILL at the n-th, so the moments are random over the
whole run and the same in every test run; nothing waits for a clock.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from steerback.config import build_config
from steerback.jobs import execute
from steerback.jobs.check import PreparedRun, check
from steerback.store.cache import Cache
from steerback.store.ledger import Ledger

KILLS = 12
KILLS_OF_A_MODEL = 3  # each start loads the model anew
TINY = (
    "n_latents=2",
    "trials_per_latent=3",
    "reference_responses=1",
    "floor_responses=3",
    "draws=100",
    "calibration.max_iterations=3",
    "calibration.trials_per_iteration=6",
    "calibration.verify_trials=0",
    "calibration.tolerance=45",
    "sampling.max_new_tokens=30",
)
SMALL = (
    "n_latents=3",
    "trials_per_latent=4",
    "reference_responses=1",
    "floor_responses=3",
    "draws=100",
    "calibration.max_iterations=3",
    "calibration.trials_per_iteration=3",
    "calibration.verify_trials=2",
    "selection.concreteness=off",
)


def job(engine: str = "scripted") -> PreparedRun:
    judge, sizes = ("scripted", SMALL) if engine == "scripted" else ("offline", TINY)
    overrides = {"engine": engine, "judge": judge}
    return check(build_config("esr", ("organism",), "quick", overrides=overrides, assignments=sizes))


def run_counting(engine: str, folder: Path, cache: Path, kill_at: int | None, calls: Any) -> None:
    """Runs the job; counts calls of Python functions in `calls`, and dies at call number `kill_at`."""
    count = 0

    def watch(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    execute.analyse = lambda *_: None  # type: ignore[assignment]  # it only reads the ledger
    sys.setprofile(watch)
    execute.run(job(engine), folder, cache=Cache(cache))
    sys.setprofile(None)
    calls.value = count


def in_child(engine: str, folder: Path, cache: Path, kill_at: int | None = None) -> tuple[int, int]:
    """(exit code, calls made); forked from a process that has imported everything and computed nothing.

    A fork of this process would inherit torch's threads from other tests, which torch does not survive reliably.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch", "transformers", "steerback.engines.transformers"])
    calls = context.Value("q", 0)
    child = context.Process(target=run_counting, args=(engine, folder, cache, kill_at, calls))
    child.start()
    child.join(300)
    assert child.exitcode is not None
    return child.exitcode, calls.value


def ledger_of(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
        return ledger.dump()


@pytest.mark.parametrize(
    ("engine", "warm", "wanted"),
    [("scripted", False, KILLS), ("scripted", True, KILLS), ("transformers", False, KILLS_OF_A_MODEL)],
    ids=["cold cache", "warm cache", "real model"],
)
def test_killed_at_random_moments_and_resumed_the_ledger_is_the_same(
    tmp_path: Path, engine: str, warm: bool, wanted: int
) -> None:
    whole, cache = tmp_path / "whole", tmp_path / "cache.sqlite"
    code, calls = in_child(engine, whole, cache)
    assert code == 0
    expected = ledger_of(whole)
    assert len(expected["judgements"]) > 30
    draw = random.Random(44)
    folder, kills, finished = tmp_path / "run0", 0, 0
    for number in range(4 * wanted):
        own = cache if warm else tmp_path / f"cache-{folder.name}.sqlite"
        code, _ = in_child(engine, folder, own, draw.randint(1, calls) if kills < wanted else None)
        kills += code == -signal.SIGKILL
        if code == 0:
            assert ledger_of(folder) == expected
            finished += 1
            if kills >= wanted:
                break
            folder = tmp_path / f"run{number + 1}"
        else:
            assert code == -signal.SIGKILL
    assert kills == wanted
    assert finished >= 1
