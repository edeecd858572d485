"""Check a config and resolve all names in it, so that mistakes are reported before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from steerback import organism
from steerback.calibration.thresholds import THRESHOLDS
from steerback.config import RunConfig, Settings, differences
from steerback.data import paper_files
from steerback.data.prompts import load_prompts
from steerback.engines import EngineOptions, check_engine, default_engine, make_engine
from steerback.engines.options import VllmOptions
from steerback.errors import SteerbackError, docs_page
from steerback.experiments import make_experiment
from steerback.experiments.base import Experiment
from steerback.experiments.detectors import with_search_of
from steerback.judging import Limits, Maker, judge_maker, make_judge
from steerback.latents.concreteness import make_rater
from steerback.latents.sampling import check_latents
from steerback.latents.selection import rater_of, rating_model
from steerback.store.facts import LATENTS, Fact
from steerback.store.run import fact_of, stored_config
from steerback.targets import Target, resolve, user_tables
from steerback.targets.fit import check_weights

if TYPE_CHECKING:
    from steerback.engines.base import Engine

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Makers:
    """Factories of the judges, engines and targets of a run. Tests and other programs can replace them."""

    judge: Maker = make_judge
    engine: Callable[[Target, EngineOptions], Engine] = make_engine
    target: Callable[[str, Mapping[str, Mapping[str, object]]], Target] = resolve


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A checked config with its resolved experiment, targets and prompts. No model is loaded yet."""

    config: RunConfig
    experiment: Experiment[Settings]
    targets: tuple[Target, ...]
    prompts: tuple[str, ...]
    makers: Makers
    engine: EngineOptions


def check(config: RunConfig, makers: Makers | None = None) -> PreparedRun:
    """Resolve all names in the config, and raise SteerbackError for a mistake before anything is loaded or written.

    `makers` are the package's factories by default. `judging.judge_maker` makes judges with a budget.
    """
    makers = makers or Makers(judge=judge_maker(Limits(), config.rubrics))
    base = None if config.from_run is None else Path(config.from_run)
    # a resumed run does not need its base, because it has copied the facts
    before = stored_config(base) if base is not None and (base / "ledger.sqlite").is_file() else None
    config = with_search_of(config, before)
    experiment = make_experiment(config)  # raises for an invalid option
    own = {**user_tables(), **config.definitions}
    targets = tuple(makers.target(name, own) for name in config.targets) if experiment.generates else ()
    chosen: dict[str, object] = {"engine": config.engine, "judge": config.judge}
    chosen["definitions"] = {name: own[name] for name in config.targets if name in own}
    if config.engine == "auto":
        chosen["engine"] = default_engine()
    if config.judge == "auto":
        chosen["judge"] = _default_judge(config) if experiment.generates else experiment.judges(config)[0]
    if config.latents is None and targets and not any(target.has_sae for target in targets):
        shared = {target.directions() for target in targets}
        # stored with the run, so that directions added later do not change a run that is resumed
        chosen["latents"] = (shared.pop() or None) if len(shared) == 1 else None
    config = config.model_copy(update=chosen)
    if config.selection.rater == "auto" and experiment.generates:
        rater = config.selection.model_copy(update={"rater": rater_of(config)})
        config = config.model_copy(update={"selection": rater})
    if base is not None and before is not None:
        _keeps_decisions(config, before, base, experiment)
    experiment.conditions(config)  # raises for options that contradict each other
    engine = check_engine(config.engine, config.engine_options, config.batch_size)
    targets = experiment.measured_targets(config, tuple(steerable(target, config, experiment) for target in targets))
    if isinstance(engine, VllmOptions) and (adapters := tuple(t.adapter for t in targets if t.adapter)):
        engine = engine.model_copy(update={"adapters": adapters})  # one engine serves the base and all of them
    for name in paper_files.used(config.prompts, experiment.own_detectors()):
        paper_files.path_of(name)
    for name in experiment.judges(config):
        makers.judge(name)  # raises for an unknown judge or a missing API key
    if experiment.generates and (asked := rating_model(config)) is not None:
        make_rater(asked, makers.judge)
    return PreparedRun(config, experiment, targets, load_prompts(config.prompts), makers, engine)


