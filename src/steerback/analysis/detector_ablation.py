"""Detector ablation: every dose compared with the baseline in pairs, and the slope of the dose response (Fig. 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from steerback.analysis.base import Measured, Results, measured, planted
from steerback.metrics import Trend, trend
from steerback.store.facts import DETECTOR_SET, DOSES, DetectorSet, Dose
from steerback.store.ledger import Ledger

TRENDS = ("multi_attempt_rate", "esr_rate", "msi", "mean_first")


@dataclass(frozen=True, eq=False)
class AblationResults(Results):
    """Summaries and comparisons of the doses; per target the detectors, the doses, and the trend of each metric."""

    measured: Measured
    detectors: Mapping[str, DetectorSet]
    doses: Mapping[str, Sequence[Dose]]
    trends: Mapping[str, Mapping[str, Trend]]
    planted: Sequence[str]

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json."""
        return self.measured.to_json(
            "detector-ablation",
            {
                target: {
                    "detectors": list(self.detectors[target].latents),
                    "doses": DOSES.dump(list(doses)),
                    "trends": {metric: x.to_json() for metric, x in self.trends[target].items()},
                }
                for target, doses in self.doses.items()
            },
        )


def analyse(ledger: Ledger, judge: str, draws: int, options: object = None) -> AblationResults:
    """Compare every dose with the baseline in pairs; fit trends over the share of detectors clamped to zero."""
    conditions = measured(ledger, judge, draws)
    detectors, doses = ledger.targets_with(DETECTOR_SET), ledger.targets_with(DOSES)
    return AblationResults(
        conditions,
        {target: detectors[target] for target in conditions.targets},
        {target: doses[target] for target in conditions.targets},
        {t: {m: dose_trend(conditions, t, doses[t], m, draws) for m in TRENDS} for t in conditions.targets},
        planted(ledger, conditions.targets),
    )


def dose_trend(measured: Measured, target: str, doses: Sequence[Dose], metric: str, draws: int) -> Trend:
    """Return the slope of a metric over the share of detectors clamped to zero (0 to 1)."""
    zeroed = [d for d in doses if not d.level and (target, d.condition) in measured.outcomes]
    outcomes = [measured.outcomes[target, d.condition] for d in zeroed]
    return trend([d.share for d in zeroed], outcomes, metric, draws)
