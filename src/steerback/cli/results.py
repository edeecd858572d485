"""Commands about results: runs, figures, show, compare, export, import, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from steerback.cli.options import (
    RUNS,
    RunName,
    RunNames,
    RunsFolder,
    VerdictsOf,
    argument,
    hold_many_records,
    in_colour,
    option,
    say,
    say_lines,
    say_table,
)
from steerback.errors import SteerbackError, unknown
from steerback.store.files import make_folder

OTHER = "choose another --out"


def list_runs(runs: RunsFolder = RUNS) -> None:
    """List all runs: experiment, target, date, state, multi-attempt rate."""
    from steerback.report.listing import run_table

    say_table(run_table(runs))


def figures(
    names: list[str] | None = argument("One run. With --all: several runs, default all."),
    judge: VerdictsOf = None,
    draws: int | None = option("Number of bootstrap draws."),
    every: bool = option("Draw the figures of several runs into one folder.", False, "--all"),
    out: Path | None = option("With --all: that folder. Default: figures, under --runs."),
    captions_inside: bool = option("Also write the captions into the images.", False),
    runs: RunsFolder = RUNS,
) -> None:
    """Analyse a run again and write summary, tables and figures.

    With --judge, the results of that judge go into a folder of their own, judges/JUDGE of the run.
    """
    if every and (judge is not None or draws is not None):
        raise SteerbackError(
            "--judge and --draws belong to the analysis of one run; --all draws with each run's own settings"
        )
    if not every and (len(names or ()) != 1 or out is not None):
        raise SteerbackError("name one run to analyse it again in its folder, or draw several's into --out with --all")
    from steerback.jobs import campaign
    from steerback.store.run import find_run, finished_runs

    if every:
        folders = finished_runs(names, runs)
        drawn = campaign.draw_all(folders, make_folder(out or runs / "figures", OTHER), captions_inside)
        say_lines(f"  {path}" for path in drawn)
        return
    hold_many_records()
    folder = find_run((names or [""])[0], runs)
    say_lines(campaign.report(campaign.reanalyse(folder, judge, draws, captions_inside)))


def show(
    name: RunName,
    trial: str | None = argument("Key of one trial. Default: several, see the options."),
    judge: VerdictsOf = None,
    condition: str | None = option("Show only this condition."),
    latent: str | None = option("Show only this latent: its index or its label."),
    attempts: str | None = option("Show only responses with this number of attempts, e.g. 2 or 2+."),
    restarts: bool = option("Short for --attempts 2+.", False),
    best: bool = option("Show the largest gains, first one of each latent.", False),
    worst: bool = option("Show the smallest gains, first one of each latent.", False),
    random: bool = option("Show a random sample (default).", False),
    seed: int = option("Seed of the random sample.", 0),
    count: int = option("Number of transcripts.", 3, "--count", "-n", min=1),
    runs: RunsFolder = RUNS,
) -> None:
    """Print responses with their attempts and scores, and how often a restart helps."""
    from steerback.jobs.judging import probe_lines
    from steerback.report.transcripts import Choice, choose, how_often, measured_rows, transcript
    from steerback.store.run import Run, find_run

    if best + worst + random > 1:
        raise SteerbackError("--best, --worst and --random exclude one another; give one")
    if restarts and attempts not in (None, "2+"):
        raise SteerbackError("--restarts is --attempts 2+; give one of them")
    order: Literal["best", "worst", "random"] = "best" if best else "worst" if worst else "random"
    choice = Choice(trial, condition, latent, "2+" if restarts else attempts, order, count, seed)
    hold_many_records()
    with Run.read(find_run(name, runs)) as opened:
        verdicts = opened.judge(judge)
        measured = [] if trial is not None else measured_rows(opened.ledger, verdicts, condition)
        rows = choose(opened.ledger, verdicts, choice, measured)
        lines = how_often(measured)
        lines += probe_lines(opened, verdicts)
    for row in rows:
        print(transcript(row, colour=in_colour()))
    say_lines(lines)


def compare(
    names: RunNames = None,
    published: bool = option("Compare with the published numbers, also when two runs are named.", False),
    out: Path | None = option("Folder for compare.txt, .csv, .json and .md."),
    form: str = option("Printed form: text, csv, json or markdown.", "text", "--format"),
    runs: RunsFolder = RUNS,
) -> None:
    """Compare two runs, or any number of runs with the published numbers."""
    from steerback import api
    from steerback.jobs.campaign import COMPARED, compared, in_form
    from steerback.store.run import finished_runs

    if form not in COMPARED:
        raise unknown("format", form, COMPARED)
    if names is not None and len(names) == 2 and not published:
        both = api.compare(names[0], names[1], runs)
        folder = None if out is None else make_folder(out, OTHER)
        text, paths = in_form(both.table, both.text(), both.table.markdown(), form, folder)
    else:
        folders = finished_runs(names, runs)
        text, paths = compared(folders, form, None if out is None else make_folder(out, OTHER))
    say(text)
    say_lines(f"  {path}" for path in paths)


def import_command(
    files: list[Path] = argument("Result files of the authors' code. Name all files of a run together.", ...),
    name: str | None = option("Name of the new run; default: the first file's."),
    target: str | None = option("Name of the model; default: from the files."),
    judge: str | None = option("Name of the judge; default: from the files."),
    condition: str | None = option("Name of the condition; default: from the files."),
    detectors: Path | None = option("JSON list of the detectors, if several sets were ablated."),
    runs: RunsFolder = RUNS,
) -> None:
    """Import result files of the authors' code (.json, .json.gz) as a run."""
    from steerback.experiments.detectors import read_latents
    from steerback.jobs import campaign
    from steerback.published.authors import import_authors
    from steerback.store.run import new_or_nothing, new_run, plain

    listed = None if detectors is None else [k for k in read_latents(detectors) if isinstance(k, int)]
    usual = plain(files[0].name.removesuffix(".gz").removesuffix(".json")) or "imported"
    folder = new_run(usual if name is None else name, runs)
    with new_or_nothing(folder):
        imported = import_authors(files, folder, target, judge, condition, listed)
        analysis = campaign.reanalyse(folder)
    say_lines([*imported.lines(), *campaign.report(analysis)])


