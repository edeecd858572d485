"""Code shared by all analyses: convert rows to outcomes, summarise conditions, and compare them in pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import JsonValue

from steerback import organism
from steerback.analysis.floor import Floor, Recoveries, floors_under, recoveries, recovery_of, series_of
from steerback.analysis.labels import Key as Key
from steerback.analysis.labels import Labelling, LedgerPlace, Prepare, labelling
from steerback.metrics import Comparison, Outcomes, Summary, compare, correct, summarize
from steerback.metrics.recovery import Recovery, Series
from steerback.records import LatentKey, Trial
from steerback.store.facts import BASELINE, FLOOR, PROVENANCE
from steerback.store.ledger import MANY, Ledger
from steerback.store.processes import collector_paused, in_halves, second_process
from steerback.store.rows import TrialRow, Verdict, verdict_of


class Results(ABC):
    """Results of an analysis. `planted` lists the targets with planted behaviour (see docs/glossary.md)."""

    planted: Sequence[str]

    @abstractmethod
    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json."""

    def data(self) -> dict[str, JsonValue]:
        """Return further JSON files by name."""
        return {}


def outcomes_of(
    rows: Sequence[TrialRow],
    include_degraded: bool,
    cluster: Callable[[Trial], LatentKey | None] = lambda t: t.latent,
) -> Outcomes:
    """Return the outcomes for the statistics: one per planned trial, clustered by latent or by `cluster`.

    `include_degraded` is a setting of the run, `Ledger.includes_degraded`.
    """
    return outcomes_from([verdict_of(row, cluster) for row in rows], include_degraded)


def outcomes_from(verdicts: Sequence[Verdict], include_degraded: bool) -> Outcomes:
    """Return the outcomes of verdicts, as `outcomes_of`."""
    table = [(v.cluster, v.pair, v.valid_receipt, v.judgement, v.degraded) for v in verdicts]
    cut = {"length": 1.0, "unknown": float("nan")}
    return Outcomes.from_rows(table, [cut.get(v.finish or "", 0.0) for v in verdicts], include_degraded)


@dataclass(frozen=True, slots=True)
class Measured:
    """Measured conditions of a ledger, and their paired comparisons.

    `comparisons[target, condition]` is that condition minus `against[target, condition]`. Within each metric, the
    p-values are Holm-corrected over all comparisons of the experiment.
    """

    judge: str
    outcomes: Mapping[Key, Outcomes]
    summaries: Mapping[Key, Summary]
    comparisons: Mapping[Key, Comparison]
    against: Mapping[Key, str]
    labels: Labelling | None = None
    """Human labels of the run, with corrected rates; None if the run has no labels."""
    floors: Mapping[Key, Floor] = field(default_factory=dict)
    """Judge's floor for each condition; empty if it was not measured."""
    recovery: Recoveries = field(default_factory=Recoveries)
    """Recovery without a restart phrase; no other metric counts it."""

    @property
    def targets(self) -> list[str]:
        """Targets in measurement order."""
        return list(dict.fromkeys(target for target, _ in self.summaries))

    def conditions(self, target: str) -> list[str]:
        """Conditions of a target in planned order."""
        return [condition for t, condition in self.summaries if t == target]

    def of(self, target: str) -> dict[str, Summary]:
        """Summaries of a target's conditions."""
        return {condition: self.summaries[target, condition] for condition in self.conditions(target)}

    def to_json(
        self, experiment: str, per_target: Mapping[str, Mapping[str, object]] | None = None, **further: object
    ) -> dict[str, object]:
        """Return the content of summary.json: per target `conditions` (all metrics) and `comparisons` (all tests).

        `per_target` adds an experiment's results to a target, `further` adds them at the top level.
        """
        targets = {
            target: {
                "conditions": {
                    name: s.to_json()
                    | (self.floors[target, name].to_json() if (target, name) in self.floors else {})
                    | self.recovery.to_json((target, name))
                    for name, s in self.of(target).items()
                },
                "comparisons": {
                    name: {"against": self.against[t, name], **c.to_json()}
                    for (t, name), c in self.comparisons.items()
                    if t == target
                },
                **({} if self.labels is None else {"labels": self.labels.to_json(target)}),
                **(per_target or {}).get(target, {}),
            }
            for target in self.targets
        }
        return {"experiment": experiment, "judge": self.judge, "targets": targets, **further}


def measured_of(results: Results) -> Measured | None:
    """Return the measured conditions of an experiment's results, or None if there are none."""
    measured = getattr(results, "measured", None)
    return measured if isinstance(measured, Measured) else None


