"""Python interface: start and open runs, read their trials, tables and figures, compare two runs.

import steerback as sb
run = sb.run("esr", target="organism", preset="quick", name="first")
run.to_pandas().groupby("label").attempts.mean()
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from steerback.config import RunConfig, build_config, differences
from steerback.errors import SteerbackError as SteerbackError
from steerback.errors import clipped, unknown
from steerback.jobs import campaign, execute
from steerback.jobs.check import Makers, PreparedRun, check, start_from
from steerback.jobs.fork import fork as fork
from steerback.jobs.loaded import LoadedTarget as LoadedTarget
from steerback.jobs.loaded import load_target as load_target
from steerback.records import Intervention as Intervention
from steerback.records import LatentKey
from steerback.report.transcripts import choose, row_html, transcript
from steerback.store.facts import IMPORTED
from steerback.store.ledger import Row
from steerback.store.run import Run, find_run, new_run, plain

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from steerback.analysis.forks import Forked
    from steerback.analysis.two_runs import TwoRuns
    from steerback.experiments.paper import Step
    from steerback.figures.tables import Table
    from steerback.jobs.execute import Analysis
    from steerback.report.transcripts import Choice

RUNS = Path("runs")
"""Folder that holds the run folders."""


@dataclass(frozen=True, repr=False)
class RunTrial:
    """A trial of a run with its response and the judge's verdict; `row` holds the records."""

    row: Row

    @property
    def key(self) -> str:
        return self.row.trial.key

    @property
    def prompt(self) -> str:
        return self.row.trial.prompt

    @property
    def text(self) -> str:
        """Text that the judge saw; "" if no response exists."""
        return self.row.judged_text

    @property
    def attempts(self) -> list[tuple[float, str]]:
        """Score and text of each attempt; empty if the response is invalid, unscored or not judged."""
        return [(a.score, self.text[a.start : a.end]) for a in self.row.attempts]

    @property
    def gain(self) -> float:
        """Score of the last attempt minus score of the first attempt, in points."""
        return self.row.gain

    def show(self, colour: bool = False) -> None:
        """Print the transcript: prompt, steering, attempts with scores and character spans."""
        print(transcript(self.row, colour))

    def __repr__(self) -> str:
        scores = ", ".join(f"{score:.0f}" for score, _ in self.attempts) or "not scored"
        return f"<trial {self.key}: {scores}: {clipped(self.text)!r}>"

    def _repr_html_(self) -> str:
        return row_html(self.row)


class PrintedSummary(dict[str, object]):
    """Content of summary.json. Its `repr` is one line."""

    def __repr__(self) -> str:
        return f"<summary of {self.get('experiment')} by judge {self.get('judge')}: {', '.join(self)}>"


@dataclass(frozen=True, repr=False)
class StudyRun:
    """A finished or unfinished run with the verdicts of one judge. It reads the ledger and needs no model."""

    folder: Path
    config: RunConfig
    judge: str

    @property
    def name(self) -> str:
        return self.folder.name

    def rows(self, choice: Choice | None = None, stage: str = "measure") -> list[Row]:
        """Return trials with response and verdict as records: the trials of `choice`, or all of a stage."""
        with Run.read(self.folder) as opened:
            if choice is None:
                return opened.ledger.rows(stage=stage, judge=self.judge)
            return choose(opened.ledger, self.judge, choice)

    def trials(self, stage: str = "measure") -> list[RunTrial]:
        """Return the trials of a stage in the order of the plan."""
        return [RunTrial(row) for row in self.rows(stage=stage)]

    def trial(self, key: str) -> RunTrial:
        """Return one trial. Raises SteerbackError for an unknown key."""
        from steerback.report.transcripts import Choice

        return RunTrial(self.rows(Choice(key=key))[0])

    def to_pandas(self, stage: str | None = "measure") -> pd.DataFrame:
        """Return one row per trial of a stage (None: of all stages), with the columns of `steerback export`."""
        from steerback.report.export import trial_table

        with Run.read(self.folder) as opened:
            return trial_table(opened.ledger, self.judge, stage).infer_objects()

    @property
    def unknown_settings(self) -> frozenset[str]:
        """Settings that the files of an imported run do not contain."""
        with Run.read(self.folder) as opened:
            files = opened.ledger.get("", IMPORTED)
        return frozenset() if files is None else frozenset(files.unknown)

    @cached_property
    def analysis(self) -> Analysis:
        """Results, tables and figures, computed from the ledger."""
        with Run.read(self.folder) as opened:
            return execute.analysed(opened, self.judge)

    @property
    def summary(self) -> PrintedSummary:
        """All results, equal to summary.json."""
        return PrintedSummary(self.analysis.summary)

    @property
    def tables(self) -> Mapping[str, Table]:
        """Tables by name."""
        return self.analysis.shown.tables

    @property
    def figures(self) -> list[str]:
        """Names of the figures."""
        return list(self.analysis.shown.figures)

    def figure(self, name: str) -> Figure:
        """Draw the figure `name`. A unique beginning of the name is enough ("figure2").

        Raises SteerbackError for an unknown or ambiguous name.
        """
        drawn = self.analysis.shown.figures
        fits = [known for known in drawn if known == name] or [known for known in drawn if known.startswith(name)]
        if len(fits) != 1:
            raise unknown(f"figure of run {self.name}", name, fits or drawn)
        return drawn[fits[0]]()

    def fork(
        self,
        trial: str | RunTrial,
        at: str | int,
        *,
        n: int = 32,
        ablate: str | None = None,
        boosts: Sequence[float] = (),
        arms: Sequence[str] = (),
        throughout: bool = False,
    ) -> Forked:
        """Continue the response of a trial from one of its tokens in several arms; see `steerback.fork`."""
        key = trial.key if isinstance(trial, RunTrial) else trial
        run, judge = self.folder, self.judge
        return fork(run, key, at, n=n, ablate=ablate, boosts=boosts, arms=arms, throughout=throughout, judge=judge)

    def __repr__(self) -> str:
        return f"<run {self.name}: {self.config.experiment} of {', '.join(self.config.targets)}, judge {self.judge}>"

    def _repr_html_(self) -> str:
        table = next(iter(self.tables.values()), None)
        return "" if table is None else table._repr_html_()


