"""Make a direction from texts: mean residual of positive texts minus mean residual of negative (or neutral) texts.

The residual of a layer is averaged over the words of each text first, so that all texts have equal weight.
`targets.directions` stores and loads directions.
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
"""Minimum number of texts per side: a mean of fewer texts depends too much on each of them."""


def from_texts(
    engine: TransformersEngine, positive: Sequence[str], negative: Sequence[str], layer: int, source: str
) -> tuple[Tensor, DirectionFacts]:
    """Return the mean residual of the positive texts minus that of the negative texts, (d,), and facts about it.

    Raises SteerbackError as `check_sides` does, or for equal means.
    """
    check_sides(positive, negative)
    high, _ = mean_residuals(engine, positive, layer)
    low, norm = mean_residuals(engine, negative, layer)
    vector = difference_of_means(high, low)
    if float(vector.norm()) == 0:
        raise SteerbackError("directions: both lists of texts have the same mean residual; choose other texts")
    facts = DirectionFacts(layer, float(vector.norm()), norm, source, contexts=tuple(positive[:CONTEXTS]))
    return vector, facts


def check_sides(positive: Sequence[str], negative: Sequence[str]) -> None:
    """Raise SteerbackError for too few texts, or a text on both sides."""
    both = sorted(set(positive) & set(negative))
    if both:
        raise SteerbackError(f"directions: {both[0]!r} is on both sides; remove it from the positive or negative texts")
    for side, texts in (("positive", positive), ("negative", negative)):
        if len(texts) < LEAST:
            raise SteerbackError(f"directions: {len(texts)} {side} texts; give at least {LEAST}, preferably dozens")


def from_file(
    engine: TransformersEngine, path: Path, texts: Sequence[str], layer: int
) -> tuple[Tensor, DirectionFacts]:
    """Return the direction in a file of any supported format, and facts with the residual's norm over `texts`."""
    vector, width = read_vector(path, layer), engine.runner.site.d_model
    if len(vector) != width:
        raise SteerbackError(
            f"direction {path}: has width {len(vector)}, but the model has width {width}; it belongs to another model"
        )
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
            raise SteerbackError(f"directions: text {texts[n]!r} has no words; remove it")
        h = states[layer].double().cpu()
        means[n] = h.mean(0)
        norms.append(h.norm(dim=1))
    return torch.stack([means[n] for n in range(len(texts))]), float(torch.cat(norms).median())
