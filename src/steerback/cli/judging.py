"""Commands about judges: judge, judges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from steerback.cli.options import (
    RUNS,
    Budget,
    DryRun,
    NoCache,
    RunName,
    RunsFolder,
    VerdictsOf,
    argument,
    option,
    say,
    say_lines,
    say_table,
)
from steerback.errors import SteerbackError
from steerback.store.files import make_folder

if TYPE_CHECKING:
    from steerback.jobs.check import Makers


def judge_command(
    name: RunName,
    budget: Budget,
    judge: str = option("offline, or a judge model (list: steerback judges).", ..., metavar="JUDGE"),
    rubric: str = option(
        "attempts, windows (relevance of each sentence), whole (recovery 0-10), boundaries (of episodes), or "
        "the file of your own rubric.",
        "attempts",
        metavar="NAME|FILE",
    ),
    stage: str | None = option("Judge only this stage, e.g. measure. Default: all, measured trials first."),
    limit: int | None = option("Most responses to judge, to try a judge.", min=1),
    retry_unscored: bool = option("Ask again about unscored responses.", False),
    probe: bool = option("First test whether the judge obeys instructions inside 20 responses.", False),
    dry_run: DryRun = False,
    no_cache: NoCache = False,
    runs: RunsFolder = RUNS,
) -> None:
    """Judge a finished run with another judge."""
    from steerback.jobs import judging
    from steerback.jobs.estimate import judging_line, spent_lines, unscored_lines
    from steerback.jobs.execute import tools
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
    makers, scope = budget.makers(dry_run, rubrics), judging.Scope(stage, limit, retry_unscored)
    with Run.read(folder) as opened:
        if probe:
            say(judging.probe_line(opened, makers.judge(judge)))
        say(judging_line(judging.to_judge(opened, makers.judge(judge), scope)))
    say_lines(lacking(makers.judge(judge)))
    if dry_run:
        return None
    with tools(not no_cache) as (progress, cache):
        if probe:
            judging.probe_judge(folder, judge, progress, makers)
        done = judging.judge_run(folder, judge, progress, cache, scope, makers)
    with Run.read(folder) as opened:
        verdicts = (row.judgement for row in opened.ledger.outlines(judge=judge))
        reasons = [j.reason if j.status == "unscored" else "" for j in verdicts if j is not None]
        probed = judging.probe_lines(opened, judge)
    say_lines([*probed, *spent_lines(folder), *unscored_lines(judge, reasons)])
    say(f"{done} responses judged by {judge}; see them with: steerback figures {name} --judge {judge}")
    return None


def _windows(folder: Path, judge: str, retry: bool, dry_run: bool, makers: Makers) -> None:
    from steerback.jobs.estimate import spent_lines, unscored_lines, windows_line
    from steerback.jobs.execute import tools
    from steerback.jobs.judging import score_run_windows
    from steerback.judging.llm import lacking
    from steerback.store.run import Run

    with Run.read(folder) as opened:
        say(windows_line(opened, makers.judge(judge), retry))
    say_lines(lacking(makers.judge(judge)))
    if dry_run:
        return
    with tools(cached=False) as (progress, _):
        score_run_windows(folder, judge, progress, makers, retry)
    with Run.read(folder) as opened:
        reasons = opened.ledger.window_reasons(judge)
    say_lines([*spent_lines(folder), *unscored_lines(judge, reasons)])
    say(f"windows of {reasons.count('')} responses scored by {judge}: steerback figures {folder.name} --judge {judge}")


def _grade(folder: Path, judge: str, rubric: str, retry: bool, dry_run: bool, budget: Budget) -> None:
    from steerback.jobs import grading
    from steerback.jobs.estimate import spent_lines, unscored_lines
    from steerback.jobs.execute import tools
    from steerback.store.run import Run

    grader = grading.Grader(judge, rubric, budget.limits(dry_run))
    with Run.read(folder) as opened:
        work = grader.todo(opened, retry)
    taken = "" if work.estimate is None else f": about {work.estimate}"
    say(f"{work.count} responses to be asked about ({rubric}) by {judge}{taken}")
    if dry_run:
        return
    with tools(cached=False) as (progress, _):
        done = grading.grade_run(folder, judge, rubric, retry, progress, budget.limits())
    with Run.read(folder) as opened:
        reasons = grader.reasons(opened)
    say_lines([*spent_lines(folder), *unscored_lines(judge, reasons)])
    if rubric == "whole":
        say((folder / "whole.txt").read_text("utf-8"))
    else:
        say(f"{done} responses done; analyses by judge {judge} use them: steerback figures {folder} --judge {judge}")


def list_judges() -> None:
    """List the judges and the API keys that they need."""
    from steerback.figures.tables import Table
    from steerback.judging import ALIASES, LOCAL
    from steerback.judging.models import KEYS

    rows = [(name, what, "-") for name, what in LOCAL.items()]
    for model in ALIASES:
        keys = " or ".join(KEYS.get(model.model.split("/")[0], ()))
        rows.append((model.alias, f"{model.model}: {model.note}", keys))
    rows.append(("provider/model", "any other model that Inspect AI knows (extra `judges`)", "the provider's"))
    say_table(Table(("judge", "what it is", "key"), rows, left=3))


class _DrawByDefault(TyperGroup):
    """Group of commands in which `label RUN` means `label draw RUN`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Put `draw` before arguments that name no verb. (`Any`: some releases of typer bring their own click.)"""
        return super().resolve_command(ctx, args if args and args[0] in self.commands else ["draw", *args])


LABEL = typer.Typer(
    cls=_DrawByDefault,
    help="Label responses by hand. `label RUN` writes a labelling page.",
    no_args_is_help=True,
    context_settings={"ignore_unknown_options": True},
    rich_markup_mode=None,
)


def draw(
    name: RunName,
    size: int = option("Number of responses in the sample.", 100, "--n", "-n", min=1),
    seed: int = option("Seed of the sample.", 42),
    condition: list[str] | None = option("Draw only from this condition. Repeatable."),
    judge: VerdictsOf = None,
    out: Path | None = option("Folder of the files. Default: the run's folder."),
    runs: RunsFolder = RUNS,
) -> None:
    """Draw a blind sample of a run; write a labelling page and a spreadsheet."""
    from steerback.jobs.labelling import draw_sample
    from steerback.store.run import find_run

    place = None if out is None else make_folder(out, "choose another --out")
    sample = draw_sample(find_run(name, runs), size, seed, judge, condition or (), place)
    say(f"{sample.count} responses in random order:")
    say(f"  {sample.page}  (open it in a browser; press h for the keys, s to save)")
    say(f"  {sample.spreadsheet}  (the same for a spreadsheet)")
    say(f"then: steerback label import {name} FILE --by YOUR_NAME")


def import_labels_command(
    name: RunName,
    file: Path = argument("JSON file saved by the page, or the completed CSV file.", ...),
    by: str = option("Name of the labeller. The judge is called human:NAME.", ..., metavar="NAME"),
    runs: RunsFolder = RUNS,
) -> None:
    """Import labels as verdicts of judge human:NAME."""
    from steerback.jobs.labelling import import_labels
    from steerback.store.run import find_run

    done = import_labels(find_run(name, runs), file, by)
    say(f"{done.new} labels imported; {done.judge} has labelled {done.labelled} of {done.size} responses of the sample")
    say(f"see them with: steerback show {name} --judge {done.judge}")
    say(f"rates corrected by them: steerback figures {name}")
