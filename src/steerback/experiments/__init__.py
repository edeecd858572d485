"""The experiments: each is a plan, an analysis and figures over the one pipeline.

An experiment is one module with one class; adding it to `REGISTRY` makes it a choice of `steerback run`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from steerback.errors import unknown

if TYPE_CHECKING:
    from steerback.experiments.base import Experiment

REGISTRY = {
    "esr": ("steerback.experiments.esr", "Esr"),
    "no-steering": ("steerback.experiments.no_steering", "NoSteering"),
    "boost-sweep": ("steerback.experiments.boost_sweep", "BoostSweep"),
    "meta-prompts": ("steerback.experiments.meta_prompts", "MetaPrompts"),
    "held-out": ("steerback.experiments.held_out", "HeldOut"),
    "prefill-control": ("steerback.experiments.prefill_control", "PrefillControl"),
    "matched-prefix": ("steerback.experiments.matched_prefix", "MatchedPrefix"),
    "imported": ("steerback.experiments.imported", "ImportedConditions"),
    "detectors": ("steerback.experiments.detectors", "DetectorExperiment"),
    "detector-ablation": ("steerback.experiments.detector_ablation", "DetectorAblation"),
    "random-ablation": ("steerback.experiments.random_ablation", "RandomAblation"),
    "detector-statistics": ("steerback.experiments.detector_statistics", "DetectorStatistics"),
    "traces": ("steerback.experiments.traces", "Traces"),
    "episode-statistics": ("steerback.experiments.episode_statistics", "EpisodeStatistics"),
    "finetuning": ("steerback.experiments.finetuning", "Finetuning"),
    "cross-judge": ("steerback.experiments.cross_judge", "CrossJudge"),
}


def get_experiment(name: str) -> Experiment:
    """The experiment of that name; the error lists the choices."""
    if name not in REGISTRY:
        raise unknown("experiment", name, sorted(REGISTRY))
    module, cls = REGISTRY[name]
    experiment: Experiment = getattr(importlib.import_module(module), cls)()
    return experiment
