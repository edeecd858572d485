"""A run on the scripted engine whose continuations restart at known rates, for tests of forks."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from planted import Runs
from steerback.analysis.forks import Forked
from steerback.engines.scripted import RESTART, PlantedModel, ScriptedEngine
from steerback.jobs.fork import ForkSettings, fork_trial
from steerback.records import Request

SMALL = ("n_latents=4", "trials_per_latent=4", "floor_responses=8")


@dataclass(frozen=True)
class Continuing(PlantedModel):
    """Continues a prefix: restarts with `steered`, `free` where nothing is added, `held` where a latent is clamped.

    Draws depend on the seed alone, so an arm with a higher rate restarts wherever one with a lower rate does.
    """

    steered: float = 0.3
    free: float = 0.8
    held: float = 0.1
    ending: str = "Here is the answer."

    def __call__(self, request: Request) -> str:
        if request.prefix is None:
            return super().__call__(request)
        future = [e for e in request.interventions if e.positions != "prompt"]
        rate = self.held if any(e.mode == "clamp" for e in future) else self.steered
        rate = rate if any(e.mode == "add" and e.value for e in future) else self.free
        again = random.Random(request.seed).random() < rate
        return " and further on." + (f" {RESTART} [[score 90.0]] {self.ending}" if again else "")


def forked(runs: Runs, name: str, trial: str, settings: ForkSettings) -> Forked:
    """The results of forking a trial of the run `name`."""
    return fork_trial(runs.root / name, trial, settings, makers=runs.makers)


def counting(runs: Runs) -> list[ScriptedEngine]:
    """Every engine that is made from now on; each counts its completions."""
    made: list[ScriptedEngine] = []
    original = runs.makers.engine

    def make(target, options):  # type: ignore[no-untyped-def]
        made.append(original(target, options))  # type: ignore[arg-type]
        return made[-1]

    object.__setattr__(runs.makers, "engine", make)
    return made


def a_trial(runs: Runs, name: str, attempts: int) -> str:
    """Key of a measured trial with so many attempts."""
    rows = runs.ledger(name).rows(stage="measure", judge="scripted")
    return next(r.trial.key for r in rows if len(r.attempts) == attempts)


def files(folder: Path) -> dict[str, bytes]:
    """Content of every result file of a run; the manifest holds times."""
    return {
        p.name: p.read_bytes()
        for p in sorted(folder.iterdir())
        if p.suffix in (".json", ".txt", ".csv", ".tex") and p.name != "manifest.json"
    }
