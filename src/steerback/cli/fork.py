"""The verb that continues one response in several ways."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from steerback.cli.options import RUNS, Budget, DryRun, NoCache, RunName, RunsFolder, add, say


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    add(app, fork)


def fork(
    name: RunName,
    budget: Budget,
    trial: Annotated[
        str | None, typer.Argument(help="Key of a trial; default: show the forks that the run has.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(metavar="TOKEN|attempt:N|drift", help="Keep so many tokens, or those before that place."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=2, help="Seeds of each arm, the same in all arms.")] = 32,
    ablate: Annotated[
        str | None, typer.Option(metavar="detectors|LATENTS", help="Add an arm in which these are clamped to zero.")
    ] = None,
    detectors: Annotated[
        str | None, typer.Option(metavar="RUN", help="With --ablate detectors: the run that has found them.")
    ] = None,
    boost: Annotated[list[float] | None, typer.Option(help="Add an arm with this boost; repeatable.")] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=EDITS", help="Add your own arm, e.g. 'calm=boost:0;clamp:12:3'; repeatable."),
    ] = None,
    throughout: Annotated[
        bool, typer.Option("--throughout", help="Arms also edit the prompt and the kept tokens.")
    ] = False,
    judge: Annotated[str | None, typer.Option(help="Judge of the continuations; default: the run's.")] = None,
    dry_run: DryRun = False,
    no_cache: NoCache = False,
    runs: RunsFolder = RUNS,
) -> None:
    """Continue one response from any of its tokens in several arms, and compare how they end."""
    from steerback.analysis.forks import forks
    from steerback.errors import SteerbackError
    from steerback.figures.forks import fork_table
    from steerback.figures.tables import terminal_width
    from steerback.jobs import execute
    from steerback.jobs.estimate import judge_estimate, response_tokens, spent_lines
    from steerback.jobs.fork import ForkSettings, fork_trial, prepare_fork
    from steerback.store.run import Run, find_run, stored_config

    folder = find_run(name, runs)
    if trial is None:
        with Run.read(folder) as opened:
            found = forks(opened.ledger, opened.judge(judge))
        for one in found:
            say(fork_table(one).text(terminal_width()))
        return say("" if found else f"run {folder.name} has no forks yet; steerback fork {name} TRIAL --at TOKEN")
    if at is None:
        raise SteerbackError("say where to fork with --at: a number of tokens, attempt:2, or drift")
    if detectors is not None and ablate != "detectors":
        raise SteerbackError("--detectors goes with --ablate detectors")
    own = None if detectors is None else find_run(detectors, runs)
    settings = ForkSettings(at, n, ablate, own, tuple(boost or ()), tuple(arm or ()), throughout, judge)
    makers = budget.makers(dry_run, stored_config(folder).rubrics)
    with Run.read(folder) as opened:
        planned = prepare_fork(opened, trial, settings, makers)
        total, new = planned.responses(opened.ledger)
        asked = judge_estimate(planned.judge, new, response_tokens(opened.config, planned.target))
    names = ", ".join(x.name for x in planned.all_arms)
    say(f"{trial} at {at}: {total} responses in {len(planned.all_arms)} arms ({names}), at most {new} of them new")
    if asked is not None:
        say(f"judge {planned.judge.name}: at most {asked}")
    if dry_run:
        return None
    try:
        with execute.tools(not no_cache) as (progress, cache):
            result = fork_trial(folder, trial, settings, progress, cache, makers)
    except KeyboardInterrupt:
        say("steerback: stopped; what was done is kept: the same command goes on", file=sys.stderr)
        sys.exit(130)
    for line in (fork_table(result).text(terminal_width()), *spent_lines(folder)):
        say(line)
    return say(f"look at it: steerback view {name}")
