"""Commands that generate: run, paper, resume, cross-judge, try; and the list of settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steerback.cli.help import RunCommand
from steerback.cli.options import (
    PROMPTS,
    RUNS,
    Budget,
    DryRun,
    NewName,
    NoCache,
    RunsFolder,
    Setup,
    Targets,
    add,
    announce_loading,
    experiment_names,
    say,
    stopped,
    target_names,
)
from steerback.errors import SteerbackError

if TYPE_CHECKING:
    from steerback.config import RunConfig
    from steerback.experiments.paper import Base, Step
    from steerback.jobs.check import Makers, PreparedRun

CROSS_JUDGE = "cross-judge is a command of its own; type: steerback cross-judge RUN RUN ... --judges A,B"

LEGEND = """drift (offline judge) in yellow, restart in green; on the right the detector of drift is clamped to 0.
The habit is planted: the model's training text does this, so it is no evidence about other models."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    add(app, run_command, "run", RunCommand)
    add(app, cross_judge, "cross-judge")
    add(app, paper)
    add(app, resume)
    add(app, try_command, "try")
    add(app, settings_command, "settings")


def run_command(
    experiments: Annotated[
        list[str],
        typer.Argument(
            metavar="EXPERIMENT...",
            autocompletion=experiment_names,
            help="Experiment, e.g. esr. Several share one engine.",
        ),
    ],
    setup: Setup,
    budget: Budget,
    target: Targets = None,
    from_run: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="RUN", help="Reuse latents, thresholds, prompts and seeds of this run."),
    ] = None,
    name: NewName = None,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="vllm: engines side by side; they share GPUs if need be.")
    ] = None,
    latents: Annotated[
        str | None, typer.Option(help="Latents: a file, a comma-separated list, or a number to draw.")
    ] = None,
    prompts: Annotated[str | None, PROMPTS] = None,
    limit: Annotated[int | None, typer.Option(help="Most measured trials per condition.")] = None,
    concreteness_threshold: Annotated[
        float | None,
        typer.Option(
            min=0, max=100, help="Keep labels with at least this concreteness, instead of those above the median."
        ),
    ] = None,
    dry_run: DryRun = False,
    no_cache: NoCache = False,
    runs: RunsFolder = RUNS,
) -> None:
    """Run experiments: calibrate, generate, judge, measure, draw."""
    from steerback.api import chosen_latents, run_folder
    from steerback.jobs.campaign import resolved
    from steerback.jobs.check import check

    if "cross-judge" in experiments:
        raise SteerbackError(CROSS_JUDGE)
    if stray := [word for word in experiments[1:] if word not in experiment_names("") and target_names(word)]:
        raise SteerbackError(
            f"{stray[0]!r} is no experiment; repeat the option for several targets: --target A --target B"
        )
    base = _base(from_run or (), runs)
    targets = tuple(target or (base[1].targets if base else ()))
    if not targets:
        raise SteerbackError("say what to steer with --target (see steerback targets), or start from a run with --from")
    overrides = {
        "prompts": prompts,
        "limit": limit,
        **({} if latents is None else chosen_latents(latents, targets[0], base)),
    }
    if replicas is not None:
        overrides["engine_options"] = {"replicas": replicas}
    if concreteness_threshold is not None:
        overrides["selection"] = {"concreteness": "threshold", "concreteness_threshold": concreteness_threshold}
    if len(experiments) > 1:

        def first(experiment: str, settings: tuple[str, ...]) -> RunConfig:
            built = setup.build(experiment, targets, overrides, base, settings)
            return resolved(built, budget.makers(dry_run, built.rubrics))

        def folder_of(config: RunConfig) -> Path:
            return run_folder(config, None if name is None else f"{name}-{config.experiment}", runs)

        steps = _several(experiments, setup.settings or (), first, folder_of, base)
        _go_through(steps, budget.makers(dry_run, steps[0].config.rubrics), dry_run, no_cache)
        return
    config = setup.build(experiments[0], targets, overrides, base)
    _go(check(config, budget.makers(dry_run, config.rubrics)), run_folder(config, name, runs), dry_run, no_cache)


