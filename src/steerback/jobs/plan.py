"""Study planning: the number of latents and trials that an effect needs, and their cost in GPU-hours and judge calls.

Power is simulated with latents as clusters (`metrics.power`). Planning loads no model and needs no API key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from steerback.analysis.base import outcomes_of
from steerback.config import RunConfig
from steerback.data.prompts import load_prompts
from steerback.errors import SteerbackError
from steerback.jobs.estimate import judge_estimate, response_tokens, responses
from steerback.judging import Judge
from steerback.metrics import power as simulate
from steerback.metrics import view
from steerback.metrics.intervals import ICC, cluster_sums
from steerback.metrics.power import Design, Effect
from steerback.records import Spend
from steerback.store.facts import FLOOR
from steerback.store.files import make_folder
from steerback.store.run import Run
from steerback.targets import Target

TRIALS = (10, 20, 50)
RATE, DROP = "rate above the floor", "drop, paired"


class Speed(NamedTuple):
    """Measured speed of steered generation on one card: `gigabytes` of weights, tokens/s over all requests."""

    gigabytes: float
    tokens_per_second: float
    source: str


CARD, CARD_BYTES = "H200", 141e9
SPEEDS = (
    Speed(16.1, 21_273, "Llama-3.1-8B shape, bfloat16: benchmarks/results/vllm_8b.json"),
    Speed(18.5, 14_223, "Gemma-2-9B shape, bfloat16: benchmarks/results/vllm_gemma.json"),
    Speed(70.6, 5_071, "70B shape, fp8: benchmarks/results/vllm_70b.json"),
)
IN_A_STUDY = 0.85
"""Speed in a study, with requests of different lengths, relative to `SPEEDS` (vllm_8b.json)."""
OTHER_CARDS = {"H100": 1.4, "A100": 2.4}
"""GPU-hours on other cards relative to an H200: the ratio of their memory bandwidths (4.8, 3.35 and 2.0 TB/s)."""


@dataclass(frozen=True)
class Assumptions:
    """Effect to detect and required power. `sources` names the source of each number."""

    effect: Effect
    power: float
    sources: Mapping[str, str]


@dataclass(frozen=True)
class Need:
    """One row of a plan: the smallest sufficient design (None: even the largest is too small) and its cost."""

    question: str
    trials: int
    design: Design | None
    power: float | None = None
    responses: int = 0
    hours: float | None = None
    judging: Spend | None = None


@dataclass(frozen=True)
class Fixed:
    """Power of a design of a given size for the stated effect, and the smallest rate and drop that it can detect."""

    design: Design
    rate_power: float
    drop_power: float
    smallest_rate: float | None
    smallest_drop: float | None


@dataclass(frozen=True)
class StudyPlan:
    """A plan, and curves of power against the number of latents if they were requested."""

    target: str
    judge: str | None
    assumed: Assumptions
    needs: Sequence[Need]
    fixed: Fixed
    hardware: str
    curves: Sequence[tuple[str, int, int, float]] = ()
    """(question, trials per latent, latents, power)."""

    def to_json(self) -> dict[str, object]:
        """Return the content of plan.json."""
        return asdict(self)


class Observed(NamedTuple):
    """Multi-attempt rate of an earlier run: its mean and ICC over latents, the judge's floor, and their source."""

    rate: float
    icc: float
    floor: float | None
    source: str


def observe(folder: Path, target: str | None, judge: str | None = None) -> Observed:
    """Estimate the rate and its variance between latents from the first measured condition of a finished run."""
    with Run.read(folder) as opened:
        judge = judge or opened.config.judge
        places = [place for place in opened.ledger.conditions("measure") if target in (None, place[0])]
        if not places:
            raise SteerbackError(
                f"run {folder.name} has no measured responses"
                + (f" of {target}; it has: {', '.join(opened.config.targets)}" if target else "")
            )
        name, condition = places[0]
        counted = opened.ledger.includes_degraded
        seen = view(outcomes_of([*opened.ledger.outlines(name, "measure", condition, judge)], counted))
        unsteered = view(outcomes_of([*opened.ledger.outlines(name, FLOOR, judge=judge)], counted))
    if not len(seen.cluster):
        raise SteerbackError(f"run {folder.name} has no verdicts of {judge} about {name} ({condition})")
    multi = seen.multi.astype(float)
    events = cluster_sums(seen.cluster, multi).astype(int)
    trials = cluster_sums(seen.cluster, multi * 0 + 1).astype(int)
    mean, icc, known = simulate.beta_binomial(events, trials)
    how = "beta-binomial fit" if known else f"assumed, as {events.sum()} restarts are too few to estimate it"
    floor = float(unsteered.multi.mean()) if len(unsteered.cluster) else None
    source = f"run {folder.name}, {name}, {condition}: {events.sum()} of {trials.sum()} in {len(trials)} latents"
    return Observed(mean, icc, floor, f"{source}; ICC: {how}")


def assume(
    rate: float | None,
    drop: float,
    power: float,
    icc: float | None = None,
    floor: float | None = None,
    seen: Observed | None = None,
) -> Assumptions:
    """Return the effect with the source of each number: the user's value, else that of a run, else the default."""

    def pick(stated: float | None, of_run: float | None, usual: float) -> tuple[float, str]:
        if stated is not None:
            return stated, "stated"
        return (usual, "default") if of_run is None or seen is None else (of_run, seen.source)

    (chosen, rate_from), (corr, icc_from), (base, floor_from) = (
        pick(rate, seen and seen.rate, 0.02),
        pick(icc, seen and seen.icc, ICC),
        pick(floor, seen and seen.floor, 0.0025),
    )
    if not 0 < chosen < 1 or not 0 < drop <= 1 or not 0 < power < 1:
        raise SteerbackError("--rate and --drop must be between 0 and 100 %, --power between 0 and 1")
    if base >= chosen:
        raise SteerbackError(f"the rate ({chosen:.2%}) must be above the judge's floor ({base:.2%})")
    sources = {"rate": rate_from, "drop": "stated", "icc": icc_from, "floor": floor_from}
    return Assumptions(Effect(chosen, drop, corr, base), power, sources)


