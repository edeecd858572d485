"""Verbs about results: the whole paper, figures, transcripts, published numbers beside ours, files in and out.

Like `cli`, it only calls into the package; `cli` registers these functions.
"""

from __future__ import annotations

import sys
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
    judges_within,
)
from steerback.errors import SteerbackError, unknown
from steerback.store.files import make_folder

OTHER = "choose another --out"
Names = Annotated[list[str] | None, typer.Argument(help="Names of runs under --runs, or paths of their folders.")]


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command()(paper)
    app.command()(figures)
    app.command()(show)
    app.command()(compare)
    app.command("import")(import_command)
    app.command()(export)
    app.command("merge")(merge_command)


def paper(
    target: Annotated[list[str], typer.Option("--target", "-t", help="What to steer; may be given several times.")],
    name: Annotated[str, typer.Option(help="Runs are called NAME-EXPERIMENT; the same name again resumes.")] = "paper",
    preset: Annotated[str | None, typer.Option(help="specification (default), authors or quick.")] = None,
    engine: Annotated[str | None, typer.Option(help="transformers or vllm; default: what fits this machine.")] = None,
    judge: Annotated[str | None, typer.Option(help="offline, or a judge model.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting of all, or an option: boost-sweep.high=6."),
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this experiment and what it starts from.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Not this experiment, nor what starts from it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show plan and estimate, and stop.")] = False,
    no_cache: NoCache = False,
    max_judge_calls: MaxCalls = None,
    max_judge_cost: MaxCost = None,
    judge_price: Price = None,
    judge_batch: Batch = False,
    runs: RunsDir = RUNS,
) -> None:
    """Run every experiment of the paper in order, then compare and draw."""
    from steerback.config import build_config
    from steerback.experiments.paper import own_options, plan
    from steerback.jobs import campaign

    common, options = own_options(settings or ())
    overrides: dict[str, Any] = {"engine": engine, "judge": judge}
    judges = judges_within(max_judge_calls, max_judge_cost, judge_price, judge_batch)
    first = build_config("esr", tuple(target), preset, config, overrides, tuple(common))
    steps = plan(campaign.resolved(first, judges), runs, name, only or (), skip or (), options)
    for line in campaign.plan_lines(steps, judges):
        print(line)
    if dry_run:
        return
    try:
        failed = campaign.run(steps, not no_cache, print, judges)
    except KeyboardInterrupt:
        print("steerback: stopped; what was done is kept: the same command goes on", file=sys.stderr)
        sys.exit(130)
    done = [step.folder for step in steps if campaign.is_done(step)]
    _compared(done, runs / f"{name}-results", ("text",))
    for path in campaign.draw_all(done, runs / f"{name}-results"):
        print(f"  {path}")
    if failed:
        raise SteerbackError(
            f"{len(failed)} of {len(steps)} experiments could not be done: "
            + "; ".join(f"{folder.name}: {why}" for folder, why in failed.items())
        )


def figures(
    names: Annotated[list[str] | None, typer.Argument(help="A run; with --all: several, or all under --runs.")] = None,
    judge: Annotated[str | None, typer.Option(help="Judge whose verdicts are analysed; default: the run's.")] = None,
    draws: Annotated[int | None, typer.Option(help="Bootstrap draws.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Draw the figures of all runs named into one folder.")] = False,
    out: Annotated[Path | None, typer.Option(help="That folder; default: figures under --runs.")] = None,
    runs: RunsDir = RUNS,
) -> None:
    """Analyse a run's ledger again: summary, tables and figures."""
    if every and (judge is not None or draws is not None):
        raise SteerbackError(
            "--judge and --draws belong to the analysis of one run; --all draws what the runs' own say"
        )
    if every:
        return _draw_all(names, out, runs)
    if len(names or ()) != 1 or out is not None:
        raise SteerbackError("name one run to analyse it again in its folder, or draw several's into --out with --all")
    name = (names or [""])[0]
    from steerback.config import parse_config
    from steerback.experiments import get_experiment
    from steerback.jobs import execute
    from steerback.jobs.campaign import report
    from steerback.store.run import Run, find_run

    with Run.read(find_run(name, runs)) as opened:
        config = opened.config
        if draws is not None:
            config = parse_config(config.model_dump(mode="json") | {"draws": draws}, "figures")
        chosen = _known_judge(judge or config.judge, opened.ledger.judges())
        experiment = get_experiment(config.experiment)
        analysis = execute.analyse(experiment, opened.ledger, opened.folder, chosen, config.draws)
    report(analysis, opened.folder)
    return None


def _known_judge(judge: str, known: list[str]) -> str:
    if known and judge not in known:
        raise SteerbackError(f"judge {judge!r} has judged nothing in this run; there are: {', '.join(known) or 'none'}")
    return judge


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
    from steerback.store.run import Run, find_run

    with Run.read(find_run(name, runs)) as opened:
        chosen = _known_judge(judge or opened.config.judge, opened.ledger.judges())
        rows = choose(opened.ledger, chosen, trial, condition, restarts, count)
    for row in rows:
        print(transcript(row, colour=sys.stdout.isatty()))


def _draw_all(names: list[str] | None, out: Path | None, runs: Path) -> None:
    """`steerback figures --all`: every figure of many runs in one folder."""
    from steerback.jobs import campaign

    folders = _folders(names, runs)
    for path in campaign.draw_all(folders, make_folder(out or runs / "figures", OTHER)):
        print(f"  {path}")


def compare(
    names: Names = None,
    out: Annotated[Path | None, typer.Option(help="Folder for compare.txt, .csv and .md.")] = None,
    form: Annotated[str, typer.Option("--format", help="What is printed: text, csv or markdown.")] = "text",
    runs: RunsDir = RUNS,
) -> None:
    """Published numbers beside ours: interval, verdict, known deviations."""
    if form not in ("text", "csv", "markdown"):
        raise unknown("format", form, ("text", "csv", "markdown"))
    _compared(_folders(names, runs), out, (form,))


def _compared(folders: list[Path], out: Path | None, printed: tuple[str, ...]) -> None:
    from steerback.paper.published import compare_published, comparison
    from steerback.store.run import write_atomic

    if out is not None:
        make_folder(out, OTHER)
    table, notes = comparison(compare_published(folders))
    listed = "\n".join(["", "Deviations that are known:", *notes, ""]) if notes else ""
    wide = 10_000  # one line a row: the terminal wraps or a pager scrolls
    forms = {"text": table.text(wide) + listed, "csv": table.csv(), "markdown": table.markdown() + listed}
    for form in printed:
        print(forms[form])
    if out is not None:
        for form, suffix in (("text", "txt"), ("csv", "csv"), ("markdown", "md")):
            print(f"  {write_atomic(out / f'compare.{suffix}', forms[form].encode())}")


def _folders(names: list[str] | None, root: Path) -> list[Path]:
    """The named runs, or all finished ones under `root`."""
    from steerback.store.run import find_run

    if names:
        return [find_run(name, root) for name in names]
    found = sorted(path.parent for path in root.glob("*/summary.json") if (path.parent / "ledger.sqlite").is_file())
    if not found:
        raise SteerbackError(f"no finished run in {root}; name runs, or say where they are with --runs")
    return found


def import_command(
    files: Annotated[list[Path], typer.Argument(help="Result files of the authors' code; those of one run together.")],
    name: Annotated[str | None, typer.Option(help="Name of the new run; default: the first file's.")] = None,
    target: Annotated[str | None, typer.Option(help="Name of the model; default: from the files.")] = None,
    judge: Annotated[str | None, typer.Option(help="Name of the judge; default: from the files.")] = None,
    condition: Annotated[str | None, typer.Option(help="Name of the condition; default: from the files.")] = None,
    runs: RunsDir = RUNS,
) -> None:
    """Read the authors' result files into a run, so that all analyses and figures work on them."""
    from steerback.jobs import campaign
    from steerback.paper.authors import import_authors

    safe = "".join(c if c.isalnum() or c in "._-+" else "_" for c in files[0].stem).lstrip(".")
    folder = runs / (name or safe or "imported")
    found = import_authors(files, folder, target, judge, condition)
    for line in found.lines():
        print(line)
    campaign.report(campaign.reanalyse(folder), folder)


def export(
    run: Annotated[str, typer.Argument(help="Name of a run under --runs, or path of its folder.")],
    form: Annotated[str, typer.Option("--format", help="authors (JSON), parquet or csv.")] = "csv",
    out: Annotated[Path | None, typer.Option(help="Where to write; default: the run's folder.")] = None,
    judge: Annotated[str | None, typer.Option(help="Whose verdicts; default: the run's judge.")] = None,
    runs: RunsDir = RUNS,
) -> None:
    """Write a run's trials: the authors' JSON, or one row a trial."""
    from steerback.paper.authors import export_authors
    from steerback.report.export import FORMATS, export_flat
    from steerback.store.run import Run, find_run

    if form not in FORMATS:
        raise unknown("export format", form, FORMATS)
    with Run.read(find_run(run, runs)) as opened:
        chosen = _known_judge(judge or opened.config.judge, opened.ledger.judges())
        folder = make_folder(out or opened.folder / "export", OTHER)
        if form == "authors":
            paths = export_authors(opened, folder, chosen)
        else:
            paths = [export_flat(opened.ledger, folder / f"trials.{form}", chosen, form)]
    for path in paths:
        print(f"  {path}")


def merge_command(
    names: Annotated[list[str], typer.Argument(help="Runs of one plan, at least two.")],
    name: Annotated[str, typer.Option(help="Name of the new run.")],
    runs: RunsDir = RUNS,
) -> None:
    """Join runs of one plan that were done on several machines."""
    from steerback.jobs import campaign
    from steerback.store.merge import merge
    from steerback.store.run import find_run

    folder = runs / name
    joined = merge([find_run(n, runs) for n in names], folder)
    print(
        f"{joined.runs} runs joined: {joined.trials:,} trials; {joined.repeated:,} had been generated twice, "
        f"{joined.differing:,} of them with another text (the first run's is kept)"
    )
    campaign.report(campaign.reanalyse(folder), folder)
