"""Coverage of confidence intervals for rates corrected with human labels, on simulated runs.

    python benchmarks/correction_coverage.py [--datasets 400] [--seed 0]

A run has 500 trials of 50 latents, whose rates are Beta-distributed (correlation within a latent 0.1). The judge sees
a restart with probability `recall`, and reports a false one in a share `floor` of the other trials. Labels are drawn as
`steerback label` draws them: half from either verdict, as far as they last.

Writes benchmarks/results/correction_coverage.json and prints the table of docs/statistics.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import scipy

from steerback.errors import VERSION
from steerback.metrics.correction import LabelledTrials, corrected_rate, rogan_gladen

LATENTS, TRIALS, ICC = 50, 10, 0.1
RATES, RECALLS, FLOORS, LABELS = (0.005, 0.02, 0.10), (0.6, 0.8, 0.95), (0.0, 0.01, 0.03), (50, 100, 200, 400)
DRAWS = 1000
METHODS = ("corrected", "Rogan-Gladen", "normal", "judge")
OUT = Path(__file__).parent / "results" / "correction_coverage.json"


def simulate(rng: np.random.Generator, rate: float, recall: float, floor: float, labels: int) -> LabelledTrials:
    """Simulate one run with its labels."""
    scale = (1 - ICC) / ICC
    cluster = np.repeat(np.arange(LATENTS), TRIALS)
    truth = rng.random(len(cluster)) < rng.beta(rate * scale, (1 - rate) * scale, LATENTS)[cluster]
    verdict = rng.random(len(cluster)) < np.where(truth, recall, floor)
    yes, no = np.flatnonzero(verdict), np.flatnonzero(~verdict)
    from_yes = min(len(yes), max(labels // 2, labels - len(no)))
    chosen = np.concatenate([rng.permutation(yes)[:from_yes], rng.permutation(no)[: labels - from_yes]])
    known = np.full(len(cluster), np.nan)
    known[chosen] = truth[chosen]
    return LabelledTrials.of(cluster, verdict, verdict, known)


def judged_alone(trials: LabelledTrials) -> LabelledTrials:
    """Return the same trials with the judge's verdicts as truth."""
    return LabelledTrials.of(trials.cluster, trials.verdict, trials.verdict, trials.verdict)


def cell(rng: np.random.Generator, datasets: int, rate: float, recall: float, floor: float, labels: int) -> dict:
    """Return coverage, mean width and mean error of each method."""
    outcomes: dict[str, list[tuple[bool, float, float]]] = {method: [] for method in METHODS}
    for number in range(datasets):
        trials = simulate(rng, rate, recall, floor, labels)
        corrected = corrected_rate(trials, DRAWS, number)
        plain = corrected_rate(judged_alone(trials), 10, number)
        solved = rogan_gladen(trials, [trials], DRAWS, number)
        for method, value, (low, high) in (
            ("corrected", corrected.value, (corrected.low, corrected.high)),
            ("Rogan-Gladen", solved.value, (solved.low, solved.high)),
            ("normal", corrected.value, corrected.beside["normal"]),
            ("judge", plain.value, (plain.low, plain.high)),
        ):
            if value is not None:
                outcomes[method].append((low <= rate <= high, high - low, value - rate))
    return {
        method: {
            "coverage": round(float(np.mean([x[0] for x in rows])), 4),
            "width": round(float(np.mean([x[1] for x in rows])), 5),
            "bias": round(float(np.mean([x[2] for x in rows])), 5),
            "defined": len(rows) / datasets,
        }
        for method, rows in outcomes.items()
        if rows
    }


def markdown(cells: dict) -> str:
    """Return the table of docs/statistics.md: coverage in per cent, and in brackets the mean width in points."""
    lines = ["| rate | recall | floor | " + " | ".join(f"{n} labels" for n in LABELS) + " | judge alone |"]
    lines += ["|---" * (4 + len(LABELS)) + "|"]
    for rate in RATES:
        for recall in RECALLS:
            for floor in FLOORS:
                shown = []
                for n in LABELS:
                    c = cells[f"{rate}/{recall}/{floor}/{n}"]
                    held = [f"{100 * c[m]['coverage']:.0f}" if m in c else "-" for m in METHODS[:3]]
                    shown.append(" / ".join(held) + f" ({100 * c['corrected']['width']:.1f})")
                alone = 100 * cells[f"{rate}/{recall}/{floor}/{LABELS[0]}"]["judge"]["coverage"]
                name = f"{100 * rate:g} % | {recall:g} | {100 * floor:g} %"
                lines.append(f"| {name} | " + " | ".join(shown) + f" | {alone:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    rng = np.random.default_rng(args.seed)
    cells = {
        f"{rate}/{recall}/{floor}/{labels}": cell(rng, args.datasets, rate, recall, floor, labels)
        for rate in RATES
        for recall in RECALLS
        for floor in FLOORS
        for labels in LABELS
    }
    results = {
        "command": "python benchmarks/" + Path(sys.argv[0]).name + " " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {
            "steerback": VERSION,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        "datasets": args.datasets,
        "seed": args.seed,
        "cells": cells,
        "seconds": round(time.perf_counter() - start, 1),
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n")
    print(markdown(cells))


if __name__ == "__main__":
    main()