def _several(
    experiments: Sequence[str],
    settings: Sequence[str],
    first: Callable[[str, tuple[str, ...]], RunConfig],
    folder_of: Callable[[RunConfig], Path],
    base: Base | None,
) -> list[Step]:
    """Return the runs of several experiments; those that build on another named one take its settings."""
    from steerback.config import build_config
    from steerback.experiments import experiment_type
    from steerback.experiments.paper import in_order, own_options

    for name in experiments:
        experiment_type(name)
    common, options = own_options(settings, experiments)

    def config_of(name: str, start: Base | None) -> RunConfig:
        own = tuple(f"options.{text}" for text in options.get(name, ()))
        if start is None or start == base:
            return first(name, (*common, *own))
        return build_config(name, start[1].targets, assignments=own, base=start)

    return in_order(experiments, config_of, folder_of, base)


def _go_through(steps: Sequence[Step], makers: Makers, dry_run: bool, no_cache: bool) -> None:
    from steerback.jobs import campaign

    for line in campaign.plan_lines(steps, makers):
        say(line)
    if dry_run:
        return
    try:
        campaign.carry_out(steps, not no_cache, say, makers)
    except KeyboardInterrupt:
        stopped("what was done is kept: the same command goes on")


def settings_command(
    experiment: Annotated[str | None, typer.Argument(help="Experiment. Default: all.")] = None,
    preset: Annotated[
        str, typer.Option(metavar="PRESET", help="Show the defaults of this preset: specification, authors or quick.")
    ] = ("specification"),
) -> None:
    """List all settings with default and meaning."""
    from steerback.cli.help import experiment_lines, setting_lines
    from steerback.figures.tables import terminal_width

    width = terminal_width()
    for line in setting_lines(width, preset) if experiment is None else experiment_lines(experiment, width, preset):
        say(line)


def _base(names: Sequence[str], runs: Path) -> tuple[str, RunConfig] | None:
    """Return folder and config of the run that --from names."""
    from steerback.jobs.check import start_from
    from steerback.store.run import find_run

    if not names:
        return None
    if len(names) > 1:
        raise SteerbackError(f"an experiment starts from one run, not from {len(names)}; give --from once")
    folder = find_run(names[0], runs)
    return start_from(folder)


def cross_judge(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="Finished runs, by name or folder.")],
    setup: Setup,
    budget: Budget,
    judges: Annotated[
        list[str] | None, typer.Option("--judges", metavar="A,B", help="Two or more judges, separated by commas.")
    ] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="Number of responses to judge.")] = None,
    name: NewName = None,
    dry_run: DryRun = False,
    no_cache: NoCache = False,
    runs: RunsFolder = RUNS,
) -> None:
    """Judge one sample of finished runs with several judges and compare the verdicts."""
    from steerback.api import run_folder
    from steerback.jobs.check import check
    from steerback.store.run import find_run, stored_config

    chosen = [judge.strip() for text in judges or () for judge in text.split(",") if judge.strip()]
    if judges and len(set(chosen)) < 2:
        raise SteerbackError("cross-judge compares two judges or more, separated by commas: --judges A,B")
    folders = [find_run(run, runs) for run in names]
    targets = tuple(dict.fromkeys(t for folder in folders for t in stored_config(folder).targets))
    options = {"sources": [str(f) for f in folders], "judges": chosen or None, "sample": sample}
    given = {"options": {key: value for key, value in options.items() if value is not None}}
    config = setup.build("cross-judge", targets, given)
    _go(check(config, budget.makers(dry_run, config.rubrics)), run_folder(config, name, runs), dry_run, no_cache)


