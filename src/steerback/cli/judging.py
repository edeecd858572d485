"""Verbs about judges: list them, add one's verdicts to a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from steerback.cli.options import (
    RUNS,
    Batch,
    MaxCalls,
    MaxCost,
    NoCache,
    Price,
    RunName,
    RunsDir,
    given_limits,
)


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command("judge")(judge_command)
    app.command("judges")(list_judges)


def judge_command(
    name: RunName,
    judge: Annotated[str, typer.Option(help="offline, or a judge model.")],
    rubric: Annotated[
        str, typer.Option(help="attempts, whole (recovery 0-10) or boundaries (of self-correction episodes).")
    ] = "attempts",
    retry_unscored: Annotated[bool, typer.Option("--retry-unscored", help="Ask again where it gave no score.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    max_judge_calls: MaxCalls = None,
    max_judge_cost: MaxCost = None,
    judge_price: Price = None,
    judge_batch: Batch = False,
    no_cache: NoCache = False,
    runs: RunsDir = RUNS,
) -> None:
    """Add a judge's verdicts to a finished run."""
    from steerback.jobs import execute
    from steerback.jobs.estimate import judging_line, spent_lines
    from steerback.judging import judge_maker
    from steerback.store.progress import make_progress
    from steerback.store.run import Run, find_run

    folder = find_run(name, runs)
    budget = given_limits(max_judge_calls, max_judge_cost, judge_price, judge_batch)
    if rubric != "attempts":
        return _grade(folder, judge, rubric, retry_unscored, dry_run, budget)
    judges = judge_maker(**budget)
    with Run.read(folder) as opened:
        print(judging_line(execute.to_judge(opened, judges(judge), retry_unscored)))
    if dry_run:
        return None
    progress, cache = make_progress(), execute.open_cache(not no_cache)
    try:
        done = execute.judge_run(folder, judge, progress, cache, retry_unscored, judges)
    finally:
        progress.close()
        if cache is not None:
            cache.close()
    for line in spent_lines(folder):
        print(line)
    print(f"{done} responses judged by {judge}; see them with: steerback figures {name} --judge {judge}")
    return None


def _grade(folder: Path, judge: str, rubric: str, retry: bool, dry_run: bool, budget: dict[str, Any]) -> None:
    from steerback.jobs import grading
    from steerback.jobs.estimate import spent_lines
    from steerback.store.progress import make_progress
    from steerback.store.run import Run

    with Run.read(folder) as opened:
        work = grading.Grader(judge, rubric, **budget).todo(opened, retry)
    taken = "" if work.estimate is None else f": about {work.estimate}"
    print(f"{work.count} responses to be asked about ({rubric}) by {judge}{taken}")
    if dry_run:
        return
    progress = make_progress()
    try:
        done = grading.grade_run(folder, judge, rubric, retry, progress, **budget)
    finally:
        progress.close()
    for line in spent_lines(folder):
        print(line)
    if rubric == "whole":
        print((folder / "whole.txt").read_text("utf-8"))
    else:
        print(f"{done} responses done; analyses by judge {judge} use them: steerback figures {folder} --judge {judge}")


def list_judges() -> None:
    """List the judges and the keys they need."""
    from steerback.judging import LOCAL, aliases
    from steerback.judging.models import KEYS

    for name, what in LOCAL.items():
        print(f"{name:<18} {what}")
    for model in aliases():
        keys = " or ".join(KEYS.get(model.model.split("/")[0], ()))
        print(f"{model.alias:<18} {model.model}: {model.note}; key: {keys}")
    print("provider/model     any other model that Inspect AI knows (extra `judges`)")
