"""The experiments; each is a plan of trials with typed options for the shared pipeline.

An experiment is one module with one class. Adding the class to `REGISTRY` makes it a choice of `steerback run`. Its
analysis and figures are registered under the same name in `analysis` and `figures`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from steerback.errors import unknown

if TYPE_CHECKING:
    from steerback.config import RunConfig, Settings
    from steerback.experiments.base import Experiment

REGISTRY = {
    "esr": ("conditions", "Esr"),
    "no-steering": ("conditions", "NoSteering"),
    "boost-sweep": ("boost_sweep", "BoostSweep"),
    "meta-prompts": ("meta_prompts", "MetaPrompts"),
    "held-out": ("conditions", "HeldOut"),
    "prefill-control": ("prefill_control", "PrefillControl"),
    "matched-prefix": ("matched_prefix", "MatchedPrefix"),
    "imported": ("conditions", "ImportedConditions"),
    "detectors": ("detectors", "DetectorExperiment"),
    "detector-ablation": ("ablation", "DetectorAblation"),
    "random-ablation": ("ablation", "RandomAblation"),
    "detector-statistics": ("detectors", "DetectorStatistics"),
    "traces": ("episodes", "Traces"),
    "episode-statistics": ("episodes", "EpisodeStatistics"),
    "finetuning": ("finetuning", "Finetuning"),
    "cross-judge": ("cross_judge", "CrossJudge"),
}


def experiment_type(name: str) -> type[Experiment[Settings]]:
    """Return the class of an experiment. Raises SteerbackError with the valid names if the name is unknown."""
    if name not in REGISTRY:
        raise unknown("experiment", name, sorted(REGISTRY))
    module, cls = REGISTRY[name]
    kind: type[Experiment[Settings]] = getattr(importlib.import_module(f"steerback.experiments.{module}"), cls)
    return kind


def make_experiment(config: RunConfig) -> Experiment[Settings]:
    """Return the experiment that a config names, with its checked options."""
    from steerback.experiments.base import parse_options

    kind = experiment_type(config.experiment)
    return kind(parse_options(kind, config))
