"""What human labels say about a judge: its precision and recall on the run, and rates corrected for its errors.

Labelled trials are a random sample within each condition and verdict of the judge they were drawn by, so each stands
for the trials of its stratum. Several labellers count as one label, their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from steerback.records import is_degraded
from steerback.store.facts import HUMAN, LABEL_SAMPLES
from steerback.store.ledger import Ledger, Row

Key = tuple[str, str]  # (target, condition)
CORRECTED = ("multi_attempt_rate", "esr_rate")
Prepare = Callable[[Sequence[Row]], Sequence[Row]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the rows of a condition stand in the ledger."""

    target: str
    stage: str
    condition: str


@dataclass(frozen=True, slots=True)
class CorrectedRate:
    """A rate by the judge alone, by prediction-powered inference, and by Rogan and Gladen, with `labels` labels."""

    judged: float | None
    corrected: Estimate
    rogan_gladen: Estimate
    labels: int


@dataclass(frozen=True, slots=True)
class LabellerAgreement:
    """Agreement of two labellers, or of a labeller and a judge, on whether there are several attempts."""

    a: str
    b: str
    several: Agreement


@dataclass(frozen=True, slots=True)
class Labelling:
    """All that the labels of a run say about `judge` and the other judges.

    `rates` by condition and metric, `differences` by compared condition and metric, `judges` by target and judge (its
    verdict on several attempts). `alpha_several` and `alpha_first` are over all labellers (None: there is one).
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
        """The part of a target in summary.json."""
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


def labelling(
    ledger: Ledger,
    judge: str,
    places: Mapping[Key, Place],
    against: Mapping[Key, str],
    draws: int,
    prepare: Prepare = lambda rows: rows,
) -> Labelling | None:
    """Return what the labels of a ledger say, None without labels.

    `places` are the conditions by the names they are shown under; `against` names the condition each is compared with.
    """
    labellers = [name for name in ledger.judges() if name.startswith(HUMAN)]
    drawn_by = {t: next(iter(s.values())).judge for t, s in ledger.targets_with(LABEL_SAMPLES).items() if s}
    labelled = {key: place for key, place in places.items() if place.target in drawn_by}
    if not labellers or not labelled:
        return None

    def read(name: str, place: Place) -> dict[str, Row]:
        rows = ledger.rows(place.target, place.stage, place.condition, name)
        return {r.trial.key: r for r in prepare(rows)}

    def stratifying(place: Place) -> dict[str, Row]:
        # as the sample was drawn: `prepare` leaves trials out, but does not change the stratum of the others
        judge = drawn_by[place.target]
        rows = ledger.rows(place.target, place.stage, place.condition, judge)
        counted = read(judge, place)
        return {r.trial.key: r for r in rows if r.trial.key in counted}

    people = {key: [read(name, place) for name in labellers] for key, place in labelled.items()}
    strata = {key: stratifying(place) for key, place in labelled.items()}

    def trials(name: str, metric: str) -> dict[Key, LabelledTrials]:
        human = name in labellers
        return {
            key: _trials(
                strata[key],
                {} if human else read(name, place),
                [people[key][labellers.index(name)]] if human else people[key],
                metric,
            )
            for key, place in labelled.items()
        }

    machines = [name for name in ledger.judges() if name not in labellers]
    of_judge = {metric: trials(judge, metric) for metric in CORRECTED}
    qualities = {}
    for name in machines:
        several = of_judge["multi_attempt_rate"] if name == judge else trials(name, "multi_attempt_rate")
        for target in dict.fromkeys(t for t, _ in labelled):
            qualities[target, name] = judge_quality([x for (t, _), x in several.items() if t == target])
    everything = [r for key in labelled for r in strata[key].values()]
    verdicts = [
        np.array([_verdict(people[key][i].get(k)) for key in labelled for k in strata[key]]).T
        for i in range(len(labellers))
    ]
    cluster = np.unique([f"{r.trial.target}/{r.trial.latent}" for r in everything], return_inverse=True)[1]
    several_people = len(labellers) > 1
    return Labelling(
        judge=judge,
        labellers=labellers,
        rates={
            key: {metric: _rate(of_judge[metric], key, judge not in labellers) for metric in CORRECTED}
            for key in labelled
        },
        differences={
            key: {
                metric: corrected_difference(of_judge[metric][key[0], other], of_judge[metric][key])
                for metric in CORRECTED
            }
            for key, other in against.items()
            if key in labelled and (key[0], other) in labelled
        },
        judges=qualities,
        agreement=[
            LabellerAgreement(labellers[i], labellers[j], agreement(verdicts[i][0], verdicts[j][0], cluster, draws))
            for i, j in combinations(range(len(labellers)), 2)
        ],
        alpha_several=alpha(np.stack([v[0] for v in verdicts]), cluster, "nominal", draws) if several_people else None,
        alpha_first=alpha(np.stack([v[1] for v in verdicts]), cluster, "interval", draws) if several_people else None,
    )


def _rate(conditions: Mapping[Key, LabelledTrials], key: Key, judged: bool) -> CorrectedRate:
    """Corrected rate of one condition; for Rogan and Gladen, the judge's errors are those in all conditions."""
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
    strata: Mapping[str, Row], judged: Mapping[str, Row], people: Sequence[Mapping[str, Row]], metric: str
) -> LabelledTrials:
    """The trials that count in the headline rate of a judge, each with its stratum and label.

    Without a judge (`judged` is empty) the labels alone are weighted back: every verdict is "no".
    """
    table = []
    for key, stratum in strata.items():
        row = judged.get(key, stratum)
        text = row.completion.text if row.completion is not None else ""
        if not (row.attempts and stratum.attempts) or is_degraded(text):
            continue
        given = [_event(p[key], metric) for p in people if key in p and p[key].attempts]
        truth = float(np.mean(given)) if given else np.nan
        verdict = _event(row, metric) if judged else False
        table.append((cluster_code(row.trial.latent), len(stratum.attempts) > 1, verdict, truth))
    columns = zip(*table, strict=True) if table else [()] * 4
    return LabelledTrials.of(*columns)


def _event(row: Row, metric: str) -> bool:
    """Whether a scored row is an event of the metric."""
    return row.is_episode if metric == "esr_rate" else len(row.attempts) > 1


def _verdict(row: Row | None) -> tuple[float, float]:
    """(several attempts, first score); nan where there is no score."""
    if row is None or not row.attempts:
        return (np.nan, np.nan)
    return (float(len(row.attempts) > 1), row.attempts[0].score)
