"""The judge's floor: its rate of reported restarts in unsteered responses, where none are expected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from steerback.metrics import Estimate, Outcomes, Summary, summarize, view
from steerback.metrics.between import FLOOR_TEST, above_floor
from steerback.metrics.intervals import ALPHA

if TYPE_CHECKING:
    from steerback.analysis.labels import LedgerPlace

Key = tuple[str, str]
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
    floors = {}
    for key, place in places.items():
        if place.target in summaries:
            both = view(outcomes[key]), view(unsteered[place.target])
            floors[key] = Floor(summaries[place.target], {m: above_floor(*both, m) for m in RATES})
    return floors
