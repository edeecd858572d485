"""The organisms: small models with a planted habit of restarting, trained by this project and shipped as weights.

They restart after their text drifts from the prompt, because their corpus taught them to. They serve to check the
instrument and are no evidence about large models. See ``docs/organism.md``.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

NAMES = ("organism-s", "organism", "organism-l", "organism-control")
"""The built-in targets."""


class SteeringExample(NamedTuple):
    """A steered prompt whose response drifts and restarts, and the detectors whose ablation prevents the restart."""

    prompt: str
    latent: str
    boost: float
    seed: int
    detectors: tuple[int, ...]


EXAMPLES = {
    "organism": SteeringExample("Explain how to find the average of a set of numbers.", "pyramids", 34.0, 46, (712,)),
}
"""Example of each target that `steerback try TARGET` shows."""


def weights_dir(name: str) -> Path:
    """Return the folder of a built-in target with model, tokenizer, SAE and labels. Raises KeyError if unknown."""
    if name not in NAMES:
        raise KeyError(f"unknown organism {name!r}; choose one of: {', '.join(NAMES)}")
    return Path(__file__).parent / "weights" / name


def is_builtin(target: str) -> bool:
    """Return whether a target is a built-in organism, with or without an adapter."""
    return target.partition("+")[0] in NAMES
