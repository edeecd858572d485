"""No steering: the restart rate with its upper bounds (Figs. A7 and A8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from steerback.analysis.base import Measured, Results, measured, outcomes_of, planted
from steerback.metrics import Estimate, Outcomes, summarize
from steerback.records import Trial
from steerback.store.facts import BASELINE, UNSTEERED
from steerback.store.ledger import Ledger
from steerback.store.rows import TrialRow

ALL = "all targets"


@dataclass(frozen=True, slots=True)
class RestartBound:
    """Restarts among `n` unsteered responses, with upper ends of 95 % intervals of their rate.

    `upper_by_latent` and `upper_by_prompt` are clustered; `upper_clopper_pearson` treats trials as independent; `upper`
    is the larger of the two clustered ones.
    """

    n: int
    multi_attempt: int
    rate: float | None
    upper: float | None
    upper_by_latent: float | None
    upper_by_prompt: float | None
    upper_clopper_pearson: float | None


@dataclass(frozen=True, eq=False)
class NoSteeringResults(Results):
    """Summaries, and the bounds of each target. With several targets, `ALL` has the bounds of all together."""

    measured: Measured
    bounds: Mapping[str, RestartBound]
    planted: Sequence[str]

    def unsteered(self) -> dict[str, Outcomes]:
        """Outcomes without steering, by target."""
        return {t: self.measured.outcomes[t, UNSTEERED] for t in self.measured.targets}

    def steered(self) -> dict[str, Outcomes]:
        """Outcomes of the steered baseline, for targets that have one."""
        return {
            t: self.measured.outcomes[t, BASELINE] for t in self.unsteered() if (t, BASELINE) in self.measured.outcomes
        }

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json."""
        pooled = self.bounds.get(ALL)
        return self.measured.to_json(
            "no-steering",
            {target: {"restarts": asdict(self.bounds[target])} for target in self.measured.targets},
            pooled=None if pooled is None else asdict(pooled),
        )


def analyse(ledger: Ledger, judge: str, draws: int, options: object = None) -> NoSteeringResults:
    """Return the restart rate with upper bounds clustered by latent and by prompt."""
    conditions = measured(ledger, judge, draws)
    rows = {target: [*ledger.outlines(target, "measure", UNSTEERED, judge)] for target in conditions.targets}
    bounds = {target: bounds_of({target: r}, draws, ledger.includes_degraded) for target, r in rows.items()}
    if len(rows) > 1:
        bounds[ALL] = bounds_of(rows, draws, ledger.includes_degraded)
    return NoSteeringResults(conditions, bounds, planted(ledger, conditions.targets))


def bounds_of(rows: Mapping[str, Sequence[TrialRow]], draws: int, include_degraded: bool) -> RestartBound:
    """Return the multi-attempt rate with intervals clustered by latent, by prompt, and for independent trials.

    Unsteered responses to one prompt differ only in their seed, so the prompt is the relevant cluster; the headline is
    the wider of the two clustered intervals.
    """
    latents = _rate(rows, lambda t: f"{t.target}/{t.latent}", draws, include_degraded)
    prompts = _rate(rows, lambda t: f"{t.target}/{t.prompt}", draws, include_degraded)
    exact = (latents.beside or {}).get("clopper_pearson", (None, None))
    highs = [e.high for e in (latents, prompts) if e.high is not None]
    return RestartBound(
        n=latents.n,
        multi_attempt=latents.events or 0,
        rate=latents.value,
        upper=max(highs) if highs else None,
        upper_by_latent=latents.high,
        upper_by_prompt=prompts.high,
        upper_clopper_pearson=exact[1],
    )


def _rate(
    rows: Mapping[str, Sequence[TrialRow]], cluster: Callable[[Trial], str], draws: int, include_degraded: bool
) -> Estimate:
    outcomes = Outcomes.concat(outcomes_of(r, include_degraded, cluster) for r in rows.values())
    return summarize(outcomes, draws)["multi_attempt_rate"]
