"""Campaigns: perform the steps of a plan in order, draw all their figures into one folder, repeat analyses.

Each step is an ordinary run, so it can be stopped and resumed. The engine is started once for each target.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from steerback.config import RunConfig, parse_config
from steerback.engines.base import finish
from steerback.engines.options import has_one_queue
from steerback.errors import SteerbackError
from steerback.figures.tables import terminal_width
from steerback.jobs import execute, side_by_side
from steerback.jobs.check import Makers, check
from steerback.jobs.estimate import judge_estimate, of_experiment, response_tokens, window_spend
from steerback.jobs.execute import Analysis, KeptEngine
from steerback.judging.llm import lacking
from steerback.published.comparison import compare_published, comparison
from steerback.records import Spend
from steerback.store.files import make_folder, write_atomic
from steerback.store.processes import helpers
from steerback.store.run import Run, stored_config
from steerback.study.pipeline import all_or_none
from steerback.study.study import UNJUDGED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from steerback.experiments.paper import Step
    from steerback.figures.tables import Table
    from steerback.jobs.check import PreparedRun
    from steerback.store.cache import Cache
    from steerback.store.progress import Progress


def resolved(config: RunConfig, makers: Makers | None = None) -> RunConfig:
    """Return the config with its engine and judge resolved, as a run stores it."""
    return check(config, makers).config


def is_done(step: Step) -> bool:
    """Return True if the run of this step is finished and has the same config."""
    if not (step.folder / "summary.json").is_file() or not (step.folder / "ledger.sqlite").is_file():
        return False
    return stored_config(step.folder) == step.config


def plan_lines(steps: Sequence[Step], makers: Makers | None = None) -> list[str]:
    """Return one line for each run of a campaign, with upper bounds for responses, tokens, verdicts and minutes."""
    jobs = [(step, _checked(step, makers)) for step in steps]
    lines, total, verdicts = [], Counter[str](), Counter[str]()
    shared: set[str] = set()  # an earlier step has generated these stages, so their responses are in the cache
    for step, job in jobs:
        cost, asked = _cost(job, shared), _verdicts(job)
        first = job.config.targets[0]
        shared |= {stage for stage, n in of_experiment(job, first).items() if n and stage in UNJUDGED}
        state = f"at most {cost['responses']:,} responses, {cost['tokens']:,} tokens"
        if not job.experiment.generates:
            state = f"at most {max(asked.values())} of them judged by {', '.join(asked)}"
        if is_done(step):
            state = "done"
        else:
            total.update(cost)
            verdicts.update(asked)
        lines.append(f"{step.folder.name}: {job.experiment.title}: {state}")
    minutes = "" if total["unknown"] else f", about {max(total['seconds'] / 60, 0.1):.0f} min at the targets' speeds"
    counted = ", ".join(f"{n:,} verdicts of judge {name}" for name, n in verdicts.items())
    lines.append(
        f"to do: at most {total['responses']:,} responses, {total['tokens']:,} tokens, {counted}{minutes}; "
        "cached responses and verdicts are used again"
    )
    longest = max(response_tokens(job.config, target) for _, job in jobs for target in job.targets)
    for name, n in verdicts.items():
        judge = (makers or Makers()).judge(name)
        asked_for = judge_estimate(judge, n, longest)
        lines += [] if asked_for is None else [f"judge {name}: at most {asked_for}", *lacking(judge)]
    open_jobs = [job for step, job in jobs if not is_done(step) and job.experiment.generates]
    windows = [spend for job in open_jobs for t in job.targets if (spend := window_spend(job, t)) is not None]
    if windows:
        lines.append(f"sentences scored: at most {sum(windows, Spend())}")
    return lines


def _checked(step: Step, makers: Makers | None) -> PreparedRun:
    try:
        return check(step.config, makers)
    except SteerbackError as error:
        raise SteerbackError(
            f"{step.folder.name}: {error} (leave it out with --skip {step.config.experiment})"
        ) from None


def _verdicts(job: PreparedRun) -> Counter[str]:
    """Return the largest number of verdicts that a job needs, by judge."""
    if not job.experiment.generates:  # verdicts of the runs' own judges exist already
        names = [name for name in job.experiment.judges(job.config) if name != job.config.judge]
        return Counter({name: sum(of_experiment(job, job.config.targets[0]).values()) for name in names})
    each = [n for t in job.targets for stage, n in of_experiment(job, t.name).items() if stage not in UNJUDGED]
    return Counter({job.config.judge: sum(each)})


def _cost(job: PreparedRun, shared: set[str]) -> Counter[str]:
    cost: Counter[str] = Counter()
    for target in job.targets:
        responses = sum(n for stage, n in of_experiment(job, target.name).items() if stage not in shared)
        cost["responses"] += responses
        cost["tokens"] += responses * response_tokens(job.config, target)
        speed = target.responses_per_second
        cost["seconds"] += round(responses / speed) if speed else 0
        cost["unknown"] += speed is None
    return cost


def run(
    steps: Sequence[Step], cached: bool, say: Callable[[str], None], makers: Makers | None = None
) -> dict[Path, str]:
    """Run the unfinished steps and return the folders of the failed ones, each with its reason.

    A failed step stops only the steps that depend on it. All steps of one target share its engine, which is started
    once; several small models on a CPU share the cores, see `side_by_side`.
    """
    heads = {step.folder: f"[{number}/{len(steps)}] {step.folder.name}" for number, step in enumerate(steps, 1)}
    undone = [step for step in steps if not is_done(step)]
    jobs = [_valid(step, makers) for step in undone] if len(undone) > 1 else []
    if jobs and jobs[0] is not None and side_by_side.possible(jobs[0]):
        for step in steps:
            if step not in undone:
                say(f"{heads[step.folder]}: done before")
        return _side_by_side(undone, heads, cached, say, makers)
    targets = list(dict.fromkeys(name for step in steps for name in step.config.targets))
    with closing(KeptEngine()) as engines, ExitStack() as stack:
        kept = _Kept(engines, stack if can_overlap(jobs) else None, cached, say, makers)
        for target in targets:
            named = {folder: head + (f": {target}" if len(targets) > 1 else "") for folder, head in heads.items()}
            finish(kept.measure([step for step in steps if target in step.config.targets], target, named))
    return kept.failed


def _valid(step: Step, makers: Makers | None) -> PreparedRun | None:
    """Return the checked config of a step; None if it has an error, which is reported when the step is run."""
    try:
        return _checked(step, makers)
    except SteerbackError:
        return None


TOGETHER = 3
"""Steps that share an engine at the same time: while some begin, end or are judged, the others keep the GPU busy."""


def can_overlap(jobs: Sequence[PreparedRun | None]) -> bool:
    """Return True if one engine takes the requests of all steps at a time.

    A step with adapters changes what the engine serves, and a step with other options needs another engine.
    """
    valid = [job for job in jobs if job is not None]
    shared = all(job.engine == valid[0].engine and not any(t.adapter for t in job.targets) for job in valid)
    return len(valid) == len(jobs) > 1 and shared and has_one_queue(valid[0].engine)


@dataclass
class _Kept:
    """Steps that share a kept engine: one by one in their order, or with an `overlap` `TOGETHER` at a time.

    With an `overlap`, steps that begin long chains come first. Another process analyses all steps and ends with it.
    """

    engines: KeptEngine
    overlap: ExitStack | None
    cached: bool
    say: Callable[[str], None]
    makers: Makers | None
    failed: dict[Path, str] = field(default_factory=dict)

    @cached_property
    def analyst(self) -> Executor | None:
        """The process that analyses steps; its first use starts it, after the engine, which may be a fork."""
        started = helpers(1)
        return self.overlap.enter_context(started) if self.overlap and started else None

    async def measure(self, steps: Sequence[Step], target: str, heads: Mapping[Path, str]) -> None:
        """Measure a target in all steps, in order; each begins when the step that it needs has been measured."""
        places = asyncio.Semaphore(TOGETHER if self.overlap else 1)
        steps = longest_first(steps, self.makers) if self.overlap else steps
        measured = {step.folder: asyncio.Event() for step in steps}
        await all_or_none([self._step(step, target, heads[step.folder], places, measured) for step in steps])

    async def _step(
        self, step: Step, target: str, head: str, places: asyncio.Semaphore, measured: Mapping[Path, asyncio.Event]
    ) -> None:
        if step.after is not None and step.after in measured:
            await measured[step.after].wait()
        await places.acquire()
        with ExitStack() as place:
            place.callback(measured[step.folder].set)
            place.callback(places.release)
            if step.folder in self.failed:
                return
            if is_done(step):
                self.say(f"{head}: done before")
                return
            try:
                if step.after is not None and step.after in self.failed:
                    raise SteerbackError(f"needs {step.after.name}")
                if not self.overlap:
                    self.say(head)
                analyse = partial(self._analyse, place) if self.overlap else None
                with execute.tools(self.cached, head=f"{step.folder.name}: " if self.overlap else "") as tools:
                    lines = await _one(step, target, self.engines, *tools, self.makers, analyse)
                for line in [head, *lines] if self.overlap else lines:
                    self.say(line)
            except SteerbackError as error:
                self.failed[step.folder] = str(error)
                self.say(f"{head}: not done: {error}")

    async def _analyse(self, place: ExitStack, folder: Path) -> list[str]:
        """Let the next step begin, analyse this one in the other process, and return the lines to print."""
        place.close()
        if self.analyst is not None:
            with suppress(BrokenExecutor):
                return await asyncio.get_running_loop().run_in_executor(self.analyst, _analysed, folder)
        return _analysed(folder)


def _side_by_side(
    steps: Sequence[Step], heads: Mapping[Path, str], cached: bool, say: Callable[[str], None], makers: Makers | None
) -> dict[Path, str]:
    """Run unfinished steps in several processes, each after the step that it needs. The longest chains start first."""
    engines, known = KeptEngine(), {step.folder: step for step in steps}
    steps = longest_first(steps, makers)
    failed: dict[Path, str] = {}
    pending = set(known)

    def work(step: Step) -> list[str]:
        if step.after in known and not is_done(known[step.after]):
            raise SteerbackError(f"needs {step.after.name}")
        lines = []
        with execute.tools(cached, head=f"{step.folder.name}: ") as (progress, cache):
            for target in step.config.targets:
                lines += finish(_one(step, target, engines, progress, cache, makers))
        return lines

    for step, result in side_by_side.each(steps, work, lambda step: step.after not in pending):
        pending.discard(step.folder)
        if isinstance(result, SteerbackError):
            failed[step.folder] = str(result)
            say(f"{heads[step.folder]}: not done: {result}")
            continue
        say(heads[step.folder])
        for line in result:
            say(line)
    return failed


def carry_out(steps: Sequence[Step], cached: bool, say: Callable[[str], None], makers: Makers | None = None) -> None:
    """Run the unfinished steps. Raises SteerbackError if one of them failed."""
    refuse(run(steps, cached, say, makers), len(steps))


def refuse(failed: Mapping[Path, str], of: int) -> None:
    """Raise a SteerbackError that lists the failed steps, if there are any."""
    if failed:
        reasons = "; ".join(f"{folder.name}: {why}" for folder, why in failed.items())
        raise SteerbackError(f"{len(failed)} of {of} experiments could not be done: {reasons}")


def longest_first(steps: Sequence[Step], makers: Makers | None) -> list[Step]:
    """Return the steps in the order to start them: first the one that begins the chain with the most responses."""
    left = Counter[Path]()
    for step in reversed(steps):
        if (job := _valid(step, makers)) is not None:
            left[step.folder] += _cost(job, set())["responses"]
        if step.after is not None:
            left[step.after] = max(left[step.after], left[step.folder])
    return sorted(steps, key=lambda step: -left[step.folder])


async def _one(
    step: Step,
    name: str,
    engines: KeptEngine,
    progress: Progress,
    cache: Cache | None,
    makers: Makers | None,
    analyse: Callable[[Path], Awaitable[list[str]]] | None = None,
) -> list[str]:
    """Measure one target of a step. After the step's last target, analyse the step and return the lines to print."""
    job = _checked(step, makers)
    position = step.config.targets.index(name)
    last = position == len(step.config.targets) - 1
    if not last and not job.experiment.generates:
        return []
    targets = job.targets[position:] if last else job.targets[position : position + 1]  # adapters come last
    with Run.start(step.folder, job.config) as opened:
        await execute.measure(job, opened, targets, engines, progress, cache)
        if not last:
            return []
        progress.status("analysing, drawing figures")
        if analyse is not None:
            return await analyse(step.folder)
        return _shown(execute.analyse(opened, job.config.judge, job.experiment))


