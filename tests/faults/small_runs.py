"""A small run over the scripted engine, and its ledger, for tests that disturb it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steerback.config import build_config
from steerback.jobs.check import PreparedRun, check
from steerback.store.ledger import Ledger

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


def scripted_job(*assignments: str) -> PreparedRun:
    """An esr run of the scripted engine and judge: about 60 responses, without its analysis under a second."""
    overrides = {"engine": "scripted", "judge": "scripted"}
    return check(build_config("esr", ("organism",), "quick", overrides=overrides, assignments=(*SMALL, *assignments)))


def ledger_of(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Everything in a run's ledger but times."""
    with Ledger(folder / "ledger.sqlite", read_only=True) as ledger:
        return ledger.dump()
