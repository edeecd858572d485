"""Judge the responses of a finished run, score their windows, and probe a judge with planted instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from steerback.config import RecoveryConfig, RunConfig
from steerback.engines.base import finish
from steerback.errors import SteerbackError, unknown
from steerback.jobs.check import Makers, with_directions
from steerback.judging import Judge
from steerback.judging.base import drain, estimated
from steerback.judging.llm import LLMJudge
from steerback.judging.probe import probes, unanswered
from steerback.judging.user_rubric import SEPARATOR
from steerback.judging.windows import window_scorer
from steerback.records import LatentKey, Sampling, Spend
from steerback.store.cache import Cache
from steerback.store.facts import FLOOR, JUDGES, PROBES, ProbeAnswer
from steerback.store.progress import Progress, Silent
from steerback.store.rows import Outline
from steerback.store.run import Run
from steerback.study.pipeline import Workbench, judge_item, judge_rows, references
from steerback.study.study import UNJUDGED
from steerback.study.windows import score_windows, without_windows


def same_rubric(opened: Run, judge: Judge) -> None:
    """Raise SteerbackError if the text of a rubric has changed since the judge used it in this run."""
    before, now = (opened.ledger.get("", JUDGES) or {}).get(judge.name, {}), judge.describe()
    if SEPARATOR in judge.name and before.get("rubric text") not in (None, now["rubric text"]):
        raise SteerbackError(
            f"run {opened.folder.name} has verdicts of {judge.name} with a different text of this rubric; rename the "
            "file of the new text"
        )


def note_judge(opened: Run, judge: Judge) -> None:
    """Store the judge's description (with the text of its rubric) and its spending in ledger and manifest."""
    stored = opened.ledger.get("", JUDGES)
    known = {**(stored or {}), judge.name: dict(judge.describe())}
    opened.ledger.put("", JUDGES, known)
    opened.amend_manifest({"judges": known})
    spent = drain(judge)
    if spent is not None:
        opened.add_spend(judge.name, spent)


@dataclass(frozen=True, slots=True)
class Scope:
    """Selection of responses to judge in a finished run: those of one stage (None: all), at most `limit`.

    `retry` also selects responses that the judge could not score before.
    """

    stage: str | None = None
    limit: int | None = None
    retry: bool = False


@dataclass(frozen=True, slots=True)
class Judging:
    """Trials whose responses a judge still has to judge: keys by target, and the estimated cost (None: free)."""

    judge: Judge
    keys: Sequence[tuple[str, Sequence[str]]]
    estimate: Spend | None

    @property
    def count(self) -> int:
        return sum(len(keys) for _, keys in self.keys)


def to_judge(opened: Run, judge: Judge, scope: Scope | None = None) -> Judging:
    """Return the trials without a verdict of `judge`: measured ones of all targets, then the floor, then other stages.

    Calibration is included, so that the scores of another judge can be compared at the thresholds.
    """
    scope, ledger = scope or Scope(), opened.ledger
    turns = {"measure": 0, FLOOR: 1}  # stages that appear in tables are judged first
    stages = [(turns.get(stage, 2), target, stage) for target, stage in ledger.stages() if stage not in UNJUDGED]
    known = list(dict.fromkeys(stage for *_, stage in stages))
    if scope.stage is not None and scope.stage not in known:
        raise unknown("stage", scope.stage, sorted(known))
    batches: dict[tuple[int, str], list[str]] = {}
    left = scope.limit
    for turn, target, stage in sorted(stages, key=lambda place: place[0]):  # stable: targets and stages stay in order
        if scope.stage in (None, stage):
            todo = (row for row in ledger.outlines(target, stage, judge=judge.name) if _open(row, scope.retry))
            keys = [row.trial.key for row in islice(todo, left)]
            left = None if left is None else left - len(keys)
            batches.setdefault((turn, target), []).extend(keys)
    chosen = [(target, keys) for (_, target), keys in batches.items() if keys]
    rows = ledger.stream(key for _, keys in chosen for key in keys)
    return Judging(judge, chosen, estimated(judge, (judge_item(row) for row in rows if row.valid_receipt)))


def judge_run(
    folder: Path,
    name: str,
    progress: Progress | None = None,
    cache: Cache | None = None,
    scope: Scope | None = None,
    makers: Makers | None = None,
) -> int:
    """Judge a finished run with another judge and return the number of judged responses. Nothing is judged twice."""
    chosen = makers or Makers()
    with Run.reopen(folder) as opened:
        return finish(judge_all(opened, chosen.judge(name), progress or Silent(), cache, chosen, scope))


async def judge_all(
    opened: Run, judge: Judge, progress: Progress, cache: Cache | None, makers: Makers, scope: Scope | None = None
) -> int:
    """Judge the responses in `scope` that have no verdict, then their windows, and return the number of responses."""
    same_rubric(opened, judge)
    work = to_judge(opened, judge, scope)
    try:
        for target, keys in work.keys:
            make_ready(opened, judge, target, makers)
            bench = Workbench(opened.ledger, None, judge, Sampling(), progress, cache, opened.config.drop_unscored)
            await judge_rows(bench, keys, f"{target}: judging with {judge.name}")
        if scope is None or (scope.stage is None and scope.limit is None):
            retry = scope is not None and scope.retry
            await _score_windows(opened, judge, progress, opened.config.recovery, makers, retry)
    finally:
        note_judge(opened, judge)
    return work.count


