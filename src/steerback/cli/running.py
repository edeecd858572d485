"""Verbs that generate: run an experiment or a whole paper, go on with one, try one latent."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    judges_within,
)
from steerback.errors import SteerbackError

if TYPE_CHECKING:
    from steerback.jobs.execute import Job


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command("run")(run_command)
    app.command()(resume)
    app.command("try")(try_command)


def run_command(
    experiment: Annotated[str, typer.Argument(help="Which experiment, e.g. esr.")],
    target: Annotated[
        list[str] | None, typer.Option("--target", "-t", help="What to steer; may be given several times.")
    ] = None,
    from_run: Annotated[
        list[str] | None,
        typer.Option("--from", help="Run whose latents, thresholds, prompts and seeds are used again."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run; the same name again resumes it.")] = None,
    preset: Annotated[str | None, typer.Option(help="specification (default), authors or quick.")] = None,
    engine: Annotated[str | None, typer.Option(help="transformers or vllm; default: what fits this machine.")] = None,
    replicas: Annotated[int | None, typer.Option(min=1, help="vllm: engines side by side, one GPU each.")] = None,
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
    concreteness_threshold: Annotated[
        float | None, typer.Option(min=0, max=100, help="Keep labels rated at least this, not those above the median.")
    ] = None,
    judges: Annotated[list[str] | None, typer.Option("--judges", help="cross-judge: two judges or more.")] = None,
    sample: Annotated[int | None, typer.Option(min=1, help="cross-judge: how many responses are judged.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    max_judge_calls: MaxCalls = None,
    max_judge_cost: MaxCost = None,
    judge_price: Price = None,
    judge_batch: Batch = False,
    no_cache: NoCache = False,
    runs: RunsDir = RUNS,
) -> None:
    """Run an experiment: calibrate, generate, judge, measure, draw."""
    from steerback.config import build_config
    from steerback.jobs import execute
    from steerback.latents.sampling import parse_latents
    from steerback.store.run import find_run, stored_config
    from steerback.targets import resolve

    base = None
    options: dict[str, Any] = {}
    if experiment == "cross-judge":
        target, options = _to_compare(from_run, judges, sample, runs)
    elif judges or sample:
        raise SteerbackError(f"--judges and --sample belong to cross-judge, not to {experiment}; use --judge")
    elif from_run:
        if len(from_run) > 1:
            raise SteerbackError(f"{experiment} starts from one run, not from {len(from_run)}; give --from once")
        folder = find_run(from_run[0], runs)
        base = (str(folder), stored_config(folder))
    chosen = tuple(target or (base[1].targets if base else ()))
    if not chosen:
        raise SteerbackError("say what to steer with --target (see steerback targets), or start from a run with --from")
    overrides: dict[str, Any] = {"engine": engine, "judge": judge, "prompts": prompts, "limit": limit}
    overrides |= {"options": options} if options else {}
    if concreteness_threshold is not None:
        rule = {"concreteness": "threshold", "concreteness_threshold": concreteness_threshold}
        overrides["selection"] = rule
    overrides |= {"engine_options": {"replicas": replicas}} if replicas else {}
    if latents is not None:
        first = resolve(chosen[0], base[1].definitions if base else None)
        own = parse_latents(latents, first.labels(), directions=first.directions())
        overrides |= {"n_latents": own} if isinstance(own, int) else {"latents": own}
    built = build_config(experiment, chosen, preset, config, overrides, tuple(settings or ()), base)
    job = execute.check(built, judges_within(max_judge_calls, max_judge_cost, judge_price, judge_batch))
    _go(job, runs / (name or f"{experiment}-{'+'.join(chosen)}"), dry_run, no_cache)


def _to_compare(
    sources: list[str] | None, judges: list[str] | None, sample: int | None, runs: Path
) -> tuple[list[str], dict[str, Any]]:
    """Targets and options of a cross-judge run: everything comes from the finished runs it starts from."""
    from steerback.store.run import find_run, stored_config

    folders = [find_run(name, runs) for name in sources or ()]
    if not folders:
        raise SteerbackError("cross-judge compares verdicts on finished runs: name them with --from RUN RUN ...")
    targets = list(dict.fromkeys(t for folder in folders for t in stored_config(folder).targets))
    given: dict[str, Any] = {"judges": judges, "sample": sample}
    return targets, {"sources": [str(f) for f in folders], **{k: v for k, v in given.items() if v is not None}}


def resume(
    name: RunName,
    max_judge_calls: MaxCalls = None,
    max_judge_cost: MaxCost = None,
    judge_price: Price = None,
    judge_batch: Batch = False,
    no_cache: NoCache = False,
    runs: RunsDir = RUNS,
) -> None:
    """Go on with a run that was stopped."""
    from steerback.jobs import execute
    from steerback.store.run import find_run, stored_config

    folder = find_run(name, runs)
    judges = judges_within(max_judge_calls, max_judge_cost, judge_price, judge_batch)
    _go(execute.check(stored_config(folder), judges), folder, False, no_cache)


def _go(job: Job, folder: Path, dry_run: bool, no_cache: bool) -> None:
    from steerback.jobs import execute
    from steerback.jobs.campaign import report
    from steerback.jobs.estimate import plan_lines, spent_lines
    from steerback.store.progress import make_progress

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
    for line in spent_lines(folder):
        print(line)


def _root_option(folder: Path) -> str:
    return "" if folder.parent == RUNS else f" --runs {folder.parent}"


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
