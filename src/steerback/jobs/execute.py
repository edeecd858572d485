"""From a config to a finished run: opens the folder, loads each target, runs the experiment, writes the analysis."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerback import organism
from steerback.config import RunConfig
from steerback.data import paper_files as paper_data
from steerback.data.prompts import load_prompts
from steerback.engines import check_engine, default_engine, make_engine
from steerback.errors import SteerbackError
from steerback.experiments import get_experiment
from steerback.experiments.base import Analysis, Experiment, settings
from steerback.judging import Judge, Maker, make_judge
from steerback.judging.spending import drain, estimated
from steerback.latents.concreteness import make_rater
from steerback.latents.selection import check_own, rating_model
from steerback.records import Judgement, LatentKey, Sampling, Spend, digest
from steerback.store.cache import Cache, default_path
from steerback.store.ledger import Ledger, Row
from steerback.store.progress import Progress, Silent
from steerback.store.run import Run, stored_config, write_atomic, write_json
from steerback.study.pipeline import Workbench, judge_item, judge_rows
from steerback.study.study import UNJUDGED, Study, fact_of, references, same_weights
from steerback.targets import Target, resolve, user_tables

if TYPE_CHECKING:
    from steerback.engines.base import Engine


@dataclass(frozen=True, slots=True)
class Job:
    """A checked config with what it names: nothing is loaded yet, but everything exists."""

    config: RunConfig
    experiment: Experiment
    targets: tuple[Target, ...]
    prompts: tuple[str, ...]
    judges: Maker


def check(config: RunConfig, judges: Maker = make_judge) -> Job:
    """Resolves every name in the config, so that a mistake shows before anything is loaded or written.

    `judges` makes the judges (`judging.judge_maker` for ones with a budget).
    """
    experiment = get_experiment(config.experiment)
    settings(experiment, config)  # so does a senseless option
    if config.from_run is not None:
        _takes_latents(config, Path(config.from_run))
    own = {**user_tables(), **config.definitions}
    targets = tuple(resolve(name, own) for name in config.targets) if experiment.generates else ()
    chosen: dict[str, Any] = {"engine": config.engine, "judge": config.judge}
    chosen["definitions"] = {name: own[name] for name in config.targets if name in own}
    if config.engine == "auto":
        chosen["engine"] = default_engine()
    if config.judge == "auto":
        chosen["judge"] = _default_judge(config) if experiment.generates else experiment.judges(config)[0]
    if config.latents is None and targets and not any(target.has_sae for target in targets):
        shared = {target.directions() for target in targets}
        chosen["latents"] = (shared.pop() or None) if len(shared) == 1 else None  # as the run is started, so it goes on
    config = config.model_copy(update=chosen)
    experiment.conditions(config)  # so do options that do not go together
    check_engine(config.engine, config.engine_options)
    targets = experiment.own_targets(config, tuple(_steerable(target, config, experiment) for target in targets))
    for name in paper_data.used(config.prompts, settings(experiment, config).get("detectors")):
        paper_data.path_of(name)
    for name in experiment.judges(config):
        judges(name)  # a missing key or unknown judge shows now
    if (rater := rating_model(config)) is not None:
        make_rater(rater, judges)
    return Job(config, experiment, targets, load_prompts(config.prompts), judges)


def _takes_latents(config: RunConfig, base: Path) -> None:
    """Refuses another choice of latents than that of the run it starts from, which is what will be used."""
    if not (base / "ledger.sqlite").is_file():
        return  # a run that goes on has what it needs of it
    before = stored_config(base)
    for field in ("n_latents", "latents"):
        if getattr(config, field) != getattr(before, field) and any(
            fact_of(base, name, "latents")[0] is not None for name in config.targets
        ):
            raise SteerbackError(
                f"{config.experiment} takes the latents that run {base.name} has chosen, and {field} would choose "
                "others; leave it out, or run without --from"
            )


def _steerable(target: Target, config: RunConfig, experiment: Experiment) -> Target:
    """The target with the directions that the run uses, if it has what the experiment needs."""
    if experiment.needs_sae and not target.has_sae:
        raise SteerbackError(f"{experiment.name} reads SAE latents and target {target.name!r} has no SAE")
    if not target.has_sae and not target.directions():
        raise SteerbackError(
            f"target {target.name!r} has neither an SAE nor directions to steer with; make one with: "
            f"steerback directions make {target.name} NAME --topic FILE"
        )
    indices = [key for key in config.latents or () if isinstance(key, int)]
    if indices and not target.has_sae:
        known = ", ".join(target.directions())
        raise SteerbackError(
            f"target {target.name!r} has no SAE, so there is no latent {indices[0]}; its directions: {known}"
        )
    if config.latents is not None:
        check_own(config.latents, target.n_latents, target.labels(), target.directions())
    elif config.preset == "authors" and config.selection.concreteness != "off":
        _authors_labels(target)
    return _used(target, config)


def _authors_labels(target: Target) -> None:
    """Refuses a target whose labels the authors filter by, as long as the user has not fetched them."""
    if target.label_source and not target.labels():
        how = "fetch-paper-data" if target.base in paper_data.LABELLED else f"labels fetch {target.name}"
        raise SteerbackError(
            f"preset authors filters latents by their labels and {target.name} has none here: run steerback {how}"
        )


def _used(target: Target, config: RunConfig) -> Target:
    """The target with the directions that a run's latents name; all of them where there is no SAE and no list."""
    if config.latents is None:
        return target.with_directions(()) if target.has_sae else target
    return target.with_directions([key for key in config.latents if isinstance(key, str)])


