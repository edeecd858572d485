"""Detector ablation: every dose compared with the baseline in pairs, and the slope of the dose response (Fig. 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from steerback.analysis.base import Key, Measured, Results, measured, planted
from steerback.metrics import Comparison, Trend, compare, correct, trend
from steerback.store.facts import ABLATED, BASELINE, DETECTOR_SET, DOSES, RANDOM_SETS, ControlSets, DetectorSet, Dose
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


def doses(ledger: Ledger, judge: str, draws: int, options: object = None) -> AblationResults:
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


RANKED = ("multi_attempt_rate", "esr_rate", "msi", "mean_attempts", "mean_first")


@dataclass(frozen=True, slots=True)
class Rank:
    """Rank of the detectors' value of a metric among the values of the random sets.

    `below` of the `sets` have a smaller value, `above` a larger one. `mean`, `low` and `high` describe the sets. `p` is
    a two-sided permutation p-value: the share of all sets, detectors included, whose distance to the mean of the other
    sets is at least that of the detectors.
    """

    value: float
    baseline: float | None
    mean: float
    low: float
    high: float
    below: int
    above: int
    sets: int
    p: float


@dataclass(frozen=True, eq=False)
class RandomAblationResults(Results):
    """Summaries and comparisons with the baseline; per target the random sets, and the detectors' rank for each metric.

    `against_sets[target, condition]` is the detector ablation minus the random set of this condition.
    """

    measured: Measured
    sets: Mapping[str, ControlSets]
    ranks: Mapping[str, Mapping[str, Rank | None]]
    against_sets: Mapping[Key, Comparison]
    planted: Sequence[str]

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json."""
        return self.measured.to_json(
            "random-ablation",
            {
                target: {
                    "random_sets": RANDOM_SETS.dump(sets),
                    "ranks": {m: None if r is None else asdict(r) for m, r in self.ranks[target].items()},
                    "detectors_against_sets": {
                        condition: x.to_json() for (t, condition), x in self.against_sets.items() if t == target
                    },
                }
                for target, sets in self.sets.items()
            },
        )


def random_sets(ledger: Ledger, judge: str, draws: int, options: object = None) -> RandomAblationResults:
    """Compare the detectors with the baseline and with each set, in pairs; rank their effect."""
    conditions = measured(ledger, judge, draws)
    stored = ledger.targets_with(RANDOM_SETS)
    sets = {target: stored[target] for target in conditions.targets}
    return RandomAblationResults(
        conditions,
        sets,
        {target: {m: rank_of(conditions, target, own, m) for m in RANKED} for target, own in sets.items()},
        compare_with_sets(conditions, sets),
        planted(ledger, conditions.targets),
    )


def rank_of(measured: Measured, target: str, sets: ControlSets, metric: str) -> Rank | None:
    """Return the detectors' rank in `metric`, or None if a value is missing."""
    values = {condition: s[metric].value for condition, s in measured.of(target).items()}
    random = [values.get(condition) for condition in sets.conditions]
    return rank(values.get(ABLATED), [v for v in random if v is not None], values.get(BASELINE))


def rank(value: float | None, others: Sequence[float], baseline: float | None = None) -> Rank | None:
    """Return the rank of a value among others, or None if there is no value or no other."""
    if value is None or not others:
        return None
    everything = [value, *others]
    # Distance of each value from the mean of the others; the first one is that of the detectors.
    apart = [abs(v - (sum(everything) - v) / len(others)) for v in everything]
    return Rank(
        value=value,
        baseline=baseline,
        mean=sum(others) / len(others),
        low=min(others),
        high=max(others),
        below=sum(v < value for v in others),
        above=sum(v > value for v in others),
        sets=len(others),
        p=sum(x >= apart[0] * (1 - 1e-12) for x in apart) / len(everything),
    )


def compare_with_sets(measured: Measured, sets: Mapping[str, ControlSets]) -> dict[Key, Comparison]:
    """Return the detector ablation minus each random set, paired, Holm-corrected over the sets."""
    outcomes = measured.outcomes
    pairs = [
        (target, condition)
        for target, own in sets.items()
        for condition in own.conditions
        if (target, condition) in outcomes and (target, ABLATED) in outcomes
    ]
    tests = correct({f"{t}\n{c}": compare(outcomes[t, c], outcomes[t, ABLATED]) for t, c in pairs})
    return {(t, c): tests[f"{t}\n{c}"] for t, c in pairs}
