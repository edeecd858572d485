"""The judge's floor, and recovery without a restart phrase with its two false-positive floors.

The floor is the rate of reported restarts in unsteered responses, where none are expected. Recovery comes from the
window scores in the ledger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from steerback.analysis.labels import Key, LedgerPlace
from steerback.config import RecoveryConfig
from steerback.metrics import Estimate, Outcomes, Summary, cluster_code, summarize, view
from steerback.metrics.between import FLOOR_TEST, above_floor
from steerback.metrics.intervals import ALPHA
from steerback.metrics.recovery import Recovery, Rule, Series, Windows, recovery
from steerback.store.facts import CONFIG, FLOOR
from steerback.store.ledger import Ledger
from steerback.store.processes import in_halves
from steerback.store.rows import Outline, Verdict, attempts_of, verdict_of

if TYPE_CHECKING:
    from steerback.analysis.labels import LedgerPlace

RATES = ("multi_attempt_rate", "esr_rate")


@dataclass(frozen=True, eq=False)
class Floor:
    """The floor of one condition: rates of its target's unsteered responses, clustered by prompt.

    `p` has for each metric the p-value of the null hypothesis "the condition's rate is not larger than the floor"; None
    if it cannot be computed.
    """

    summary: Summary
    p: Mapping[str, float | None]

    def __getitem__(self, metric: str) -> Estimate:
        return self.summary[metric]

    def distinguishable(self, metric: str) -> bool:
        """Return whether the condition's rate is significantly larger than the floor."""
        p = self.p[metric]
        return p is not None and p <= ALPHA

    def to_json(self) -> dict[str, object]:
        """Return the floor in its form for a condition in summary.json."""
        rates = {metric: asdict(self[metric]) | {"p": self.p[metric]} for metric in RATES}
        return {"floor": {"counts": self.summary.counts, **rates, "test": FLOOR_TEST}}


def floors_under(
    outcomes: Mapping[Key, Outcomes], places: Mapping[Key, LedgerPlace], unsteered: Mapping[str, Outcomes], draws: int
) -> dict[Key, Floor]:
    """Return the floor of each condition; `unsteered` has by target the judged unsteered responses of the ledger."""
    summaries = {target: summarize(own, draws) for target, own in unsteered.items() if len(own)}
    floored = [key for key, place in places.items() if place.target in summaries]

    def tested(keys: Sequence[Key]) -> dict[Key, dict[str, float | None]]:
        views = {key: (view(outcomes[key]), view(unsteered[places[key].target])) for key in keys}
        return {key: {m: above_floor(*both, m) for m in RATES} for key, both in views.items()}

    first, second = in_halves(tested, floored)
    return {key: Floor(summaries[places[key].target], (first | second)[key]) for key in floored}


@dataclass(frozen=True, eq=False)
class Recoveries:
    """Recovery by condition. `floors` has the recovery in the unsteered responses of the condition's target, if any.

    Both are empty if the judge scored no windows.
    """

    rule: Rule = field(default_factory=Rule)
    conditions: Mapping[Key, Recovery] = field(default_factory=dict)
    floors: Mapping[Key, Recovery] = field(default_factory=dict)

    def to_json(self, key: Key) -> dict[str, object]:
        """Return the content of `recovery` for a condition in summary.json."""
        if key not in self.conditions:
            return {}
        unsteered = {"unsteered": self.floors[key].to_json()} if key in self.floors else {}
        return {"recovery": {**self.conditions[key].to_json(), **unsteered}}


def recoveries(
    ledger: Ledger,
    judge: str,
    places: Mapping[Key, LedgerPlace],
    measured: Mapping[Key, Recovery | None],
    floors: Mapping[str, Sequence[Outline]],
) -> Recoveries:
    """Return the recovery of every condition whose windows `judge` has scored.

    `measured` is the recovery in each condition (`recovery_of`), `floors` are the unsteered rows of each target, all
    with the verdicts of `judge`.
    """
    unsteered: dict[str, Recovery] = {}
    for target, condition in ledger.conditions(FLOOR):
        own = [verdict_of(r, lambda t: t.prompt) for r in floors[target] if r.trial.condition == condition]
        floor = recovery_of(ledger, [series_of(ledger, judge, LedgerPlace(target, FLOOR, condition), own)])
        if floor is not None:
            unsteered[target] = floor
    under = {key: unsteered[place.target] for key, place in places.items() if place.target in unsteered}
    return Recoveries(rule_of(ledger), {key: own for key, own in measured.items() if own is not None}, under)


def rule_of(ledger: Ledger) -> Rule:
    """Return the recovery rule of a run's settings."""
    stored = (ledger.get("", CONFIG) or {}).get("recovery")
    settings = RecoveryConfig.model_validate(stored) if isinstance(stored, dict) else RecoveryConfig()
    return Rule(settings.low, settings.high, settings.early, settings.least_windows)


def recovery_of(ledger: Ledger, parts: Iterable[Series | None]) -> Recovery | None:
    """Return the recovery in a condition from the parts of `series_of`; None if no part has windows."""
    scored = [part for part in parts if part is not None]
    return recovery(Series.concat(scored), rule_of(ledger)) if scored else None


def series_of(
    ledger: Ledger, judge: str, place: LedgerPlace, verdicts: Sequence[Verdict], half: int | None = None
) -> Series | None:
    """Return the windows of a condition, or of one half of it; None if the judge has scored no windows there.

    Degraded responses, and responses without a score for the whole text, are excluded, as in the other metrics.
    """
    scores = ledger.window_scores(judge, place.target, place.stage, place.condition, half)
    if not scores:
        return None
    used = [(v, len(attempts_of(v.valid_receipt, v.judgement))) for v in verdicts if scores.get(v.key)]
    used = [(v, attempts) for v, attempts in used if attempts and not v.degraded]
    return Series(
        Windows.of(scores[v.key] for v, _ in used),
        np.array([cluster_code(v.cluster) for v, _ in used], dtype=np.int64),
        np.array([attempts == 1 for _, attempts in used], dtype=bool),
    )
