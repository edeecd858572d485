"""Experiment 1, ESR across models (specification section "Experiment 1", Fig. 2).

Every latent is steered at its threshold boost; how often does the model restart, and does it come back?
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from steerback.calibration import assess
from steerback.config import RunConfig
from steerback.experiments.base import Analysis, outcomes_of
from steerback.ledger import Ledger
from steerback.metrics import summarize
from steerback.study import Study, read_threshold

CONDITION = "steered"


class Esr:
    """Incidence of Endogenous Steering Resistance at calibrated boosts."""

    name = "esr"
    title = "ESR at threshold boosts (experiment 1)"
    options: Mapping[str, Any] = {}

    def conditions(self, config: RunConfig) -> int:
        return 1

    async def run(self, study: Study) -> None:
        """Steers every cell of the grid."""
        cells = await study.cells()
        await study.measure(
            CONDITION,
            [study.steered("measure", CONDITION, c.latent, c.boost, c.index, c.prompt) for c in cells],
        )

    def analyse(self, ledger: Ledger, judge: str, draws: int) -> Analysis:
        """Rates, MSI and intervals per target; Figure 2."""
        from steerback.figures import esr as figure
        from steerback.report.tables import summary_table

        data, calibration = {}, {}
        for target, condition in ledger.conditions():
            outcomes = outcomes_of(ledger.rows(target, "measure", condition, judge))
            data[target] = (outcomes, summarize(outcomes, draws))
            calibration[target] = calibration_of(ledger, target)
        return Analysis(
            summary={
                "experiment": self.name,
                "judge": judge,
                "targets": {
                    target: {"metrics": summary.to_json(), "calibration": calibration[target]}
                    for target, (_, summary) in data.items()
                },
            },
            tables={"table": summary_table({target: summary for target, (_, summary) in data.items()}, judge=judge)},
            figures={"figure2": partial(figure.draw, data, judge, note=PLANTED if organisms(data) else "")},
            lines=[_calibrated(target, found) for target, found in calibration.items()],
        )


PLANTED = "Built-in organisms restart because their training text does (planted): no evidence about other models."


def organisms(targets: Mapping[str, Any]) -> bool:
    """Whether any of the targets is a built-in organism, whose numbers are planted."""
    return any(name.startswith("organism") for name in targets)


def calibration_of(ledger: Ledger, target: str) -> dict[str, Any]:
    """The calibration report of a target, with how its latents were chosen."""
    from dataclasses import asdict

    stored = ledger.fact(target, "thresholds") or []
    chosen = ledger.fact(target, "latents") or {"counts": {}}
    return {**asdict(assess([t for _, t in map(read_threshold, stored)])), "selection": chosen["counts"]}


def _calibrated(target: str, report: Mapping[str, Any]) -> str:
    if report["mean_score"] is None:
        return f"{target}: no latent has a usable threshold ({report['statuses']})"
    interval = "" if report["mean_low"] is None else f" [{report['mean_low']:.1f}, {report['mean_high']:.1f}]"
    states = ", ".join(f"{n} {status}" for status, n in report["statuses"].items() if n)
    return (
        f"{target}: calibrated mean first score {report['mean_score']:.1f}{interval} over {report['n_judged']} latents "
        f"({states}; {report['share_outside']:.0%} of latents off by more than the tolerance)"
    )
