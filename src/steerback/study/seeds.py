"""Seeds of trials: the stages of a run share none."""

from __future__ import annotations

# Seeds of the stages are disjoint. Each stage counts up from its offset above the generation seed; indices that do not
# fit below the next offset continue at a multiple of FAR.
SEED_OFFSETS = {
    "measure": 0,
    "calibration": 1_000_000,
    "verification": 2_000_000,
    "reference": 3_000_000,
    "floor": 3_500_000,  # the second half of the references' range
    "discovery": 4_000_000,
    "fork": 5_000_000,
}
FAR = 2**40

_PLACES = {stage: place for place, stage in enumerate(SEED_OFFSETS)}
_STARTS = (*SEED_OFFSETS.values(), 5_000_000)


def seed_offset(stage: str, index: int) -> int:
    """Return the offset of a trial's seed above the run's generation seed; stages share none below index 2**40."""
    place = _PLACES[stage]
    fits = _STARTS[place] + index < _STARTS[place + 1]
    return _STARTS[place] + index if fits else (place + 1) * FAR + index
