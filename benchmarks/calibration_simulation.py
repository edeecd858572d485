"""Calibration of simulated latents with known thresholds: bias, spread, coverage, statuses, trials.

    python benchmarks/calibration_simulation.py            # all tables of docs/calibration.md
    python benchmarks/calibration_simulation.py --n 20     # short version
    python benchmarks/calibration_simulation.py --degraded # effect of the setting `degraded`

Writes benchmarks/results/calibration_simulation.json and prints the tables as Markdown. Scores are drawn from beta
distributions around a mean curve; thresholds vary over latents like N(130, 40) on [50, 230], the prior is that of
Gemma-2-2B, N(150, 75) on [0, 300].
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from steerback.calibration import Calibrator, assess, verified
from steerback.calibration.curves import falling_means
from steerback.config import CalibrationConfig, quick
from steerback.records import BoostPrior

Floats = NDArray[np.float64]
Curve = Callable[[Any, float], Any]
RESULTS = Path(__file__).parent / "results" / "calibration_simulation.json"
PRIOR = BoostPrior(150, 75, 0, 300)
DRAWS = 400
FRESH = 20
"""Number of verification trials per threshold."""
GRID = np.linspace(0, 300, 60_001)
QUICK = quick("esr", ("organism",)).calibration


def sigmoid(x: Any) -> Any:
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, dtype=float)))


# Mean score at a boost, for a latent whose scale is t.
FALLING: dict[str, Curve] = {
    "steep": lambda b, t: 95 * sigmoid((t - b) / 8),
    "medium": lambda b, t: 95 * sigmoid((t - b) / 20),
    "shallow": lambda b, t: 95 * sigmoid((t - b) / 50),
    "levels off at 25": lambda b, t: 25 + 68 * sigmoid((t - b) / 20),
    "levels off at 40": lambda b, t: 40 + 55 * sigmoid((t - b) / 15),
    "slow, then fast": lambda b, t: 95 * np.clip(1 - (b / (1.3 * t)) ** 3, 0, 1),
    "straight line": lambda b, t: np.clip(95 - 45 * b / t, 0, 100),
    "cliff": lambda b, t: np.where(np.asarray(b) < t, 92.0, 6.0),
    "recovers to 30": lambda b, t: 95 * sigmoid((t - b) / 12) + 30 * sigmoid((b - 1.5 * t) / 12),
    "second crossing": lambda b, t: 95 * sigmoid((t - b) / 8)
    + 70 * (sigmoid((b - 1.4 * t) / 8) - sigmoid((b - 2 * t) / 8)),
}  # fmt: skip
HOPELESS: dict[str, Curve] = {
    "flat at 90": lambda b, t: 90.0 + 0 * np.asarray(b, dtype=float),
    "flat at 65": lambda b, t: 65.0 + 0 * np.asarray(b, dtype=float),
    "flat at 50": lambda b, t: 50.0 + 0 * np.asarray(b, dtype=float),
    "flat at 20": lambda b, t: 20.0 + 0 * np.asarray(b, dtype=float),
    "95 to 70": lambda b, t: 70 + 25 * sigmoid((t - b) / 20),
}
NOISE = {"mostly 0 or 100": 0.4, "broad": 2.0, "narrow": 10.0}  # a + b of the beta distribution
DESIGNS: dict[str, CalibrationConfig] = {
    "specification (15 x 10)": CalibrationConfig(),
    f"preset quick ({QUICK.max_iterations} x {QUICK.trials_per_iteration})": CalibrationConfig(
        max_iterations=QUICK.max_iterations, trials_per_iteration=QUICK.trials_per_iteration
    ),
    "one trial a round (150 x 1)": CalibrationConfig(max_iterations=150, trials_per_iteration=1),
    "target 30 (15 x 10)": CalibrationConfig(target_score=30),
    "weight 5 (15 x 10)": CalibrationConfig(weight=5),
    "specification, stop=tolerance": CalibrationConfig(stop="tolerance"),
    "authors (10 x 5, target 30, posterior median)": CalibrationConfig(
        target_score=30, max_iterations=10, trials_per_iteration=5, weight=5, estimate="posterior"
    ),
}


def draw(generator: np.random.Generator, mean: float, noise: float, n: int) -> list[float]:
    share = min(max(mean / 100, 1e-3), 1 - 1e-3)
    return [float(s) for s in 100 * generator.beta(noise * share, noise * (1 - share), n)]


def first_crossing(curve: Curve, t: float, target: float) -> float | None:
    below = curve(GRID, t) < target
    return float(GRID[below.argmax()]) if below.any() and not below[0] else None


def run_search(
    curve: Curve, t: float, noise: float, settings: CalibrationConfig, generator: np.random.Generator
) -> Calibrator:
    calibrator = Calibrator(PRIOR, settings, DRAWS)
    while (boost := calibrator.next_boost()) is not None:
        calibrator.update(boost, draw(generator, float(curve(boost, t)), noise, settings.trials_per_iteration))
    return calibrator


# -- estimates that were not chosen -----------------------------------------------------------------------------------


def grouped(calibrator: Calibrator, weights: Floats) -> tuple[Floats, Floats, Floats]:
    boosts = np.concatenate([np.full(len(r.scores), r.boost) for r in calibrator.rounds])
    scores = np.concatenate([r.scores for r in calibrator.rounds])
    places, group = np.unique(boosts, return_inverse=True)
    member = np.eye(len(places))[group]
    totals = weights @ member
    return places, totals, (weights * scores) @ member / totals


def centred_isotonic(places: Floats, totals: Floats, means: Floats, target: float) -> Floats:
    """Centred isotonic regression: pooled means at the weighted centre of their boosts (Oron and Flournoy, 2017)."""
    measured = []
    for fitted, weight in zip(falling_means(totals, means), totals, strict=True):
        levels = np.unique(fitted.round(9))[::-1]
        centres = [np.average(places[fitted.round(9) == v], weights=weight[fitted.round(9) == v]) for v in levels]
        measured.append(np.interp(-target, -levels, centres, left=PRIOR.low, right=PRIOR.high))
    return np.array(measured)


def plain_logistic(places: Floats, totals: Floats, means: Floats, target: float) -> Floats:
    """Logistic curve from 100 to 0 by maximum quasi-likelihood."""
    z = (places - np.median(places)) / PRIOR.sd
    level, slope = np.zeros(len(means)), np.full(len(means), -3.0)
    for _ in range(40):
        p = sigmoid(level[:, None] + slope[:, None] * z)
        v, r = totals * p * (1 - p), totals * (means / 100 - p)
        g0, g1 = r.sum(1), (r * z).sum(1) - 0.002 * (slope + 3)
        h00, h01, h11 = v.sum(1) + 1e-4, (v * z).sum(1), (v * z * z).sum(1) + 0.002
        det = h00 * h11 - h01**2
        d0, d1 = (h11 * g0 - h01 * g1) / det, (h00 * g1 - h01 * g0) / det
        step = np.minimum(1, np.minimum(3 / np.maximum(abs(d0), 3), np.maximum(-slope, 1) / np.maximum(abs(d1), 1e-9)))
        level, slope = level + step * d0, np.minimum(slope + step * d1, -0.05)
    at = np.median(places) + PRIOR.sd * (np.log(target / (100 - target)) - level) / slope
    return np.asarray(np.clip(at, PRIOR.low, PRIOR.high), dtype=float)


def alternatives(calibrator: Calibrator, generator: np.random.Generator, draws: int) -> dict[str, tuple[float, ...]]:
    """Return (boost, low, high) of the rejected estimators, with intervals of the plain Bayesian bootstrap."""
    trials = sum(len(r.scores) for r in calibrator.rounds)
    weights = np.concatenate([np.ones((1, trials)), generator.exponential(size=(draws, trials))])
    places, totals, means = grouped(calibrator, weights)
    target = calibrator.settings.target_score
    measured: dict[str, tuple[float, ...]] = {}
    for name, method in (("centred isotonic", centred_isotonic), ("logistic 100 to 0", plain_logistic)):
        at = method(places, totals, means, target)
        measured[name] = (float(at[0]), *np.quantile(at[1:], [0.025, 0.975]).tolist())
    grid, p = calibrator.posterior()
    cdf = np.cumsum(p)
    measured["posterior median"] = tuple(float(grid[np.searchsorted(cdf, q)]) for q in (0.5, 0.025, 0.975))
    return measured


# -- tables -----------------------------------------------------------------------------------------------------------


def one_condition(
    curve: Curve, noise: float, settings: CalibrationConfig, n: int, compare: bool = False
) -> dict[str, Any]:
    """Simulate n latents; return score error (points), interval coverage and width by estimator, and statuses."""
    generator = np.random.default_rng(1)
    errors: dict[str, list[float]] = {}
    covered: dict[str, list[bool]] = {}
    widths: dict[str, list[float]] = {}
    misses: dict[str, list[float]] = {}
    thresholds, trials = [], []
    for _ in range(n):
        t = float(np.clip(generator.normal(130, 40), 50, 230))
        truth = first_crossing(curve, t, settings.target_score)
        calibrator = run_search(curve, t, noise, settings, generator)
        measured = calibrator.finish()
        fresh = draw(generator, float(curve(measured.boost, t)), noise, FRESH)
        thresholds.append(verified(measured, fresh))
        trials.append(measured.n_trials)
        estimates: dict[str, tuple[float, ...]] = {"chosen": (measured.boost, measured.low, measured.high)}
        if compare:
            estimates |= alternatives(calibrator, generator, 200)
        for name, (boost, low, high) in estimates.items():
            errors.setdefault(name, []).append(float(curve(boost, t)) - settings.target_score)
            if truth is not None:
                covered.setdefault(name, []).append(low - 0.02 <= truth <= high + 0.02)
                misses.setdefault(name, []).append(abs(boost - truth))
            widths.setdefault(name, []).append(high - low)
    report = assess(thresholds)
    usable = np.array([t.usable for t in thresholds])
    return {
        "n": n,
        "estimates": {
            name: {
                "bias": float(np.mean(e)),
                "rmse": float(np.sqrt(np.mean(np.square(e)))),
                "outside_tolerance": float(np.mean(np.abs(e) > settings.tolerance)),
                "coverage": float(np.mean(covered[name])) if name in covered else None,
                "width": float(np.median(widths[name])),
                "miss": float(np.median(misses[name])) if name in misses else None,
            }
            for name, e in errors.items()
        },
        "statuses": {k: v / n for k, v in report.statuses.items()},
        "trials": float(np.mean(trials)),
        "usable_bias": float(np.mean(np.array(errors["chosen"])[usable])) if usable.any() else None,
        "report": {
            "mean_score": report.mean_score,
            "share_outside": report.share_outside,
            "share_clearly_outside": report.share_clearly_outside,
            "spread": report.spread,
        },
    }


def simulate(n: int) -> dict[str, Any]:
    settings = CalibrationConfig()
    out: dict[str, Any] = {"falling": {}, "hopeless": {}, "designs": {}}
    for name, curve in FALLING.items():
        for noise, value in NOISE.items():
            out["falling"][f"{name} | {noise}"] = one_condition(curve, value, settings, n, compare=True)
    for name, curve in HOPELESS.items():
        for noise, value in NOISE.items():
            out["hopeless"][f"{name} | {noise}"] = one_condition(curve, value, settings, n)
    for design, changed in DESIGNS.items():
        smooth = [c for c in FALLING if c not in ("cliff", "second crossing", "levels off at 40")]
        cells = [one_condition(FALLING[c], v, changed, max(n // 2, 5)) for c in smooth for v in NOISE.values()]
        out["designs"][design] = {
            "n": sum(c["n"] for c in cells),
            "trials": float(np.mean([c["trials"] for c in cells])),
            "converged": float(np.mean([c["statuses"]["converged"] for c in cells])),
            **{
                key: float(np.mean([c["estimates"]["chosen"][key] for c in cells]))
                for key in ("bias", "rmse", "outside_tolerance", "coverage", "width")
            },
        }
    return out


def degraded_readings(n: int) -> dict[str, Any]:
    """Return the mean first score at the threshold for both values of `degraded`, by share of degraded responses."""
    out: dict[str, Any] = {}
    for share in (0.0, 0.1, 0.3):
        for reading in ("include", "exclude"):
            generator, measured = np.random.default_rng(2), []
            for _ in range(n):
                t = float(np.clip(generator.normal(130, 40), 50, 230))
                calibrator = Calibrator(PRIOR, CalibrationConfig(), DRAWS)
                while (boost := calibrator.next_boost()) is not None:
                    mean = float(FALLING["medium"](boost, t))
                    sound = draw(generator, mean, NOISE["broad"], 10)
                    fallen = generator.random(10) < share
                    low = draw(generator, 5.0, NOISE["broad"], 10)
                    scores = [b if bad else a for a, b, bad in zip(sound, low, fallen, strict=True)]
                    kept = [None if bad and reading == "exclude" else s for s, bad in zip(scores, fallen, strict=True)]
                    calibrator.update(boost, kept)
                threshold = calibrator.finish()
                sound_mean = float(FALLING["medium"](threshold.boost, t))
                measured.append((share * 5.0 + (1 - share) * sound_mean, sound_mean, threshold.boost / t))
            names = ("with degraded", "without", "boost / true")
            out[f"{share:.0%} | {reading}"] = dict(zip(names, np.mean(measured, axis=0).tolist(), strict=True))
    return out


def degraded_table(measured: dict[str, Any]) -> str:
    lines = ["| degraded | setting | mean with degraded | mean without | boost |", "|---|---|---|---|---|"]
    for key, m in measured.items():
        lines.append(f"| {key} | {m['with degraded']:.1f} | {m['without']:.1f} | {m['boost / true']:.2f} |")
    return "\n".join(lines)


def markdown(measured: dict[str, Any]) -> str:
    lines = [
        "| curve | scores | bias | RMSE | off by > 5 | coverage | width | converged / bound / not |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, cell in measured["falling"].items():
        e, s = cell["estimates"]["chosen"], cell["statuses"]
        lines.append(
            f"| {key} | {e['bias']:+.1f} | {e['rmse']:.1f} | {100 * e['outside_tolerance']:.0f} % | "
            f"{100 * e['coverage']:.0f} % | {e['width']:.1f} | {_statuses(s)} |"
        )
    lines += [
        "",
        "| estimate | mean absolute bias | RMSE | off by > 5 | coverage | width | miss (boost) |",
        "|---|---|---|---|---|---|---|",
    ]
    smooth = [cell for key, cell in measured["falling"].items() if not key.startswith("cliff")]
    for name in smooth[0]["estimates"]:
        rows = [cell["estimates"][name] for cell in smooth]
        m = {k: float(np.mean([abs(r[k]) for r in rows])) for k in rows[0]}
        lines.append(
            f"| {name} | {m['bias']:.1f} | {m['rmse']:.1f} | {100 * m['outside_tolerance']:.0f} % | "
            f"{100 * m['coverage']:.0f} % | {m['width']:.1f} | {m['miss']:.1f} |"
        )
    lines += ["", "| curve | scores | converged / bound / not | mean of the usable - target |", "|---|---|---|---|"]
    for key, cell in measured["hopeless"].items():
        bias = "-" if cell["usable_bias"] is None else f"{cell['usable_bias']:+.1f}"
        lines.append(f"| {key} | {_statuses(cell['statuses'])} | {bias} |")
    lines += [
        "",
        "| design | trials | bias | RMSE | off by > 5 | coverage | width | converged |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, m in measured["designs"].items():
        lines.append(
            f"| {name} | {m['trials']:.0f} | {m['bias']:+.1f} | {m['rmse']:.1f} | "
            f"{100 * m['outside_tolerance']:.0f} % | {100 * m['coverage']:.0f} % | {m['width']:.1f} | "
            f"{100 * m['converged']:.0f} % |"
        )
    return "\n".join(lines)


def _statuses(s: dict[str, float]) -> str:
    return " / ".join(f"{100 * s[k]:.0f}" for k in ("converged", "at bound", "not converged")) + " %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100, help="simulated latents per curve and noise")
    parser.add_argument("--degraded", action="store_true", help="only the two readings of degraded responses")
    chosen = parser.parse_args()
    n = chosen.n
    if chosen.degraded:
        print(degraded_table(degraded_readings(n)))
        return
    began = time.perf_counter()
    measured = simulate(n)
    measured["machine"] = {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}
    measured["seconds"] = round(time.perf_counter() - began, 1)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(markdown(measured))
    print(f"\n{measured['seconds']} s")


if __name__ == "__main__":
    main()
