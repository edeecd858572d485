"""The calibration as the viewer shows it: per latent the boosts that were tried, the fitted curve, the threshold."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from steerback.calibration.curves import fit_falling
from steerback.calibration.thresholds import THRESHOLDS, Threshold
from steerback.records import BoostPrior, LatentKey
from steerback.report.view_trials import ShownRun
from steerback.store.facts import CONFIG, LATENTS
from steerback.store.ledger import Ledger
from steerback.store.run import Run

STAGE = "calibration"
POINTS, DRAWS = 60, 200

Tried = dict[LatentKey, list[tuple[float, float | None]]]
"""By latent: boost and first score of each trial, None where it has none."""


def calibration(shown: ShownRun) -> dict[str, object]:
    """Return the thresholds of each target with the scores they come from.

    The scores are those of the run's judge: the thresholds were found with it. `source` is the run that they stand in.
    """
    targets = []
    with _calibrated(shown.run) as (ledger, source):
        for target, thresholds in shown.run.ledger.targets_with(THRESHOLDS).items():
            tried = _tried(ledger, target, shown.run.config.judge)
            chosen = shown.run.ledger.get(target, LATENTS)
            labels = {x.key: x.label or "" for x in chosen.chosen} if chosen else {}
            latents = [
                {
                    "latent": str(e.latent),
                    "label": labels.get(e.latent, ""),
                    **asdict(e.threshold),
                    "tried": _means(tried.get(e.latent, [])),
                    "curve": _curve(e.threshold, tried.get(e.latent, []), shown.priors(target, e.latent)),
                }
                for e in thresholds
            ]
            targets.append({"target": target, "latents": latents})
    return {"run": shown.name, "source": source, "targets": targets}


@contextmanager
def _calibrated(run: Run) -> Iterator[tuple[Ledger, str]]:
    """Yield the ledger that holds the calibration's trials, and its run's name: the run's, or one it starts from."""
    name, earlier = run.folder.name, run.config.from_run
    if run.ledger.stage_sizes().get(STAGE) or earlier is None:
        yield run.ledger, name
        return
    while earlier is not None and (path := Path(earlier) / "ledger.sqlite").is_file():
        with Ledger(path, read_only=True) as ledger:
            if ledger.stage_sizes().get(STAGE):
                yield ledger, Path(earlier).name
                return
            further = (ledger.get("", CONFIG) or {}).get("from_run")
            earlier = further if isinstance(further, str) else None
    yield run.ledger, name


def _tried(ledger: Ledger, target: str, judge: str) -> Tried:
    tried: Tried = defaultdict(list)
    for row in ledger.outlines(target, STAGE, judge=judge):
        if row.trial.latent is not None and row.trial.boost is not None:
            score = row.attempts[0].score if row.attempts else None
            tried[row.trial.latent].append((row.trial.boost, score))
    return tried


def _means(tried: Sequence[tuple[float, float | None]]) -> list[dict[str, object]]:
    """Return every boost tried, in the order of the search, with its mean score and single scores."""
    scores: dict[float, list[float]] = {}
    missing: dict[float, int] = defaultdict(int)
    for boost, score in tried:
        known = scores.setdefault(boost, [])
        if score is None:
            missing[boost] += 1
        else:
            known.append(score)
    return [
        {
            "boost": boost,
            "mean": float(np.mean(known)) if known else None,
            "scores": known,
            "unscored": missing[boost],
        }
        for boost, known in scores.items()
    ]


def _curve(
    threshold: Threshold, tried: Sequence[tuple[float, float | None]], prior: BoostPrior | None
) -> dict[str, list[float]] | None:
    """Return the fitted curve with its 95 % band; None with scores at fewer than two boosts.

    Without the target's prior (its definition is not here) the range of the boosts takes its place.
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
    band = [np.quantile(fit.drawn.score(boost), (0.025, 0.975)) for boost in x]
    columns = {
        "boost": x.tolist(),
        "score": [fit.score(boost) for boost in x],
        "low": [float(low) for low, _ in band],
        "high": [float(high) for _, high in band],
    }
    return {name: [float(f"{value:.5g}") for value in values] for name, values in columns.items()}
