"""Experiment 3, first phase: the search for latents that tell whether a response belongs to its prompt.

Unsteered responses to discovery prompts are read after their own and after another prompt; latents that separate the
two on one half of the prompts are the detectors, and the other half says how well that holds. Nothing is steered and
nothing is judged. Other experiments take their detectors from here with `detectors_of`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from steerback.config import RunConfig, Settings
from steerback.data.prompts import load_prompts
from steerback.errors import SteerbackError
from steerback.experiments.base import Analysis, Experiment, planted, settings
from steerback.store.ledger import Ledger, Row
from steerback.study.pipeline import complete
from steerback.study.study import Study, fact_of, same_weights

if TYPE_CHECKING:
    from steerback.figures.tables import Table
    from steerback.latents.detectors import DetectorSearch
    from steerback.latents.separation import Separation

DISCOVERY, FACT = "discovery", "detectors"


class SearchOptions(Settings):
    """How detectors are found."""

    detectors: Any = None
    """Own detectors: a list of latents, a JSON file, or the folder of another run; default: search."""
    discovery_prompts: str | None = None
    """Built-in list or file; default: the target's."""
    responses: int = Field(500, ge=1)
    """Unsteered responses to them."""
    rule: Literal["perfect", "authors", "auc", "top"] = "perfect"
    auc: float = Field(0.9, ge=0, le=1)
    """For rule `auc`, and where no latent separates perfectly."""
    limit: int | None = Field(25, ge=1)
    """At most this many, best first."""
    include_prompt: bool = False
    """Pool over the prompt as well, as the authors do."""


AUTHORS: Mapping[str, Any] = {"rule": "authors", "include_prompt": True, "limit": None}


class DetectorExperiment(Experiment):
    """Which latents are more active when a response does not fit its prompt, and is that more than chance?"""

    name = "detectors"
    needs_sae = True
    title = "Search for off-topic detectors (experiment 3)"
    options: type[Settings] = SearchOptions
    authors = AUTHORS
    calibrates = False

    def conditions(self, config: RunConfig) -> int:
        return 0

    def further(self, config: RunConfig) -> dict[str, int]:
        return searched(settings(self, config))

    async def run(self, study: Study) -> None:
        """Responses to the discovery prompts, and the search."""
        await look_up(study, settings(self, study.config))

    def analyse(self, ledger: Ledger, judge: str, draws: int) -> Analysis:
        """The detectors with their separation on both halves, against the null."""
        from steerback.figures import detectors as figure

        found = {target: stored_detectors(ledger, target) for target in targets_with(ledger, FACT)}
        return Analysis(
            summary={"experiment": self.name, "targets": {t: d.stored for t, d in found.items()}},
            tables={"table": detector_table(found)},
            figures={"detectors": partial(figure.draw, found, planted(found))},
            lines=[f"{target}: {d.told}" for target, d in found.items()],
            data={f"off_topic_detectors_{target}": list(d.latents) for target, d in found.items()},
        )


@dataclass(frozen=True)
class Detectors:
    """Detectors of a target, best first. `levels`: their mean pooled activation on mismatched pairs."""

    latents: tuple[int, ...]
    levels: Mapping[int, float]
    stored: Mapping[str, Any]

    def best(self, share: float) -> tuple[int, ...]:
        """The best `share` (0-1) of them, to the nearest number (halves up)."""
        return self.latents[: math.floor(share * len(self.latents) + 0.5)]

    @property
    def told(self) -> str:
        """One line: how many, by which rule, and how they do on prompts that were not searched."""
        line = f"{len(self.latents)} detector{'s' * (len(self.latents) != 1)} ({self.stored['source']})"
        half = (self.stored["search"] or {}).get("held_out")
        if half is None or not self.latents:
            return line
        high = half["high_auc"]
        return (
            f"{line}; on held-out prompts {high['observed']} of them at AUC >= 0.9, "
            f"{high['expected']:.2g} expected by chance (p = {high['p']:.2g})"
        )


