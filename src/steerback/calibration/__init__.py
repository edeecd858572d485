"""Find, per latent, the boost at which the mean first-attempt score meets a target (the *threshold*).

Knows boosts and scores; nothing of engines, judges, prompts or storage. One `Calibrator` per latent is a small state
machine, so that all latents can be driven in lockstep, one big batch a round:

    calibrators = {key: Calibrator(BoostPrior(150, 75, 0, 300), settings) for key in latents}
    while batch := {k: b for k, c in calibrators.items() if (b := c.next_boost()) is not None}:
        for key, scores in measure(batch, settings.trials_per_iteration):  # 0-100, None where unscored
            calibrators[key].update(batch[key], scores)
    thresholds = {key: c.finish() for key, c in calibrators.items()}
    thresholds = {key: verified(t, measure_fresh(key, t.boost)) for key, t in thresholds.items()}
    report = assess(list(thresholds.values()))

The state depends on the (boost, scores) history alone: `Calibrator.replay` rebuilds it bit for bit.

The search is the probabilistic bisection of Waeber, Frazier and Henderson (2013) in the authors' form: a posterior
over a grid of boosts, sampled at its median. What follows it is ours: the threshold comes from a monotone curve fitted
to all trials (`curves`), with an interval, and is verified on fresh trials. Stopping at the first round
whose mean is near the target selects lucky rounds; it is the option `stop="tolerance"`. See docs/calibration.md.
"""

from steerback.calibration.bisection import Calibrator
from steerback.calibration.thresholds import CalibrationReport, Threshold, assess, verified

__all__ = ["CalibrationReport", "Calibrator", "Threshold", "assess", "verified"]
