"""Cross-judge validation: agreement of several judges on one sample of responses (Figs. A2 to A4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from steerback.analysis.base import Results, outcomes_of, planted
from steerback.errors import SteerbackError
from steerback.metrics import Estimate, Summary, agreement, alpha, rank_correlation, summarize
from steerback.store.facts import HUMAN, SAMPLE, JudgedSample
from steerback.store.ledger import Ledger
from steerback.store.rows import TrialRow

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class JudgePair:
    """Agreement of two judges on several attempts (yes or no), better / same / worse, and first scores."""

    several: Estimate
    several_kappa: Estimate
    direction: Estimate
    direction_kappa: Estimate
    first: Estimate


@dataclass(frozen=True, eq=False)
class Compared(Results):
    """Results for the figures and tables. `first[judge]` are first scores (n responses), nan if unscored.

    `with_labels` pairs each labeller with each judge over the labelled responses. Labellers do not count as judges:
    their sample was drawn by another judge's verdicts, so their uncorrected rates are biased.
    """

    judges: Sequence[str]
    targets: Sequence[str]
    n: int
    pairs: Mapping[tuple[str, str], JudgePair]
    with_labels: Mapping[tuple[str, str], JudgePair]
    alpha_several: Estimate
    alpha_first: Estimate
    summaries: Mapping[tuple[str, str], Summary]  # (judge, target)
    weighted: Mapping[tuple[str, str], Mapping[str, float | None]]
    by_target: Mapping[str, Mapping[tuple[str, str], JudgePair]]
    orders: Mapping[str, Mapping[str, Sequence[str]]]  # metric -> judge -> targets, highest first
    first: Mapping[str, Floats]
    unscored: Mapping[str, int]
    planted: Sequence[str]

    def same_order(self, metric: str) -> bool:
        """Return True if all judges rank the models in the same order."""
        return len({tuple(order) for order in self.orders[metric].values()}) == 1

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json."""

        def by_pair(pairs: Mapping[tuple[str, str], JudgePair]) -> dict[str, object]:
            return {f"{a} / {b}": {k: asdict(v) for k, v in vars(p).items()} for (a, b), p in pairs.items()}

        return {
            "experiment": "cross-judge",
            "judges": list(self.judges),
            "responses": self.n,
            "unscored": dict(self.unscored),
            "pairs": by_pair(self.pairs),
            "labels": by_pair(self.with_labels),
            "alpha": {"several attempts": asdict(self.alpha_several), "first score": asdict(self.alpha_first)},
            "rates": {
                judge: {
                    t: {"sample": self.summaries[judge, t].to_json(), "weighted": self.weighted[judge, t]}
                    for t in self.targets
                }
                for judge in self.judges
            },
            "targets": {
                target: {
                    "agreement": {
                        " / ".join(names): {"multi_attempt": asdict(p.several), "direction": asdict(p.direction)}
                        for names, p in pairs.items()
                    }
                }
                for target, pairs in self.by_target.items()
            },
            "orders": {m: {j: list(o) for j, o in orders.items()} for m, orders in self.orders.items()},
            "same order": {metric: self.same_order(metric) for metric in self.orders},
        }


def analyse(ledger: Ledger, judge: str, draws: int, options: object = None) -> Compared:
    """Return agreement of every pair of judges, alpha over all, rates per judge and model, and model rankings."""
    labellers = [name for name in ledger.judges() if name.startswith(HUMAN)]
    judges = [name for name in ledger.judges() if name not in labellers]
    if len(judges) < 2:
        raise SteerbackError(f"cross-judge needs at least two judges; this run has: {', '.join(judges) or 'none'}")
    rows = {judge: [*ledger.outlines(stage="measure", judge=judge)] for judge in [*judges, *labellers]}
    plan = rows[judges[0]]
    targets = list(dict.fromkeys(r.trial.target for r in plan))
    cluster = np.unique([f"{r.trial.target}/{r.trial.latent}" for r in plan], return_inverse=True)[1]
    seen = {judge: np.array([_verdict(r) for r in own]).T for judge, own in rows.items()}
    owner = np.array([r.trial.target for r in plan])
    couples = list(combinations(judges, 2))
    pairs = {(a, b): _pair(seen[a], seen[b], cluster, draws) for a, b in couples}
    by_target = {
        target: {
            (a, b): _pair(seen[a][:, mine], seen[b][:, mine], cluster[mine], draws)
            for a, b in couples
            for mine in (owner == target,)
        }
        for target in targets
    }
    summaries, weighted = {}, {}
    for judge in judges:
        for target in targets:
            own = [r for r in rows[judge] if r.trial.target == target]
            summaries[judge, target] = summarize(outcomes_of(own, ledger.includes_degraded), draws)
            weighted[judge, target] = _weighted(ledger.get(target, SAMPLE) or JudgedSample(), own)
    orders = {
        metric: {judge: _order({t: weighted[judge, t][metric] for t in targets}) for judge in judges}
        for metric in ("esr_rate", "multi_attempt_rate", "msi")
    }
    return Compared(
        judges=judges,
        targets=targets,
        n=len(plan),
        pairs=pairs,
        with_labels={(a, b): _pair(seen[a], seen[b], cluster, draws) for a in labellers for b in judges},
        alpha_several=alpha(np.stack([seen[j][0] for j in judges]), cluster, "nominal", draws),
        alpha_first=alpha(np.stack([seen[j][2] for j in judges]), cluster, "interval", draws),
        summaries=summaries,
        weighted=weighted,
        by_target=by_target,
        orders=orders,
        first={j: seen[j][2] for j in judges},
        unscored={j: int(np.isnan(seen[j][0]).sum()) for j in judges},
        planted=planted(ledger, targets),
    )


def _pair(a: Floats, b: Floats, cluster: NDArray[np.intp], draws: int) -> JudgePair:
    """Return the agreement of two judges' verdicts, each (3, n responses) as returned by `_verdict`."""
    both = (a[0] == 1) & (b[0] == 1)
    several = agreement(a[0], b[0], cluster, draws)
    direction = agreement(a[1][both], b[1][both], cluster[both], draws)
    first = rank_correlation(a[2], b[2], cluster, draws)
    return JudgePair(several.share, several.kappa, direction.share, direction.kappa, first)


def _verdict(row: TrialRow) -> tuple[float, float, float]:
    """Return (several attempts, direction of change, first score) after gating; nan if there is no score."""
    attempts = row.attempts
    if not attempts:
        return (np.nan, np.nan, np.nan)
    return (float(len(attempts) > 1), float(np.sign(row.gain)), attempts[0].score)


def _weighted(sample: JudgedSample, rows: Sequence[TrialRow]) -> dict[str, float | None]:
    """Return rates and MSI over the source runs; weights correct for the undersampled single-attempt trials."""
    several = set(sample.several_keys)
    total = events = improved = gain = 0.0
    for row in rows:
        if not row.attempts:
            continue
        weight = sample.weights.several if row.trial.key in several else sample.weights.single
        many = len(row.attempts) > 1
        total += weight
        events += weight * many
        improved += weight * (many and row.gain > 0)
        gain += weight * row.gain
    if not total:
        return {"multi_attempt_rate": None, "esr_rate": None, "msi": None}
    return {"multi_attempt_rate": events / total, "esr_rate": improved / total, "msi": gain / total}


def _order(values: Mapping[str, float | None]) -> list[str]:
    """Return names from the highest value to the lowest; ties are ordered by name, unknown values last."""
    return sorted(values, key=lambda t: (values[t] is None, -(values[t] or 0.0), t))
