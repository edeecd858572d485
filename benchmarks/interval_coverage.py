"""Coverage of the 95 % confidence intervals on simulated trials clustered by latent.

    python benchmarks/interval_coverage.py [--datasets 1000] [--seed 0]

Writes benchmarks/results/interval_coverage.json and prints the tables of docs/statistics.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.special import ndtr

from steerback.metrics import Outcomes, compare, view
from steerback.metrics.rates import estimates

LATENTS = (5, 10, 20, 50)
RATES = (0.005, 0.02, 0.10, 0.30)
ICCS = (0.02, 0.1, 0.3)
SIZES = (10, 50)  # trials per latent
GAIN, SPREAD = 15.0, 30.0  # mean and sd of last - first where there is a second attempt; a fifth of it by latent
METRICS = ("multi_attempt_rate", "improvement_rate", "msi", "mean_first")
COMPARED = ("multi_attempt_rate", "msi", "mean_first")
OUT = Path(__file__).parent / "results" / "interval_coverage.json"


def quantiles(rng: np.random.Generator, p: float, icc: float) -> np.ndarray:
    """Return sorted draws of the latents' rates: Beta with mean p and intra-latent correlation icc."""
    scale = (1 - icc) / icc
    return np.sort(rng.beta(p * scale, (1 - p) * scale, 100_000))


def condition(
    rng: np.random.Generator, rates: np.ndarray, sizes: np.ndarray, level: np.ndarray, latent_gain: np.ndarray
) -> Outcomes:
    """Simulate one condition from `rates`, first-score `level` and `latent_gain` of each latent."""
    cluster = np.repeat(np.arange(len(sizes)), sizes)
    n = len(cluster)
    multi = rng.random(n) < rates[cluster]
    first = level[cluster] + rng.normal(0, 20, n)
    gain = latent_gain[cluster] + rng.normal(0, SPREAD * np.sqrt(0.8), n)
    last, attempts, none = np.where(multi, first + gain, first), np.where(multi, 2, 1), np.zeros(n, int)
    return Outcomes(cluster, np.arange(n), none, attempts, first, last, attempts, first, last, none)


