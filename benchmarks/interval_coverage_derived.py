"""Coverage of confidence intervals for derived statistics, on simulated trials clustered by latent.

    python benchmarks/interval_coverage_derived.py [--datasets 400] [--seed 0]

Agreement of judges, trends, peaks of sweeps, regions of responses. Writes
benchmarks/results/interval_coverage_derived.json and prints the table of docs/statistics.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.special import gamma

from steerback.metrics import Outcomes, agreement, alpha, find_peak, rank_correlation, trend
from steerback.metrics.regions import mean_of, median_of, paired_regions, ratio_of, separate_regions

LATENTS = (5, 10, 20, 50)
PER = 10  # trials per latent
DRAWS = 300
OUT = Path(__file__).parent / "results" / "interval_coverage_derived.json"
Bounds = tuple[float | None, float | None]
Case = Callable[[np.random.Generator, int, int], dict[str, Bounds]]


def latent_of(latents: int, per: int = PER) -> np.ndarray:
    return np.repeat(np.arange(latents), per)


def verdicts(rng: np.random.Generator, latents: int, per: int = PER) -> np.ndarray:
    """Two judges' labels, (2, n): 30 % true, each judge errs in 5 %, both correlated within latents (ICC 0.1)."""
    cluster = latent_of(latents, per)
    truth = rng.random(len(cluster)) < rng.beta(0.3 * 9, 0.7 * 9, latents)[cluster]
    wrong = [rng.random(len(cluster)) < rng.beta(0.05 * 9, 0.95 * 9, latents)[cluster] for _ in range(2)]
    return np.array([truth ^ w for w in wrong], dtype=float)


def scores(rng: np.random.Generator, latents: int, per: int = PER) -> np.ndarray:
    """Two judges' scores, (2, n): a common quality that varies between latents, and noise of their own."""
    cluster = latent_of(latents, per)
    quality = rng.normal(0, 15, latents)[cluster] + rng.normal(50, 20, len(cluster))
    return quality + rng.normal(0, 10, (2, len(cluster)))


def judged(rng: np.random.Generator, latents: int, seed: int) -> dict[str, Bounds]:
    labels, rated, cluster = verdicts(rng, latents), scores(rng, latents), latent_of(latents)
    kappa = agreement(*labels, cluster, DRAWS, seed).kappa
    estimates = {
        "kappa": kappa,
        "alpha, nominal": alpha(labels, cluster, "nominal", DRAWS, seed),
        "alpha, interval": alpha(rated, cluster, "interval", DRAWS, seed),
        "rank correlation": rank_correlation(*rated, cluster, DRAWS, seed),
    }
    return {name: (e.low, e.high) for name, e in estimates.items()}


def judged_truth() -> dict[str, float]:
    rng = np.random.default_rng(1)
    labels, rated, one = verdicts(rng, 400_000, 1), scores(rng, 400_000, 1), np.zeros(400_000, int)
    kappa = agreement(*labels, one, 0).kappa.value
    values = [kappa, alpha(labels, one, "nominal", 0).value, alpha(rated, one, "interval", 0).value]
    return dict(zip(NAMES, [*values, rank_correlation(*rated, one, 0).value], strict=True))  # type: ignore[arg-type]


NAMES = ("kappa", "alpha, nominal", "alpha, interval", "rank correlation")


def condition(rng: np.random.Generator, rate: float, level: np.ndarray) -> Outcomes:
    cluster = latent_of(len(level))
    n = len(cluster)
    multi = rng.random(n) < np.clip(rate * level[cluster], 0, 1)
    first, attempts, none = np.full(n, 50.0), np.where(multi, 2, 1), np.zeros(n, int)
    last = first + 10 * multi
    return Outcomes(cluster, np.arange(n), none, attempts, first, last, attempts, first, last, none)


