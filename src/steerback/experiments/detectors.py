"""Experiment 3, first phase: search for latents that detect whether a response matches its prompt; Table A1.

Unsteered responses to discovery prompts are read twice: after the correct prompt and after another prompt. On one half
of the prompts the search selects the latents that separate the two; these are the detectors. The other half measures
how well they separate on new prompts. Nothing is steered or judged. Other experiments get their detectors from
`detectors_of`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field, StrictInt, StrictStr

from steerback.config import RunConfig, Settings
from steerback.data.prompts import load_prompts
from steerback.errors import SteerbackError
from steerback.experiments.base import SEARCHING, Experiment
from steerback.readers import read_json
from steerback.store.facts import DETECTOR_SET, PAIR_ACTIVATIONS, Detector, DetectorSet, PairActivations
from steerback.store.ledger import Row
from steerback.store.run import fact_of, stored_config
from steerback.study.pipeline import complete
from steerback.study.study import Study, same_weights

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from steerback.engines.base import Over
    from steerback.latents.detectors import DetectorSearch
    from steerback.latents.separation import Separation
    from steerback.records import LatentKey

    Activations = NDArray[np.float32]

DISCOVERY = "discovery"
AUTHORS: Mapping[str, object] = {"rule": "authors", "include_prompt": True, "template": True, "limit": None}


def _list_or_path(value: object) -> object:
    if value is not None and not isinstance(value, list | str):
        raise ValueError(f"expected a list of latents, a JSON file or the folder of a run, not {value!r}")
    return value


class SearchOptions(Settings):
    """Settings of the detector search, or detectors to use instead."""

    detectors: Annotated[list[StrictInt | StrictStr] | str | None, BeforeValidator(_list_or_path)] = None
    """Detectors to use instead of a search: a list of latents, a JSON file, or the folder of another run."""
    discovery_prompts: str | None = None
    """Prompts of the search: a built-in list or a file; default: the target's list."""
    responses: int = Field(500, ge=1)
    """Number of unsteered responses to the discovery prompts."""
    rule: Literal["perfect", "authors", "auc", "top"] = "perfect"
    """Rule for selecting latents: `perfect` (AUC 1), `authors` (their rule), `auc` (AUC of at least `auc`) or `top`
    (the `limit` best)."""
    auc: float = Field(0.9, ge=0, le=1)
    """Smallest AUC for rule `auc`, and for rule `perfect` if no latent separates perfectly."""
    limit: int | None = Field(25, ge=1)
    """Maximum number of detectors, best first."""
    include_prompt: bool = False
    """Pool over the user's words as well as the response."""
    template: bool = False
    """Pool over the whole conversation with all special and template tokens, as the authors do."""

    @property
    def over(self) -> Over:
        """Tokens to pool over."""
        if self.template:
            return "all"
        return "words" if self.include_prompt else "response"


def with_search_of(config: RunConfig, before: RunConfig | None) -> RunConfig:
    """Return the config with the search options of its base run, unless it sets search options.

    `before` is the config of the base run. If one run names detectors and the other searches, the options of `config`
    have priority.
    """
    from steerback.experiments import experiment_type

    if not issubclass(experiment_type(config.experiment).options_type, SearchOptions):
        return config
    before = _searching(before)
    if before is None:
        return config
    given = {key: value for key, value in before.options.items() if key in SearchOptions.model_fields}
    if config.options.keys() & SEARCHING:
        given.pop("detectors", None)
    if config.options.get("detectors") is not None:
        given = {key: value for key, value in given.items() if key not in SEARCHING}
    return config.model_copy(update={"options": {**given, **config.options}})


def _searching(config: RunConfig | None) -> RunConfig | None:
    """Return the first config with search options, from `config` back through its chain of base runs."""
    from steerback.experiments import experiment_type

    while config is not None:
        if issubclass(experiment_type(config.experiment).options_type, SearchOptions):
            return config
        earlier = None if config.from_run is None else Path(config.from_run)
        config = None if earlier is None else _stored(earlier)
    return None


def _stored(folder: Path) -> RunConfig | None:
    """Return the config of a run, or None if the run no longer exists."""
    return stored_config(folder) if (folder / "ledger.sqlite").is_file() else None


def _same_search(study: Study, options: SearchOptions) -> bool:
    """Return whether the base run searched with these options; True if it did not search."""
    from steerback.experiments import make_experiment

    folder = study.config.from_run
    before = _searching(None if folder is None else _stored(Path(folder)))
    if before is None:
        return True
    theirs = make_experiment(before).options
    return all(getattr(options, name) == getattr(theirs, name) for name in SearchOptions.model_fields)