def _analysed(folder: Path) -> list[str]:
    return _shown(reanalyse(folder))


def _shown(analysis: Analysis) -> list[str]:
    """Return the lines to print about a step of a campaign."""
    shown = analysis.shown
    tables = dict.fromkeys([*list(shown.tables)[:1], *(name for name in shown.tables if name == PAIRED)])
    return [*shown.warnings, *(shown.tables[name].text(terminal_width()) for name in tables), *shown.lines]


PAIRED = "comparisons"
"""Name of the table of paired tests between conditions."""


def reanalyse(
    folder: Path, judge: str | None = None, draws: int | None = None, captions_inside: bool = False
) -> Analysis:
    """Repeat the analysis of a run from its ledger and write the results into its folder.

    `judge` and `draws` (bootstrap draws) replace those of the run's config. `captions_inside` draws the captions
    inside the figures.
    """
    with Run.read(folder) as opened:
        if draws is not None:  # `parse_config` checks the bounds
            parse_config(opened.config.model_dump(mode="json") | {"draws": draws}, "figures")
        return execute.analyse(opened, opened.judge(judge), draws=draws, captions_inside=captions_inside)


def report(analysis: Analysis) -> list[str]:
    """Return the lines to print about an analysis: its tables, its messages and the files in its folder."""
    tables = [line for table in analysis.shown.tables.values() for line in ("", table.text(terminal_width()))]
    shown = sorted(p for p in analysis.folder.iterdir() if p.is_file() and not p.name.startswith("."))
    files = [p for p in shown if not p.name.endswith(("-wal", "-shm"))]
    return [*analysis.shown.warnings, *tables, *analysis.shown.lines, "", *(f"  {path}" for path in files)]


