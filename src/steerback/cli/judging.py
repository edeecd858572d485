"""Commands about judges: judge, judges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steerback.cli.options import RUNS, Budget, DryRun, NoCache, RunName, RunsFolder, add, say
from steerback.errors import SteerbackError

if TYPE_CHECKING:
    from steerback.jobs.check import Makers


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add(app, judge_command, "judge")
    add(app, list_judges, "judges")


def judge_command(
    name: RunName,
    budget: Budget,
    judge: Annotated[str, typer.Option(metavar="JUDGE", help="offline, or a judge model (list: steerback judges).")],
    rubric: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="attempts, windows (relevance of each sentence), whole (recovery 0-10), boundaries (of episodes), or "
            "the file of your own rubric.",
        ),
    ] = "attempts",
    stage: Annotated[
        str | None, typer.Option(help="Judge only this stage, e.g. measure. Default: all, measured trials first.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most responses to judge, to try a judge.")] = None,
    retry_unscored: Annotated[
        bool, typer.Option("--retry-unscored", help="Ask again about unscored responses.")
    ] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="First test whether the judge obeys instructions inside 20 responses.")
    ] = False,
    dry_run: DryRun = False,
    no_cache: NoCache = False,
    runs: RunsFolder = RUNS,
) -> None:
    """Judge a finished run with another judge."""
    from steerback.jobs import execute
    from steerback.jobs.estimate import judging_line, spent_lines, unscored_lines
    from steerback.jobs.probing import probe_judge, probe_line, probe_lines
    from steerback.judging.llm import lacking
    from steerback.judging.user_rubric import read_rubric, with_rubric
    from steerback.store.run import Run, find_run, stored_config

    folder = find_run(name, runs)
    rubrics = dict(stored_config(folder).rubrics)
    if Path(rubric).is_file():
        own, text = read_rubric(Path(rubric))
        rubrics[own], judge, rubric = text, with_rubric(judge, own), "attempts"
    if rubric != "attempts":
        if probe:
            raise SteerbackError(f"--probe goes with the attempts rubric; leave it out with {rubric}")
        if stage is not None or limit is not None:
            raise SteerbackError(f"--stage and --limit go with the attempts rubric; leave them out with {rubric}")
        if rubric == "windows":
            return _windows(folder, judge, retry_unscored, dry_run, budget.makers(dry_run, rubrics))
        return _grade(folder, judge, rubric, retry_unscored, dry_run, budget)
    makers, scope = budget.makers(dry_run, rubrics), execute.Scope(stage, limit, retry_unscored)
    with Run.read(folder) as opened:
        if probe:
            say(probe_line(opened, makers.judge(judge)))
        say(judging_line(execute.to_judge(opened, makers.judge(judge), scope)))
    for line in lacking(makers.judge(judge)):
        say(line)
    if dry_run:
        return None
    with execute.tools(not no_cache) as (progress, cache):
        if probe:
            probe_judge(folder, judge, progress, makers)
        done = execute.judge_run(folder, judge, progress, cache, scope, makers)
    with Run.read(folder) as opened:
        judged = [r.judgement for r in opened.ledger.outlines(judge=judge) if r.judgement is not None]
        probed = probe_lines(opened, judge)
    reasons = [j.reason if j.status == "unscored" else "" for j in judged]
    for line in (*probed, *spent_lines(folder), *unscored_lines(judge, reasons)):
        say(line)
    say(f"{done} responses judged by {judge}; see them with: steerback figures {name} --judge {judge}")
    return None


def _windows(folder: Path, judge: str, retry: bool, dry_run: bool, makers: Makers) -> None:
    from steerback.jobs import execute
    from steerback.jobs.estimate import spent_lines, unscored_lines, windows_line
    from steerback.judging.llm import lacking
    from steerback.store.run import Run

    with Run.read(folder) as opened:
        say(windows_line(opened, makers.judge(judge), retry))
    for line in lacking(makers.judge(judge)):
        say(line)
    if dry_run:
        return
    with execute.tools(cached=False) as (progress, _):
        execute.score_run_windows(folder, judge, progress, makers, retry)
    with Run.read(folder) as opened:
        reasons = [w.reason for w in opened.ledger.windows(judge).values()]
    for line in (*spent_lines(folder), *unscored_lines(judge, reasons)):
        say(line)
    say(f"windows of {len(reasons)} responses scored by {judge}: steerback figures {folder.name} --judge {judge}")


def _grade(folder: Path, judge: str, rubric: str, retry: bool, dry_run: bool, budget: Budget) -> None:
    from steerback.jobs import execute, grading
    from steerback.jobs.estimate import spent_lines, unscored_lines
    from steerback.store.run import Run

    grader = grading.Grader(judge, rubric, budget.limits(dry_run))
    with Run.read(folder) as opened:
        work = grader.todo(opened, retry)
    taken = "" if work.estimate is None else f": about {work.estimate}"
    say(f"{work.count} responses to be asked about ({rubric}) by {judge}{taken}")
    if dry_run:
        return
    with execute.tools(cached=False) as (progress, _):
        done = grading.grade_run(folder, judge, rubric, retry, progress, budget.limits())
    with Run.read(folder) as opened:
        reasons = grader.reasons(opened)
    for line in (*spent_lines(folder), *unscored_lines(judge, reasons)):
        say(line)
    if rubric == "whole":
        say((folder / "whole.txt").read_text("utf-8"))
    else:
        say(f"{done} responses done; analyses by judge {judge} use them: steerback figures {folder} --judge {judge}")


def list_judges() -> None:
    """List the judges and the API keys that they need."""
    from steerback.figures.tables import Table, terminal_width
    from steerback.judging import LOCAL, aliases
    from steerback.judging.models import KEYS

    rows = [(name, what, "-") for name, what in LOCAL.items()]
    for model in aliases():
        keys = " or ".join(KEYS.get(model.model.split("/")[0], ()))
        rows.append((model.alias, f"{model.model}: {model.note}", keys))
    rows.append(("provider/model", "any other model that Inspect AI knows (extra `judges`)", "the provider's"))
    say(Table(("judge", "what it is", "key"), rows, left=3).text(terminal_width()), end="")