def world(rng: np.random.Generator, latents: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return trials per latent (0.5 to 1.5 times `size`), first-score levels and gains of the latents."""
    sizes = rng.integers(max(1, size // 2), size + size // 2 + 1, latents)
    return sizes, rng.normal(50, 10, latents), rng.normal(GAIN, SPREAD * np.sqrt(0.2), latents)


def one_condition(rng: np.random.Generator, datasets: int, latents: int, size: int, p: float, icc: float) -> dict:
    """Return coverage and mean width by metric and method over `datasets` simulated conditions."""
    table = quantiles(rng, p, icc)
    truth = {"multi_attempt_rate": p, "improvement_rate": ndtr(GAIN / SPREAD), "msi": p * GAIN, "mean_first": 50.0}
    hits: dict[tuple[str, str], list[tuple[bool, float]]] = {}
    for _ in range(datasets):
        sizes, level, gain = world(rng, latents, size)
        v = view(condition(rng, rng.choice(table, latents), sizes, level, gain))
        for name, e in estimates(v, METRICS, 400, rng).items():
            if e.value is None or e.low is None or e.high is None:
                continue  # nothing was claimed
            beside = {"bootstrap": (e.value, e.value)} | (e.beside or {})  # a bootstrap that is a point is a miss
            pairs = {"ours": (e.low, e.high)} | {k: b for k, b in beside.items() if k in BESIDE}
            for method, (low, high) in pairs.items():
                hits.setdefault((name, method), []).append((low <= truth[name] <= high, high - low))
    return {
        f"{name}/{method}": {
            "coverage": round(float(np.mean([h for h, _ in intervals])), 4),
            "width": round(float(np.mean([w for _, w in intervals])), 5),
            "claimed": len(intervals) / datasets,
        }
        for (name, method), intervals in hits.items()
    }


BESIDE = ("bootstrap", "wilson")


def two_conditions(
    rng: np.random.Generator, datasets: int, latents: int, size: int, rates: Sequence[float], icc: float
) -> dict:
    """Return the coverage of paired differences, and the share of tests with p <= 0.05."""
    tables = [quantiles(rng, p, icc) for p in rates]
    truth = {"multi_attempt_rate": rates[1] - rates[0], "msi": (rates[1] - rates[0]) * GAIN, "mean_first": 0.0}
    held: dict[str, list[bool]] = {m: [] for m in COMPARED}
    rejected: dict[str, list[bool]] = {m: [] for m in COMPARED}
    for _ in range(datasets):
        sizes, level, gain = world(rng, latents, size)
        shared = rng.normal(size=latents)
        arms = []
        for table in tables:  # a latent's rates in the two conditions correlate (0.8 on the normal scale)
            u = ndtr(np.sqrt(0.8) * shared + np.sqrt(0.2) * rng.normal(size=latents))
            arms.append(condition(rng, table[(u * len(table)).astype(int)], sizes, level, gain))
        for name, t in compare(*arms, metrics=COMPARED, draws=400, seed=int(rng.integers(2**31))).tests.items():
            if t.low is not None and t.high is not None and t.p is not None:
                held[name].append(t.low <= truth[name] <= t.high)
                rejected[name].append(t.p <= 0.05)
    return {
        m: {"coverage": round(float(np.mean(held[m])), 4), "p<=0.05": round(float(np.mean(rejected[m])), 4)}
        for m in COMPARED
    }


def markdown(results: dict) -> str:
    """Return the tables of docs/statistics.md."""
    lines = []
    for metric in METRICS:
        lines += [f"\n{metric}: ours / percentile bootstrap" + (" / Wilson" if "rate" in metric else ""), ""]
        lines += ["| trials per latent | ICC | rate | " + " | ".join(f"{c} latents" for c in LATENTS) + " |"]
        lines += ["|---" * (3 + len(LATENTS)) + "|"]
        for size in SIZES:
            for icc in ICCS:
                for p in RATES if metric != "mean_first" else RATES[-1:]:
                    cells = []
                    for c in LATENTS:
                        r = results["one"][f"{c}/{size}/{p}/{icc}"]
                        intervals = [r.get(f"{metric}/{m}") for m in ("ours", *BESIDE)]
                        cells.append(" / ".join(f"{100 * f['coverage']:.0f}" for f in intervals if f))
                    lines.append(f"| {size} | {icc:g} | {100 * p:g} % | " + " | ".join(cells) + " |")
    lines += ["\nPaired comparisons: coverage of the difference / share with p <= 0.05", ""]
    lines += ["| metric | rates | " + " | ".join(f"{c} latents" for c in LATENTS) + " |", "|---" * 6 + "|"]
    for metric in COMPARED:
        for a, b in PAIRS:
            cells = []
            for c in LATENTS:
                r = results["two"][f"{c}/{a}/{b}"][metric]
                cells.append(f"{100 * r['coverage']:.0f} / {100 * r['p<=0.05']:.0f}")
            lines.append(f"| {metric} | {100 * a:g} % and {100 * b:g} % | " + " | ".join(cells) + " |")
    return "\n".join(lines)


PAIRS = ((0.02, 0.02), (0.1, 0.1), (0.1, 0.2), (0.3, 0.3), (0.3, 0.4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    rng = np.random.default_rng(args.seed)
    one = {
        f"{c}/{size}/{p}/{icc}": one_condition(rng, args.datasets, c, size, p, icc)
        for c in LATENTS
        for size in SIZES
        for p in RATES
        for icc in ICCS
    }
    two = {f"{c}/{a}/{b}": two_conditions(rng, args.datasets, c, 10, (a, b), 0.1) for c in LATENTS for a, b in PAIRS}
    results = {"datasets": args.datasets, "seed": args.seed, "one": one, "two": two}
    results["seconds"] = round(time.perf_counter() - start, 1)
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(results))


if __name__ == "__main__":
    main()
