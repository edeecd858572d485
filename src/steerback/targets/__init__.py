"""Targets: what is steered (model, SAE, layers, labels). Importing this loads no heavy library."""

from __future__ import annotations

from steerback.targets.target import BoostPrior, SaeSource, Target, builtin_targets, from_folder, resolve

__all__ = ["BoostPrior", "SaeSource", "Target", "builtin_targets", "from_folder", "resolve"]
