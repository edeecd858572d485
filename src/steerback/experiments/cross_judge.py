"""Experiment 7, cross-judge validation (specification section "Experiment 7", Figs. A2 to A4).

A sample of finished runs is judged by several judges: do they see the same restarts and the same direction of change,
and do they rank the models alike? Nothing is generated: `gather` copies responses into a run of its own, judging adds
each judge's verdicts, and the analysis compares them from the ledger alone.

The sample takes multi-attempt trials first, so rates over it are higher than over the runs; `weighted` undoes that by
weighing trials with how many each stands for.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from steerback.config import RunConfig, Settings
from steerback.errors import SteerbackError
from steerback.experiments.base import Analysis, Experiment, outcomes_of, planted, settings
from steerback.figures.tables import Table, number, show
from steerback.metrics import Estimate, Summary, agreement, alpha, rank_correlation, summarize
from steerback.records import Judgement
from steerback.store.ledger import Ledger, Row
from steerback.store.run import Run, stored_config
from steerback.study.study import fact_of

Floats = NDArray[np.float64]
SAMPLE, MINIMUM, SEED = 1000, 100, 42


class Options(Settings):
    """Which responses are judged by whom."""

    sources: list[str] = Field([])
    judges: list[str] = Field([])
    sample: int = Field(SAMPLE, ge=1)
    minimum: int = Field(MINIMUM, ge=1)
    """Of each target."""


class CrossJudge(Experiment):
    """Agreement of several judges on one sample of responses."""

    name = "cross-judge"
    title = "Cross-judge validation (experiment 7)"
    options = Options
    generates = False

    def conditions(self, config: RunConfig) -> int:
        return 0

    def further(self, config: RunConfig) -> dict[str, int]:
        """How many responses are judged, at most."""
        chosen = settings(self, config)
        return {"sample": max(chosen["sample"], chosen["minimum"] * len(config.targets))}

    def judges(self, config: RunConfig) -> tuple[str, ...]:
        """Two or more, each named once."""
        names = tuple(dict.fromkeys(settings(self, config)["judges"]))
        if len(names) < 2:
            raise SteerbackError("cross-judge compares two judges or more: name them with --judges A,B")
        return names

    def collect(self, run: Run) -> None:
        """The sample of the runs it starts from."""
        chosen = settings(self, run.config)
        gather(run, [Path(s) for s in chosen["sources"]], chosen["sample"], chosen["minimum"])

    def analyse(self, ledger: Ledger, judge: str, draws: int) -> Analysis:
        """Agreement of every pair of judges, alpha over all, rates per judge and model, and the models' order."""
        from steerback.figures import cross_judge as figure

        found = compared(ledger, draws)
        note = planted(found.targets)
        return Analysis(
            summary=found.to_json(),
            tables={"agreement": agreement_table(found), "judges": judge_table(found)},
            figures={
                "figureA2": partial(figure.rates, found, "esr_rate", note),
                "figureA3": partial(figure.rates, found, "multi_attempt_rate", note),
                "figureA4": partial(figure.agreement, found, note),
            },
            lines=[ranking_line(found)],
        )


# --- the sample ---------------------------------------------------------------------------------------------------


