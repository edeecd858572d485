"""Execute a prepared run: load each target, run the experiment, ask the judges and write the analysis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from steerback.analysis import analyse as analyse_ledger
from steerback.analysis.base import Results
from steerback.config import Settings
from steerback.data import paper_files
from steerback.engines import EngineOptions
from steerback.engines.base import START_LOG, WHILE_STARTING, EngineStopped, Serves, finish
from steerback.engines.options import has_one_queue
from steerback.errors import SteerbackError
from steerback.experiments import make_experiment
from steerback.experiments.base import Experiment
from steerback.figures import present
from steerback.figures.base import Presentation
from steerback.jobs import side_by_side
from steerback.jobs.check import PreparedRun
from steerback.jobs.estimate import of_experiment
from steerback.jobs.judging import judge_all, note_judge
from steerback.judging.processes import start_early
from steerback.records import digest
from steerback.store.cache import Cache, default_path
from steerback.store.facts import ENGINE, MEASURED, PROVENANCE, EngineIdentity, Provenance
from steerback.store.files import clear_leftovers, make_folder
from steerback.store.ledger import Ledger
from steerback.store.manifest import Parts, TargetUsed
from steerback.store.processes import second_process
from steerback.store.progress import Plain, Progress, Silent, make_progress
from steerback.store.run import Run, write_atomic, write_json
from steerback.study.floor import floor_trials, measure_floor
from steerback.study.pipeline import Workbench, all_or_none
from steerback.study.study import Study, same_weights
from steerback.study.windows import score_windows
from steerback.targets import Target

if TYPE_CHECKING:
    from steerback.engines.base import Engine


@contextmanager
def tools(cached: bool = True, quiet: bool = False, head: str = "") -> Iterator[tuple[Progress, Cache | None]]:
    """Open the progress display (silent if `quiet`) and the shared cache (None if not `cached`); close both at exit.

    `head` starts each line of a process that shares the terminal with others.
    """
    shown = Silent() if quiet else Plain(head=head) if head else make_progress()
    with closing(shown) as progress:
        cache = Cache(default_path(), progress.note) if cached else None
        with closing(cache) if cache is not None else nullcontext():
            yield progress, cache


def begin_early(judge: str, target: Target) -> None:
    """Import and read what selecting, judging and drawing need; it takes seconds."""
    if judge.startswith("offline"):
        start_early("steerback.judging.relevance")
    for name in ("steerback.judging.relevance", "steerback.figures.recovery", "matplotlib.backends.backend_pdf"):
        import_module(name)
    target.labels()  # both are kept
    target.contexts()


class KeptEngine:
    """Starts engines and keeps the last one in memory, so that runs on the same target share it."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._made_with: tuple[Target, EngineOptions] | None = None

    def of(self, target: Target, job: PreparedRun, folder: Path, progress: Progress) -> Engine:
        """Return the engine of the target: the current one, or a new one after the current one is closed.

        The engine writes its log into `folder`, the folder of the run.
        """
        made_with = target, job.engine
        if self._made_with not in (None, made_with) and (other := self._serving(target, job.engine)) is not None:
            self._engine, self._made_with = other, made_with
        if self._engine is None or self._made_with != made_with:
            self.close()  # two engines would not fit on one GPU
            progress.status(f"loading {target.name} into {job.config.engine}")
            log = START_LOG.set(folder / "engine.log")
            work = WHILE_STARTING.set(partial(begin_early, job.config.judge, target))
            try:
                self._engine, self._made_with = job.makers.engine(target, job.engine), made_with
            finally:
                START_LOG.reset(log)
                WHILE_STARTING.reset(work)
        return self._engine

    def _serving(self, target: Target, options: EngineOptions) -> Engine | None:
        """Return the engine of another target on the processes of the current one, if that can serve it."""
        same = self._made_with is not None and self._made_with[1] == options
        return self._engine.serving(target) if same and isinstance(self._engine, Serves) else None

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Release the kept engine, if any, beside the work of the block: vLLM's processes take seconds to end."""
        if self._engine is None:  # no thread, because the block may fork
            yield
            return
        with ThreadPoolExecutor(1) as beside:
            ended = beside.submit(self.close)
            yield
            ended.result()

    def close(self) -> None:
        """Release the kept engine, if any."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


def run(
    job: PreparedRun,
    folder: Path,
    progress: Progress | None = None,
    cache: Cache | None = None,
) -> Analysis:
    """Run or resume a job in `folder` and write its analysis.

    Raises SteerbackError for a problem that the user can solve. After a KeyboardInterrupt the ledger keeps all
    committed work.
    """
    with closing(KeptEngine()) as engines, Run.start(folder, job.config) as opened:
        if len(job.targets) > 1 and job.experiment.generates and side_by_side.possible(job):
            work = side_by_side.each(job.targets, lambda target: _measure_alone(job, folder, target, cache))
            if errors := [str(result) for _, result in work if isinstance(result, SteerbackError)]:
                raise SteerbackError("; ".join(dict.fromkeys(errors)))
        else:
            finish(measure(job, opened, job.targets, engines, progress or Silent(), cache))
        (progress or Silent()).status("analysing, drawing figures")
        with engines.ending():
            return analyse(opened, job.config.judge, job.experiment)


def _measure_alone(job: PreparedRun, folder: Path, target: Target, cache: Cache | None) -> None:
    """Measure one target in a child process. The parent process holds the lock of the run."""
    with closing(KeptEngine()) as engines, closing(Ledger(folder / "ledger.sqlite")) as ledger:
        progress = Plain()
        own = None if cache is None else Cache(cache.path, progress.note)  # SQLite connections must not be forked
        with closing(own) if own is not None else nullcontext():
            finish(measure(job, Run(folder, job.config, ledger, None), [target], engines, progress, own))


async def measure(
    job: PreparedRun,
    opened: Run,
    targets: Sequence[Target],
    engines: KeptEngine,
    progress: Progress,
    cache: Cache | None,
) -> None:
    """Measure some targets of the job and store the results in the ledger.

    An experiment that generates nothing is always executed for all targets.
    """
    progress.expect(sum(sum(of_experiment(job, t.name).values()) for t in targets) if job.experiment.generates else 0)
    if job.experiment.generates:
        await _targets(job, opened, targets, engines, progress, cache)
    else:
        await _collected(job, opened, progress, cache)


async def _targets(
    job: PreparedRun,
    opened: Run,
    chosen: Sequence[Target],
    engines: KeptEngine,
    progress: Progress,
    cache: Cache | None,
) -> None:
    parts: Parts = {
        "prompts": {"source": job.config.prompts, "count": len(job.prompts), "hash": digest(list(job.prompts))},
    }
    if used := paper_files.used(job.config.prompts, job.experiment.own_detectors()):
        parts["paper data"] = {"repository": paper_files.REPOSITORY, "commit": paper_files.COMMIT, "sha256": used}
    for target in chosen:
        try:
            await _target(job, opened, target, engines, progress, cache, parts)
        except BaseException as error:
            if not isinstance(error, SteerbackError) or isinstance(error, EngineStopped):
                engines.close()  # its state is unknown; a refusal, such as a missing detector, leaves it as it was
            raise


async def _target(
    job: PreparedRun,
    opened: Run,
    target: Target,
    engines: KeptEngine,
    progress: Progress,
    cache: Cache | None,
    parts: Parts,
) -> None:
    engine = engines.of(target, job, opened.folder, progress)
    judge = job.makers.judge(job.config.judge)
    _same_engine(opened, target, engine)
    opened.ledger.put(target.name, PROVENANCE, Provenance(planted=target.planted))
    if job.config.from_run is not None:
        same_weights(Path(job.config.from_run), target.name, engine)
    sampling = job.config.of(target.name).sampling.record(target.max_new_tokens)
    bench = Workbench(opened.ledger, engine, judge, sampling, progress, cache, job.config.drop_unscored)
    study = Study(opened, target, bench, job.prompts, job.makers.judge)
    await study.prepare(expected=sum(of_experiment(job, target.name).values()))
    parts["targets"] = _targets_used(job, opened)
    parts["judge"] = judge.describe()
    opened.write_manifest(parts)
    try:
        floor = await floor_trials(study) if job.experiment.reports_rates else []
        if has_one_queue(job.engine):  # the floor and the experiment together keep it busy
            beside = replace(bench, progress=progress.beside())
            await all_or_none([measure_floor(beside, floor, target.name), job.experiment.run(study)])
        else:
            await measure_floor(bench, floor, target.name)
            await job.experiment.run(study)
        if job.experiment.reports_rates:
            await score_windows(bench, job.config.recovery, target.name)
        opened.ledger.put(target.name, MEASURED, True)
    finally:
        note_judge(opened, judge)


def _targets_used(job: PreparedRun, opened: Run) -> dict[str, TargetUsed]:
    """Return the manifest entries of the targets whose engine was started."""
    known = [(t, identity) for t in job.targets if (identity := opened.ledger.get(t.name, ENGINE)) is not None]
    return {
        target.name: {
            "target": target.describe(),
            "labels": {"count": len(labels := target.labels()), "hash": digest(sorted(labels.items()))},
            "engine": identity.engine,
        }
        for target, identity in known
    }


async def _collected(job: PreparedRun, opened: Run, progress: Progress, cache: Cache | None) -> None:
    """Copy the rows of finished runs into the ledger and judge them with every judge of the experiment."""
    job.experiment.collect(opened)
    opened.write_manifest({"options": dict(job.config.options)})
    for name in job.experiment.judges(job.config):
        await judge_all(opened, job.makers.judge(name), progress, cache, job.makers)


def _same_engine(opened: Run, target: Target, engine: Engine) -> None:
    """Raise SteerbackError if the engine differs from the one of the first start: its rows are not comparable."""
    now = EngineIdentity(fingerprint=engine.fingerprint, engine=dict(engine.describe()))
    before = opened.ledger.get(target.name, ENGINE)
    if before is None:
        opened.ledger.put(target.name, ENGINE, now)
        return
    if before.fingerprint != now.fingerprint:
        old, new = before.engine, now.engine
        changed = [f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted(old | new) if old.get(k) != new.get(k)]
        raise SteerbackError(
            f"run {opened.folder.name!r} was started with a different engine for {target.name} "
            f"({'; '.join(changed) or 'fingerprint'}); resume it where it was started, or choose another --name"
        )


@dataclass(frozen=True, slots=True)
class Analysis:
    """Results of a run, their presentation as tables and figures, and the folder of their files."""

    results: Results
    shown: Presentation
    folder: Path

    @property
    def summary(self) -> dict[str, object]:
        """The content of summary.json."""
        return self.results.to_json()


def analysed(
    opened: Run, judge: str, experiment: Experiment[Settings] | None = None, draws: int | None = None
) -> Analysis:
    """Analyse a run with the verdicts of one judge. `draws`: bootstrap draws; default: those of the config."""
    planned = experiment or make_experiment(opened.config)
    results = analyse_ledger(planned.name, opened.ledger, judge, draws or opened.config.draws, planned.options)
    return Analysis(results, present(planned.name, results), results_folder(opened, judge))


def analyse(
    opened: Run,
    judge: str,
    experiment: Experiment[Settings] | None = None,
    draws: int | None = None,
    captions_inside: bool = False,
) -> Analysis:
    """Analyse a run; write summary.json, tables (txt, csv, tex) and figures (`style.save_all`) to `results_folder`."""
    from steerback.figures.style import save_all

    analysis = analysed(opened, judge, experiment, draws)
    folder = make_folder(analysis.folder, "free that name")
    clear_leftovers(folder)
    tables = second_process(lambda: _write_tables(analysis, folder))  # pandas is imported beside the drawing
    try:
        save_all(analysis.shown.figures, folder, captions_inside)
    finally:
        tables()
    write_json(folder / "summary.json", analysis.summary)  # the last file: it says that the run is finished
    return analysis


def _write_tables(analysis: Analysis, folder: Path) -> None:
    for name, value in analysis.results.data().items():
        write_json(folder / f"{name}.json", value)
    for name, table in analysis.shown.tables.items():
        for suffix, text in (("txt", table.text()), ("csv", table.csv()), ("tex", table.latex())):
            write_atomic(folder / f"{name}.{suffix}", text.encode("utf-8"))


def results_folder(opened: Run, judge: str) -> Path:
    """Return the folder of a judge's results: the run's folder for the judge of its config, else a subfolder."""
    return opened.folder if judge == opened.config.judge else opened.folder / "judges" / quote(judge, safe="+@")
