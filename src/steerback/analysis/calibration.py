"""Calibration by latent: the scores at every tried boost, and the curve fitted to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from steerback.calibration.curves import fit_falling
from steerback.calibration.thresholds import THRESHOLDS, Threshold
from steerback.records import BoostPrior, LatentKey
from steerback.store.facts import CONFIG, LATENTS
from steerback.store.ledger import Ledger

STAGE = "calibration"
POINTS, DRAWS = 60, 200

Scores = Sequence[tuple[float, float | None]]
"""Boost and first score of each trial; the score is None if the trial was not scored."""


@dataclass(frozen=True, slots=True)
class CalibratedLatent:
    """Threshold of one latent with the trials of its calibration (empty if this ledger does not contain them)."""

    latent: LatentKey
    label: str
    threshold: Threshold
    tried: Scores


def calibrated_latents(ledger: Ledger, target: str, judge: str) -> list[CalibratedLatent]:
    """Return the latents of a target with their thresholds, in the order of their selection."""
    stored = ledger.get(target, THRESHOLDS) or []
    chosen = ledger.get(target, LATENTS)
    labels = {x.key: x.label or "" for x in chosen.chosen} if chosen else {}
    with calibrated(ledger) as (source, _):
        scores = tried(source, target, judge) if stored else {}
    return [CalibratedLatent(e.latent, labels.get(e.latent, ""), e.threshold, scores.get(e.latent, [])) for e in stored]


@contextmanager
def calibrated(ledger: Ledger) -> Iterator[tuple[Ledger, str | None]]:
    """Yield the ledger with the calibration's trials and None, or a base run's ledger and its name.

    Yields this ledger if no ledger has such trials.
    """
    earlier = (ledger.get("", CONFIG) or {}).get("from_run")
    if ledger.stage_sizes().get(STAGE):
        earlier = None
    while isinstance(earlier, str) and (path := Path(earlier) / "ledger.sqlite").is_file():
        with Ledger(path, read_only=True) as other:
            if other.stage_sizes().get(STAGE):
                yield other, Path(earlier).name
                return
            earlier = (other.get("", CONFIG) or {}).get("from_run")
    yield ledger, None


def tried(ledger: Ledger, target: str, judge: str) -> Mapping[LatentKey, Scores]:
    """Return by latent the boost and first score of each trial of the search, in search order."""
    trials: dict[LatentKey, list[tuple[float, float | None]]] = defaultdict(list)
    degraded = ledger.includes_degraded
    for row in ledger.outlines(target, STAGE, judge=judge):
        if row.trial.latent is not None and row.trial.boost is not None:
            counts = row.attempts and (degraded or not row.degraded)
            trials[row.trial.latent].append((row.trial.boost, row.attempts[0].score if counts else None))
    return trials


def curve(threshold: Threshold, tried: Scores, prior: BoostPrior | None = None) -> dict[str, list[float]] | None:
    """Return the fitted curve (`boost`, `score`, 95 % band `low`, `high`), or None with fewer than two scored boosts.

    If the target's prior is not available on this machine, the range of the boosts replaces it.
    """
    boosts = np.array([boost for boost, score in tried if score is not None], dtype=np.float64)
    scores = np.array([score for _, score in tried if score is not None], dtype=np.float64)
    if len(np.unique(boosts)) < 2:
        return None
    bounds = (float(boosts.min()), float(boosts.max())) if prior is None else (prior.low, prior.high)
    scale = (bounds[1] - bounds[0]) / 4 if prior is None else prior.sd
    fit = fit_falling(boosts, scores, threshold.target_score, bounds, scale, DRAWS)
    margin = 0.08 * float(np.ptp(boosts))
    x = np.linspace(float(boosts.min()) - margin, float(boosts.max()) + margin, POINTS)
    low, high = np.quantile(fit.drawn.score(x[:, None]), (0.025, 0.975), axis=1)
    columns = {
        "boost": x.tolist(),
        "score": fit.curve.score(x[:, None])[:, 0].tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
    }
    return {name: [float(f"{value:.5g}") for value in values] for name, values in columns.items()}