SearchOptionsType = TypeVar("SearchOptionsType", bound=SearchOptions)


class UsesDetectors(Experiment[SearchOptionsType]):
    """Base class of the experiments that search for detectors."""

    needs_sae = True
    options_type = SearchOptions
    authors: ClassVar[Mapping[str, object]] = AUTHORS

    def conditions(self, config: RunConfig) -> int:
        return 0

    def further(self, config: RunConfig) -> dict[str, int]:
        """Number of responses for the search, by stage; none if the user names the detectors."""
        return {} if self.options.detectors is not None else {DISCOVERY: self.options.responses}


class DetectorExperiment(UsesDetectors[SearchOptions]):
    """Search for latents that are more active if a response does not match its prompt; test against chance."""

    name = "detectors"
    title = "Search for off-topic detectors (experiment 3)"
    calibrates = False
    reports_rates = False

    async def run(self, study: Study) -> None:
        """Generate the responses to the discovery prompts and search for detectors."""
        await load_or_search(study, self.options)


async def detectors_of(study: Study, options: SearchOptions) -> DetectorSet:
    """Return the detectors as `load_or_search` does, at least one. Raises SteerbackError if there are none."""
    detectors = await load_or_search(study, options)
    if not detectors.detectors:
        raise SteerbackError(
            f"{study.name}: no detectors ({detectors.source}); lower options.auc, set options.rule=top, "
            "or name latents with options.detectors"
        )
    return detectors


async def load_or_search(study: Study, options: SearchOptions) -> DetectorSet:
    """Return the detectors of this run or its base run, else those that the user names, else search for them.

    Detectors of the base run are used if it searched with the same options. The result may be empty.
    """
    detectors = study.run.ledger.get(study.name, DETECTOR_SET)
    if detectors is None and _same_search(study, options):
        detectors = study.fact(DETECTOR_SET)
    if detectors is None:
        if options.detectors is None:
            detectors = await _search(study, options)
        else:
            detectors = await _named(study, options.detectors, options.over)
        study.run.ledger.put(study.name, DETECTOR_SET, detectors)
    return detectors


async def _search(study: Study, options: SearchOptions) -> DetectorSet:
    from steerback.latents.detectors import make_pairs, search_detectors

    rows = await _discover(study, options)
    pairs = make_pairs([r.trial.prompt for r in rows], study.config.seeds.latents)
    matched, mismatched = arms(study, rows, pairs.partner.tolist(), over=options.over)
    search = partial(search_detectors, matched, mismatched, pairs, limit=options.limit, auc=options.auc)
    result = search(rule=options.rule)
    source = f"rule {result.rule}"
    # A large SAE on few prompts may have no perfect latent; a weaker rule then avoids an empty result.
    if options.rule == "perfect" and not result.latents:
        result = search(rule="auc")
        source = f"no latent separates perfectly: AUC >= {options.auc:g}"
    source += f" on the search half, {result.n_passed} of {matched.shape[1]:,} latents passed"
    return _detector_set(study, result.latents, result.search.separation, source, result)


async def _discover(study: Study, options: SearchOptions) -> list[Row]:
    """Complete the unsteered responses to the discovery prompts, in rotation over the prompts."""
    source = options.discovery_prompts or study.target.discovery_prompts
    prompts = load_prompts(source)
    shared = sorted(set(prompts) & set(study.prompts))
    # Detectors that were selected on measured prompts would look better than they are.
    if shared:
        raise SteerbackError(
            f"discovery prompts {source} and the run's own prompts share {shared[0]!r}; search for detectors on "
            "prompts that are not measured"
        )
    trials = [
        study.trial(DISCOVERY, "unsteered", i, prompt=prompts[i % len(prompts)], seed=study.seed(DISCOVERY, i))
        for i in range(options.responses)
    ]
    rows = await complete(study.bench, trials, stage=f"{study.name}: discovery responses", judged=False)
    return [r for r in rows if r.completion is not None and r.completion.finish != "error"]


def arms(
    study: Study,
    rows: Sequence[Row],
    partner: Sequence[int],
    latents: Sequence[int] | None = None,
    over: Over = "response",
) -> tuple[Activations, Activations]:
    """Return pooled activations (n, latents) after the correct prompt, and after the prompt of row partner[i]."""
    texts = [r.completion.text for r in rows if r.completion is not None]
    prompts = [r.trial.prompt for r in rows]
    others = [prompts[j] for j in partner]
    matched = study.engine.activations(prompts, texts, latents=latents, over=over)
    return matched, study.engine.activations(others, texts, latents=latents, over=over)


