"""Window scores of measured responses and of the floor: the input of recovery without a restart phrase."""

from __future__ import annotations

from collections.abc import Sequence

from steerback.config import RecoveryConfig
from steerback.errors import SteerbackError
from steerback.judging.windows import WindowScorer, window_scorer
from steerback.records import WindowScores
from steerback.store.facts import CONTINUATION, FLOOR
from steerback.store.ledger import Ledger, Row
from steerback.study.pipeline import Workbench, in_batches, judge_item

STAGES = ("measure", CONTINUATION, FLOOR)
"""Stages whose responses are scored by window."""


def without_windows(
    ledger: Ledger, judge: str, target: str | None = None, retry: bool = False
) -> list[tuple[str, str]]:
    """Return (target, trial key) of the responses whose windows the judge has not scored.

    With `retry` also of those to which it gave no scores.
    """
    return [
        (row.trial.target, row.trial.key)
        for stage in STAGES
        for row in ledger.without_windows(judge, target, stage, retry)
        if row.valid_receipt
    ]


async def score_windows(bench: Workbench, settings: RecoveryConfig, target: str, retry: bool = False) -> None:
    """Score the windows of a target's responses that have no scores yet; each batch is saved when it is done.

    Does nothing if the judge should not score windows (`window_scorer`).
    """
    judge = window_scorer(bench.judge, settings)
    if judge is None:
        return
    keys = [key for _, key in without_windows(bench.ledger, judge.name, target, retry)]
    if keys:
        bench.progress.stage(f"{target}: relevance of sentences", len(keys))
    await in_batches(keys, lambda batch: _score_batch(bench, judge, list(bench.ledger.stream(batch))))


async def _score_batch(bench: Workbench, judge: WindowScorer, rows: Sequence[Row]) -> None:
    scored: dict[str, WindowScores] = {}
    refused = ""
    try:
        async for key, scores in judge.windows([judge_item(r) for r in rows]):
            if scores.over_budget:
                refused = scores.reason
            else:
                scored[key] = scores
    finally:
        if scored:
            bench.ledger.add_windows(scored.items())
    bench.progress.update(judged=len(scored), unscored=sum(bool(s.reason) for s in scored.values()))
    if refused:
        raise SteerbackError(f"judge {judge.name}: {refused}; scores so far are kept: resume with a larger budget")
