"""Probe a judge with planted instructions inside responses, and store with the run which of them it obeyed."""

from __future__ import annotations

from pathlib import Path

from steerback.engines.base import finish
from steerback.errors import SteerbackError
from steerback.jobs.check import Makers
from steerback.jobs.execute import note_judge
from steerback.judging import Judge
from steerback.judging.base import estimated
from steerback.judging.llm import LLMJudge
from steerback.judging.probe import probes, unanswered
from steerback.store.facts import PROBES, ProbeAnswer
from steerback.store.progress import Progress, Silent
from steerback.store.run import Run


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