def run(
    experiment: str,
    target: str | Sequence[str] | None = None,
    *,
    name: str | None = None,
    preset: str | None = None,
    config: Path | None = None,
    from_run: str | Path | StudyRun | None = None,
    latents: Sequence[LatentKey] | int | None = None,
    runs: Path | str = RUNS,
    cached: bool = True,
    quiet: bool = False,
    makers: Makers | None = None,
    **settings: object,
) -> StudyRun:
    """Run or resume an experiment and return the finished run.

    `settings` are the settings of `--set`: `trials_per_latent=5`, `sampling={"temperature": 0.8}`. `latents` is a list
    of indices or labels, or the number of latents to sample. `from_run` is the base run, whose latents, thresholds,
    prompts and seeds are used again. The same `name` resumes a run. `cached`: use the shared cache of responses and
    verdicts. `quiet`: print no progress. Raises SteerbackError for invalid arguments and settings.
    """
    base = None if from_run is None else _base(from_run, Path(runs))
    targets = (target,) if isinstance(target, str) else tuple(target or (base[1].targets if base else ()))
    if not targets:
        raise SteerbackError("no target to steer: set target=..., or start from a run with from_run=...")
    if latents is not None:
        settings |= chosen_latents(latents, targets[0], base)
    built = build_config(experiment, targets, preset, config, settings, (), base)
    return carry_out(check(built, makers), run_folder(built, name, Path(runs)), cached, quiet)


def _base(given: str | Path | StudyRun, runs: Path) -> tuple[str, RunConfig]:
    folder = given.folder if isinstance(given, StudyRun) else find_run(str(given), runs)
    return start_from(folder)


def chosen_latents(
    latents: str | Sequence[LatentKey] | int, target: str, base: tuple[str, RunConfig] | None = None
) -> dict[str, object]:
    """Return the setting `n_latents` or `latents` for the user's choice of latents.

    A text has the form of `--latents`: a number, a list separated by commas, or a file.
    """
    from steerback.latents.sampling import check_latents, parse_latents
    from steerback.targets import resolve

    first = resolve(target, base[1].definitions if base else None)
    if isinstance(latents, str):
        chosen = parse_latents(latents, first.labels(), directions=first.directions())
    elif isinstance(latents, int):
        chosen = latents
    else:
        chosen = tuple(check_latents(latents, first.labels(), first.n_latents or None, first.directions()))
    return {"n_latents": chosen} if isinstance(chosen, int) else {"latents": chosen}


def run_folder(config: RunConfig, name: str | None, runs: Path) -> Path:
    """Return the folder of a run: `name` under `runs`, by default named after experiment and targets."""
    usual = plain(f"{config.experiment}-{'+'.join(config.targets)}")
    return new_run(usual if name is None else name, runs)


def carry_out(job: PreparedRun, folder: Path, cached: bool = True, quiet: bool = False) -> StudyRun:
    """Execute or resume a prepared run in `folder`."""
    with execute.tools(cached, quiet) as (progress, cache):
        analysis = execute.run(job, folder, progress, cache)
    done = StudyRun(folder, job.config, job.config.judge)
    done.__dict__["analysis"] = analysis
    return done


