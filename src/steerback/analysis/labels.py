"""Human labels of a run: precision and recall of each judge, and rates corrected for the judge's errors.

Labelled trials are a random sample within strata: condition and verdict of the judge that the sample was drawn by. Each
labelled trial therefore represents the trials of its stratum. The labels of several people are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from steerback.metrics import Estimate, agreement, alpha, cluster_code
from steerback.metrics.agreement import Agreement
from steerback.metrics.correction import (
    JudgeQuality,
    LabelledTrials,
    corrected_difference,
    corrected_rate,
    judge_quality,
    rogan_gladen,
)
from steerback.store.facts import HUMAN, LABEL_SAMPLES
from steerback.store.ledger import Ledger
from steerback.store.rows import Outline

Key = tuple[str, str]  # (target, condition)
CORRECTED = ("multi_attempt_rate", "esr_rate")
Prepare = Callable[[Iterable[Outline]], list[Outline]]
"""Function that drops or changes rows of a condition, each by itself, before they are counted."""


@dataclass(frozen=True, slots=True)
class LedgerPlace:
    """Target and condition of rows in the ledger."""

    target: str
    stage: str
    condition: str


@dataclass(frozen=True, slots=True)
class CorrectedRate:
    """A rate by the judge alone, by prediction-powered inference, and by Rogan-Gladen, from `labels` labels."""

    judged: float | None
    corrected: Estimate
    rogan_gladen: Estimate
    labels: int


@dataclass(frozen=True, slots=True)
class LabellerAgreement:
    """Agreement of two labellers, or of a labeller and a judge, on the verdict "several attempts"."""

    a: str
    b: str
    several: Agreement


@dataclass(frozen=True, slots=True)
class Labelling:
    """Results of a run's labels for `judge` and the other judges.

    `rates` are by condition and metric, `differences` by compared condition and metric, `judges` by target and judge
    (verdict "several attempts"). `alpha_several` and `alpha_first` cover all labellers (None: only one).
    """

    judge: str
    labellers: Sequence[str]
    rates: Mapping[Key, Mapping[str, CorrectedRate]]
    differences: Mapping[Key, Mapping[str, Estimate]]
    judges: Mapping[tuple[str, str], JudgeQuality]
    agreement: Sequence[LabellerAgreement]
    alpha_several: Estimate | None
    alpha_first: Estimate | None

    def to_json(self, target: str) -> dict[str, object]:
        """Return the part of summary.json for a target."""
        return {
            "labellers": list(self.labellers),
            "rates": {
                c: {m: asdict(r) for m, r in rates.items()} for (t, c), rates in self.rates.items() if t == target
            },
            "differences": {
                c: {m: asdict(e) for m, e in tests.items()} for (t, c), tests in self.differences.items() if t == target
            },
            "judges": {judge: asdict(quality) for (t, judge), quality in self.judges.items() if t == target},
            "agreement of labellers": [asdict(pair) for pair in self.agreement],
            "alpha": {
                name: None if e is None else asdict(e)
                for name, e in (("several attempts", self.alpha_several), ("first score", self.alpha_first))
            },
        }


@dataclass(frozen=True, eq=False)
class _LabelledRows:
    """Rows of the labelled conditions, with the verdicts of each judge and each labeller.

    `places` maps displayed condition names to rows of the ledger; `drawn_by` is, by target, the judge that defined the
    strata.
    """

    ledger: Ledger
    places: Mapping[Key, LedgerPlace]
    labellers: Sequence[str]
    drawn_by: Mapping[str, str]
    prepare: Prepare

    @cached_property
    def people(self) -> dict[Key, list[dict[str, Outline]]]:
        """Rows by labeller."""
        return {key: [self.read(name, place) for name in self.labellers] for key, place in self.places.items()}

    @cached_property
    def strata(self) -> dict[Key, dict[str, Outline]]:
        """Rows that define the sample's strata. `prepare` may drop trials, but a trial keeps its stratum."""
        strata = {}
        for key, place in self.places.items():
            judge = self.drawn_by[place.target]
            counted = self.read(judge, place)
            rows = self.ledger.outlines(place.target, place.stage, place.condition, judge)
            strata[key] = {r.trial.key: r for r in rows if r.trial.key in counted}
        return strata

    def read(self, name: str, place: LedgerPlace) -> dict[str, Outline]:
        """Return a condition's rows with the verdicts of one judge, by trial key."""
        rows = self.ledger.outlines(place.target, place.stage, place.condition, name)
        return {r.trial.key: r for r in self.prepare(rows)}

    def trials(self, name: str) -> dict[str, dict[Key, LabelledTrials]]:
        """Return the trials of every condition, by metric, with the verdicts of judge `name`."""
        trials: dict[str, dict[Key, LabelledTrials]] = {metric: {} for metric in CORRECTED}
        for key, place in self.places.items():
            if name in self.labellers:
                judged, people = {}, [self.people[key][self.labellers.index(name)]]
            else:
                judged, people = self.read(name, place), self.people[key]
            for metric in CORRECTED:
                trials[metric][key] = _trials(self.strata[key], judged, people, metric, self.ledger.includes_degraded)
        return trials


