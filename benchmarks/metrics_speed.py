"""All metrics with 2,000 bootstrap draws on 100,000 trials: seconds and peak memory (at most 5 s and 1 GB).

    python benchmarks/metrics_speed.py

Writes benchmarks/results/metrics_speed.json. Each case runs in a separate process, so that peaks are independent.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import resource
import time
from pathlib import Path

OUT = Path(__file__).parent / "results" / "metrics_speed.json"
TRIALS, DRAWS = 100_000, 2000


def case(latents: int, pipe: multiprocessing.connection.Connection) -> None:
    """Summarise a condition of 100,000 trials over `latents` latents and compare it with another one."""
    import numpy as np

    from steerback.metrics import Outcomes, compare, summarize

    def made(seed: int) -> Outcomes:
        rng = np.random.default_rng(seed)
        state = rng.choice(4, TRIALS, p=[0.94, 0.01, 0.03, 0.02])
        multi, valid = rng.random(TRIALS) < 0.08, state == 0
        first = np.where(valid, rng.uniform(0, 100, TRIALS), np.nan)
        last = np.where(multi, rng.uniform(0, 100, TRIALS), first)
        attempts = np.where(valid, 1 + multi, 0)
        degraded = rng.random(TRIALS) < 0.02
        index = np.arange(TRIALS)
        return Outcomes(index % latents, index, state, attempts, first, last, attempts, first, last, degraded)

    a, b = made(0), made(1)
    start = time.perf_counter()
    summarize(a, draws=DRAWS)
    middle = time.perf_counter()
    compare(a, b, draws=10_000)
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if platform.system() == "Linux" else 2**30)
    pipe.send({"summarize_s": middle - start, "compare_s": end - middle, "peak_gib": peak})


def main() -> None:
    context = multiprocessing.get_context("spawn")
    results: dict[str, object] = {"trials": TRIALS, "draws": DRAWS, "machine": platform.platform()}
    for latents in (10, 50, 200, 1000, 10_000):
        ours, theirs = context.Pipe()
        process = context.Process(target=case, args=(latents, theirs))
        process.start()
        measured = {k: round(v, 3) for k, v in ours.recv().items()}
        process.join()
        results[f"{latents} latents"] = measured
        print(f"{latents:6d} latents: {measured}")
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
