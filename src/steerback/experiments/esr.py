"""Experiment 1, ESR across models (specification section "Experiment 1", Fig. 2).

Every latent is steered at its threshold boost; how often does the model restart, and does it come back?
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from steerback.calibration import assess
from steerback.config import RunConfig
from steerback.experiments.base import Analysis, Experiment, measured, planted
from steerback.store.ledger import Ledger
from steerback.study.study import Study, read_threshold

CONDITION = "steered"


class Esr(Experiment):
    """Incidence of Endogenous Steering Resistance at calibrated boosts."""

    name = "esr"
    title = "ESR at threshold boosts (experiment 1)"

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

        found = measured(ledger, judge, draws)
        calibration = {target: calibration_of(ledger, target) for target in found.targets}
        data = {target: (found.outcomes[target, c], found.summaries[target, c]) for target, c in found.summaries}
        return Analysis(
            summary=found.to_json(
                self.name, {target: {"calibration": report} for target, report in calibration.items()}
            ),
            tables=found.tables(),
            figures={"figure2": partial(figure.draw, data, judge, note=planted(data))},
            lines=[_calibrated(target, report) for target, report in calibration.items()],
        )


def calibration_of(ledger: Ledger, target: str) -> dict[str, Any]:
    """The calibration report of a target, with how its latents were chosen."""
    from dataclasses import asdict

    stored = ledger.fact(target, "thresholds") or []
    chosen = ledger.fact(target, "latents") or {"counts": {}}
    return {**asdict(assess([t for _, t in map(read_threshold, stored)])), "selection": chosen["counts"]}


def _calibrated(target: str, report: Mapping[str, Any]) -> str:
    if not report["n"]:
        return f"{target}: no calibration in this ledger (imported results hold thresholds alone)"
    if report["mean_score"] is None:
        return f"{target}: no latent has a usable threshold ({report['statuses']})"
    interval = "" if report["mean_low"] is None else f" [{report['mean_low']:.1f}, {report['mean_high']:.1f}]"
    states = ", ".join(f"{n} {status}" for status, n in report["statuses"].items() if n)
    return (
        f"{target}: calibrated mean first score {report['mean_score']:.1f}{interval} over {report['n_judged']} latents "
        f"({states}; {report['share_outside']:.0%} of latents off by more than the tolerance{_spread(report)})"
    )


def _spread(report: Mapping[str, Any]) -> str:
    """With few fresh trials a latent, most of what is off is noise; this is what is left of it."""
    return "" if report["spread"] is None else f", spread beyond noise {report['spread']:.0f} points"
