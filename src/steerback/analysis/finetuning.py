"""Fine-tuning on self-corrections: every adapter compared with its base, and trends over the mixes (Fig. 6).

Adapters are separate targets in the ledger; this module treats them as conditions of their base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from steerback.analysis.base import Key, Measured, Results, outcomes_of, paired, planted, read_conditions, with_floors
from steerback.analysis.labels import LedgerPlace, labelling
from steerback.metrics import VALID, Estimate, Trend, trend
from steerback.store.facts import ADAPTER, HELD_OUT, HELD_OUT_UNSTEERED, STEERED, UNSTEERED, Adapter
from steerback.store.ledger import Ledger
from steerback.store.rows import TrialRow

BASE = "base"
SHOWN = ("mean_attempts", "multi_attempt_rate", "improvement_rate", "esr_rate", "msi", "mean_first")
TRENDS = {STEERED: SHOWN, HELD_OUT: SHOWN, UNSTEERED: SHOWN[:2], HELD_OUT_UNSTEERED: SHOWN[:2]}


@dataclass(frozen=True, slots=True)
class Ending:
    """Multi-attempt responses with one type of ending: their number, and the mean gain in points."""

    n: int
    gain: float


@dataclass(frozen=True, eq=False)
class MixResults:
    """Results of one base: percentages of its mixes, attempts, peak of MSI, and trends."""

    percents: Sequence[float]
    attempts_base: Estimate | None
    attempts_last: Estimate | None
    msi_peak: Estimate | None
    msi_peak_at: float | None
    trends: Mapping[str, Trend]

    def to_json(self) -> dict[str, object]:
        """Return plain numbers; the peak is a share, with the number of responses at it."""
        peak = self.msi_peak
        at = None if peak is None or self.msi_peak_at is None else {"value": self.msi_peak_at / 100, "n": peak.n}
        named = {"attempts_base": self.attempts_base, "attempts_last": self.attempts_last, "msi_peak": peak}
        return {
            "percents": list(self.percents),
            **{name: None if e is None else asdict(e) for name, e in named.items()},
            "msi_peak_at": at,
            "trends": {name: t.to_json() for name, t in self.trends.items()},
        }


@dataclass(frozen=True, eq=False)
class FinetuningResults(Results):
    """Conditions of each base, its adapters, results over the mixes, and endings of multi-attempt responses."""

    measured: Measured
    adapters: Mapping[str, Adapter]
    mixes: Mapping[str, MixResults]
    endings: Mapping[str, Mapping[str, Ending]]
    planted: Sequence[str]

    def levels(self, target: str, condition: str) -> list[tuple[float, str]]:
        """Return (percentage of self-corrections, name of the condition) of the adapters, ascending."""
        return levels(self.measured, target, self.adapters, condition)

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json."""

        def ended(target: str) -> dict[str, object]:
            own = {name: a for name, a in self.adapters.items() if a.base == target}
            return {a.adapter: {k: asdict(e) for k, e in self.endings[name].items()} for name, a in own.items()}

        return self.measured.to_json(
            "finetuning",
            {target: {"finetune": {**mix.to_json(), "endings": ended(target)}} for target, mix in self.mixes.items()},
        )


def analyse(ledger: Ledger, judge: str, draws: int, options: object = None) -> FinetuningResults:
    """Compare every adapter with the base in pairs of grid points; fit trends over the mixes."""
    adapters = ledger.targets_with(ADAPTER)
    conditions = by_mix(ledger, judge, draws, adapters)
    return FinetuningResults(
        conditions,
        adapters,
        {target: mix_results(conditions, target, adapters) for target in conditions.targets},
        {
            name: endings([*ledger.outlines(name, "measure", STEERED, judge)], ledger.includes_degraded)
            for name in adapters
        },
        planted(ledger, conditions.targets),
    )