def paper(
    setup: Setup,
    budget: Budget,
    target: Annotated[
        list[str], typer.Option("--target", "-t", metavar="TARGET", help="Model to steer. Repeat it for several.")
    ],
    name: Annotated[
        str, typer.Option(metavar="NAME", help="Runs are called NAME-EXPERIMENT. The same name again resumes.")
    ] = "paper",
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="EXPERIMENT", help="Run this experiment and those that it starts from. Repeatable."),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="EXPERIMENT", help="Leave out this experiment and those that start from it. Repeatable."),
    ] = None,
    dry_run: DryRun = False,
    no_cache: NoCache = False,
    runs: RunsFolder = RUNS,
) -> None:
    """Run all experiments of the paper, compare with its numbers and draw all figures.

    To change a setting of one experiment, put its name first: --set boost-sweep.high=6.
    """
    from steerback.api import carry_out_paper
    from steerback.experiments.paper import own_options, plan
    from steerback.jobs import campaign
    from steerback.store.run import new_run

    new_run(f"{name}-results", runs)  # refuses a name that is no file name
    common, options = own_options(setup.settings or ())
    config = setup.build("esr", tuple(target), settings=tuple(common))
    makers = budget.makers(dry_run, config.rubrics)
    first = campaign.resolved(config, makers)
    steps = plan(first, runs, name, only or (), skip or (), options)
    for line in campaign.plan_lines(steps, makers):
        say(line)
    if dry_run:
        return
    try:
        carry_out_paper(steps, runs / f"{name}-results", not no_cache, say, makers)
    except KeyboardInterrupt:
        stopped("what was done is kept: the same command goes on")


def resume(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="Names of runs, or paths of their folders.")],
    budget: Budget,
    no_cache: NoCache = False,
    runs: RunsFolder = RUNS,
) -> None:
    """Resume stopped runs."""
    from steerback.jobs.campaign import stored_steps
    from steerback.jobs.check import check
    from steerback.store.run import find_run, stored_config

    if len(names) > 1:
        steps = stored_steps([find_run(name, runs) for name in names])
        _go_through(steps, budget.makers(rubrics=steps[0].config.rubrics), False, no_cache)
        return
    folder = find_run(names[0], runs)
    config = stored_config(folder)
    _go(check(config, budget.makers(rubrics=config.rubrics)), folder, False, no_cache)


def _go(job: PreparedRun, folder: Path, dry_run: bool, no_cache: bool) -> None:
    from steerback.api import carry_out
    from steerback.jobs.campaign import report
    from steerback.jobs.estimate import plan_lines, spent_lines

    for line in plan_lines(job, folder):
        say(line)
    if dry_run:
        return
    try:
        done = carry_out(job, folder, not no_cache)
    except KeyboardInterrupt:
        root = "" if folder.parent == RUNS else f" --runs {folder.parent}"
        stopped(f"resume with: steerback resume {folder.name}{root}")
    for line in (*report(done.analysis), *spent_lines(folder)):
        say(line)


def try_command(
    target: Annotated[str, typer.Argument(help="Target to steer, e.g. organism.")],
    prompt: Annotated[str | None, typer.Argument(help="Prompt. Built-in models have an example.")] = None,
    latent: Annotated[str | None, typer.Option(help="Latent to steer: its index or its label.")] = None,
    boost: Annotated[float | None, typer.Option(help="Multiple of the decoder direction to add.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all responses.")] = 44,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.6,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 160,
) -> None:
    """Show a steered and an unsteered response. `try organism` shows drift and restart."""
    from steerback.jobs.loaded import drift_and_restart, example_of, load_target, steered_and_not
    from steerback.records import Sampling
    from steerback.report.transcripts import print_marked

    if prompt is None and latent is None and boost is None:
        example = example_of(target)
        announce_loading(target)
        with load_target(target) as loaded:
            shown = drift_and_restart(loaded, example)
        print_marked(example.prompt, [(done.steering, done.marks) for done in shown])
        print(LEGEND)
        return
    if prompt is None or latent is None or boost is None:
        raise SteerbackError(f"try {target}: give a prompt, --latent and --boost together")
    announce_loading(target)
    with load_target(target) as loaded:
        sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens)
        pair = steered_and_not(loaded, prompt, latent, boost, seed, sampling)
    print_marked(prompt, [(done.steering, done.marks) for done in pair])