def searched(options: Mapping[str, Any]) -> dict[str, int]:
    """Responses that a search would cost."""
    return {} if options["detectors"] is not None else {DISCOVERY: options["responses"]}


async def detectors_of(study: Study, options: Mapping[str, Any]) -> Detectors:
    """The study's detectors: its own, those of the run it starts from, or else searched for now; at least one."""
    found = await look_up(study, options)
    if not found.latents:
        raise SteerbackError(
            f"{study.name}: no detectors ({found.stored['source']}); lower options.auc, set options.rule=top, "
            "or name latents with options.detectors"
        )
    return found


async def look_up(study: Study, options: Mapping[str, Any]) -> Detectors:
    """As `detectors_of`, but there may be none. Options of the search that were set for this run search anew."""
    ledger, own = study.run.ledger, options["detectors"]
    stored = ledger.fact(study.name, FACT)
    if stored is None and not set(study.config.options) & set(SearchOptions.model_fields):
        stored = study.fact(FACT)
    if stored is None:
        stored = await _search(study, options) if own is None else await _own(study, own, options["include_prompt"])
        ledger.set_fact(study.name, FACT, stored)
    return _read(stored)


def stored_detectors(ledger: Ledger, target: str) -> Detectors:
    """The detectors that a run used."""
    return _read(ledger.fact(target, FACT))


def _read(stored: Mapping[str, Any]) -> Detectors:
    latents = tuple(entry["latent"] for entry in stored["detectors"])
    return Detectors(latents, {e["latent"]: e["level"] for e in stored["detectors"]}, stored)


def targets_with(ledger: Ledger, fact: str) -> list[str]:
    """The run's targets that have a fact, in the order of the config."""
    return [t for t in (ledger.fact("", "config") or {"targets": []})["targets"] if ledger.fact(t, fact) is not None]


async def _search(study: Study, options: Mapping[str, Any]) -> dict[str, Any]:
    from steerback.latents.detectors import make_pairs, search_detectors

    rows = await _discover(study, options)
    prompts = [r.trial.prompt for r in rows]
    pairs = make_pairs(prompts, study.config.seeds.latents)
    matched, mismatched = arms(study, rows, pairs.partner.tolist(), include_prompt=options["include_prompt"])
    look = partial(search_detectors, matched, mismatched, pairs, limit=options["limit"], auc=options["auc"])
    found = look(rule=options["rule"])
    source = f"rule {found.rule}"
    if options["rule"] == "perfect" and not found.latents:
        found = look(rule="auc")
        source = f"no latent separates perfectly: AUC >= {options['auc']:g}"
    source += f" on the search half, {found.n_passed} of {matched.shape[1]:,} latents passed"
    return _stored(study, found.latents, found.search.separation, source, found)


async def _discover(study: Study, options: Mapping[str, Any]) -> list[Row]:
    """Unsteered responses to the discovery prompts, in turns."""
    source = options["discovery_prompts"] or study.target.discovery_prompts
    prompts = load_prompts(source)
    shared = sorted(set(prompts) & set(study.prompts))
    if shared:
        raise SteerbackError(
            f"discovery prompts {source} and the run's own prompts share {shared[0]!r}; detectors have to be found on "
            "prompts that are not measured"
        )
    trials = [
        study.trial(DISCOVERY, "unsteered", i, prompt=prompts[i % len(prompts)], seed=study.seed(DISCOVERY, i))
        for i in range(options["responses"])
    ]
    rows = await complete(study.bench, trials, stage=f"{study.name}: discovery responses", judged=False)
    return [r for r in rows if r.completion is not None and r.completion.finish != "error"]


def arms(study: Study, rows: Sequence[Row], partner: Sequence[int], **how: Any) -> tuple[Any, Any]:
    """Pooled activations (n, latents) of the responses after their own prompt, and after that of row partner[i]."""
    texts = [r.completion.text for r in rows if r.completion is not None]
    prompts = [r.trial.prompt for r in rows]
    matched = study.engine.activations(prompts, texts, **how)
    return matched, study.engine.activations([prompts[j] for j in partner], texts, **how)