def sloped(rng: np.random.Generator, latents: int, seed: int) -> dict[str, Bounds]:
    """Multi-attempt rate over five levels, 2 to 6 % or 10 to 30 %; latents' levels are Gamma(4) with mean 1."""
    level = rng.gamma(4, 0.25, latents)
    out = {}
    for name, low in (("slope, 2-6 %", 0.02), ("slope, 10-30 %", 0.1)):
        t = trend(range(5), [condition(rng, low * (1 + x / 2), level) for x in range(5)], draws=1, seed=seed)
        out[name] = (t.low, t.high)
    return out


def peaked(rng: np.random.Generator, latents: int, seed: int) -> dict[str, Bounds]:
    """Multi-attempt rate over eight levels with a bell-shaped maximum of 5 or 30 % at 0.3."""
    level, grid = rng.gamma(4, 0.25, latents), np.linspace(-1.5, 3, 8)
    out: dict[str, Bounds] = {}
    for name, top in (("peak at 5 %", 0.05), ("peak at 30 %", 0.3)):
        sweep = [condition(rng, top * np.exp(-0.5 * (x - 0.3) ** 2), level) for x in grid]
        p = find_peak(list(grid), sweep, "multi_attempt_rate", DRAWS, seed)
        out[name] = (p.low, p.high) if p else (None, None)
    return out


def regions(rng: np.random.Generator, latents: int, seed: int) -> dict[str, Bounds]:
    """Exponential activity, multiplied per latent by Gamma(2) with mean 1; region b is four times region a."""
    cluster = latent_of(latents)
    level, own = rng.gamma(2, 0.5, latents)[cluster], rng.gamma(4, 0.25, latents)[cluster]
    a = rng.exponential(1, len(cluster)) * level
    b = 4 * rng.exponential(1, len(cluster)) * own * np.sqrt(level)
    estimates = {
        "mean": mean_of(a, cluster),
        "median": median_of(a, cluster, DRAWS, seed),
        "ratio": ratio_of(b, cluster, a, cluster, DRAWS, seed),
        "paired difference": paired_regions(a, b, cluster, draws=1),
        "separate difference": separate_regions(a, cluster, b, cluster, draws=DRAWS),
    }
    return {name: (e.low, e.high) for name, e in estimates.items()}


def regions_truth() -> dict[str, float]:
    rng = np.random.default_rng(2)
    mean_b = 4 * float(gamma(2.5) / gamma(2) * np.sqrt(0.5))
    median = float(np.median(rng.exponential(1, 4_000_000) * rng.gamma(2, 0.5, 4_000_000)))
    gap = mean_b - 1
    return {
        "mean": 1.0,
        "median": median,
        "ratio": mean_b,
        "paired difference": gap,
        "separate difference": gap,
    }


CASES: tuple[tuple[Case, dict[str, float]], ...] = (
    (judged, judged_truth()),
    (sloped, {"slope, 2-6 %": 0.01, "slope, 10-30 %": 0.05}),
    (peaked, {"peak at 5 %": 0.3, "peak at 30 %": 0.3}),
    (regions, regions_truth()),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start, rng = time.perf_counter(), np.random.default_rng(args.seed)
    coverage: dict[str, dict[int, float]] = {}
    for case, truth in CASES:
        for latents in LATENTS:
            hits: dict[str, list[bool]] = {}
            for i in range(args.datasets):
                for name, (low, high) in case(rng, latents, i).items():
                    if low is not None and high is not None:
                        hits.setdefault(name, []).append(low <= truth[name] <= high)
            for name, held in hits.items():
                coverage.setdefault(name, {})[latents] = round(float(np.mean(held)), 4)
    results = {"datasets": args.datasets, "seed": args.seed, "coverage": coverage}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(results | {"seconds": round(time.perf_counter() - start, 1)}, indent=1) + "\n")
    print("| statistic | " + " | ".join(f"{c} latents" for c in LATENTS) + " |\n" + "|---" * 5 + "|")
    for name, row in coverage.items():
        print(f"| {name} | " + " | ".join(f"{100 * row[c]:.0f}" for c in LATENTS) + " |")


if __name__ == "__main__":
    main()
