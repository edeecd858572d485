"""Calibration data of the viewer: tested boosts, fitted curve and threshold of each latent."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict

import numpy as np

from steerback.analysis.calibration import Scores, calibrated, curve, tried
from steerback.calibration.thresholds import THRESHOLDS
from steerback.report.view_trials import ShownRun
from steerback.store.facts import LATENTS


def calibration(shown: ShownRun) -> dict[str, object]:
    """Return the thresholds of each target with the scores behind them.

    The scores come from the run's judge, which also determined the thresholds. `source` is the run that calibrated
    them.
    """
    targets = []
    with calibrated(shown.run.ledger) as (ledger, earlier):
        for target, thresholds in shown.run.ledger.targets_with(THRESHOLDS).items():
            scores = tried(ledger, target, shown.run.config.judge)
            chosen = shown.run.ledger.get(target, LATENTS)
            labels = {x.key: x.label or "" for x in chosen.chosen} if chosen else {}
            latents = [
                {
                    "latent": str(e.latent),
                    "label": labels.get(e.latent, ""),
                    **asdict(e.threshold),
                    "tried": _means(scores.get(e.latent, [])),
                    "curve": curve(e.threshold, scores.get(e.latent, []), shown.priors(target, e.latent)),
                }
                for e in thresholds
            ]
            targets.append({"target": target, "latents": latents})
    return {"run": shown.name, "source": earlier or shown.name, "targets": targets}


def _means(tried: Scores) -> list[dict[str, object]]:
    """Return the tested boosts in order of the search, each with its mean score and single scores."""
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