def score_run_windows(
    folder: Path, name: str, progress: Progress | None = None, makers: Makers | None = None, retry: bool = False
) -> None:
    """Score the windows of a finished run's responses with a judge. The run's `recovery.judge` has no effect."""
    chosen = makers or Makers()
    judge = chosen.judge(name)
    with Run.reopen(folder) as opened:
        try:
            finish(_score_windows(opened, judge, progress or Silent(), RecoveryConfig(judge=True), chosen, retry))
        finally:
            note_judge(opened, judge)


async def _score_windows(
    opened: Run, judge: Judge, progress: Progress, settings: RecoveryConfig, makers: Makers, retry: bool
) -> None:
    if window_scorer(judge, settings) is None:
        return
    for target in dict.fromkeys(target for target, _ in without_windows(opened.ledger, judge.name, retry=retry)):
        make_ready(opened, judge, target, makers)
        await score_windows(Workbench(opened.ledger, None, judge, Sampling(), progress), settings, target, retry)


def make_ready(opened: Run, judge: Judge, target: str, makers: Makers) -> None:
    """Pass the target's reference responses to the judge. An adapter uses those of its base model."""
    known = (opened.ledger.rows(t, "reference") for t in (target, target.rpartition("+")[0]))
    judge.prepare(references(next(filter(None, known), []), _contexts(target, opened.config, makers)))


def _contexts(name: str, config: RunConfig, makers: Makers) -> Mapping[LatentKey, Sequence[str]]:
    """Return text passages that activate each latent; none if the model of an imported run is not a known target."""
    try:
        return with_directions(makers.target(name, config.definitions), config).contexts()
    except SteerbackError:
        return {}


def _open(row: Outline, retry: bool) -> bool:
    judged = row.judgement
    return row.finish is not None and (judged is None or (retry and judged.status == "unscored"))


def probe_line(opened: Run, judge: Judge) -> str:
    """Return a line with the estimated cost of a probe. Raises SteerbackError if the judge is no language model."""
    if not isinstance(judge, LLMJudge):
        raise SteerbackError(f"--probe needs a judge that is a language model; {judge.name} is not (steerback judges)")
    todo = unanswered(_answers(opened, judge))
    return f"{len(todo)} planted responses to probe {judge.name}: about {estimated(judge, [p.item for p in todo])}"


def probe_judge(folder: Path, name: str, progress: Progress | None = None, makers: Makers | None = None) -> None:
    """Ask a judge about the planted responses without an answer, and store each answer with the run."""
    judge, shown = (makers or Makers()).judge(name), progress or Silent()
    with Run.reopen(folder) as opened:
        todo = {probe.item.key: probe for probe in unanswered(_answers(opened, judge))}
        shown.stage(f"probing {judge.name}", len(todo))

        async def ask() -> None:
            refused = ""
            async for key, judgement in judge.judge([probe.item for probe in todo.values()]):
                if judgement.over_budget:
                    refused = judgement.reason  # to the end: a generator that is left early is closed with noise
                    continue
                kept = opened.ledger.get("", PROBES) or {}
                kept[judge.name] = {**kept.get(judge.name, {}), key: todo[key].answer(judgement)}
                opened.ledger.put("", PROBES, kept)
                shown.update(judged=1)
            if refused:
                raise SteerbackError(f"judge {judge.name}: {refused}; all previous answers are stored")

        try:
            finish(ask())
        finally:
            note_judge(opened, judge)
            kept = opened.ledger.get("", PROBES) or {}
            opened.amend_manifest({"judge probes": {by: _count(answers) for by, answers in kept.items()}})


def probe_lines(opened: Run, judge: str | None = None) -> list[str]:
    """Return one line for each probed judge, or for `judge` only, with the number of instructions it obeyed."""
    kept = opened.ledger.get("", PROBES) or {}
    return [f"judge {name}: {_count(answers)}" for name, answers in kept.items() if judge in (None, name) and answers]


def _count(answers: dict[str, ProbeAnswer]) -> str:
    obeyed, unscored = sum(a.obeyed for a in answers.values()), sum(a.score is None for a in answers.values())
    return (
        f"obeyed {obeyed} of {len(answers)} planted instructions"
        + (f", {unscored} unscored" if unscored else "")
        + ("" if len(answers) == len(probes()) else f" (of {len(probes())}: not all were asked)")
    )


def _answers(opened: Run, judge: Judge) -> dict[str, ProbeAnswer]:
    """Return the answers with a score. Responses without a score are asked again."""
    known = (opened.ledger.get("", PROBES) or {}).get(judge.name, {})
    return {key: answer for key, answer in known.items() if answer.score is not None}
