"""Random ablation control (specification section "Random Ablation Control", Fig. A9): is it the detectors?

Clamping any active latents to zero disturbs a model. The detectors' ablation is compared with that of random sets of as
many latents, matched to the detectors in activity on the baseline's responses: with each set, and by its rank among
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from steerback.config import RunConfig
from steerback.experiments.base import Analysis, Experiment, Measured, measured, planted, settings
from steerback.experiments.detector_ablation import ABLATED, ablate
from steerback.experiments.detectors import AUTHORS, SearchOptions, detectors_of, searched
from steerback.figures.tables import Table, comparison_table, number
from steerback.metrics import METRICS, Comparison, compare, correct
from steerback.store.ledger import Ledger, Row
from steerback.study.study import BASELINE, Study

if TYPE_CHECKING:
    from steerback.latents.matching import RandomSets

RANKED = ("multi_attempt_rate", "esr_rate", "msi", "mean_attempts", "mean_first")


class Options(SearchOptions):
    """Which random sets the detectors are compared with."""

    sets: int | None = Field(None, ge=1)
    """How many; default: the target's (3; 19 for the built-in organisms)."""
    draw: Literal["matched", "uniform"] = "matched"
    """`uniform` over live latents, as the authors draw."""


class RandomAblation(Experiment):
    """Detector ablation against ablations of random sets."""

    name = "random-ablation"
    needs_sae = True
    title = "Detector ablation against matched random sets (appendix A5.2)"
    options = Options
    authors: Mapping[str, Any] = {**AUTHORS, "draw": "uniform"}

    def conditions(self, config: RunConfig) -> int:
        from steerback.targets import resolve

        given = settings(self, config)["sets"]
        if given is not None:
            return 2 + int(given)
        return 2 + max(resolve(t, config.definitions).random_sets for t in config.targets)

    def further(self, config: RunConfig) -> dict[str, int]:
        return searched(settings(self, config))

    async def run(self, study: Study) -> None:
        """Baseline, the detectors clamped to zero, then every random set."""
        chosen = settings(self, study.config)
        detectors = await detectors_of(study, chosen)
        rows = await study.baseline()
        await ablate(study, ABLATED, dict.fromkeys(detectors.latents, 0.0))
        sets = study.run.ledger.fact(study.name, "random sets")
        if sets is None:
            number = study.target.random_sets if chosen["sets"] is None else chosen["sets"]
            drawn = await draw_sets(study, rows, detectors.latents, number, chosen["draw"])
            sets = drawn.to_json()
            study.run.ledger.set_fact(study.name, "random sets", sets)
        for number, latents in enumerate(sets["sets"], 1):
            await ablate(study, f"random {number}", dict.fromkeys(latents, 0.0))

    def analyse(self, ledger: Ledger, judge: str, draws: int) -> Analysis:
        """Detectors against the baseline and against each set; the rank of their effect; Figure A9."""
        from steerback.figures import random_ablation as figure

        found = measured(ledger, judge, draws)
        ranks = {target: {m: rank(found, target, m) for m in RANKED} for target in found.targets}
        sets = {target: ledger.fact(target, "random sets") for target in found.targets}
        beside = against_sets(found)
        own = {
            t: {
                "random_sets": sets[t],
                "ranks": {m: None if r is None else asdict(r) for m, r in ranks[t].items()},
                "detectors_against_sets": {c: x.to_json() for (target, c), x in beside.items() if target == t},
            }
            for t in found.targets
        }
        # every set against the baseline is in summary.json; the table holds what the control is for
        named = {f"{t}: {ABLATED} − {BASELINE}": x for (t, c), x in found.comparisons.items() if c == ABLATED}
        named |= {f"{t}: {ABLATED} − {c}": x for (t, c), x in beside.items()}
        return Analysis(
            summary=found.to_json(self.name, own),
            tables={
                "table": found.tables()["table"],
                "comparisons": comparison_table(named, judge=judge, metrics=("multi_attempt_rate", "msi")),
                "ranks": rank_table(ranks),
                "match": match_table(sets),
            },
            figures={"figureA9": partial(figure.draw, found, ranks, sets, note=planted(found.targets))},
            lines=[told(target, ranks[target], sets[target]) for target in found.targets],
        )


def is_random(condition: str) -> bool:
    return condition.startswith("random ")


async def draw_sets(study: Study, rows: list[Row], latents: tuple[int, ...], sets: int, draw: str) -> RandomSets:
    """Random sets matched on the responses of `rows`; steered latents are never drawn.

    Activities are read on the steered texts without steering, which at the steered layer is what a clamp there meets.
    """
    from steerback.latents.matching import LatentActivity, matched_sets, uniform_sets

    texts = [(r.trial.prompt, r.completion.text) for r in rows if r.completion is not None and r.completion.text]
    prompts, responses = zip(*texts, strict=True)
    means, frequencies = (study.engine.activations(prompts, responses, pool=p) for p in ("mean", "active"))
    activity = LatentActivity.measure(means, frequencies, study.engine.decoder_norms())
    steered = {r.trial.latent for r in rows if isinstance(r.trial.latent, int)}
    choose = matched_sets if draw == "matched" else uniform_sets
    return choose(activity, latents, sets, exclude=steered, seed=study.config.seeds.latents)


