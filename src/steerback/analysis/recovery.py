"""Recovery without a restart phrase, from the window scores in the ledger, with its two false-positive floors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from steerback.analysis.labels import Key, LedgerPlace
from steerback.config import RecoveryConfig
from steerback.metrics import cluster_code
from steerback.metrics.recovery import Recovery, Rule, Series, recovery
from steerback.records import LatentKey, Trial, is_degraded
from steerback.store.facts import CONFIG, FLOOR
from steerback.store.ledger import Ledger, Row


@dataclass(frozen=True, eq=False)
class Recoveries:
    """Recovery by condition; `floors`: that of the unsteered responses of the condition's target, where there are any.

    Both are empty where the judge has scored no windows.
    """

    rule: Rule = field(default_factory=Rule)
    conditions: Mapping[Key, Recovery] = field(default_factory=dict)
    floors: Mapping[Key, Recovery] = field(default_factory=dict)

    def to_json(self, key: Key) -> dict[str, object]:
        """The content of `recovery` of a condition in summary.json."""
        if key not in self.conditions:
            return {}
        unsteered = {"unsteered": self.floors[key].to_json()} if key in self.floors else {}
        return {"recovery": {**self.conditions[key].to_json(), **unsteered}}


def recoveries(
    ledger: Ledger,
    judge: str,
    places: Mapping[Key, LedgerPlace],
    prepare: Callable[[Sequence[Row]], Sequence[Row]] = lambda rows: rows,
) -> Recoveries:
    """Return the recovery of every condition whose windows `judge` has scored.

    Degraded responses, and those that the judge has not scored as a whole, are left out, as in the other metrics.
    """
    rule = rule_of(ledger)
    found: dict[Key, Recovery] = {}
    for key, place in places.items():
        series = _series(ledger, judge, place, prepare, lambda trial: trial.latent)
        if series is not None:
            found[key] = recovery(series, rule)
    unsteered: dict[str, Recovery] = {}
    for target, condition in ledger.conditions(FLOOR):
        floor = _series(ledger, judge, LedgerPlace(target, FLOOR, condition), lambda rows: rows, lambda t: t.prompt)
        if floor is not None:
            unsteered[target] = recovery(floor, rule)
    floors = {key: unsteered[place.target] for key, place in places.items() if place.target in unsteered}
    return Recoveries(rule, found, floors)


def rule_of(ledger: Ledger) -> Rule:
    """Return the rule of recovery that a run was started with."""
    stored = (ledger.get("", CONFIG) or {}).get("recovery")
    settings = RecoveryConfig.model_validate(stored) if isinstance(stored, dict) else RecoveryConfig()
    return Rule(settings.low, settings.high, settings.early, settings.least_windows)


def _series(
    ledger: Ledger,
    judge: str,
    place: LedgerPlace,
    prepare: Callable[[Sequence[Row]], Sequence[Row]],
    cluster: Callable[[Trial], LatentKey | None],
) -> Series | None:
    windows = ledger.windows(judge, place.target, place.stage, place.condition)
    if not windows:
        return None
    rows = [
        r
        for r in prepare(ledger.rows(place.target, place.stage, place.condition, judge))
        if r.trial.key in windows and windows[r.trial.key].scores and r.attempts and not is_degraded(_text(r))
    ]
    return Series(
        [np.array(windows[r.trial.key].scores, dtype=np.float64) for r in rows],
        np.array([cluster_code(cluster(r.trial)) for r in rows], dtype=np.int64),
        np.array([len(r.attempts) == 1 for r in rows], dtype=bool),
    )


def _text(row: Row) -> str:
    return row.completion.text if row.completion is not None else ""
