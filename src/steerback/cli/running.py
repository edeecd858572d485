"""Commands that generate: run, paper, resume, cross-judge, try; and the list of settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from steerback.cli.options import (
    PROMPTS,
    RUNS,
    Budget,
    DryRun,
    NewName,
    NoCache,
    RunName,
    RunsFolder,
    Setup,
    Targets,
    announce_loading,
    argument,
    experiment_names,
    option,
    say,
    say_lines,
    stoppable,
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


def run_command(
    setup: Setup,
    budget: Budget,
    experiments: list[str] = argument(
        "Experiment, e.g. esr. Several share one engine.", ..., metavar="EXPERIMENT...", autocompletion=experiment_names
    ),
    target: Targets = None,
    from_run: list[str] | None = option(
        "Reuse latents, thresholds, prompts and seeds of this run.", None, "--from", metavar="RUN"
    ),
    name: NewName = None,
    replicas: int | None = option("vllm: engines side by side; they share GPUs if need be.", min=1),
    latents: str | None = option("Latents: a file, a comma-separated list, or a number to draw."),
    prompts: Annotated[str | None, PROMPTS] = None,
    limit: int | None = option("Most measured trials per condition."),
    concreteness_threshold: float | None = option(
        "Keep labels with at least this concreteness, instead of those above the median.", min=0, max=100
    ),
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

    say_lines(campaign.plan_lines(steps, makers))
    if dry_run:
        return
    with stoppable():
        campaign.carry_out(steps, not no_cache, say, makers)


def settings_command(
    experiment: str | None = argument("Experiment. Default: all."),
    preset: str = option(
        "Show the defaults of this preset: specification, authors or quick.", "specification", metavar="PRESET"
    ),
) -> None:
    """List all settings with default and meaning."""
    from steerback.cli.help import experiment_lines, setting_lines
    from steerback.figures.tables import terminal_width

    width = terminal_width()
    say_lines(setting_lines(width, preset) if experiment is None else experiment_lines(experiment, width, preset))


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
    setup: Setup,
    budget: Budget,
    names: list[str] = argument("Finished runs, by name or folder.", ..., metavar="RUN..."),
    judges: list[str] | None = option("Two or more judges, separated by commas.", metavar="A,B"),
    sample: int | None = option("Number of responses to judge.", min=1),
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
    target: list[str] = option("Model to steer. Repeat it for several.", ..., "--target", "-t", metavar="TARGET"),
    name: str = option("Runs are called NAME-EXPERIMENT. The same name again resumes.", "paper", metavar="NAME"),
    only: list[str] | None = option(
        "Run this experiment and those that it starts from. Repeatable.", metavar="EXPERIMENT"
    ),
    skip: list[str] | None = option(
        "Leave out this experiment and those that start from it. Repeatable.", metavar="EXPERIMENT"
    ),
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
    say_lines(campaign.plan_lines(steps, makers))
    if dry_run:
        return
    with stoppable():
        carry_out_paper(steps, runs / f"{name}-results", not no_cache, say, makers)


def resume(
    budget: Budget,
    names: list[str] = argument("Names of runs, or paths of their folders.", ..., metavar="RUN..."),
    no_cache: NoCache = False,
    runs: RunsFolder = RUNS,
) -> None:
    """Resume stopped runs."""
    from steerback.experiments.paper import stored_steps
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

    say_lines(plan_lines(job, folder))
    if dry_run:
        return
    root = "" if folder.parent == RUNS else f" --runs {folder.parent}"
    with stoppable(f"resume with: steerback resume {folder.name}{root}"):
        done = carry_out(job, folder, not no_cache)
    say_lines([*report(done.analysis), *spent_lines(folder)])


def try_command(
    target: str = argument("Target to steer, e.g. organism.", ...),
    prompt: str | None = argument("Prompt. Built-in models have an example."),
    latent: str | None = option("Latent to steer: its index or its label."),
    boost: float | None = option("Multiple of the decoder direction to add."),
    seed: int = option("Seed of all responses.", 44),
    temperature: float = option("0 is greedy.", 0.6, min=0),
    max_new_tokens: int = option("Longest response, in tokens.", 160, min=1),
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


def fork(
    name: RunName,
    budget: Budget,
    trial: str | None = argument("Key of a trial. Default: show the existing forks of the run."),
    at: str | None = option("Fork after this many tokens, or at this place.", metavar="TOKEN|attempt:N|drift"),
    n: int = option("Number of seeds, the same in each arm.", 32, min=2),
    ablate: str | None = option("Add an arm in which these latents are clamped to 0.", metavar="detectors|LATENTS"),
    detectors: str | None = option("With --ablate detectors: the run of the detector search.", metavar="RUN"),
    boost: list[float] | None = option("Add an arm with this boost. Repeatable."),
    arm: list[str] | None = option(
        "Add an arm of your own, e.g. 'calm=boost:0;clamp:12:3'. Repeatable.", metavar="NAME=EDITS"
    ),
    throughout: bool = option("Arms also change the prompt and the kept tokens.", False),
    judge: str | None = option("Judge of the continuations. Default: the run's judge.", metavar="JUDGE"),
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
        say_lines(fork_table(one).text(terminal_width()) for one in existing)
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
    with stoppable(), execute.tools(not no_cache) as (progress, cache):
        result = fork_trial(folder, trial, settings, progress, cache, makers)
    say_lines([fork_table(result).text(terminal_width()), *spent_lines(folder)])
    return say(f"look at it: steerback view {name}")