def _default_judge(config: RunConfig) -> str:
    real = [name for name in config.targets if name.partition("+")[0] not in organism.NAMES]
    if real:
        raise SteerbackError(
            f"{real[0]} is a real model: name its judge with --judge (see steerback judges); "
            "`--judge offline` needs no key, but its scores are not comparable with the paper's"
        )
    return "offline"


def run(
    job: Job,
    folder: Path,
    progress: Progress | None = None,
    cache: Cache | None = None,
) -> Analysis:
    """Runs (or resumes) a job into `folder` and writes its analysis.

    Raises SteerbackError for what the user must mend. KeyboardInterrupt leaves all committed work in the ledger.
    """
    with Run.start(folder, job.config) as opened:
        if job.experiment.generates:
            asyncio.run(_targets(job, opened, progress or Silent(), cache))
        else:
            _collected(job, opened, progress or Silent(), cache)
        return analyse(job.experiment, opened.ledger, opened.folder, job.config.judge, job.config.draws)


async def _targets(job: Job, opened: Run, progress: Progress, cache: Cache | None) -> None:
    parts: dict[str, Any] = {
        "targets": {},
        "prompts": {"source": job.config.prompts, "count": len(job.prompts), "hash": digest(list(job.prompts))},
    }
    if used := paper_data.used(job.config.prompts, settings(job.experiment, job.config).get("detectors")):
        parts["paper data"] = {"repository": paper_data.REPOSITORY, "commit": paper_data.COMMIT, "sha256": used}
    for target in job.targets:
        engine = make_engine(
            target, job.config.engine, **{"batch_size": job.config.batch_size, **job.config.engine_options}
        )
        try:
            judge = job.judges(job.config.judge)
            _same_engine(opened, target, engine)
            if job.config.from_run is not None:
                same_weights(Path(job.config.from_run), target.name, engine)
            sampling = job.config.sampling.record(target.max_new_tokens)
            bench = Workbench(opened.ledger, engine, judge, sampling, progress, cache)
            study = Study(opened, target, bench, job.prompts, job.judges)
            await study.prepare()
            parts["targets"][target.name] = {
                "target": target.describe(),
                "labels": {"count": len(labels := target.labels()), "hash": digest(sorted(labels.items()))},
                "engine": engine.describe(),
            }
            parts["judge"] = judge.describe()
            opened.write_manifest(parts)
            try:
                await job.experiment.run(study)
            finally:
                note_judge(opened, judge)
        finally:
            engine.close()


def _collected(job: Job, opened: Run, progress: Progress, cache: Cache | None) -> None:
    """Rows of finished runs, judged by every judge that the experiment names."""
    job.experiment.collect(opened)
    opened.write_manifest({"options": dict(job.config.options)})
    for name in job.experiment.judges(job.config):
        _judge_all(opened, job.judges(name), progress, cache)


def note_judge(opened: Run, judge: Judge) -> None:
    """Keeps what the judge is (with its rubric's text) and what it has been paid, in ledger and manifest."""
    known = opened.ledger.fact("", "judges") or {}
    known[judge.name] = judge.describe()
    opened.ledger.set_fact("", "judges", known)
    opened.amend_manifest({"judges": known})
    spent = drain(judge)
    if spent is not None:
        opened.add_spend(judge.name, spent)


