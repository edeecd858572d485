"""Outcomes of one condition, one entry per trial, as plain arrays: the input of every statistic.

Missing numbers are nan, never 0. This module knows the judgement record, but no ledgers, engines or files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from steerback.errors import SteerbackError
from steerback.metrics.intervals import Codes, Flags, Floats
from steerback.records import Judgement, LatentKey

VALID, EMPTY, UNSCORED, INVALID = 0, 1, 2, 3
STATES = ("valid", "empty", "unscored", "invalid")  # index is the constant
NAN = float("nan")


class Outcome(NamedTuple):
    """Outcome of one trial: state, gated and ungated attempts with first and last score (0-100), degradation."""

    state: int
    attempts: int
    first: float
    last: float
    ungated_attempts: int
    ungated_first: float
    ungated_last: float
    degraded: bool


@dataclass(frozen=True, eq=False)
class Outcomes:
    """All trials of one condition, every array of shape (n_trials,).

    `cluster` is a code of the latent (trials of one latent are correlated). `pair` is the trial's index in the plan:
    trials of two conditions with equal `pair` share prompt, seed and latent. Scores (0-100) are gated unless named
    otherwise; a trial that is not VALID has score nan and 0 attempts. `cut` is 1 if the length limit stopped the
    response, so that its last attempt may be unfinished, and nan if that is unknown.
    """

    cluster: Codes
    pair: Codes
    state: NDArray[np.uint8]
    attempts: Codes
    first: Floats
    last: Floats
    ungated_attempts: Codes
    ungated_first: Floats
    ungated_last: Floats
    degraded: Flags
    cut: Floats = field(default_factory=lambda: np.zeros(0))
    include_degraded: bool = field(default=True, kw_only=True)
    """Whether degraded responses count in the headline."""

    def __post_init__(self) -> None:
        if not len(self.cut):
            object.__setattr__(self, "cut", np.full(len(self.state), NAN))
        for name, dtype in _DTYPES.items():
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))
        shapes = {getattr(self, name).shape for name in _DTYPES}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise ValueError(f"outcomes need one-dimensional arrays of one length, got shapes {sorted(shapes)}")
        valid = self.state == VALID
        for attempts, *scores in (("attempts", "first", "last"), ("ungated_attempts", "ungated_first", "ungated_last")):
            if np.any(getattr(self, attempts)[valid] < 1):
                raise ValueError(f"a valid trial needs at least one attempt ({attempts})")
            if not all(np.all(np.isfinite(getattr(self, s)[valid])) for s in scores):
                raise ValueError(f"a valid trial needs finite scores ({', '.join(scores)})")

    def __len__(self) -> int:
        return len(self.state)

    def take(self, index: Flags | Codes) -> Outcomes:
        """Return the trials at `index` (positions or a mask), in that order."""
        return Outcomes(*(getattr(self, name)[index] for name in _DTYPES), include_degraded=self.include_degraded)

    @staticmethod
    def concat(parts: Iterable[Outcomes]) -> Outcomes:
        """Concatenate several conditions; pairs may then repeat."""
        parts = list(parts)
        if not parts:
            return Outcomes.from_rows([])
        columns = (np.concatenate([getattr(p, name) for p in parts]) for name in _DTYPES)
        return Outcomes(*columns, include_degraded=parts[0].include_degraded)

    @staticmethod
    def from_rows(
        rows: Iterable[tuple[LatentKey | None, int, bool, Judgement | None, bool]],
        cut: Sequence[float] = (),
        include_degraded: bool = True,
    ) -> Outcomes:
        """Build outcomes from rows (latent key, pair, trial ok, judgement, degraded), with `cut` if it is known.

        Trial ok: the response was generated without an error and its receipt matches the plan.
        """
        table = [(cluster_code(key), pair, *outcome_of(ok, judged, worn)) for key, pair, ok, judged, worn in rows]
        columns = [*zip(*table, strict=True)] if table else [()] * (len(_DTYPES) - 1)
        arrays = zip([*columns, cut], _DTYPES.values(), strict=True)
        return Outcomes(*(np.array(c, dtype=d) for c, d in arrays), include_degraded=include_degraded)


_DTYPES: dict[str, type[np.generic]] = {
    "cluster": np.int64,
    "pair": np.int64,
    "state": np.uint8,
    "attempts": np.int64,
    "first": np.float64,
    "last": np.float64,
    "ungated_attempts": np.int64,
    "ungated_first": np.float64,
    "ungated_last": np.float64,
    "degraded": np.bool_,
    "cut": np.float64,
}


def outcome_of(trial_ok: bool, judgement: Judgement | None, degraded: bool) -> Outcome:
    """Return the outcome of one trial: INVALID if it is not ok, whatever the judge said; UNSCORED if not judged yet."""
    if not trial_ok:
        state = INVALID
    elif judgement is None or judgement.status == "unscored":
        state = UNSCORED
    elif judgement.status == "empty":
        state = EMPTY
    else:
        gated, ungated = judgement.gated_attempts(), judgement.attempts
        scores = (gated[0].score, gated[-1].score, ungated[0].score, ungated[-1].score)
        if not all(map(math.isfinite, scores)):
            return Outcome(UNSCORED, 0, NAN, NAN, 0, NAN, NAN, degraded)
        return Outcome(VALID, len(gated), *scores[:2], len(ungated), *scores[2:], degraded)
    return Outcome(state, 0, NAN, NAN, 0, NAN, NAN, degraded)


def cluster_code(key: LatentKey | None) -> int:
    """Return a code that is equal in all runs: an SAE index itself, a negative hash of a name, -1 for no latent."""
    if key is None:
        return -1
    if isinstance(key, int):
        if key < 0:
            raise SteerbackError(f"latent index {key} is negative; indices of SAE latents start at 0")
        return key
    return -2 - int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