def labelling(
    ledger: Ledger,
    judge: str,
    places: Mapping[Key, LedgerPlace],
    against: Mapping[Key, str],
    draws: int,
    prepare: Prepare | None = None,
) -> Labelling | None:
    """Return the results of a ledger's labels, or None without labels.

    `places` maps displayed condition names to rows of the ledger; `against` names the condition for each comparison.
    """
    labellers = [name for name in ledger.judges() if name.startswith(HUMAN)]
    drawn_by = {t: next(iter(s.values())).judge for t, s in ledger.targets_with(LABEL_SAMPLES).items() if s}
    labelled = {key: place for key, place in places.items() if place.target in drawn_by}
    if not labellers or not labelled:
        return None
    rows = _LabelledRows(ledger, labelled, labellers, drawn_by, prepare or list)
    machines = [name for name in ledger.judges() if name not in labellers]
    trials = {name: rows.trials(name) for name in dict.fromkeys([judge, *machines])}
    compared = {key: (key[0], other) for key, other in against.items() if {key, (key[0], other)} <= set(labelled)}
    pairs, alpha_several, alpha_first = _agreement(rows, draws)
    return Labelling(
        judge=judge,
        labellers=labellers,
        rates={key: {m: _rate(trials[judge][m], key, judge not in labellers) for m in CORRECTED} for key in labelled},
        differences={
            key: {m: corrected_difference(trials[judge][m][other], trials[judge][m][key]) for m in CORRECTED}
            for key, other in compared.items()
        },
        judges={
            (target, name): judge_quality(
                [x for (t, _), x in trials[name]["multi_attempt_rate"].items() if t == target]
            )
            for name in machines
            for target in dict.fromkeys(t for t, _ in labelled)
        },
        agreement=pairs,
        alpha_several=alpha_several,
        alpha_first=alpha_first,
    )


def _agreement(rows: _LabelledRows, draws: int) -> tuple[list[LabellerAgreement], Estimate | None, Estimate | None]:
    """Return agreement of each pair of labellers, and alpha over all for several attempts and first scores."""
    names = rows.labellers
    if len(names) < 2:
        return [], None, None
    drawn = [(key, trial, row.trial) for key, own in rows.strata.items() for trial, row in own.items()]
    cluster = np.unique([f"{t.target}/{t.latent}" for _, _, t in drawn], return_inverse=True)[1]
    seen = np.array([[_verdict(rows.people[key][i].get(trial)) for key, trial, _ in drawn] for i in range(len(names))])
    several, first = seen[:, :, 0], seen[:, :, 1]
    pairs = [
        LabellerAgreement(names[i], names[j], agreement(several[i], several[j], cluster, draws))
        for i, j in combinations(range(len(names)), 2)
    ]
    return pairs, alpha(several, cluster, "nominal", draws), alpha(first, cluster, "interval", draws)


def _rate(conditions: Mapping[Key, LabelledTrials], key: Key, judged: bool) -> CorrectedRate:
    """Return the corrected rate of one condition; Rogan-Gladen uses the judge's errors over all conditions."""
    own = conditions[key]
    together = [x for (target, _), x in conditions.items() if target == key[0]]
    return CorrectedRate(
        judged=float(np.mean(own.verdict)) if judged and len(own) else None,
        corrected=corrected_rate(own),
        rogan_gladen=(
            rogan_gladen(own, together) if judged else Estimate(None, None, None, len(own), "labels are not corrected")
        ),
        labels=own.labels,
    )


def _trials(
    strata: Mapping[str, Outline],
    judged: Mapping[str, Outline],
    people: Sequence[Mapping[str, Outline]],
    metric: str,
    include_degraded: bool,
) -> LabelledTrials:
    """Return the trials in a judge's headline rate, each with its stratum and label.

    Without a judge (`judged` is empty) every verdict is "no", and the estimate uses only the weighted labels.
    """
    table = []
    for key, stratum in strata.items():
        row = judged.get(key, stratum)
        if not (row.attempts and stratum.attempts) or (row.degraded and not include_degraded):
            continue
        given = [_event(p[key], metric) for p in people if key in p and p[key].attempts]
        truth = float(np.mean(given)) if given else np.nan
        verdict = _event(row, metric) if judged else False
        # the same strata for all metrics, so that no corrected ESR rate exceeds the corrected multi-attempt rate
        cell = 1 + (len(row.attempts) > 1) + row.is_episode if judged else 0
        table.append((cluster_code(row.trial.latent), len(stratum.attempts) > 1, verdict, truth, cell))
    columns = zip(*table, strict=True) if table else [()] * 5
    return LabelledTrials.of(*columns)


def _event(row: Outline, metric: str) -> bool:
    """Return whether a scored row is an event of the metric."""
    return row.is_episode if metric == "esr_rate" else len(row.attempts) > 1


def _verdict(row: Outline | None) -> tuple[float, float]:
    """Return (several attempts, first score); nan if there is no score."""
    if row is None or not row.attempts:
        return (np.nan, np.nan)
    return (float(len(row.attempts) > 1), row.attempts[0].score)