def _same_engine(opened: Run, target: Target, engine: Engine) -> None:
    """A run goes on only with the engine it was started with: otherwise its rows would not be comparable."""
    now = {"fingerprint": engine.fingerprint, "engine": engine.describe()}
    before = opened.ledger.fact(target.name, "engine")
    if before is None:
        opened.ledger.set_fact(target.name, "engine", now)
        return
    if before["fingerprint"] != now["fingerprint"]:
        old: dict[str, Any] = before["engine"]
        new = engine.describe()
        changed = [f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted(old | new) if old.get(k) != new.get(k)]
        raise SteerbackError(
            f"run {opened.folder.name!r} was started with another engine for {target.name} "
            f"({'; '.join(changed) or 'fingerprint'}); resume it where it was started, or choose another --name"
        )


def analyse(experiment: Experiment, ledger: Ledger, folder: Path, judge: str, draws: int) -> Analysis:
    """Analyses a ledger and writes summary.json, tables (txt, csv, tex) and figures (png, pdf) into `folder`."""
    from steerback.figures.style import save

    analysis = experiment.analyse(ledger, judge, draws)
    write_json(folder / "summary.json", analysis.summary)
    for name, value in analysis.data.items():
        write_json(folder / f"{name}.json", value)
    for name, table in analysis.tables.items():
        for suffix, text in (("txt", table.text()), ("csv", table.csv()), ("tex", table.latex())):
            write_atomic(folder / f"{name}.{suffix}", text.encode("utf-8"))
    for name, draw in analysis.figures.items():
        save(draw(), folder, name)
    return analysis


def open_cache(enabled: bool = True) -> Cache | None:
    """The shared cache, or None where it is switched off."""
    return Cache(default_path()) if enabled else None


@dataclass(frozen=True, slots=True)
class Judging:
    """What a judge has to do in a run: rows per target, and what asking about them would take (None: nothing)."""

    judge: Judge
    rows: Mapping[str, Sequence[Row]]
    estimate: Spend | None

    @property
    def count(self) -> int:
        return sum(map(len, self.rows.values()))


def to_judge(opened: Run, judge: Judge, retry: bool = False) -> Judging:
    """The rows of a run that `judge` has no verdict about; with `retry` also those that it left unscored.

    Every scored stage counts, so that another judge's first scores stand beside the thresholds.
    """
    rows = {
        target: [
            r
            for r in opened.ledger.rows(target=target, judge=judge.name)
            if r.trial.stage not in UNJUDGED and r.completion is not None and _open(r.judgement, retry)
        ]
        for target in dict.fromkeys([*opened.config.targets, *(name for name, _ in opened.ledger.conditions())])
    }
    valid = [judge_item(r) for own in rows.values() for r in own if r.valid_receipt]
    return Judging(judge, rows, estimated(judge, valid))


def judge_run(
    folder: Path,
    name: str,
    progress: Progress | None = None,
    cache: Cache | None = None,
    retry: bool = False,
    judges: Maker = make_judge,
) -> int:
    """Adds a judge's verdicts to a finished run; returns how many responses it judged.

    `retry` asks again for what this judge left unscored. Nothing is judged twice.
    """
    with Run.reopen(folder) as opened:
        return _judge_all(opened, judges(name), progress or Silent(), cache, retry)


def _judge_all(opened: Run, judge: Judge, progress: Progress, cache: Cache | None, retry: bool = False) -> int:
    work = to_judge(opened, judge, retry)
    try:
        for target, rows in work.rows.items():
            if rows:
                # an adapter is compared with its base's unsteered responses, as when it was measured
                known = (opened.ledger.rows(t, "reference") for t in (target, target.rpartition("+")[0]))
                judge.prepare(references(next(filter(None, known), []), _contexts(target, opened.config)))
                bench = Workbench(opened.ledger, None, judge, Sampling(), progress, cache)
                asyncio.run(judge_rows(bench, rows, f"{target}: judging with {judge.name}"))
    finally:
        note_judge(opened, judge)
    return work.count


def _contexts(name: str, config: RunConfig) -> Mapping[LatentKey, Sequence[str]]:
    """Contexts of a target's latents; none for the model of an imported run, which need not be a target of ours."""
    try:
        return _used(resolve(name, config.definitions), config).contexts()
    except SteerbackError:
        return {}


def _open(judgement: Judgement | None, retry: bool) -> bool:
    return judgement is None or (retry and judgement.status == "unscored")