def gather(opened: Run, sources: Sequence[Path], sample: int = SAMPLE, minimum: int = MINIMUM) -> int:
    """Copies the sample, its references and the verdicts it has into `opened`; returns how many trials. Idempotent.

    Stratified by target, `sample` in all but at least `minimum` each: multi-attempt trials (by the source run's judge)
    first, and at least half of the minimum single-attempt ones, so that agreement on the difference means something.
    """
    pools: dict[str, list[tuple[Row, str, Path]]] = defaultdict(list)
    kept: list[tuple[Row, str, Path]] = []
    for folder in sources:
        config = stored_config(folder)
        with Run.read(folder) as source:
            for row in source.ledger.rows(judge=config.judge):
                if row.completion is None:
                    continue
                if row.trial.stage == "reference":
                    kept.append((row, config.judge, folder))
                elif row.trial.stage == "measure" and row.valid_receipt and _attempts(row) > 0:
                    pools[row.trial.target].append((row, config.judge, folder))
    if not pools:
        raise SteerbackError(f"no judged trial in {', '.join(str(s) for s in sources) or 'no run at all'}")
    quota = max(minimum, sample // len(pools))
    chosen: list[tuple[Row, str, Path]] = []
    for target, pool in pools.items():
        strata = {
            "several": [entry for entry in pool if _attempts(entry[0]) > 1],
            "single": [entry for entry in pool if _attempts(entry[0]) == 1],
        }
        for stratum in strata.values():
            random.Random(SEED).shuffle(stratum)
        several = strata["several"][: quota - min(len(strata["single"]), minimum // 2)]
        single = strata["single"][: quota - len(several)]
        chosen += several + single
        taken = {"several": several, "single": single}
        weights = {name: len(strata[name]) / len(own) if own else 0.0 for name, own in taken.items()}
        counted = {"available": len(pool), "several": len(several), "single": len(single), "weights": weights}
        keys = [key for key, _ in _renamed(several)]
        opened.ledger.set_fact(target, "cross-judge sample", {**counted, "several keys": keys})
    _copy(opened, [*kept, *chosen])
    return len(chosen)


def _copy(opened: Run, entries: Sequence[tuple[Row, str, Path]]) -> None:
    trials, completions, judgements = [], [], []
    asked = {(folder, row.trial.target) for row, _, folder in entries}
    made_by = {key: str((fact_of(*key, "engine")[0] or {}).get("fingerprint", "unknown")) for key in asked}
    for key, (row, _, folder) in _renamed(entries):
        trials.append(replace(row.trial, key=key, record=None))
        if row.completion is not None:
            completions.append((key, replace(row.completion, activations=None), made_by[folder, row.trial.target]))
        if row.judgement is not None:
            judgements.append((key, row.judgement))
    opened.ledger.add_trials(trials)
    opened.ledger.add_completions(completions)
    opened.ledger.add_judgements(judgements)


def _renamed(entries: Sequence[tuple[Row, str, Path]]) -> list[tuple[str, tuple[Row, str, Path]]]:
    """Keys that say which run a trial came from, as two runs may hold the same key."""
    return [(f"{entry[0].trial.key}@{entry[2].name}", entry) for entry in entries]


def _attempts(row: Row) -> int:
    judged = row.judgement
    return len(judged.gated_attempts()) if judged is not None and judged.status == "scored" else 0


# --- the comparison -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """How two judges agree: on whether there are several attempts, on better / same / worse, on first scores."""

    several: Estimate
    several_kappa: Estimate
    direction: Estimate
    direction_kappa: Estimate
    first: Estimate


@dataclass(frozen=True, eq=False)
class Compared:
    """Everything the figures and tables need. `first[judge]` are first scores (n responses), nan where unscored."""

    judges: Sequence[str]
    targets: Sequence[str]
    n: int
    pairs: Mapping[tuple[str, str], Pair]
    alpha_several: Estimate
    alpha_first: Estimate
    summaries: Mapping[tuple[str, str], Summary]  # (judge, target)
    weighted: Mapping[tuple[str, str], Mapping[str, float | None]]
    by_target: Mapping[str, Mapping[tuple[str, str], Pair]]
    orders: Mapping[str, Mapping[str, Sequence[str]]]  # metric -> judge -> targets, highest first
    first: Mapping[str, Floats]
    unscored: Mapping[str, int]

    def same_order(self, metric: str) -> bool:
        """Whether all judges rank the models alike."""
        return len({tuple(order) for order in self.orders[metric].values()}) == 1

    def to_json(self) -> dict[str, Any]:
        return {
            "experiment": CrossJudge.name,
            "judges": list(self.judges),
            "responses": self.n,
            "unscored": dict(self.unscored),
            "pairs": {f"{a} / {b}": {k: asdict(v) for k, v in vars(p).items()} for (a, b), p in self.pairs.items()},
            "alpha": {"several attempts": asdict(self.alpha_several), "first score": asdict(self.alpha_first)},
            "rates": {
                judge: {
                    target: {
                        "sample": self.summaries[judge, target].to_json(),
                        "weighted": self.weighted[judge, target],
                    }
                    for target in self.targets
                }
                for judge in self.judges
            },
            "targets": {
                target: {"agreement": {" / ".join(names): _shares(pair) for names, pair in pairs.items()}}
                for target, pairs in self.by_target.items()
            },
            "orders": {m: {j: list(o) for j, o in orders.items()} for m, orders in self.orders.items()},
            "same order": {metric: self.same_order(metric) for metric in self.orders},
        }


def compared(ledger: Ledger, draws: int) -> Compared:
    """Compares all judges of a ledger that `gather` filled."""
    judges = ledger.judges()
    if len(judges) < 2:
        raise SteerbackError(f"cross-judge needs two judges or more; this run has: {', '.join(judges) or 'none'}")
    rows = {judge: ledger.rows(stage="measure", judge=judge) for judge in judges}
    plan = rows[judges[0]]
    targets = list(dict.fromkeys(r.trial.target for r in plan))
    cluster = np.unique([f"{r.trial.target}/{r.trial.latent}" for r in plan], return_inverse=True)[1]
    seen = {judge: np.array([_seen(r.judgement) for r in found]).T for judge, found in rows.items()}
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
            summaries[judge, target] = summarize(outcomes_of(own), draws)
            weighted[judge, target] = _weighted(ledger.fact(target, "cross-judge sample") or {}, own)
    orders = {
        metric: {judge: _order({t: weighted[judge, t][metric] for t in targets}) for judge in judges}
        for metric in ("esr_rate", "multi_attempt_rate", "msi")
    }
    return Compared(
        judges=judges,
        targets=targets,
        n=len(plan),
        pairs=pairs,
        alpha_several=alpha(np.stack([seen[j][0] for j in judges]), cluster, "nominal", draws),
        alpha_first=alpha(np.stack([seen[j][2] for j in judges]), cluster, "interval", draws),
        summaries=summaries,
        weighted=weighted,
        by_target=by_target,
        orders=orders,
        first={j: seen[j][2] for j in judges},
        unscored={j: int(np.isnan(seen[j][0]).sum()) for j in judges},
    )


def _pair(a: Floats, b: Floats, cluster: NDArray[np.intp], draws: int) -> Pair:
    """Agreement of two judges' verdicts (3, n responses), as `_seen` gives them."""
    both = (a[0] == 1) & (b[0] == 1)
    several = agreement(a[0], b[0], cluster, draws)
    direction = agreement(a[1][both], b[1][both], cluster[both], draws)
    first = rank_correlation(a[2], b[2], cluster, draws)
    return Pair(several.share, several.kappa, direction.share, direction.kappa, first)


def _shares(pair: Pair) -> dict[str, Any]:
    return {"multi_attempt": asdict(pair.several), "direction": asdict(pair.direction)}


def _seen(judgement: Judgement | None) -> tuple[float, float, float]:
    """(several attempts, direction of change, first score) after gating; nan where there is no score."""
    if judgement is None or judgement.status != "scored":
        return (np.nan, np.nan, np.nan)
    attempts = judgement.gated_attempts()
    return (float(len(attempts) > 1), float(np.sign(attempts[-1].score - attempts[0].score)), attempts[0].score)


def _weighted(fact: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, float | None]:
    """Rates and MSI over the runs the sample was drawn from, single-attempt trials weighed up again."""
    weights = fact.get("weights", {"several": 1.0, "single": 1.0})
    several = set(fact.get("several keys", ()))
    total = events = improved = gain = 0.0
    for row in rows:
        many, direction, _ = _seen(row.judgement)
        if np.isnan(many):
            continue
        weight = weights["several" if row.trial.key in several else "single"]
        attempts = row.judgement.gated_attempts() if row.judgement is not None else ()
        total += weight
        events += weight * many
        improved += weight * (many == 1 and direction > 0)
        gain += weight * (attempts[-1].score - attempts[0].score)
    if not total:
        return {"multi_attempt_rate": None, "esr_rate": None, "msi": None}
    return {"multi_attempt_rate": events / total, "esr_rate": improved / total, "msi": gain / total}


def _order(values: Mapping[str, float | None]) -> list[str]:
    """Names from the highest value to the lowest; equal ones by name, unknown ones last."""
    return sorted(values, key=lambda t: (values[t] is None, -(values[t] or 0.0), t))


# --- tables -------------------------------------------------------------------------------------------------------


def agreement_table(found: Compared) -> Table:
    """One row per pair of judges."""
    cells = [
        (
            f"{a} / {b}",
            f"{p.several.n:,}",
            show(p.several, rate=True),
            show(p.several_kappa, rate=False),
            f"{p.direction.n:,}",
            show(p.direction, rate=True),
            show(p.direction_kappa, rate=False),
            show(p.first, rate=False),
        )
        for (a, b), p in found.pairs.items()
    ]
    columns = ("judges", "n", "same count %", "kappa", "n multi", "same direction %", "its kappa", "first scores")
    caption = (
        "Agreement on whether a response has several attempts, on better / same / worse where both see several, and "
        "rank correlation of first scores. Krippendorff's alpha over all judges: several "
        f"{show(found.alpha_several, False)}, first score {show(found.alpha_first, False)}. "
        "95 % intervals clustered by latent."
    )
    return Table(columns, cells, caption)


def judge_table(found: Compared) -> Table:
    """One row per judge and target: rates over the sample and weighed back to the runs."""
    cells = []
    for judge in found.judges:
        for target in found.targets:
            summary, back = found.summaries[judge, target], found.weighted[judge, target]
            cells.append(
                (
                    judge,
                    target,
                    f"{summary['msi'].n:,}",
                    show(summary["multi_attempt_rate"], rate=True),
                    show(summary["esr_rate"], rate=True),
                    show(summary["msi"], rate=False),
                    number(back["multi_attempt_rate"], rate=True),
                    number(back["esr_rate"], rate=True),
                    number(back["msi"]),
                )
            )
    columns = (
        "judge",
        "target",
        "n",
        "multi-attempt %",
        "ESR %",
        "MSI",
        "multi (runs) %",
        "ESR (runs) %",
        "MSI (runs)",
    )
    caption = (
        "Over the sample, which takes multi-attempt trials first, with 95 % intervals; "
        "(runs): weighed back to the runs it was drawn from."
    )
    return Table(columns, cells, caption, left=2)


def ranking_line(found: Compared) -> str:
    """One sentence: do all judges rank the models alike?"""
    if len(found.targets) < 2:
        return "one model only: there is no order to compare"
    alike = found.same_order("esr_rate")
    shown = "; ".join(f"{j}: {' > '.join(found.orders['esr_rate'][j])}" for j in found.judges)
    return f"models by ESR rate: {'all judges rank them alike' if alike else 'judges differ'} ({shown})"
