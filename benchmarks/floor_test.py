"""Size and power of the test for a rate above the judge's floor, on simulated trials.

    python benchmarks/floor_test.py [--runs 1000] [--out benchmarks/results/floor_test.json]

Measured responses are clustered by latent, those of the floor by prompt (38 prompts, 4 responses each); the rates of
clusters are Beta-distributed with the intra-cluster correlation `icc`. Nominal size is 5 %.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from steerback.metrics.between import above
from steerback.metrics.intervals import Floats

PLANS = ((50, 10), (12, 20))
CASES = ((0.0, 0.0), (0.0, 0.1), (0.1, 0.1), (0.3, 0.1))  # icc of latents, of prompts
RATES = ((0.01, 0.01), (0.03, 0.03), (0.1, 0.1), (0.05, 0.015), (0.1, 0.015), (0.05, 0.0), (0.02, 0.0))  # rate, floor


def sample(rng: np.random.Generator, rate: float, icc: float, clusters: int, size: int) -> Floats:
    """Draw events and trials of each cluster; shape (clusters, 2)."""
    rates = np.full(clusters, rate)
    if icc and rate:
        rates = rng.beta(rate * (1 - icc) / icc, (1 - rate) * (1 - icc) / icc, clusters)
    return np.stack([rng.binomial(size, rates), np.full(clusters, size)], axis=1).astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/floor_test.json"))
    given = parser.parse_args()
    rows = []
    for latents, trials in PLANS:
        for icc, icc_floor in CASES:
            for rate, floor in RATES:
                rng = np.random.default_rng(0)
                p = [
                    above(sample(rng, rate, icc, latents, trials), sample(rng, floor, icc_floor, 38, 4), 400)
                    for _ in range(given.runs)
                ]
                share = float(np.mean(np.array(p) <= 0.05))
                rows.append(
                    {"latents": latents, "trials": trials, "icc": icc, "icc_floor": icc_floor}
                    | {"rate": rate, "floor": floor, "above": share}
                )
                print(rows[-1], flush=True)
    given.out.write_text(json.dumps({"runs": given.runs, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