def make_plan(
    config: RunConfig,
    target: Target,
    judge: Judge | None,
    assumed: Assumptions,
    floor: int | None,
    curves: bool,
    simulations: int = simulate.SIMULATIONS,
) -> StudyPlan:
    """Search for sufficient designs and estimate their cost. The size in the config is evaluated without a search.

    `floor` is the number of judged unsteered responses; None: as many as measured responses, at least the config's
    `floor_responses`. `simulations` is the number of simulated studies for each design.
    """
    config = config.of(target.name)

    def floor_of(measured: int) -> int:
        return max(config.floor_responses, measured) if floor is None else floor

    prompts, effect = len(load_prompts(config.prompts)), assumed.effect
    questions: dict[str, tuple[simulate.Question, Callable[[int], int]]] = {
        RATE: (simulate.power_of_rate, floor_of),
        DROP: (simulate.power_of_drop, lambda measured: config.floor_responses if floor is None else floor),
    }
    needs, sizes = [], sorted({*TRIALS, config.trials_per_latent})
    for question, (power_of, floors) in questions.items():
        for trials in sizes:
            smallest = simulate.smallest_size(power_of, effect, trials, assumed.power, floors, simulations)
            need = Need(question, trials, None) if smallest is None else Need(question, trials, *smallest)
            needs.append(_priced(need, config, prompts, target, judge))
    own = Design(config.n_latents, config.trials_per_latent, floor_of(config.n_latents * config.trials_per_latent))
    fixed = Fixed(
        own,
        simulate.power_of_rate(own, effect, simulations),
        simulate.power_of_drop(own, effect, simulations),
        simulate.smallest_rate(own, effect, assumed.power, simulations),
        simulate.smallest_drop(own, effect, assumed.power, simulations),
    )
    fewer = min(simulations, 400)
    drawn = [
        (question, trials, n, power_of(Design(n, trials, floors(n * trials)), effect, fewer, 0))
        for question, (power_of, floors) in questions.items()
        for trials in sizes
        for n in simulate.LATENTS[:49:6]
        if curves
    ]
    name = judge.name if judge is not None else None
    return StudyPlan(target.name, name, assumed, needs, fixed, hardware(target), drawn)


def _priced(need: Need, config: RunConfig, prompts: int, target: Target, judge: Judge | None) -> Need:
    """Return the row with the cost of its design. A paired drop measures two conditions."""
    if need.design is None:
        return need
    size = {"n_latents": need.design.latents, "trials_per_latent": need.trials, "latents": None, "limit": None}
    counts = responses(config.model_copy(update=size), prompts, 2 if need.question == DROP else 1)
    counts[FLOOR] = need.design.floor_responses
    total, tokens = sum(counts.values()), response_tokens(config, target)
    judged = total - counts["reference"]
    return replace(
        need,
        responses=total,
        hours=hours(target, total, tokens),
        judging=None if judge is None else judge_estimate(judge, judged, tokens),
    )


def hours(target: Target, count: int, tokens: int) -> float | None:
    """Return GPU-hours on `CARD`, or hours of two CPU cores for a built-in model; None if the size is unknown."""
    if target.responses_per_second is not None:
        return count / target.responses_per_second / 3600
    size = weights(target)
    if size is None:
        return None
    return count * tokens / (IN_A_STUDY * _nearest(size).tokens_per_second * _nearest(size).gigabytes / size) / 3600


def weights(target: Target) -> float | None:
    """Return the gigabytes of a target's weights in bfloat16, or in fp8 if bfloat16 does not fit one card."""
    count, needed = target.parameters(), target.memory("bfloat16")
    if count is None or needed is None:
        return None
    return count * (2 if needed <= 0.95 * CARD_BYTES else 1) / 1e9


def hardware(target: Target) -> str:
    """Return a text with the unit of the hours and the measurement that they are derived from."""
    if target.responses_per_second is not None:
        return f"hours of two CPU cores, at {target.responses_per_second:g} responses/s (the target's measured speed)"
    size = weights(target)
    if size is None:
        return "GPU-hours unknown: the target's number of parameters is not known"
    cards = max(1, math.ceil(size * 1.05e9 / (0.95 * CARD_BYTES)))
    near = _nearest(size)
    others = ", ".join(f"{factor:g} times as many on {card}" for card, factor in OTHER_CARDS.items())
    return (
        f"GPU-hours on {cards} x {CARD} for {size:.0f} GB of weights, from {near.tokens_per_second:,.0f} tokens/s "
        f"({near.source}), times {near.gigabytes:.0f}/{size:.0f}, times {IN_A_STUDY} for requests of different "
        f"lengths, every response at its full length; derived from memory bandwidth, not measured: {others}"
    )


def _nearest(size: float) -> Speed:
    return min(SPEEDS, key=lambda speed: abs(math.log(speed.gigabytes / size)))


def prepare_out(out: Path | None) -> None:
    """Create the output folder before the computation starts, so that an unwritable path fails early."""
    if out is not None:
        make_folder(out, "choose another --out")