@dataclass(frozen=True, slots=True)
class Rank:
    """Where the detectors' value lies among the random sets' values of a metric.

    `below` of the `sets` have a smaller value, `above` a larger one. `p` is two-sided: how many of all sets, with the
    detectors among them, lie at least as far from the mean of the others as the detectors do.
    """

    value: float
    baseline: float | None
    mean: float
    low: float
    high: float
    below: int
    above: int
    sets: int
    p: float


def rank(found: Measured, target: str, metric: str) -> Rank | None:
    """The detectors' rank in `metric`; None where a value is missing."""
    own = {condition: s[metric].value for condition, s in found.of(target).items()}
    others = [v for condition, v in own.items() if is_random(condition) and v is not None]
    value = own.get(ABLATED)
    if value is None or not others:
        return None
    everything = [value, *others]
    apart = [abs(v - (sum(everything) - v) / len(others)) for v in everything]
    return Rank(
        value=value,
        baseline=own.get(BASELINE),
        mean=sum(others) / len(others),
        low=min(others),
        high=max(others),
        below=sum(v < value for v in others),
        above=sum(v > value for v in others),
        sets=len(others),
        p=sum(x >= apart[0] * (1 - 1e-12) for x in apart) / len(everything),
    )


def against_sets(found: Measured) -> dict[tuple[str, str], Comparison]:
    """The detectors' ablation minus each random set's, paired, Holm-corrected over the sets."""
    pairs = [key for key in found.outcomes if is_random(key[1]) and (key[0], ABLATED) in found.outcomes]
    tests = {f"{t}\n{c}": compare(found.outcomes[t, c], found.outcomes[t, ABLATED]) for t, c in pairs}
    corrected = correct(tests)
    return {(t, c): corrected[f"{t}\n{c}"] for t, c in pairs}


def rank_table(ranks: Mapping[str, Mapping[str, Rank | None]]) -> Table:
    """One row per target and metric: baseline, detectors, and where the random sets lie."""
    cells, records = [], []
    for target, found in ranks.items():
        for metric, r in found.items():
            if r is None:
                continue
            values = (r.baseline, r.value, r.mean, r.low, r.high)
            shown = [number(v, METRICS[metric].rate) for v in values]
            cells.append((target, METRICS[metric].label, *shown, f"{r.below} / {r.above} of {r.sets}", f"{r.p:.3f}"))
            records.append({"target": target, "metric": metric, **asdict(r)})
    return Table(
        ("target", "metric", "baseline", "detectors", "sets: mean", "least", "most", "below / above", "p (rank)"),
        cells,
        "Detectors clamped to zero among random sets clamped to zero. Below / above: sets with a smaller / larger "
        "value than the detectors; p: two-sided, from the rank of the distance to the mean of the other sets.",
        records,
        left=2,
    )


def match_table(sets: Mapping[str, Mapping[str, Any]]) -> Table:
    """How like the detectors each random set is."""
    rows = [(t, i, s["sets"][i], q) for t, s in sets.items() for i, q in enumerate(s["quality"])]

    def shown(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:{sign}.2f}"

    return Table(
        ("target", "set", "mean", "frequency", "norm removed", "distance", "norm, ratio"),
        [
            (
                t,
                f"random {i + 1}",
                *(shown(q["difference"][f], "+") for f in ("mean", "frequency", "removed")),
                shown(q["distance"]),
                shown(q["removed_ratio"]),
            )
            for t, i, _, q in rows
        ],
        "Random sets minus detectors, in logarithms and units of the sd over live latents; distance: mean over members "
        "to the detector each stands for; ratio: norm that the clamp removes per token, relative to the detectors.",
        [
            {
                "target": t,
                "set": i + 1,
                "latents": " ".join(map(str, latents)),
                **q["difference"],
                "distance": q["distance"],
                "removed_ratio": q["removed_ratio"],
            }
            for t, i, latents, q in rows
        ],
        left=2,
    )


def told(target: str, ranks: Mapping[str, Rank | None], sets: Mapping[str, Any]) -> str:
    """One line: how far the ablation of the detectors lies from those of the sets."""
    kind = (
        f"{len(sets['sets'])} {sets['method']} sets of {len(sets['sets'][0])} from {sets['n_candidates']} live latents"
    )
    overlap = f", which share {sets['overlap']:.0%} of their latents" if sets["overlap"] else ""
    r = ranks["multi_attempt_rate"]
    if r is None:
        return f"{target}: {kind}{overlap}; nothing to compare"
    return (
        f"{target}: {kind}{overlap}; multi-attempt rate {r.value:.1%} without the detectors, {r.mean:.1%} "
        f"[{r.low:.1%}, {r.high:.1%}] without a random set (rank p = {r.p:.3f}; the least that {r.sets} sets allow is "
        f"{1 / (r.sets + 1):.3f})"
    )
