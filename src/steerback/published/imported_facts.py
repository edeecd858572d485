"""Facts of an imported run that the analyses need besides trials: latents, boost levels, variants, ablated sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import JsonValue

from steerback.errors import SteerbackError
from steerback.published.exports import EXPORTED
from steerback.published.sources import Ablations, Source
from steerback.records import Latent, LatentKey
from steerback.store.facts import (
    ABLATED,
    BASELINE,
    DETECTOR_SET,
    DOSES,
    IMPORTED,
    LATENTS,
    META_PROMPTS,
    RANDOM_SETS,
    SWEEP,
    ControlSets,
    Detector,
    DetectorSet,
    Dose,
    Fact,
    ImportedFiles,
    MetaPromptSet,
    Selection,
    Sweep,
    boundaries,
    whole_scores,
)

if TYPE_CHECKING:
    from steerback.published.authors import Imported

SMALLEST_SD = 1e-6
"""Smallest standard deviation of thresholds. Below it, boosts in units of the standard deviation are not distinct."""


@dataclass(frozen=True)
class Levels:
    """Boost levels of a sweep: distances from the mean threshold in standard deviations of the thresholds."""

    mean: float
    sd: float
    latents: int

    def of(self, boost: float | None) -> float:
        """Return the level of a boost, rounded to two decimals."""
        if boost is None:
            raise SteerbackError("a trial of a sweep has no boost (its threshold field)")
        return round((boost - self.mean) / self.sd, 2)


def levels_of(source: Source) -> Levels | None:
    """Return the boost levels of a sweep; None for other files."""
    if source.kind != "sweep":
        return None
    stats = source.file.threshold_cache_stats
    if stats is not None and stats.mean is not None and stats.std:
        mean, sd = stats.mean, stats.std
    else:
        if len(source.thresholds) < 2:
            raise SteerbackError(f"{source.path}: a sweep needs threshold_cache_stats or at least two thresholds")
        mean, sd = float(np.mean(source.thresholds)), float(np.std(source.thresholds))
    if not (math.isfinite(mean) and SMALLEST_SD < sd < math.inf):
        raise SteerbackError(
            f"{source.path}: the standard deviation of the thresholds is {sd:g}, so boosts cannot be normalised; "
            "set a finite mean and a std above 0 in threshold_cache_stats"
        )
    return Levels(mean, sd, len(source.labels))


def facts_of(
    sources: Sequence[Source], target: str | None, result: Imported, sets: Ablations, unknown: list[str]
) -> dict[tuple[str, str], JsonValue]:
    """Return the facts that analyses need besides trials, by (target, name), in the form of the ledger."""
    facts: dict[tuple[str, str], JsonValue] = {}
    for name in result.targets:
        own = [s for s in sources if (target or s.model) == name]
        chosen = {key: label for s in own for key, label in s.labels.items()}
        latents = [Latent(key, label) for key, label in chosen.items()]
        facts[name, LATENTS.name] = LATENTS.dump(Selection(chosen=latents, counts={"imported": len(latents)}))
        for source in own:
            for fact, value in ((source.file.steerback and source.file.steerback.facts) or {}).items():
                facts[name, fact] = _own_fact(source, fact, value)
        sweeps = [levels for s in own if (levels := levels_of(s)) is not None]
        if sweeps:
            first, grid = sweeps[0], sorted(result.levels.get(name, set()))
            swept = Sweep(mean=first.mean, sd=first.sd, latents=len(chosen), levels=grid, dropped={}, boosts="absolute")
            facts[name, SWEEP.name] = SWEEP.dump(swept)
        if result.experiment == "meta-prompts" and not any(s.kind == "ours" for s in own):
            texts = {s.condition: s.file.variant.template for s in own if s.kind == "variant"}
            variants = MetaPromptSet(variants=texts, cells_without_label=0, parameters=None)
            facts[name, META_PROMPTS.name] = META_PROMPTS.dump(variants)
        facts |= {(name, fact): value for fact, value in _ablation_facts(sets, chosen).items()}
    facts["", IMPORTED.name] = IMPORTED.dump(
        ImportedFiles(files=[s.path.name for s in sources], counts=dict(result.counts), unknown=unknown)
    )
    return facts


def _ablation_facts(sets: Ablations, labels: Mapping[LatentKey, str | None]) -> dict[str, JsonValue]:
    """Return the facts of an ablation: detectors, doses, random sets. AUC and level are NaN: the files lack them."""
    facts: dict[str, JsonValue] = {}
    if sets.detectors:
        members = [Detector(latent=k, label=labels.get(k), level=math.nan, auc=math.nan) for k in sets.detectors]
        facts[DETECTOR_SET.name] = DETECTOR_SET.dump(DetectorSet(source="imported files", detectors=members))
        doses = [
            Dose(condition=BASELINE, share=0.0, level=0.0, latents=0),
            Dose(condition=ABLATED, share=1.0, level=0.0, latents=len(members)),
        ]
        facts[DOSES.name] = DOSES.dump(doses)
    if sets.random:
        shared = sum(len(x) for x in sets.random) - len({k for x in sets.random for k in x})
        control = ControlSets(
            sets=[list(x) for x in sets.random],
            method="imported",
            quality=[],
            n_candidates=None,
            overlap=shared / sum(len(x) for x in sets.random),
        )
        facts[RANDOM_SETS.name] = RANDOM_SETS.dump(control)
    return facts


def _own_fact(source: Source, name: str, value: JsonValue) -> JsonValue:
    """Check and return a fact of an export of steerback. Raises SteerbackError for a fact that is never exported."""
    kind, by, judge = name.partition(" by ")
    fact: Fact[Any] | None = EXPORTED.get(name)
    if fact is None and by and kind in ("boundaries", "whole"):
        fact = boundaries(judge) if kind == "boundaries" else whole_scores(judge)
    if fact is not None:
        return fact.dump(fact.load(value, str(source.path)))
    raise SteerbackError(
        f"{source.path}: unknown fact {name[:80]!r} in steerback.facts; choose from: {', '.join(EXPORTED)}"
    )