def start_from(folder: Path) -> tuple[str, RunConfig]:
    """Return folder and config of a base run.

    Raises SteerbackError if the definition of a user's target has changed since the base run was made.
    """
    config = stored_config(folder)
    _same_definitions(config, {k: v for k, v in user_tables().items() if k in config.targets}, folder)
    return str(folder), config


def _same_definitions(before: RunConfig, now: Mapping[str, Mapping[str, object]], base: Path) -> None:
    for name, new in now.items():
        old = before.definitions.get(name, {})
        if differ := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
            raise SteerbackError(
                f"the definition of target {name} has changed since run {base.name} was made ({', '.join(differ)}); "
                "restore it, or rename the target and run without --from"
            )


def _keeps_decisions(config: RunConfig, before: RunConfig, base: Path, experiment: Experiment[Settings]) -> None:
    """Raise SteerbackError if the run changes settings that determined the latents or thresholds of its base run."""
    _same_definitions(before, {name: config.definitions.get(name, {}) for name in config.targets}, base)
    if experiment.calibrates and experiment.generates:
        _same_judge(config, before, base)
    changed = sorted({line for t in config.targets for line in differences(before.of(t), config.of(t))})
    _refuse(changed, config, base, LATENTS, ("n_latents", "latents", "selection", "seeds.latents"))
    _refuse(changed, config, base, THRESHOLDS, ("calibration", "degraded", "unscored_attempts"))


def _same_judge(config: RunConfig, before: RunConfig, base: Path) -> None:
    """Raise SteerbackError if the judge differs from the one that scored the calibration of the base run."""
    new, old = ((c.judge, c.rubrics.get(c.judge.partition("+")[2])) for c in (config, before))
    if new != old and any(fact_of(base, name, THRESHOLDS)[0] is not None for name in config.targets):
        what = f"judge {config.judge}" if config.judge != before.judge else f"the rubric of judge {config.judge}"
        raise SteerbackError(
            f"{config.experiment} uses the {THRESHOLDS.name} of run {base.name}, which were calibrated with judge "
            f"{before.judge}, not with {what}: run with {before.judge} and judge the run again afterwards "
            f"(steerback judge RUN --judge {config.judge}), or run without --from"
        )


def _refuse(changed: Sequence[str], config: RunConfig, base: Path, fact: Fact[T], settings: tuple[str, ...]) -> None:
    """Raise SteerbackError if one of `settings`, which determined a fact of the base run, was changed."""
    refused = [line for line in changed if line.split(":")[0].startswith(settings)]
    if refused and any(fact_of(base, name, fact)[0] is not None for name in config.targets):
        raise SteerbackError(
            f"{config.experiment} uses the {fact.name} of run {base.name}, so these settings would have no effect: "
            f"{'; '.join(refused)}; leave them out, or run without --from"
        )


def steerable(target: Target, config: RunConfig, experiment: Experiment[Settings]) -> Target:
    """Return the target with the directions of the run. Raises SteerbackError if the experiment cannot use it."""
    if Path(target.model).is_dir():
        check_weights(target)
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
        check_latents(config.latents, target.labels(), target.n_latents, target.directions())
    elif config.preset == "authors" and config.selection.concreteness != "off":
        _authors_labels(target)
    return with_directions(target, config)


def _authors_labels(target: Target) -> None:
    """Raise SteerbackError if the target's labels, which preset `authors` filters by, have not been downloaded."""
    if target.label_source and not target.labels():
        how = "fetch-paper-data" if target.base in paper_files.LABELLED else f"labels fetch {target.name}"
        raise SteerbackError(
            f"preset authors filters latents by their labels and {target.name} has none here: run steerback {how}"
        )


def with_directions(target: Target, config: RunConfig) -> Target:
    """Return the target with the directions among the run's latents; all directions if there is no list and no SAE."""
    if config.latents is None:
        return target.with_directions(()) if target.has_sae else target
    return target.with_directions([key for key in config.latents if isinstance(key, str)])


def _default_judge(config: RunConfig) -> str:
    real = [name for name in config.targets if not organism.is_builtin(name)]
    if real:
        raise SteerbackError(
            f"{real[0]} is a real model: name its judge with --judge (see steerback judges); "
            "`--judge offline` needs no key, but its scores are not comparable with the paper's "
            f"({docs_page('judging')})"
        )
    return "offline"