def to_baseline(condition: str) -> str | None:
    """Compare every condition except the baseline with the baseline."""
    return None if condition == BASELINE else BASELINE


def measured(
    ledger: Ledger,
    judge: str,
    draws: int,
    against: Callable[[str], str | None] = to_baseline,
    stage: str = "measure",
    prepare: Prepare | None = None,
) -> Measured:
    """Summarise all conditions of `stage`; compare each with the condition that `against` returns, if any.

    `prepare` may drop or change a condition's rows, each by itself, before they are counted.
    """
    places = {
        (target, condition): LedgerPlace(target, stage, condition) for target, condition in ledger.conditions(stage)
    }
    outcomes, recovered = read_conditions(ledger, judge, places, prepare)
    pairs = {
        (target, condition): other
        for target, condition in outcomes
        if (other := against(condition)) is not None and (target, other) in outcomes
    }
    tested = paired(judge, outcomes, pairs, draws, labelling(ledger, judge, places, pairs, draws, prepare))
    return with_floors(tested, ledger, places, draws, recovered)


@collector_paused()
def read_conditions(
    ledger: Ledger, judge: str, places: Mapping[Key, LedgerPlace], prepare: Prepare | None = None
) -> tuple[dict[Key, Outcomes], dict[Key, Recovery | None]]:
    """Return the outcomes and the recovery (None: no window scores) of conditions.

    Two processes read one half of each condition if there are many trials.
    """

    def read(half: int, own: Ledger) -> dict[Key, tuple[Outcomes, Series | None]]:
        found = {}
        for key, place in places.items():
            at = (place.target, place.stage, place.condition, judge)
            if prepare is None:
                rows = [*own.verdicts(*at, half=half)]
            else:
                rows = [verdict_of(row) for row in prepare(own.outlines(*at, half=half))]
            found[key] = outcomes_from(rows, own.includes_degraded), series_of(own, judge, place, rows, half)
        return found

    def second() -> dict[Key, tuple[Outcomes, Series | None]]:
        with Ledger(ledger.path, read_only=True) as own:
            return read(1, own)

    rest = second_process(second, worth=ledger.progress()[0] >= MANY)
    halves = read(0, ledger), rest()
    outcomes = {key: Outcomes.concat([half[key][0] for half in halves]) for key in places}
    return outcomes, {key: recovery_of(ledger, [half[key][1] for half in halves]) for key in places}


def with_floors(
    measured: Measured,
    ledger: Ledger,
    places: Mapping[Key, LedgerPlace],
    draws: int,
    recovered: Mapping[Key, Recovery | None],
) -> Measured:
    """Return a copy with the judge's floor of each condition, and with recovery without a restart phrase."""
    targets = {target for target, _ in ledger.conditions(FLOOR)}
    unsteered = {t: [*ledger.outlines(t, FLOOR, judge=measured.judge)] for t in targets}
    restarts = {t: outcomes_of(own, ledger.includes_degraded, lambda x: x.prompt) for t, own in unsteered.items()}
    floors = floors_under(measured.outcomes, places, restarts, draws)
    recovery = recoveries(ledger, measured.judge, places, recovered, unsteered)
    return replace(measured, floors=floors, recovery=recovery)


def paired(
    judge: str,
    outcomes: Mapping[Key, Outcomes],
    against: Mapping[Key, str],
    draws: int,
    labels: Labelling | None = None,
) -> Measured:
    """Return summaries of the outcomes, and the tests of each condition against the one that `against` returns."""

    def summaries(keys: Sequence[Key]) -> dict[Key, Summary]:
        return {key: summarize(outcomes[key], draws) for key in keys}

    first, second = in_halves(summaries, [*outcomes], worth=sum(map(len, outcomes.values())) >= MANY)
    tests = correct({f"{t}\n{c}": compare(outcomes[t, other], outcomes[t, c]) for (t, c), other in against.items()})
    return Measured(
        judge=judge,
        outcomes=outcomes,
        summaries={key: (first | second)[key] for key in outcomes},
        comparisons={(t, c): tests[f"{t}\n{c}"] for t, c in against},
        against=against,
        labels=labels,
    )


def planted(ledger: Ledger, targets: Iterable[str]) -> list[str]:
    """Return the targets with planted behaviour; ledgers of version 0.1 identify the built-in organisms by name."""

    def is_planted(target: str) -> bool:
        stored = ledger.get(target, PROVENANCE)
        return stored.planted if stored is not None else organism.is_builtin(target)

    return [target for target in targets if is_planted(target)]
