"""The command line: verbs, options and messages. Everything it does is a call into the package.

A mistake of the user's is one line on stderr and exit code 2; a stop by Ctrl-C is exit code 130 with how to go on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerback import __version__, cli_results
from steerback.errors import SteerbackError

if TYPE_CHECKING:
    from steerback.execute import Job

app = typer.Typer(
    name="steerback",
    help="Measure, explain and change how language models resist activation steering.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RunsDir = Annotated[Path, typer.Option("--runs", help="Folder that holds the run folders.")]
RunName = Annotated[str, typer.Argument(help="Name of a run under --runs, or path of its folder.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Neither read nor write the shared cache.")]
RUNS = Path("runs")
# typer brings its own copy of click in some releases, so its base error is found through what typer exports
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a verb and turns every expected failure into one line and an exit code."""
    try:
        code = app(args=arguments, prog_name="steerback", standalone_mode=False)
    except SteerbackError as error:
        fail(str(error))
    except USAGE_ERROR as error:
        fail(f"{error.format_message()} (see steerback --help)")  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        print("steerback: stopped; what was done is kept", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (head, less) has left
        sys.stderr.close()
        sys.exit(141)
    sys.exit(code if isinstance(code, int) else 0)


def fail(message: str) -> None:
    print("steerback: error: " + " ".join(message.split("\n")), file=sys.stderr)
    sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"steerback {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


@app.command("run")
def run_command(
    experiment: Annotated[str, typer.Argument(help="Which experiment, e.g. esr.")],
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="What to steer; may be given several times.")
    ] = None,
    from_run: Annotated[
        str | None, typer.Option("--from", help="Run whose latents, thresholds, prompts and seeds are used again.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; the same name again resumes it.")] = None,
    preset: Annotated[str | None, typer.Option(help="specification (default), authors or quick.")] = None,
    engine: Annotated[str | None, typer.Option(help="transformers or vllm; default: what fits this machine.")] = None,
    judge: Annotated[str | None, typer.Option(help="offline, or a judge model.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting, e.g. sampling.temperature=0.8.")
    ] = None,
    latents: Annotated[
        str | None, typer.Option(help="Own latents: a file, a comma-separated list, or how many.")
    ] = None,
    prompts: Annotated[str | None, typer.Option(help="Built-in list or text file, one prompt a line.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many measured trials per condition.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    no_cache: NoCache = False,
    runs: RunsDir = RUNS,
) -> None:
    """Run an experiment: calibrate, generate, judge, measure, draw."""
    from steerback import execute
    from steerback.config import build_config
    from steerback.latents.sampling import parse_latents
    from steerback.runs import find_run, stored_config
    from steerback.targets import resolve

    base = None
    if from_run is not None:
        folder = find_run(from_run, runs)
        base = (str(folder), stored_config(folder))
    chosen = tuple(target or (base[1].targets if base else ()))
    if not chosen:
        raise SteerbackError("say what to steer with --target (see steerback targets), or start from a run with --from")
    overrides: dict[str, Any] = {"engine": engine, "judge": judge, "prompts": prompts, "limit": limit}
    if latents is not None:
        own = parse_latents(latents, resolve(chosen[0]).labels())
        overrides |= {"n_latents": own} if isinstance(own, int) else {"latents": own}
    built = build_config(experiment, chosen, preset, config, overrides, tuple(settings or ()), base)
    job = execute.check(built)
    _go(job, runs / (name or f"{experiment}-{'+'.join(chosen)}"), dry_run, no_cache)


@app.command()
def resume(name: RunName, no_cache: NoCache = False, runs: RunsDir = RUNS) -> None:
    """Go on with a run that was stopped."""
    from steerback import execute
    from steerback.runs import find_run, stored_config

    folder = find_run(name, runs)
    _go(execute.check(stored_config(folder)), folder, False, no_cache)


def _go(job: Job, folder: Path, dry_run: bool, no_cache: bool) -> None:
    from steerback import execute
    from steerback.campaign import report
    from steerback.estimate import plan_lines
    from steerback.progress import make_progress

    for line in plan_lines(job, folder):
        print(line)
    if dry_run:
        return
    progress = make_progress()
    cache = execute.open_cache(not no_cache)
    try:
        analysis = execute.run(job, folder, progress, cache)
    except KeyboardInterrupt:
        progress.close()
        print(f"steerback: stopped; resume with: steerback resume {folder.name}{_root_option(folder)}", file=sys.stderr)
        sys.exit(130)
    finally:
        progress.close()
        if cache is not None:
            cache.close()
    report(analysis, folder)


def _root_option(folder: Path) -> str:
    return "" if folder.parent == RUNS else f" --runs {folder.parent}"


@app.command()
def figures(
    names: Annotated[list[str] | None, typer.Argument(help="A run; with --all: several, or all under --runs.")] = None,
    judge: Annotated[str | None, typer.Option(help="Judge whose verdicts are analysed; default: the run's.")] = None,
    draws: Annotated[int | None, typer.Option(help="Bootstrap draws.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Draw the figures of all runs named into one folder.")] = False,
    out: Annotated[Path | None, typer.Option(help="That folder; default: figures under --runs.")] = None,
    runs: RunsDir = RUNS,
) -> None:
    """Analyse a run's ledger again: summary, tables and figures."""
    if every:
        return cli_results.draw_all(names, out, runs)
    if len(names or ()) != 1:
        raise SteerbackError("name one run to analyse it again, or draw those of many with --all")
    name = (names or [""])[0]
    from steerback import execute
    from steerback.campaign import report
    from steerback.experiments import get_experiment
    from steerback.runs import Run, find_run

    with Run.read(find_run(name, runs)) as opened:
        chosen = _known_judge(judge or opened.config.judge, opened.ledger.judges())
        experiment = get_experiment(opened.config.experiment)
        analysis = execute.analyse(experiment, opened.ledger, opened.folder, chosen, draws or opened.config.draws)
    report(analysis, opened.folder)
    return None


def _known_judge(judge: str, known: list[str]) -> str:
    if known and judge not in known:
        raise SteerbackError(f"judge {judge!r} has judged nothing in this run; there are: {', '.join(known) or 'none'}")
    return judge


@app.command()
def show(
    name: RunName,
    trial: Annotated[str | None, typer.Argument(help="Key of a trial; default: a choice of them.")] = None,
    judge: Annotated[str | None, typer.Option(help="Whose verdicts; default: the run's judge.")] = None,
    condition: Annotated[str | None, typer.Option(help="Only this condition.")] = None,
    restarts: Annotated[bool, typer.Option("--restarts", help="Only responses with two or more attempts.")] = False,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many transcripts.")] = 3,
    runs: RunsDir = RUNS,
) -> None:
    """Print transcripts with their attempts, scores and spans."""
    from steerback.report.transcripts import choose, transcript
    from steerback.runs import Run, find_run

    with Run.read(find_run(name, runs)) as opened:
        rows = choose(opened.ledger, judge or opened.config.judge, trial, condition, restarts, count)
    for row in rows:
        print(transcript(row, colour=sys.stdout.isatty()))


@app.command("judge")
def judge_command(
    name: RunName,
    judge: Annotated[str, typer.Option(help="offline, or a judge model.")],
    retry_unscored: Annotated[bool, typer.Option("--retry-unscored", help="Ask again where it gave no score.")] = False,
    no_cache: NoCache = False,
    runs: RunsDir = RUNS,
) -> None:
    """Add a judge's verdicts to a finished run."""
    from steerback import execute
    from steerback.progress import make_progress
    from steerback.runs import find_run

    progress, cache = make_progress(), execute.open_cache(not no_cache)
    try:
        done = execute.judge_run(find_run(name, runs), judge, progress, cache, retry_unscored)
    finally:
        progress.close()
        if cache is not None:
            cache.close()
    print(f"{done} responses judged by {judge}; see them with: steerback figures {name} --judge {judge}")


@app.command()
def judges() -> None:
    """List the judges and the keys they need."""
    from steerback.judging import LOCAL, aliases
    from steerback.judging.models import KEYS

    for name, what in LOCAL.items():
        print(f"{name:<18} {what}")
    for model in aliases():
        keys = " or ".join(KEYS.get(model.model.split("/")[0], ()))
        print(f"{model.alias:<18} {model.model}: {model.note}; key: {keys}")
    print("provider/model     any other model that Inspect AI knows (extra `judges`)")


@app.command()
def targets() -> None:
    """List what can be steered."""
    from steerback.targets import builtin_targets

    for target in builtin_targets():
        print(f"{target.name:<20} {target.summary}")


@app.command("try")
def try_command(
    target: Annotated[str, typer.Argument(help="What to steer, e.g. organism.")],
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    latent: Annotated[str, typer.Option(help="Latent index, or its label.")],
    boost: Annotated[float, typer.Option(help="How much of its decoder direction to add.")],
    seed: Annotated[int, typer.Option(help="Seed of both responses.")] = 44,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.6,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 160,
) -> None:
    """Show one steered response beside the unsteered one."""
    from steerback.api import load_target
    from steerback.records import Intervention, Request, Sampling
    from steerback.report.transcripts import pair

    with load_target(target) as loaded:
        key = loaded.latent(latent)
        sampling = Sampling(temperature=temperature, max_new_tokens=max_new_tokens)
        edits = (Intervention("add", key, boost),)
        requests = [Request(name, prompt, seed, sampling, e) for name, e in (("plain", ()), ("steered", edits))]
        unsteered, steered = loaded.complete(requests)
        label = loaded.target.labels().get(key) if isinstance(key, int) else None
    receipt = steered.receipt
    if not steered.receipt_matches(edits):
        raise SteerbackError(f"the response was not steered as planned: {receipt}; please report this")
    what = f"latent {key}{f' ({label})' if label else ''}, boost {boost:g}, seed {seed}"
    told = f"{receipt.positions} positions steered, mean norm added {receipt.added_norm:.4g}"
    print(pair(prompt, what, unsteered.text, steered.text, told))


cli_results.register(app)

if __name__ == "__main__":
    main()
