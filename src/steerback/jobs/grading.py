"""Rubrics other than attempts, asked about a finished run: how far a whole response recovers, where its parts begin.

Results are facts of the run's ledger, one entry per response and rubric, so that grading goes on where it was stopped
and nothing is graded twice. `whole` also writes a table. Knows runs and graders; it generates nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steerback.errors import SteerbackError, unknown
from steerback.figures.tables import Table, show
from steerback.judging.graders import BoundaryAnnotator, WholeJudge, offline_boundaries
from steerback.judging.models import model_string
from steerback.judging.spending import OVER_BUDGET
from steerback.judging.transport import Limits, Transport
from steerback.metrics import cluster_code
from steerback.metrics.regions import mean_of
from steerback.records import Spend
from steerback.store.facts import EPISODES, REPLAY, Fact, boundaries
from steerback.store.ledger import Row
from steerback.store.progress import Progress, Silent
from steerback.store.run import Run, write_atomic
from steerback.study.pipeline import judge_item

RUBRICS = ("attempts", "whole", "boundaries")
CHUNK = 512  # after so many responses what is graded is kept
RECOVERED = 5.0  # of 10: "it starts off the prompt and recovers in part"


@dataclass(frozen=True, slots=True)
class Grading:
    """What a grader has to do in a run: rows per target, and what asking about them would take (None: nothing)."""

    rows: Mapping[str, Sequence[Row]]
    estimate: Spend | None

    @property
    def count(self) -> int:
        return sum(map(len, self.rows.values()))


class Grader:
    """One rubric and one judge. `offline` marks boundaries, from attempts and restart phrases; nothing else."""

    def __init__(self, name: str, rubric: str, **limits: Any) -> None:
        if rubric not in RUBRICS[1:]:
            raise unknown("rubric", rubric, RUBRICS)
        self.name, self.rubric = name, rubric
        self._transport = None
        if name == "offline" and rubric == "boundaries":
            return
        model = model_string(name)
        if model is None:
            can = "a judge model" + (" or offline" if rubric == "boundaries" else "")
            raise SteerbackError(f"rubric {rubric!r} needs {can}, not {name!r} (see steerback judges)")
        self._transport = Transport(model, Limits(**limits))
        kinds: Mapping[str, Any] = {"whole": WholeJudge, "boundaries": BoundaryAnnotator}
        self._asking = kinds[rubric](self._transport)

    def todo(self, run: Run, retry: bool = False) -> Grading:
        """Rows without a result; with `retry` also those whose result is a reason why there is none."""
        rows: dict[str, list[Row]] = {}
        for target in run.config.targets:
            known = self.known(run, target)
            rows[target] = [
                r
                for r in self._concerned(run, target)
                if r.trial.key not in known or (retry and known[r.trial.key].get("reason"))
            ]
        items = [judge_item(r) for own in rows.values() for r in own]
        return Grading(rows, self._asking.estimate(items) if self._transport else None)

    def known(self, run: Run, target: str) -> dict[str, dict[str, Any]]:
        """Results by trial."""
        results = run.ledger.get(target, self.fact)
        return {} if results is None else results

    @property
    def fact(self) -> Fact[dict[str, dict[str, Any]]]:
        """The fact that holds the results of this rubric and judge, in the form in which they are stored."""
        name = boundaries(self.name).name if self.rubric == "boundaries" else f"{self.rubric} by {self.name}"
        return Fact.of(name, dict[str, dict[str, Any]])

    def _concerned(self, run: Run, target: str) -> list[Row]:
        """Every measured response; boundaries are asked for of recorded episodes, else of measured ones."""
        judge = run.config.judge
        rows = [r for r in run.ledger.rows(target, "measure", judge=judge) if r.completion and r.valid_receipt]
        if self.rubric == "whole":
            return rows
        recorded = run.ledger.rows(target, REPLAY, EPISODES, judge)
        return [r for r in recorded or rows if r.is_episode]

    def grade(self, run: Run, retry: bool = False, progress: Progress | None = None) -> int:
        """Grades what is to be graded and keeps it; returns how many responses. Raises when the budget is spent."""
        work, told = self.todo(run, retry), progress or Silent()
        for target, rows in work.rows.items():
            told.stage(f"{target}: {self.rubric} by {self.name}", len(rows))
            for first in range(0, len(rows), CHUNK):
                found = self._results(rows[first : first + CHUNK])
                refused = [v for v in found.values() if str(v.get("reason", "")).startswith(OVER_BUDGET)]
                kept = {k: v for k, v in found.items() if v not in refused}
                run.ledger.put(target, self.fact, self.known(run, target) | kept)
                told.update(judged=len(kept), unscored=sum(bool(v.get("reason")) for v in kept.values()))
                self._pay(run)
                if refused:
                    raise SteerbackError(f"judge {self.name}: {refused[0]['reason']}; all results so far are kept")
        return work.count

    def _results(self, rows: Sequence[Row]) -> dict[str, Any]:
        if self._transport is None:
            return {r.trial.key: asdict(offline_boundaries(r.judged_text, r.judgement)) for r in rows if r.judgement}
        grade: Callable[[Any], Any] = self._asking.score if self.rubric == "whole" else self._asking.annotate

        async def ask() -> dict[str, Any]:
            return {key: asdict(found) async for key, found in grade([judge_item(r) for r in rows])}

        return asyncio.run(ask())

    def _pay(self, run: Run) -> None:
        spent = self._transport.drain() if self._transport else Spend()
        if spent.calls:
            run.add_spend(f"{self.name} ({self.rubric})", spent)


def grade_run(
    folder: Path, name: str, rubric: str, retry: bool = False, progress: Progress | None = None, **limits: Any
) -> int:
    """Asks a judge another rubric about a finished run; `whole` leaves a table in the folder."""
    grader = Grader(name, rubric, **limits)
    with Run.reopen(folder) as run:
        count = grader.grade(run, retry, progress)
        if rubric == "whole":
            table = whole_table(run, grader)
            for suffix, text in (("txt", table.text()), ("csv", table.csv()), ("tex", table.latex())):
                write_atomic(folder / f"whole.{suffix}", text.encode("utf-8"))
    return count


def whole_table(run: Run, grader: Grader) -> Table:
    """Per condition: mean score 0-10, and how many single attempts recover although nothing announces it."""
    cells = []
    for target, condition in run.ledger.conditions("measure"):
        known = grader.known(run, target)
        rows = run.ledger.rows(target, "measure", condition, run.config.judge)
        graded = [(r, known[r.trial.key]) for r in rows if (known.get(r.trial.key) or {}).get("score") is not None]
        cluster = np.array([cluster_code(r.trial.latent) for r, _ in graded], dtype=np.int64)
        scores = np.array([v["score"] for _, v in graded], dtype=np.float64)
        silent = [
            float(v["score"] >= RECOVERED and not v["on_topic_from_start"]) if _single(r) else np.nan for r, v in graded
        ]
        quiet = mean_of(np.array(silent, dtype=np.float64), cluster, (0.0, 1.0))
        mean = mean_of(scores, cluster, (0.0, 10.0))
        cells.append((target, condition, f"{len(graded):,}", show(mean, rate=False), show(quiet, rate=True)))
    caption = (
        f"Whole responses graded 0-10 by {grader.name}. Recovered in silence: single attempts that leave the prompt at "
        f"first and score {RECOVERED:g} or more, without a restart phrase. 95 % intervals clustered by latent."
    )
    return Table(("target", "condition", "n", "score", "recovered in silence %"), cells, caption, left=2)


def _single(row: Row) -> bool:
    return len(row.attempts) == 1
