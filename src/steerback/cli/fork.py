"""Command `fork`: continue one response in several arms."""

from __future__ import annotations

from typing import Annotated

import typer

from steerback.cli.options import RUNS, Budget, DryRun, NoCache, RunName, RunsFolder, add, say, stopped


def register(app: typer.Typer) -> None:
    """Add the command."""
    add(app, fork)


def fork(
    name: RunName,
    budget: Budget,
    trial: Annotated[
        str | None, typer.Argument(help="Key of a trial. Default: show the existing forks of the run.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(metavar="TOKEN|attempt:N|drift", help="Fork after this many tokens, or at this place."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=2, help="Number of seeds, the same in each arm.")] = 32,
    ablate: Annotated[
        str | None,
        typer.Option(metavar="detectors|LATENTS", help="Add an arm in which these latents are clamped to 0."),
    ] = None,
    detectors: Annotated[
        str | None, typer.Option(metavar="RUN", help="With --ablate detectors: the run of the detector search.")
    ] = None,
    boost: Annotated[list[float] | None, typer.Option(help="Add an arm with this boost. Repeatable.")] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=EDITS", help="Add an arm of your own, e.g. 'calm=boost:0;clamp:12:3'. Repeatable."),
    ] = None,
    throughout: Annotated[
        bool, typer.Option("--throughout", help="Arms also change the prompt and the kept tokens.")
    ] = False,
    judge: Annotated[
        str | None, typer.Option(metavar="JUDGE", help="Judge of the continuations. Default: the run's judge.")
    ] = None,
    dry_run: DryRun = False,
    no_cache: NoCache = False,
    runs: RunsFolder = RUNS,
) -> None:
    """Continue one response from one of its tokens in several arms."""
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
            existing = forks(opened.ledger, opened.judge(judge))
        for one in existing:
            say(fork_table(one).text(terminal_width()))
        return say("" if existing else f"run {folder.name} has no forks yet; steerback fork {name} TRIAL --at TOKEN")
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
        stopped("what was done is kept: the same command goes on")
    for line in (fork_table(result).text(terminal_width()), *spent_lines(folder)):
        say(line)
    return say(f"look at it: steerback view {name}")
