"""Make directions from texts: difference of means, and the mean of a topic's texts minus that of neutral ones.

The layer's residual over a text's own words is averaged, so that long texts count as much as short ones. How a
direction is kept and used is in `targets.directions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from steerback.errors import SteerbackError
from steerback.targets.directions import DirectionFacts, difference_of_means, read_facts, read_vector

if TYPE_CHECKING:
    from torch import Tensor

    from steerback.engines.transformers import TransformersEngine

CONTEXTS = 8
LEAST = 3
"""Texts on either side: fewer say more about themselves than about what they share."""


def from_texts(
    engine: TransformersEngine, positive: Sequence[str], negative: Sequence[str], layer: int, source: str
) -> tuple[Tensor, DirectionFacts]:
    """Return the mean residual of the positive texts minus that of the negative ones, (d,), and facts about it.

    Raises SteerbackError for too few texts, texts on both sides, or means that do not differ.
    """
    both = sorted(set(positive) & set(negative))
    if both:
        raise SteerbackError(f"directions: {both[0]!r} is on both sides; a text can stand for one side only")
    for side, texts in (("positive", positive), ("negative", negative)):
        if len(texts) < LEAST:
            raise SteerbackError(f"directions: {len(texts)} {side} texts; give at least {LEAST}, better dozens")
    high, _ = mean_residuals(engine, positive, layer)
    low, norm = mean_residuals(engine, negative, layer)
    vector = difference_of_means(high, low)
    if float(vector.norm()) == 0:
        raise SteerbackError("directions: the two lists of texts have the same mean; there is nothing to steer with")
    facts = DirectionFacts(layer, float(vector.norm()), norm, source, contexts=tuple(positive[:CONTEXTS]))
    return vector, facts


def from_file(
    engine: TransformersEngine, path: Path, texts: Sequence[str], layer: int
) -> tuple[Tensor, DirectionFacts]:
    """Return a direction of any readable file, with the residual's norm measured on `texts`."""
    vector, width = read_vector(path, layer), engine.runner.site.d_model
    if len(vector) != width:
        raise SteerbackError(f"direction {path}: has width {len(vector)}, the model has {width}; it is another model's")
    _, norm = mean_residuals(engine, texts, layer)
    known = read_facts(path)
    return vector, replace(
        known, layer=layer, norm=float(vector.norm()), residual_norm=norm, source=known.source or f"file {path.name}"
    )


def mean_residuals(engine: TransformersEngine, texts: Sequence[str], layer: int) -> tuple[Tensor, float]:
    """Return the mean residual over each text's words, (n texts, d) float64, and the median norm over all tokens."""
    import torch

    means: dict[int, Tensor] = {}
    norms: list[Tensor] = []
    for n, ids, states in engine.residuals([""] * len(texts), texts, (layer,)):
        if not ids:
            raise SteerbackError(f"directions: text {texts[n]!r} has no words")
        h = states[layer].double().cpu()
        means[n] = h.mean(0)
        norms.append(h.norm(dim=1))
    return torch.stack([means[n] for n in range(len(texts))]), float(torch.cat(norms).median())
