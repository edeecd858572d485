"""Grade a finished run with other rubrics than attempts: `whole` (recovery of a response) and `boundaries`.

Results are facts in the ledger, one entry for each response and rubric. Interrupted grading can be resumed, and no
response is graded twice. `whole` also writes a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from steerback.engines.base import finish
from steerback.errors import SteerbackError, unknown
from steerback.figures.tables import Table, show
from steerback.judging.asking import Answer, Asker
from steerback.judging.base import JudgeItem, estimate_in_batches
from steerback.judging.graders import BOUNDARIES, WHOLE, offline_boundaries
from steerback.judging.models import Limits, model_string
from steerback.judging.transport import Transport
from steerback.metrics import cluster_code
from steerback.metrics.regions import mean_of
from steerback.records import Spend
from steerback.store.facts import EPISODES, REPLAY, Boundaries, Fact, WholeScore, boundaries, whole_scores
from steerback.store.ledger import Row
from steerback.store.progress import Progress, Silent
from steerback.store.rows import Outline
from steerback.store.run import Run, write_atomic
from steerback.study.pipeline import judge_item

RUBRICS = ("attempts", "whole", "boundaries")
CHUNK = 512  # results are stored after every 512 responses
NO_IMPROVEMENT = "no attempt that improves on the one before it"
RECOVERED = 5.0  # of 10: "it starts off the prompt and recovers in part"


@dataclass(frozen=True, slots=True)
class Grading:
    """Keys of the trials of a run that are not graded yet, by target, and the estimated cost (None: free)."""

    keys: Mapping[str, Sequence[str]]
    estimate: Spend | None

    @property
    def count(self) -> int:
        return sum(map(len, self.keys.values()))


class Grader:
    """Grades responses by one rubric with one judge. Judge `offline` supports only the rubric `boundaries`."""

    def __init__(self, name: str, rubric: str, limits: Limits | None = None) -> None:
        if rubric not in RUBRICS[1:]:
            raise unknown("rubric", rubric, (*RUBRICS, "windows"))
        self.name, self.rubric = name, rubric
        self._asker: Asker[JudgeItem, WholeScore] | Asker[JudgeItem, Boundaries] | None = None
        if name == "offline" and rubric == "boundaries":
            return
        model = model_string(name)
        if model is None:
            can = "a judge model" + (" or offline" if rubric == "boundaries" else "")
            raise SteerbackError(f"rubric {rubric!r} needs {can}, not {name!r} (see steerback judges)")
        transport = Transport(model, limits or Limits())
        self._asker = Asker(transport, WHOLE) if rubric == "whole" else Asker(transport, BOUNDARIES)

    def todo(self, run: Run, retry: bool = False) -> Grading:
        """Return the trials without a result. With `retry`, also return those that could not be graded before."""
        keys: dict[str, list[str]] = {}
        for target in run.config.targets:
            known = self.known(run, target)
            concerned = (row.trial.key for row in self._concerned(run, target))
            keys[target] = [key for key in concerned if key not in known or (retry and known[key].get("reason"))]
        if self._asker is None:
            return Grading(keys, None)
        rows = run.ledger.stream(key for own in keys.values() for key in own)
        return Grading(keys, estimate_in_batches(self._asker.estimate, map(judge_item, rows)))

    def known(self, run: Run, target: str) -> dict[str, dict[str, object]]:
        """Return the stored results by trial key."""
        return run.ledger.get(target, self.fact) or {}

    def reasons(self, run: Run) -> list[str]:
        """Return for each result the reason why it is empty; "" for a complete result."""
        return [str(v.get("reason", "")) for target in run.config.targets for v in self.known(run, target).values()]

    @property
    def fact(self) -> Fact[dict[str, dict[str, object]]]:
        """Fact that stores the results of this rubric and judge."""
        typed = boundaries(self.name) if self.rubric == "boundaries" else whole_scores(self.name)
        return Fact.of(typed.name, dict[str, dict[str, object]])

    def _concerned(self, run: Run, target: str) -> Sequence[Outline]:
        """Return all measured responses; for `boundaries` only episodes, recorded ones if there are any."""
        judge = run.config.judge
        rows = [row for row in run.ledger.outlines(target, "measure", judge=judge) if row.valid_receipt]
        if self.rubric == "whole":
            return rows
        recorded = [*run.ledger.outlines(target, REPLAY, EPISODES, judge)]
        return [row for row in recorded or rows if row.is_episode]

    def grade(self, run: Run, retry: bool = False, progress: Progress | None = None) -> int:
        """Grade the trials of `todo`, store the results and return the number of graded responses.

        Raises SteerbackError if the budget is spent.
        """
        work, shown = self.todo(run, retry), progress or Silent()
        for target, keys in work.keys.items():
            known = self.known(run, target)
            shown.stage(f"{target}: {self.rubric} by {self.name}", len(keys))
            for first in range(0, len(keys), CHUNK):
                answers = self._answers(list(run.ledger.stream(keys[first : first + CHUNK], run.config.judge)))
                kept = {
                    key: {**(a.value.model_dump() if a.value else {}), "reason": a.reason, "raw": a.raw}
                    for key, a in answers.items()
                    if not a.over_budget
                }
                known |= kept
                run.ledger.put(target, self.fact, known)
                shown.update(judged=len(kept), unscored=sum(bool(entry["reason"]) for entry in kept.values()))
                if self._asker and (spent := self._asker.transport.drain()).calls:
                    run.add_spend(f"{self.name} ({self.rubric})", spent)
                refused = next((answer.reason for answer in answers.values() if answer.over_budget), None)
                if refused is not None:
                    raise SteerbackError(f"judge {self.name}: {refused}; all previous results are stored")
        return work.count

    def _answers(self, rows: Sequence[Row]) -> Mapping[str, Answer[WholeScore] | Answer[Boundaries]]:
        if self._asker is None:
            marked = {r.trial.key: offline_boundaries(r.judged_text, r.judgement) for r in rows if r.judgement}
            return {key: Answer(bounds, "" if bounds else NO_IMPROVEMENT) for key, bounds in marked.items()}
        asker = self._asker

        async def ask() -> dict[str, Answer[WholeScore] | Answer[Boundaries]]:
            return {item.key: answer async for item, answer in asker.ask([judge_item(r) for r in rows])}

        return finish(ask())


def grade_run(
    folder: Path,
    name: str,
    rubric: str,
    retry: bool = False,
    progress: Progress | None = None,
    limits: Limits | None = None,
) -> int:
    """Grade a finished run by another rubric. Rubric `whole` also writes a table into the folder."""
    grader = Grader(name, rubric, limits)
    with Run.reopen(folder) as run:
        count = grader.grade(run, retry, progress)
        if rubric == "whole":
            table = whole_table(run, grader)
            for suffix, text in (("txt", table.text()), ("csv", table.csv()), ("tex", table.latex())):
                write_atomic(folder / f"whole.{suffix}", text.encode("utf-8"))
    return count


def whole_table(run: Run, grader: Grader) -> Table:
    """Return a table by condition: mean score (0-10) and share of single attempts that recover without a restart."""
    cells = []
    for target, condition in run.ledger.conditions("measure"):
        known = run.ledger.get(target, whole_scores(grader.name)) or {}
        rows = run.ledger.outlines(target, "measure", condition, run.config.judge)
        scored = [(r, known[r.trial.key]) for r in rows if r.trial.key in known]
        graded = [(r, whole, whole.score) for r, whole in scored if whole.score is not None]
        cluster = np.array([cluster_code(r.trial.latent) for r, _, _ in graded], dtype=np.int64)
        scores = np.array([score for _, _, score in graded], dtype=np.float64)
        judged = [r.judgement for r, _, _ in graded]
        attempts = [len(j.gated_attempts()) if j is not None and j.status == "scored" else 0 for j in judged]
        silent = [
            float(score >= RECOVERED and not whole.on_topic_from_start) if n == 1 else np.nan
            for (_, whole, score), n in zip(graded, attempts, strict=True)
        ]
        quiet = mean_of(np.array(silent, dtype=np.float64), cluster, (0.0, 1.0))
        mean = mean_of(scores, cluster, (0.0, 10.0))
        cells.append((target, condition, f"{len(graded):,}", show(mean, rate=False), show(quiet, rate=True)))
    caption = (
        f"Whole responses graded 0-10 by {grader.name}. Recovered in silence: single attempts that start off topic and "
        f"score {RECOVERED:g} or more, without a restart phrase. 95 % confidence intervals, clustered by latent."
    )
    return Table(("target", "condition", "n", "score", "recovered in silence %"), cells, caption, left=2)