def export(
    run: RunName,
    form: str | None = option("csv (default), parquet, authors (JSON), inspect or hf.", None, "--format"),
    out: Path | None = option("Folder, or for csv and parquet the file, e.g. trials.csv; default: export in the run."),
    judge: VerdictsOf = None,
    license_name: str | None = option("hf: licence on the dataset card; default: unknown.", None, "--license"),
    push: str | None = option("hf: upload the dataset there; private if it is new.", metavar="OWNER/NAME"),
    runs: RunsFolder = RUNS,
) -> None:
    """Write the trials of a run: CSV, parquet, the authors' JSON, Inspect logs, dataset."""
    from steerback.published.exports import export_authors
    from steerback.report import dataset
    from steerback.report.export import FLAT, FORMATS, export_flat
    from steerback.report.inspect_logs import export_inspect, require_inspect
    from steerback.store.run import Run, find_run

    file = out if out is not None and out.suffix.removeprefix(".") in FLAT and not out.is_dir() else None
    form = form or (file.suffix.removeprefix(".") if file else "csv")
    if form not in FORMATS:
        raise unknown("export format", form, FORMATS)
    if file is not None and file.suffix != f".{form}":
        raise SteerbackError(f"--out {file} is not a file of format {form}; name a folder, or leave out --format")
    if form != "hf" and (push or license_name):
        raise SteerbackError("--push and --license belong to --format hf")
    if form == "inspect":
        require_inspect()
    if push:
        dataset.check_repository(push)
    hold_many_records()
    with Run.read(find_run(run, runs)) as opened:
        chosen, known = opened.judge(judge), opened.ledger.judges()
        folder = make_folder(file.parent if file else out or opened.folder / "export", OTHER)
        if form == "authors":
            paths = export_authors(opened, folder, chosen)
        elif form == "inspect":
            paths = export_inspect(opened, make_folder(folder / "inspect", OTHER), [chosen] if judge else known)
        elif form == "hf":
            place = make_folder(folder / "dataset", OTHER)
            paths = dataset.export_dataset(opened, place, chosen, license_name or "unknown")
        else:
            paths = [export_flat(opened.ledger, file or folder / f"trials.{form}", chosen, form)]
    say_lines(f"  {path}" for path in paths)
    if push:
        say(f"  {dataset.push(place, push)}")


def merge_command(
    names: list[str] = argument("Two or more runs of the same plan.", ...),
    name: str = option("Name of the new run.", ...),
    runs: RunsFolder = RUNS,
) -> None:
    """Join runs of one plan that several machines worked on."""
    from steerback.jobs import campaign
    from steerback.store.merge import merge
    from steerback.store.run import find_run, new_run

    folder = new_run(name, runs)
    joined = merge([find_run(n, runs) for n in names], folder)
    say(
        f"{joined.runs} runs joined: {joined.trials:,} trials; {joined.repeated:,} had been generated twice, "
        f"{joined.differing:,} of them with another text (the first run's is kept)"
    )
    say_lines(campaign.report(campaign.reanalyse(folder)))


def view(
    names: list[str] = argument("Runs: names under --runs, or paths of folders.", ...),
    out: Path | None = option("HTML file to write. Default: view.html in the run's folder."),
    judge: VerdictsOf = None,
    record: bool = option("Load the target and record the activations of some responses.", False),
    trial: list[str] | None = option("With --record: record this trial. Repeatable."),
    stage: list[str] | None = option("Show trials of this stage instead of the measured ones. Repeatable."),
    max_trials: int = option("Most trials to show. Larger runs are sampled.", 5000, min=1),
    browse: bool = option("Open the file in a browser.", False, "--open"),
    runs: RunsFolder = RUNS,
) -> None:
    """Write an HTML page of runs: rates, all trials, activations, calibration."""
    from steerback.errors import SteerbackError
    from steerback.jobs.execute import tools
    from steerback.jobs.view import ViewSettings, write_view
    from steerback.report.view_trials import STAGES
    from steerback.store.files import make_folder
    from steerback.store.run import find_run

    hold_many_records()
    if trial and not record:
        raise SteerbackError("--trial names trials whose activations are read; add --record")
    folders = [find_run(name, runs) for name in names]
    path = out or (folders[0] if len(folders) == 1 else runs) / "view.html"
    make_folder(path.parent, "choose another --out")
    settings = ViewSettings(judge, tuple(stage or STAGES), max_trials, record, tuple(trial or ()))
    with tools(cached=False) as (progress, _):
        write_view(folders, path, settings, progress)
    say(f"{path} ({path.stat().st_size / 1e6:.1f} MB; it needs no network)")
    if browse:
        import webbrowser

        webbrowser.open(path.absolute().as_uri())
