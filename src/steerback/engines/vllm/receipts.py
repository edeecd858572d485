"""From the marks that layers left to receipts: how many positions were edited, and how far. Arithmetic alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from steerback.engines.vllm.tables import CACHED, UNEDITED


def receipts(
    plans: Sequence[Sequence[Collection[int]]],
    boundaries: Sequence[int],
    fed: Sequence[int],
    marks: Mapping[int, np.ndarray[Any, Any]],
) -> list[dict[str, Any]]:
    """Prompt and generated positions edited and their mean norm, for n requests at once.

    plans: the layers that edit each request's prompt and generated positions; boundaries: its first generated position;
    fed: how many positions it had; marks: (n, longest) of every layer in `plans`. A position counts when every layer
    that was to edit it did. What came out of the prefix cache was edited when it was computed, and its norm is not
    known here: it counts, and the mean is over the others (0.0 if there are none).
    """
    position = np.arange(max(fed))
    end, generated = np.array(fed)[:, None], position >= np.array(boundaries)[:, None]
    counts, computed, norm = [], np.zeros(len(fed)), np.zeros(len(fed))
    for phase, inside in enumerate((~generated, generated)):
        planned = {layer: np.array([layer in plan[phase] for plan in plans])[:, None] for layer in marks}
        some = np.array([bool(plan[phase]) for plan in plans])[:, None]
        done = inside & (position < end) & some
        for layer, edits in planned.items():
            done &= (marks[layer] != UNEDITED) | ~edits
        counts.append(done.sum(axis=1).tolist())
        for layer, edits in planned.items():
            done &= (marks[layer] != CACHED) | ~edits
        computed += done.sum(axis=1)
        for layer, edits in planned.items():
            norm += marks[layer].sum(axis=1, dtype=np.float64, where=done & edits)
    means = (norm / np.maximum(computed, 1)).tolist()
    return [{"prompt": p, "generated": g, "norm": n} for p, g, n in zip(*counts, means, strict=True)]
