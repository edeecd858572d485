"""A run killed at any moment and resumed ends with the ledger of an uninterrupted one.

The child counts its own function calls and kills itself with SIGKILL at the n-th, so the moments are random over the
whole run and the same in every test run; nothing waits for a clock.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from children import SCALE, in_child
from small_runs import ledger_of, scripted_job

from steerback.config import build_config
from steerback.jobs import execute
from steerback.jobs.check import PreparedRun, check
from steerback.store.cache import Cache

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


def job(engine: str) -> PreparedRun:
    if engine == "scripted":
        return scripted_job()
    overrides = {"engine": engine, "judge": "offline"}
    return check(build_config("esr", ("organism",), "quick", overrides=overrides, assignments=TINY))


def run_counting(engine: str, folder: Path, cache: Path, kill_at: int | None, drawn: bool, calls: Any) -> None:
    """Runs the job; counts calls of Python functions in `calls`, and dies at call number `kill_at`."""
    count = 0

    def watch(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event == "call"
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    if not drawn:
        execute.analyse = lambda *_: None  # type: ignore[assignment]  # it only reads the ledger
    sys.setprofile(watch)
    execute.run(job(engine), folder, cache=Cache(cache))
    sys.setprofile(None)
    calls.value = count


@pytest.mark.parametrize(
    ("engine", "warm", "drawn", "wanted"),
    [
        ("scripted", False, False, 5 * SCALE),
        ("scripted", True, False, 3 * SCALE),
        ("scripted", True, True, 2 * SCALE),
        ("transformers", False, False, 2 * SCALE),  # each start loads the model anew
    ],
    ids=["cold cache", "warm cache", "with figures", "real model"],
)
def test_killed_at_random_moments_and_resumed_the_ledger_is_the_same(
    tmp_path: Path, engine: str, warm: bool, drawn: bool, wanted: int
) -> None:
    whole, cache = tmp_path / "whole", tmp_path / "cache.sqlite"
    code, calls = in_child(run_counting, engine, whole, cache, None, drawn)
    assert code == 0
    expected = ledger_of(whole)
    assert len(expected["judgements"]) > 30
    draw = random.Random(44)
    folder, kills, finished = tmp_path / "run0", 0, 0
    for number in range(4 * wanted):
        own = cache if warm else tmp_path / f"cache-{folder.name}.sqlite"
        kill_at = draw.randint(1, calls) if kills < wanted else None
        code, _ = in_child(run_counting, engine, folder, own, kill_at, drawn)
        kills += code == -signal.SIGKILL
        if code == 0:
            assert ledger_of(folder) == expected
            assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in whole.iterdir())  # no leftovers
            finished += 1
            if kills >= wanted:
                break
            folder = tmp_path / f"run{number + 1}"
        else:
            assert code == -signal.SIGKILL
    assert kills == wanted
    assert finished >= 1
