"""Search, per latent, for the boost at which the mean first-attempt score equals a target (the *threshold*).

This package uses only boosts and scores; it does not know about engines, judges, prompts or storage. Each latent has a
`Calibrator`, a small state machine, so that each round can measure all latents in one batch:

    calibrators = {key: Calibrator(BoostPrior(150, 75, 0, 300), settings) for key in latents}
    while batch := {k: b for k, c in calibrators.items() if (b := c.next_boost()) is not None}:
        for key, scores in measure(batch, settings.trials_per_iteration):  # 0-100, None if unscored
            calibrators[key].update(batch[key], scores)
    thresholds = {key: c.finish() for key, c in calibrators.items()}
    thresholds = {key: verified(t, measure_fresh(key, t.boost)) for key, t in thresholds.items()}
    report = assess(list(thresholds.values()))

The state depends only on the history of (boost, scores): `Calibrator.replay` rebuilds it bit for bit.

The search is the probabilistic bisection of Waeber, Frazier and Henderson (2013) in the authors' form: a posterior
over a grid of boosts, sampled at its median. The later steps are specific to this package. A monotone curve is fitted
to all trials (`curves`) and gives the threshold with an interval, which is then verified on fresh trials. The authors'
rule, which stops at the first round with a mean near the target, selects rounds that are close by chance; it is the
option `stop="tolerance"`. See docs/calibration.md.
"""

from steerback.calibration.bisection import Calibrator
from steerback.calibration.thresholds import CalibrationReport, Threshold, assess, verified

__all__ = ["CalibrationReport", "Calibrator", "Threshold", "assess", "verified"]
