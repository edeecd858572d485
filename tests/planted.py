"""Runs on the scripted engine and judge with known rates, for the tests of the experiments."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from steerback.config import build_config
from steerback.engines.scripted import PlantedModel, Script, ScriptedEngine
from steerback.figures import style
from steerback.figures.style import save_all
from steerback.jobs import check, execute
from steerback.jobs.execute import Analysis
from steerback.judging.base import JudgeItem
from steerback.judging.scripted import ScriptedJudge
from steerback.records import Judgement, Request
from steerback.store.ledger import Ledger
from steerback.targets import BoostPrior, Target

SIZES = (
    "n_latents=12",
    "trials_per_latent=20",
    "reference_responses=2",
    "floor_responses=38",
    "draws=200",
    "calibration.max_iterations=8",
    "calibration.trials_per_iteration=6",
    "calibration.verify_trials=4",
)


class PlantedTarget(Target):
    """A target without files, with a label for each of its latents."""

    def labels(self) -> dict[int, str]:
        return {k: f"concrete thing {k}" for k in range(self.n_latents)}


def target(name: str = "planted") -> Target:
    return PlantedTarget(name, "nowhere", 1, 1, BoostPrior(10, 5, 0, 40), n_latents=64)


def thresholds(mean: float = 10.0, sd: float = 2.0) -> dict[Any, float]:
    """Planted thresholds that differ between latents."""
    return {k: mean + sd * ((k * 37) % 64 / 32 - 1) * 1.7 for k in range(64)}


class Held(ScriptedJudge):
    """A slow judge: its verdict on the trial `first` waits until the trial `until` arrives."""

    def __init__(self, first: str, until: str) -> None:
        super().__init__()
        self.first, self.until, self.arrived = first, until, asyncio.Event()

    async def judge(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, Judgement]]:
        if any(item.key == self.until for item in items):
            self.arrived.set()
        late = [item for item in items if item.key == self.first]
        async for done in super().judge([item for item in items if item not in late]):
            yield done
        if late:
            await self.arrived.wait()
        async for done in super().judge(late):
            yield done


class Runs:
    """Runs experiments with `script` in place of a model, into folders under `root`; figures on demand."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch, script: Script | None = None, name: str = "planted"):
        self.draw = False
        patch.setattr(style, "save_all", lambda *given: save_all(*given) if self.draw else None)
        self.root, self.scripts = root, {name: script or PlantedModel(thresholds=thresholds())}
        self.makers = check.Makers(
            engine=lambda t, options: ScriptedEngine(self.scripts[t.name], target=t.name, n_latents=64),
            target=lambda wanted, own: target(wanted),
        )

    def run(
        self,
        experiment: str,
        *settings: str,
        base: str | None = None,
        targets: tuple[str, ...] = (),
        name: str | None = None,
    ) -> tuple[Analysis, Path]:
        """The analysis and folder of one run; `base` is the name of the run it starts from."""
        from steerback.store.run import stored_config

        started = (str(self.root / base), stored_config(self.root / base)) if base else None
        config = build_config(
            experiment,
            targets or (next(iter(self.scripts)),),
            "quick",
            overrides={"engine": "scripted", "judge": "scripted"},
            assignments=(() if base else SIZES) + settings,
            base=started,
        )
        folder = self.root / (name or experiment)
        return execute.run(check.check(config, self.makers), folder), folder

    def ledger(self, name: str) -> Ledger:
        return Ledger(self.root / name / "ledger.sqlite", read_only=True)


@dataclass(frozen=True)
class Peaked(PlantedModel):
    """Restarts most often at `offset` from the threshold, less so on both sides; a long second half."""

    offset: float = -1.0
    width: float = 2.0

    def restart_probability(self, request: Request) -> float:
        usual = super().restart_probability(request)
        added = next((i for i in request.interventions if i.mode == "add"), None)
        if added is None:
            return 0.0
        away = added.value - self.thresholds[added.latent] - self.offset
        return usual * math.exp(-0.5 * (away / self.width) ** 2)

    def __call__(self, request: Request) -> str:
        return super().__call__(request) + " And so it goes on for a while." * 12


def inside(estimate: dict[str, Any], truth: float) -> bool:
    return bool(estimate["low"] <= truth <= estimate["high"])


def headline(summary: Any, condition: str, target: str = "planted") -> dict[str, Any]:
    return dict(summary["targets"][target]["conditions"][condition]["headline"])
