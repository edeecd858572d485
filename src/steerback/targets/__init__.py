"""Targets: the models that are steered, each with SAE, layers and labels. Importing this loads no heavy library."""

from __future__ import annotations

from steerback.records import BoostPrior
from steerback.targets.registry import builtin_targets, from_folder, list_targets, read_targets, resolve, user_tables
from steerback.targets.target import SaeSource, Target

__all__ = [
    "BoostPrior",
    "SaeSource",
    "Target",
    "builtin_targets",
    "from_folder",
    "list_targets",
    "read_targets",
    "resolve",
    "user_tables",
]
