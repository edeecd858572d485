"""The outcomes of one condition, trial by trial, as plain arrays: the input of every statistic.

Knows the judgement record, and nothing of ledgers, engines or files. Missing numbers are nan, never 0.
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
    """One trial's row: state, gated and ungated attempts with first and last score (0-100), degradation."""

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

    `cluster` is a code of the latent (trials of one latent are correlated), `pair` the trial's index in the plan:
    equal pair means same prompt, seed and latent in the conditions that are compared. Scores are gated unless
    named otherwise, 0-100, nan (and 0 attempts) where the trial is not VALID. `cut`: 1 where the length limit
    stopped the response, so that its last attempt may be unfinished, nan where that is not known.
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
        """The trials at `index` (positions or a mask), in that order."""
        return Outcomes(*(getattr(self, name)[index] for name in _DTYPES), include_degraded=self.include_degraded)

    @staticmethod
    def concat(parts: Iterable[Outcomes]) -> Outcomes:
        """Several conditions one after the other (pairs may then repeat)."""
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
        """Build outcomes from (latent key, pair, trial ok, judgement, degraded), and `cut` if it is known.

        Trial ok: generated without an error and the receipt matches the plan.
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
    """One trial's row. Not ok: INVALID, whatever the judge said; no judgement yet: UNSCORED."""
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
    """A code that is the same in every run: an SAE index is itself, a name a negative hash, no latent -1."""
    if key is None:
        return -1
    if isinstance(key, int):
        if key < 0:
            raise SteerbackError(f"latent index {key} is negative; SAE latents count from 0")
        return key
    return -2 - int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