async def contrast(study: Study, latents: Sequence[int], include_prompt: bool) -> tuple[Any, Any, list[int]]:
    """Both arms (n, latents) on the run's own prompts, from its unsteered references, and the prompt's number (n,)."""
    from steerback.latents.detectors import make_pairs

    rows = [r for r in await study.references() if r.completion is not None]
    pairs = make_pairs([r.trial.prompt for r in rows], study.config.seeds.latents, held_out=False)
    how = {"latents": list(latents), "include_prompt": include_prompt}
    return *arms(study, rows, pairs.partner.tolist(), **how), pairs.prompt.tolist()


async def _own(study: Study, own: Any, include_prompt: bool) -> dict[str, Any]:
    """Detectors that the user named: a list, a JSON file as the authors write it, or another run's folder."""
    from steerback.latents.sampling import check_latents
    from steerback.latents.separation import separation

    where = "options.detectors"
    if isinstance(own, str):
        where = f"detectors of {own}"
        if Path(own).is_dir():
            stored, _ = fact_of(Path(own), study.name, FACT)
            if stored is None:
                raise SteerbackError(f"run {own} has no detectors for {study.name}; start one: steerback run detectors")
            same_weights(Path(own), study.name, study.engine)
            return dict(stored)
        own = _read_json(Path(own))
    if not isinstance(own, list):
        raise SteerbackError(f"{where}: expected a list of latents, not {own!r}")
    keys = check_latents(own, study.target.labels(), study.target.n_latents or None, where=where)
    latents = [k for k in keys if isinstance(k, int)]
    matched, mismatched, _ = await contrast(study, latents, include_prompt)
    return _stored(study, latents, separation(matched, mismatched), f"{len(latents)} named in {where}")


def _read_json(path: Path) -> Any:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SteerbackError(f"options.detectors: {path} is neither a JSON file nor the folder of a run") from None
    except (OSError, ValueError) as error:
        raise SteerbackError(f"options.detectors: {path} cannot be read as JSON: {error}") from None
    if isinstance(found, dict):
        return next((found[key] for key in ("latents", "off_topic_detectors") if key in found), found)
    return found


def _stored(
    study: Study,
    latents: Sequence[int],
    separation: Separation,
    source: str,
    found: DetectorSearch | None = None,
) -> dict[str, Any]:
    """What the ledger keeps: per detector its label, level and separation, and the search with its null."""
    held_out = found.held_out.separation if found is not None and found.held_out is not None else None
    entries = [
        {
            "latent": int(k),
            "label": study.target.labels().get(int(k)),
            "level": float(separation.mismatched_mean[i]),
            "auc": float(separation.auc[i]),
            "held_out_auc": None if held_out is None else float(held_out.auc[i]),
            "held_out_effect": None if held_out is None else _finite(held_out.effect[i]),
        }
        for i, k in enumerate(latents)
    ]
    return {"source": source, "detectors": entries, "search": None if found is None else found.to_json()}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def detector_table(found: Mapping[str, Detectors]) -> Table:
    """One row per detector: separation on the searched and on the held-out half."""
    from steerback.figures.tables import Table

    def shown(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    entries = [(target, entry) for target, d in found.items() for entry in d.stored["detectors"]]
    return Table(
        ("target", "latent", "label", "AUC searched", "AUC held out", "d held out", "level"),
        [
            (
                target,
                str(e["latent"]),
                e["label"] or "-",
                shown(e["auc"]),
                shown(e["held_out_auc"]),
                shown(e["held_out_effect"], 2),
                shown(e["level"], 2),
            )
            for target, e in entries
        ],
        "Detectors, best first. AUC: how often a mismatched response is more active than a matched one; the "
        "held-out prompts were not searched. Level: mean pooled activation on mismatched pairs of the searched half.",
        [{"target": target, **e} for target, e in entries],
        left=3,
    )