COMPARED = {"text": "txt", "csv": "csv", "json": "json", "markdown": "md"}
"""Output formats of a comparison and their file suffixes."""


def compared(folders: Sequence[Path], form: str, out: Path | None = None) -> tuple[str, list[Path]]:
    """Compare runs with the published numbers. Return the text in the format `form`, and the files in `out`."""
    table, notes = comparison(compare_published(folders))
    listed = "\n".join(["", "Deviations that are known:", *notes, ""]) if notes else ""
    return in_form(table, table.text(terminal_width()) + listed, table.markdown() + listed, form, out)


def in_form(table: Table, text: str, markdown: str, form: str, out: Path | None) -> tuple[str, list[Path]]:
    """Return a comparison in the format `form` (one of `COMPARED`). Write all formats into `out`, if it is set."""
    forms = {"text": text, "csv": table.csv(), "json": table.json(), "markdown": markdown}
    if out is None:
        return forms[form], []
    return forms[form], [write_atomic(out / f"compare.{COMPARED[f]}", part.encode()) for f, part in forms.items()]


def results(folders: Sequence[Path], out: Path) -> list[str]:
    """Write the comparison into `out`, and copy all figures of the runs. Return the lines to print about them."""
    from steerback.figures.style import copy_figure, figure_names

    text, paths = compared(folders, "text", make_folder(out, "choose another --runs"))
    named = [(folder, name) for folder in folders for name in figure_names(folder)]
    for folder, name, own in _own_names(named):
        paths += copy_figure(folder, name, out, own)
    return [text, *(f"  {path}" for path in paths)]


def _own_names(figures: Sequence[tuple[Path, str]]) -> list[tuple[Path, str, str]]:
    """Return folder, name and name in a common folder of figures: if runs share a name, it is followed by the run's."""
    shared = Counter(name for _, name in figures)
    return [(folder, name, name if shared[name] == 1 else f"{name}-{folder.name}") for folder, name in figures]


def draw_all(folders: Sequence[Path], out: Path, captions_inside: bool = False) -> list[Path]:
    """Draw all figures of the runs into one folder. If several runs have the same figure, its file names the run."""
    from steerback.figures.style import save

    figures: dict[tuple[Path, str], Callable[[], Figure]] = {}
    for folder in folders:
        with Run.read(folder) as opened:
            shown = execute.analysed(opened, opened.config.judge).shown
        figures |= {(folder, name): draw for name, draw in shown.figures.items()}
    paths: list[Path] = []
    for folder, name, own in _own_names([*figures]):
        paths += save(figures[folder, name](), out, own, captions_inside)
    return paths
