"""Coverage of the confidence interval of a peak's position, by latents, rate at the peak and trials per level.

    python benchmarks/peak_coverage.py [--runs 400] [--out benchmarks/results/peak_coverage.json]

Eight levels from -1.5 to 3, as in the boost sweep; the multi-attempt rate is a Gaussian bump of the level (sd 1) whose
top is drawn uniformly from -1 to 2, so that it falls on levels and between them; latents differ in their rate
(log-normal, sd 0.5). Nominal coverage is 95 %.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from steerback.metrics import Outcomes, find_peak

LEVELS = np.linspace(-1.5, 3.0, 8)


def conditions(latents: int, trials: int, top: float, at: float, rng: np.random.Generator) -> list[Outcomes]:
    """Simulate one condition per level. All levels of a latent share its rate factor."""
    cluster = np.repeat(np.arange(latents), trials)
    own = np.exp(rng.normal(-0.125, 0.5, latents))[cluster]
    n, first = len(cluster), np.full(len(cluster), 50.0)
    rows = []
    for level in LEVELS:
        rate = np.clip(top * own * np.exp(-0.5 * (level - at) ** 2), 0, 1)
        attempts = 1 + (rng.random(n) < rate)
        rows.append(
            Outcomes(cluster, np.arange(n), np.zeros(n), attempts, first, first, attempts, first, first, np.zeros(n))
        )
    return rows


def simulate(latents: int, trials: int, top: float, runs: int, seed: int) -> dict[str, Any]:
    """Return coverage of the true position, mean width and error, and the share of peaks at the edge."""
    rng = np.random.default_rng(seed)
    hits, widths, errors, edges = [], [], [], []
    for _ in range(runs):
        at = rng.uniform(-1, 2)
        peak = find_peak(list(LEVELS), conditions(latents, trials, top, at, rng), "multi_attempt_rate", draws=400)
        if peak is None:
            continue
        hits.append(peak.low <= at <= peak.high)
        widths.append(peak.high - peak.low)
        errors.append(peak.at - at)
        edges.append(peak.edge)
    return {
        "latents": latents,
        "trials": trials,
        "rate": top,
        "runs": len(hits),
        "none": runs - len(hits),
        "coverage": float(np.mean(hits)),
        "width": float(np.mean(widths)),
        "bias": float(np.mean(errors)),
        "error_sd": float(np.std(errors)),
        "edge": float(np.mean(edges)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peak_coverage.json"))
    given = parser.parse_args()
    rows = []
    for latents, trials in ((12, 20), (50, 10)):
        for top in (0.03, 0.1, 0.4):
            rows.append(simulate(latents, trials, top, given.runs, seed=7))
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()})
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