def open_run(path: str | Path, judge: str | None = None, runs: Path | str = RUNS) -> StudyRun:
    """Open a run by the path of its folder or by its name in `runs`, with the verdicts of `judge`.

    `judge` None: the judge of the run. Raises SteerbackError if the run or the verdicts do not exist.
    """
    folder = find_run(str(path), Path(runs))
    with Run.read(folder) as opened:
        return StudyRun(folder, opened.config, opened.judge(judge))


def paper(
    target: str | Sequence[str],
    *,
    name: str = "paper",
    preset: str | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    settings: Sequence[str] = (),
    runs: Path | str = RUNS,
    cached: bool = True,
    say: Callable[[str], None] = print,
) -> list[StudyRun]:
    """Run all experiments of the paper in order and return the finished runs.

    `settings` are texts as in `--set`; `boost-sweep.high=6` applies to one experiment. `only` and `skip` select
    experiments. The folder NAME-results receives all figures and the comparison with published numbers. If an
    experiment fails, the others are still executed; then SteerbackError is raised.
    """
    from steerback.experiments.paper import own_options, plan

    targets = (target,) if isinstance(target, str) else tuple(target)
    common, options = own_options(settings)
    first = campaign.resolved(build_config("esr", targets, preset, assignments=tuple(common)))
    steps = plan(first, Path(runs), name, only, skip, options)
    return carry_out_paper(steps, Path(runs) / f"{name}-results", cached, say)


def carry_out_paper(
    steps: Sequence[Step], out: Path, cached: bool, say: Callable[[str], None], makers: Makers | None = None
) -> list[StudyRun]:
    """Execute the unfinished steps; write comparison and figures of all finished steps into `out`."""
    failed = campaign.run(steps, cached, say, makers)
    done = [step.folder for step in steps if campaign.is_done(step)]
    for line in campaign.results(done, out):
        say(line)
    campaign.refuse(failed, len(steps))
    return [open_run(folder) for folder in done]


@dataclass(frozen=True, repr=False)
class RunComparison:
    """Comparison of two runs. `results` contains all rates and tests; `table` shows them."""

    a: StudyRun
    b: StudyRun
    results: TwoRuns

    @property
    def judge(self) -> str:
        """Judge of both runs, or both judges if they differ."""
        return self.a.judge if self.a.judge == self.b.judge else f"{self.a.judge} (a), {self.b.judge} (b)"

    @property
    def table(self) -> Table:
        """Table with one row for each compared condition and metric."""
        from steerback.figures.two_runs import runs_table

        return runs_table(self.results, self.judge)

    @property
    def settings(self) -> list[str]:
        """Different settings of the runs as `setting: a -> b`, without unknown settings of imported runs."""
        unknown = self.a.unknown_settings | self.b.unknown_settings
        known = [x for x in differences(self.a.config, self.b.config) if x.partition(":")[0] not in unknown]
        return known + (["settings that the imported files do not contain are not compared"] if unknown else [])

    def text(self, width: int = 80) -> str:
        """Return a text with both runs, their different settings, and rates and differences by condition."""
        from steerback.figures.two_runs import runs_text

        lines = [f"{side}  {run.folder} ({run.config.experiment})" for side, run in (("a", self.a), ("b", self.b))]
        lines += [textwrap.fill(x, width, initial_indent="   ", subsequent_indent="     ") for x in self.settings]
        return "\n".join([*lines, "", runs_text(self.results, self.judge, width)])

    def to_pandas(self) -> pd.DataFrame:
        """Return one row for each comparison and metric, with unrounded numbers."""
        return self.table.numbers.infer_objects()

    def __repr__(self) -> str:
        return f"<comparison of run {self.b.name} with run {self.a.name}: {', '.join(self.results.rates)}>"

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def compare(run_a: StudyRun | str | Path, run_b: StudyRun | str | Path, runs: Path | str = RUNS) -> RunComparison:
    """Compare the measured trials of two runs by condition. Differences are b - a.

    Trials are paired if the runs share prompts, seeds and latents; otherwise latents are permuted between the runs.
    Confidence intervals are clustered by latent. Raises SteerbackError if the runs have no condition in common.
    """
    from steerback.analysis.two_runs import compare_runs

    a, b = (r if isinstance(r, StudyRun) else open_run(r, runs=runs) for r in (run_a, run_b))
    with Run.read(a.folder) as first, Run.read(b.folder) as second:
        results = compare_runs(first.ledger, second.ledger, (a.judge, b.judge))
        if not results.rates:
            conditions = (f"{r.name} has {_conditions(opened)}" for r, opened in ((a, first), (b, second)))
            raise SteerbackError(f"the runs have no measured target and condition in common: {'; '.join(conditions)}")
    return RunComparison(a, b, results)


def _conditions(run: Run) -> str:
    return ", ".join(f"{target}: {condition}" for target, condition in run.ledger.conditions()) or "none"
