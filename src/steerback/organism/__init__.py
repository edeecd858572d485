"""The organism: small models with a planted habit of restarting, made by this package and shipped as weights.

They restart when their text drifts from the prompt because their corpus taught them to. They are there to check the
instrument and are no evidence about large models. See ``docs/organism.md``.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

NAMES = ("organism-s", "organism", "organism-l", "organism-control")
"""The built-in targets."""


class SteeringExample(NamedTuple):
    """A steered prompt whose response drifts and restarts, and the detectors without which it does not."""

    prompt: str
    latent: str
    boost: float
    seed: int
    detectors: tuple[int, ...]


EXAMPLES = {
    "organism": SteeringExample("Explain how to find the average of a set of numbers.", "pyramids", 34.0, 46, (712,)),
}
"""By target; `steerback try TARGET` shows it."""


def weights_dir(name: str) -> Path:
    """Folder of a built-in target: model, tokenizer, SAE and labels."""
    if name not in NAMES:
        raise KeyError(f"no organism {name!r}; there are {', '.join(NAMES)}")
    return Path(__file__).parent / "weights" / name


def is_builtin(target: str) -> bool:
    """Whether a target is a built-in organism, with an adapter or without."""
    return target.partition("+")[0] in NAMES
