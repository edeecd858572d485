"""Write the viewer of finished or unfinished runs: analyses, labels and, on request, activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from steerback.analysis.base import measured
from steerback.analysis.forks import Forked, forks
from steerback.engines import check_engine
from steerback.engines.base import Rereads
from steerback.errors import SteerbackError, unknown
from steerback.figures.base import Presentation, measured_tables
from steerback.figures.style import caption_of, png
from steerback.figures.tables import Table
from steerback.jobs.check import Makers, with_directions
from steerback.jobs.execute import analysed
from steerback.records import BoostPrior, LatentKey, Recording
from steerback.report import view
from steerback.report.view_calibration import calibration
from steerback.report.view_sample import Sample, draw
from steerback.report.view_sample import most as most_shown
from steerback.report.view_trials import STAGES, Group, Reading, ShownRun, group_of
from steerback.store.facts import DETECTOR_SET, FORK, RECORDED_LATENTS
from steerback.store.files import write_atomic
from steerback.store.ledger import MANY, Row
from steerback.store.processes import in_halves, second_process
from steerback.store.progress import Progress, Silent
from steerback.store.run import Run
from steerback.study.study import same_weights
from steerback.targets import Target

RECORDED = 40
"""Number of trials that `record` reads by default."""


@dataclass(frozen=True, slots=True)
class ViewSettings:
    """Settings of `steerback view`: judge (None: that of each run), stages, largest number of trials, activations.

    `trials` are keys of trials to read activations of. By default these are up to `RECORDED` trials with the largest
    gains, and the paired trials (same latent, prompt and seed).
    """

    judge: str | None = None
    stages: Sequence[str] = STAGES
    most_trials: int = view.MOST_TRIALS
    record: bool = False
    trials: Sequence[str] = ()


def write_view(
    folders: Sequence[Path],
    out: Path,
    settings: ViewSettings | None = None,
    progress: Progress | None = None,
    makers: Makers | None = None,
) -> Path:
    """Write the viewer of some runs, finished or not, to the file `out`."""
    chosen, makers = settings or ViewSettings(), makers or Makers()
    with ExitStack() as stack:
        runs = [stack.enter_context(Run.read(folder)) for folder in folders]
        known = dict.fromkeys(stage for run in runs for stage in run.ledger.stage_sizes())
        for stage in chosen.stages:
            if stage not in known and stage not in STAGES:
                raise unknown("stage", stage, list(known))
        shown = [_shown(run, chosen, progress or Silent(), makers, len(runs) == 1) for run in runs]
        return write_atomic(out, view.page(shown, chosen.stages, chosen.most_trials).encode("utf-8"))


Beside = tuple[tuple[Sequence[Mapping[str, object]], Mapping[str, object]], Sequence[Forked], Sample | None]
"""Results of a second process: counts and curves, forks, and the sample of a run that is alone on its page."""


def _shown(run: Run, settings: ViewSettings, progress: Progress, makers: Makers, alone: bool) -> ShownRun:
    judge, problem = run.judge(settings.judge), ""
    targets = _targets(run, makers)

    def prior(target: str, key: LatentKey) -> BoostPrior | None:
        try:
            settings = run.config.of(target).calibration
            return settings.prior(targets[target].prior_of(key)) if target in targets else None
        except SteerbackError:  # the file of this direction does not exist any more
            return None

    early = alone and not settings.record  # trials whose activations are read later come first in the sample

    def beside() -> Beside:
        with Run.read(run.folder) as own:
            shown = ShownRun(own, judge, priors=prior, forks=forks(own.ledger, judge))
            counts_and_curves = view.trial_counts(own.ledger, judge, settings.stages), calibration(shown)
            most = settings.most_trials
            sample = draw([shown], settings.stages, most, most_shown(most)) if early else None
            return counts_and_curves, shown.forks, sample

    many = run.ledger.progress()[0] >= MANY
    second = second_process(beside, worth=many)
    analysis: Presentation | None = None
    try:
        analysis = analysed(run, judge).shown
    except SteerbackError as error:  # an unfinished run has no analysis, but its trials can be shown
        problem = str(error)
    tables = dict(analysis.tables) if analysis else {}
    if not any("multi-attempt" in column for table in tables.values() for column in table.columns):
        tables = _rates(run, judge) | tables
    figures = _figures(analysis, many) if analysis else {}
    readings = _readings(run, judge, settings, targets, progress, makers) if settings.record else {}
    counts_and_curves, forked, sample = second()
    return ShownRun(
        run,
        judge,
        lines=analysis.lines if analysis else (),
        tables=tables,
        figures=figures,
        problem=problem,
        labels={name: target.labels() for name, target in targets.items()},
        priors=prior,
        readings=readings,
        forks=forked,
        counts_and_curves=counts_and_curves,
        sample=sample,
    )


def _figures(analysis: Presentation, many: bool) -> dict[str, tuple[bytes, str]]:
    """Draw all figures; return image and caption by name."""

    def drawn(names: Sequence[str]) -> dict[str, tuple[bytes, str]]:
        figures = {name: analysis.figures[name]() for name in names}
        return {name: (png(figure), caption_of(figure)) for name, figure in figures.items()}

    first, second = in_halves(drawn, [*analysis.figures], worth=many)
    both = first | second
    return {name: both[name] for name in analysis.figures}


def _rates(run: Run, judge: str) -> dict[str, Table]:
    """Return the table of rates, for a run whose analysis is not possible yet or contains no such table."""
    if not run.ledger.conditions():
        return {}
    return {"rates": measured_tables(measured(run.ledger, judge, run.config.draws))["table"]}


def _targets(run: Run, makers: Makers) -> dict[str, Target]:
    """Return the targets of a run that are defined on this machine."""
    defined = {}
    for name in run.config.targets:
        try:
            defined[name] = with_directions(makers.target(name, run.config.definitions), run.config)
        except SteerbackError:  # the model of an imported run can be unknown here
            continue
    return defined


def _readings(
    run: Run, judge: str, settings: ViewSettings, targets: Mapping[str, Target], progress: Progress, makers: Makers
) -> dict[str, Reading]:
    """Read the activations of the chosen trials, target by target."""
    readings: dict[str, Reading] = {}
    rows = _to_read(run, judge, settings)
    for name in dict.fromkeys(row.trial.target for row in rows):
        if name not in targets:
            raise SteerbackError(f"--record needs target {name!r}, which is not defined on this machine")
        if not targets[name].has_sae:
            raise SteerbackError(f"--record reads SAE latents and target {name!r} has no SAE")
        options = run.config.engine_options if run.config.engine == "transformers" else {}
        engine = makers.engine(targets[name], check_engine("transformers", options, run.config.batch_size))
        try:
            if not isinstance(engine, Rereads):
                raise SteerbackError(
                    f"--record needs an engine that re-reads responses; {type(engine).__name__} cannot"
                )
            same_weights(run.folder, name, engine)
            own = [row for row in rows if row.trial.target == name]
            progress.stage(f"{name}: reading activations", len(own))
            for row in own:
                readings[row.trial.key] = _reading(run, engine, row, targets[name])
                progress.update(generated=1)
        finally:
            engine.close()
    return readings


def _reading(run: Run, engine: Rereads, row: Row, target: Target) -> Reading:
    """Read the activations of the steered latent and of the run's detectors along one response."""
    done, trial = row.completion, row.trial
    assert done is not None  # `_to_read` requires a response
    latents = dict.fromkeys((trial.latent,) if isinstance(trial.latent, int) else ())
    groups = run.ledger.get(trial.target, RECORDED_LATENTS) or {}
    detectors = run.ledger.get(trial.target, DETECTOR_SET)
    latents |= dict.fromkeys(k for group in groups.values() for k in group)
    latents |= dict.fromkeys(detectors.latents if detectors else ())
    sampling = run.config.of(target.name).sampling.record(target.max_new_tokens)
    request = replace(trial.request(sampling), record=Recording(tuple(latents)))
    values = engine.reread(request, done.token_ids)
    if len(values) != done.prompt_tokens + max(len(done.token_ids) - 1, 0):
        raise SteerbackError(
            f"{trial.key}: the prompt is tokenized differently now, so its activations cannot be read; use the package "
            "versions in the run's manifest.json"
        )
    return Reading(engine.token_ends(done, trial.prefix), tuple(latents), values[done.prompt_tokens :])


def _to_read(run: Run, judge: str, settings: ViewSettings) -> list[Row]:
    """Return the rows to read activations of: the named ones, or those with the largest gains and their pairs."""
    ledger = run.ledger
    if settings.trials:
        rows = {row.trial.key: row for row in ledger.rows(keys=settings.trials, judge=judge)}
        missing = [key for key in settings.trials if key not in rows or not rows[key].valid_receipt]
        if missing:
            raise SteerbackError(f"run {run.folder.name!r} has no valid response of trial {missing[0]!r}")
        return list(rows.values())
    groups: dict[Group, list[str]] = {}
    gains: dict[Group, float] = {}
    stages = [stage for stage in settings.stages if stage != FORK or len(settings.stages) == 1]
    for row in ledger.outlines(judge=judge):
        if row.trial.stage in stages and row.valid_receipt and row.trial.record is None:
            group = group_of(row.trial)
            groups.setdefault(group, []).append(row.trial.key)
            gains[group] = max(gains.get(group, 0.0), row.gain)
    keys: list[str] = []
    for group in sorted(groups, key=lambda g: -gains[g]):
        keys += groups[group] if len(keys) + len(groups[group]) <= RECORDED else []
    return list(ledger.stream(keys, judge))