def condition_name(adapter: str, condition: str) -> str:
    """Return a condition's name: `mix-50` (steered on the run's prompts), `mix-50 unsteered`, `mix-50 held-out`, ..."""
    return adapter if condition == STEERED else f"{adapter} {condition}"


def by_mix(ledger: Ledger, judge: str, draws: int, adapters: Mapping[str, Adapter]) -> Measured:
    """Return all conditions as conditions of the base, each compared with the base's equivalent."""
    against: dict[Key, str] = {}
    places: dict[Key, LedgerPlace] = {}
    for target, condition in ledger.conditions():
        fact = adapters.get(target)
        base = target if fact is None else fact.base
        key = (base, condition_name(BASE if fact is None else fact.adapter, condition))
        places[key] = LedgerPlace(target, "measure", condition)
        if fact is not None:
            against[key] = condition_name(BASE, condition)
    outcomes, recovered = read_conditions(ledger, judge, places)
    against = {key: other for key, other in against.items() if (key[0], other) in outcomes}
    tested = paired(judge, outcomes, against, draws, labelling(ledger, judge, places, against, draws))
    return with_floors(tested, ledger, places, draws, recovered)


def steered_comparisons(measured: Measured) -> Measured:
    """Return a copy with the comparisons of steered responses on the run's prompts only, which keeps tables short."""
    shown = {key: test for key, test in measured.comparisons.items() if measured.against[key] == BASE}
    return replace(measured, comparisons=shown)


def levels(measured: Measured, target: str, adapters: Mapping[str, Adapter], condition: str) -> list[tuple[float, str]]:
    """Return (percentage of self-corrections, name of the condition) of adapters with a known percentage, ascending."""
    named = [
        (a.percent, condition_name(a.adapter, condition))
        for a in adapters.values()
        if a.base == target and a.percent is not None
    ]
    return sorted((percent, name) for percent, name in named if (target, name) in measured.summaries)


def mix_results(measured: Measured, target: str, adapters: Mapping[str, Adapter]) -> MixResults:
    """Return the peak of MSI, attempts of the base and at the mix with most corrections, and trends of each metric."""
    trends: dict[str, Trend] = {}
    for condition, metrics in TRENDS.items():
        along = levels(measured, target, adapters, condition)
        if len({percent for percent, _ in along}) > 1:
            for metric in metrics:
                outcomes = [measured.outcomes[target, name] for _, name in along]
                trends[condition_name(metric, condition)] = trend([p for p, _ in along], outcomes, metric)
    steered = levels(measured, target, adapters, STEERED)
    summaries = [(percent, measured.summaries[target, name]) for percent, name in steered]
    scored = [(percent, s["msi"]) for percent, s in summaries if s["msi"].value is not None]
    peak = max(scored, key=lambda entry: entry[1].value or 0.0, default=None)
    base = measured.summaries.get((target, BASE))
    return MixResults(
        percents=[percent for percent, _ in steered],
        attempts_base=None if base is None else base["mean_attempts"],
        attempts_last=summaries[-1][1]["mean_attempts"] if summaries else None,
        msi_peak=None if peak is None else peak[1],
        msi_peak_at=None if peak is None else peak[0],
        trends=trends,
    )


def endings(rows: Sequence[TrialRow], include_degraded: bool) -> dict[str, Ending]:
    """Return multi-attempt responses by ending: `n`, and `gain`, the mean of last minus first score in points.

    Responses `cut` at the length limit could not finish their last attempt, which lowers MSI.
    """
    outcomes = outcomes_of(rows, include_degraded)
    counted = (outcomes.state == VALID) & (include_degraded | ~outcomes.degraded)
    multi = counted & (outcomes.attempts > 1)
    gain = outcomes.last - outcomes.first
    parts = {"ended": multi & (outcomes.cut == 0), "cut": multi & (outcomes.cut == 1)}
    return {name: Ending(int(part.sum()), float(gain[part].mean())) for name, part in parts.items() if part.any()}
