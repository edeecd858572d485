"""Runs on a scripted model with known detectors, backtracking latent and ablation effect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from planted import Runs, thresholds
from steerback.engines.scripted import PlantedModel

DETECTORS, BACKTRACKER = (3, 11, 40), 7
RATE, EFFECT, LEAD = 0.4, 0.5, 4
FEW_RESPONSES = "options.responses=100"
MODEL = PlantedModel(
    thresholds=thresholds(),
    restart_rate=RATE,
    detectors=DETECTORS,
    ablation_effect=EFFECT,
    lead=LEAD,
    backtrackers=(BACKTRACKER,),
)


@contextmanager
def detector_runs(root: Path) -> Iterator[Runs]:
    """Runs under `root`, of which `esr` and `detectors` are finished."""
    with pytest.MonkeyPatch.context() as patch:
        runs = Runs(root, patch, MODEL)
        runs.run("esr")
        runs.run("detectors", FEW_RESPONSES, base="esr")
        yield runs


def without_restarts(runs: Runs) -> str:
    """Add a target that never restarts and has no detectors; return its name."""
    runs.scripts["blank"] = PlantedModel(thresholds=thresholds(), restart_rate=0.0)
    return "blank"
