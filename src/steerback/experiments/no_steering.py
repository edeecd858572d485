"""Experiment 8, no steering (specification section "Experiment 8", Figs. A7 and A8).

The identical protocol with the addition left out. The judge is told the label that the trial would have had, so that
it looks for the same thing. Expected is no restart at all, so what matters is the upper bound.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from steerback.config import RunConfig
from steerback.experiments.base import Analysis, Experiment, Measured, measured, outcomes_of, planted
from steerback.figures.tables import Table, number
from steerback.metrics import Estimate, Outcomes, summarize
from steerback.records import Trial
from steerback.store.ledger import Ledger, Row
from steerback.study.study import BASELINE, Study

CONDITION = "unsteered"


class NoSteering(Experiment):
    """How often the model restarts when nothing pushes it."""

    name = "no-steering"
    title = "No steering (experiment 8)"
    calibrates = False

    def conditions(self, config: RunConfig) -> int:
        return 1 if config.from_run is None else 2

    async def run(self, study: Study) -> None:
        """Every cell without steering. Started from another run: its cells, and its steered baseline beside.

        On its own it needs no thresholds, so none are searched and all chosen latents take part.
        """
        paired = study.config.from_run is not None
        if paired:
            await study.baseline()
        cells = await study.cells(calibrated=paired)
        await study.measure(CONDITION, [study.at(cell, CONDITION, boost=0.0, interventions=()) for cell in cells])

    def analyse(self, ledger: Ledger, judge: str, draws: int) -> Analysis:
        """Restart rate with upper bounds clustered by latent and by prompt; Figures A7 and A8."""
        from steerback.figures import first_scores as figure

        found = measured(ledger, judge, draws)
        rows = {target: ledger.rows(target, "measure", CONDITION, judge) for target in found.targets}
        bounds = {target: bounds_of({target: r}, draws) for target, r in rows.items()}
        if len(rows) > 1:
            bounds["all targets"] = bounds_of(rows, draws)
        note = planted(found.targets)
        return Analysis(
            summary=found.to_json(
                self.name,
                {target: {"restarts": bounds[target]} for target in found.targets},
                pooled=bounds.get("all targets"),
            ),
            tables={**found.tables(), "bounds": bound_table(bounds, judge)},
            figures={
                "figureA7": partial(
                    figure.draw, {t: found.outcomes[t, CONDITION] for t in found.targets}, judge, note=note
                ),
                **_beside(found, judge, note),
            },
        )


def _beside(found: Measured, judge: str, note: str) -> dict[str, Any]:
    """Figure A8, unsteered beside steered, where a steered baseline was measured."""
    from steerback.figures import first_scores as figure

    pairs = {t: found.outcomes[t, CONDITION] for t in found.targets if (t, BASELINE) in found.outcomes}
    steered = {t: found.outcomes[t, BASELINE] for t in pairs}
    return {"figureA8": partial(figure.draw, pairs, judge, steered=steered, note=note)} if pairs else {}


def bounds_of(rows: Mapping[str, Sequence[Row]], draws: int) -> dict[str, Any]:
    """Multi-attempt rate of the rows with its interval clustered by latent, by prompt, and as if independent.

    Unsteered responses to one prompt differ in their seed alone, so the prompt is the cluster that matters there; the
    headline is the wider of the two.
    """
    found = {"latents": _rate(rows, lambda t: f"{t.target}/{t.latent}", draws)}
    found["prompts"] = _rate(rows, lambda t: f"{t.target}/{t.prompt}", draws)
    one = found["latents"]
    exact = (one.beside or {}).get("clopper_pearson", (None, None))
    highs = [e.high for e in found.values() if e.high is not None]
    return {
        "n": one.n,
        "multi_attempt": one.events,
        "rate": one.value,
        "upper": max(highs) if highs else None,
        "upper_by_latent": found["latents"].high,
        "upper_by_prompt": found["prompts"].high,
        "upper_clopper_pearson": exact[1],
    }


def _rate(rows: Mapping[str, Sequence[Row]], cluster: Callable[[Trial], str], draws: int) -> Estimate:
    outcomes = Outcomes.concat(outcomes_of(r, cluster) for r in rows.values())
    return summarize(outcomes, draws)["multi_attempt_rate"]


def bound_table(bounds: Mapping[str, Mapping[str, Any]], judge: str) -> Table:
    """One row per target, and one for all together."""
    shown = ("rate", "upper_by_latent", "upper_by_prompt", "upper_clopper_pearson")
    return Table(
        ("target", "n", "multi-attempt", "rate %", "upper % (latents)", "upper % (prompts)", "upper % (independent)"),
        [
            (target, f"{b['n']:,}", f"{b['multi_attempt']:,}", *(number(b[name], rate=True) for name in shown))
            for target, b in bounds.items()
        ],
        "Restarts without steering: upper ends of 95 % intervals, clustered by latent, by prompt, and Clopper-Pearson "
        f"as if all trials were independent. Judge: {judge}.",
        [{"target": target, "judge": judge, **b} for target, b in bounds.items()],
    )