async def contrast(study: Study, latents: Sequence[int], over: Over) -> tuple[Activations, Activations, list[int]]:
    """Return matched and shuffled activations (n, latents) of the unsteered references, and prompt numbers (n,)."""
    from steerback.latents.detectors import make_pairs

    rows = [r for r in await study.references() if r.completion is not None]
    pairs = make_pairs([r.trial.prompt for r in rows], study.config.seeds.latents, held_out=False)
    matched, mismatched = arms(study, rows, pairs.partner.tolist(), list(latents), over)
    return matched, mismatched, pairs.prompt.tolist()


async def _named(study: Study, source: Sequence[LatentKey] | str, over: Over) -> DetectorSet:
    """Return the detectors that the user names: a list, a JSON file in the authors' format, or another run's folder."""
    from steerback.latents.sampling import check_latents
    from steerback.latents.separation import separation

    where = "options.detectors"
    if isinstance(source, str):
        where = f"detectors of {source}"
        if Path(source).is_dir():
            return _of_run(study, Path(source))
        source = read_latents(Path(source))
    keys = check_latents(source, study.target.labels(), study.target.n_latents or None, where=where)
    latents = [k for k in keys if isinstance(k, int)]
    matched, mismatched, _ = await contrast(study, latents, over)
    return _detector_set(study, latents, separation(matched, mismatched), f"{len(latents)} named in {where}")


def _of_run(study: Study, folder: Path) -> DetectorSet:
    stored = fact_of(folder, study.name, DETECTOR_SET)[0]
    if stored is None:
        raise SteerbackError(
            f"run {folder} has no detectors for {study.name}; start such a run: steerback run detectors"
        )
    same_weights(folder, study.name, study.engine)
    return stored


def read_latents(path: Path) -> list[LatentKey]:
    """Read a JSON file with a list of latents, at the top level or under `latents` or `off_topic_detectors`."""
    if not path.is_file():
        raise SteerbackError(f"options.detectors: {path} is neither a JSON file nor the folder of a run")
    content = read_json(path, "options.detectors:")
    if isinstance(content, dict):
        content = next((content[key] for key in ("latents", "off_topic_detectors") if key in content), content)
    if not isinstance(content, list):
        raise SteerbackError(f"detectors of {path}: expected a list of latents, not {content!r}")
    wrong = next((key for key in content if isinstance(key, bool) or not isinstance(key, int | str)), None)
    if wrong is not None:
        raise SteerbackError(f"detectors of {path}: {wrong!r} is not a latent")
    return [key for key in content if isinstance(key, int | str)]


def _detector_set(
    study: Study,
    latents: Sequence[int],
    separation: Separation,
    source: str,
    search: DetectorSearch | None = None,
) -> DetectorSet:
    """Return the record of detectors: label, level and separation of each, and the search with its null."""
    labels = study.target.labels()
    held_out = search.held_out.separation if search is not None and search.held_out is not None else None
    detectors = [
        Detector(
            latent=int(k),
            label=labels.get(int(k)),
            level=float(separation.mismatched_mean[i]),
            auc=float(separation.auc[i]),
            held_out_auc=None if held_out is None else float(held_out.auc[i]),
            held_out_effect=None if held_out is None else _finite(held_out.effect[i]),
        )
        for i, k in enumerate(latents)
    ]
    return DetectorSet(source=source, detectors=detectors, search=None if search is None else search.record())


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


class DetectorStatistics(UsesDetectors[SearchOptions]):
    """Report mean, sd, median, frequency, AUC and effect size of each detector on matched and shuffled pairs.

    The pairs are the unsteered responses to the run's prompts, each after the correct prompt (matched) and after
    another prompt (shuffled). The detector search did not use these prompts, so the statistics are out of sample.
    """

    name = "detector-statistics"
    title = "Detectors on matched and shuffled pairs (Table A1)"
    calibrates = False
    reports_rates = False

    async def run(self, study: Study) -> None:
        """Read the activations of the detectors on matched and shuffled pairs."""
        if study.run.ledger.get(study.name, PAIR_ACTIVATIONS) is not None:
            return
        detectors = await detectors_of(study, self.options)
        matched, mismatched, prompts = await contrast(study, detectors.latents, self.options.over)
        pairs = PairActivations(matched=matched.tolist(), mismatched=mismatched.tolist(), prompts=prompts)
        study.run.ledger.put(study.name, PAIR_ACTIVATIONS, pairs)
