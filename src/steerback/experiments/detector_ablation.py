"""Experiment 3, second phase: off-topic detectors clamped to zero (Fig. 5).

The baseline's trials are replayed, same prompts, seeds and boosts, with the detectors of the search half clamped. A
dose curve clamps the best quarter, half and three quarters of them; partial clamps hold all of them at a fixed part
of the level they have on mismatched pairs instead of at zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated, Any

from pydantic import Field

from steerback.config import RunConfig
from steerback.experiments.base import Analysis, Experiment, Measured, measured, planted, settings
from steerback.experiments.detectors import AUTHORS, SearchOptions, detectors_of, searched, stored_detectors
from steerback.metrics import Trend, trend
from steerback.records import Intervention
from steerback.store.ledger import Ledger
from steerback.study.study import BASELINE, Study

ABLATED = "ablated"
TRENDS = ("multi_attempt_rate", "esr_rate", "msi", "mean_first")


class Options(SearchOptions):
    """Which doses are measured beside none and all of the detectors at zero."""

    doses: list[Annotated[float, Field(gt=0, lt=1)]] = Field([0.25, 0.5, 0.75])
    """Shares of the detectors, best first."""
    levels: list[Annotated[float, Field(gt=0)]] = Field([0.25, 0.5])
    """Partial clamps: all detectors held at this part of their level on mismatched pairs."""


class DetectorAblation(Experiment):
    """Does resistance need the detectors? Baseline against all of them at zero, and the doses between."""

    name = "detector-ablation"
    needs_sae = True
    title = "Detectors clamped to zero, with dose curve (experiment 3)"
    options = Options
    authors: Mapping[str, Any] = AUTHORS

    def conditions(self, config: RunConfig) -> int:
        return 1 + len(plan(settings(self, config)))

    def further(self, config: RunConfig) -> dict[str, int]:
        return searched(settings(self, config))

    async def run(self, study: Study) -> None:
        """Baseline, all detectors at zero, then the doses and the partial clamps."""
        chosen = settings(self, study.config)
        found = await detectors_of(study, chosen)
        # with few detectors several doses come to the same number of them; each number is measured once
        doses = {(len(found.best(d.share)), d.level): d for d in reversed([Dose(BASELINE, 0.0, 0.0), *plan(chosen)])}
        size = len(found.latents)
        kept = [{**asdict(d), "share": n / size, "latents": n} for (n, _), d in reversed(doses.items())]
        study.run.ledger.set_fact(study.name, "doses", kept)
        await study.baseline()
        for (n, level), dose in reversed(doses.items()):
            if n:
                await ablate(study, dose.condition, {k: level * found.levels[k] for k in found.latents[:n]})

    def analyse(self, ledger: Ledger, judge: str, draws: int) -> Analysis:
        """Every condition against the baseline, paired; Figure 5 and the dose curve."""
        from steerback.figures import conditions, doses

        found = measured(ledger, judge, draws)
        detectors = {target: stored_detectors(ledger, target) for target in found.targets}
        curves = {target: ledger.fact(target, "doses") for target in found.targets}
        trends = {t: {m: dose_trend(found, t, curves[t], m, draws) for m in TRENDS} for t in found.targets}
        own = {
            t: {
                "detectors": list(d.latents),
                "doses": curves[t],
                "trends": {m: x.to_json() for m, x in trends[t].items()},
            }
            for t, d in detectors.items()
        }
        note = planted(found.targets)
        return Analysis(
            summary=found.to_json(self.name, own),
            tables=found.tables(),
            figures={
                "figure5": partial(conditions.draw, found, note=note, shown=(BASELINE, ABLATED)),
                "dose_curve": partial(doses.draw, found, curves, note),
            },
            lines=[f"{t}: {d.told}; {told(trends[t])}" for t, d in detectors.items()],
        )


@dataclass(frozen=True, slots=True)
class Dose:
    """A condition: the share of the detectors that is clamped, and the part of their usual level they are held at."""

    condition: str
    share: float
    level: float


def plan(options: Mapping[str, Any]) -> list[Dose]:
    """All detectors at zero, smaller doses, partial clamps."""
    return [
        Dose(ABLATED, 1.0, 0.0),
        *(Dose(f"{ABLATED} {x:.0%}", x, 0.0) for x in sorted(set(options["doses"]))),
        *(Dose(f"held at {x:.0%}", 1.0, x) for x in sorted(set(options["levels"]))),
    ]


def dose_trend(found: Measured, target: str, doses: Sequence[Mapping[str, Any]], metric: str, draws: int) -> Trend:
    """Slope of a metric over the share of detectors clamped to zero (0 to 1)."""
    zeroed = [d for d in doses if not d["level"] and (target, d["condition"]) in found.outcomes]
    return trend([d["share"] for d in zeroed], [found.outcomes[target, d["condition"]] for d in zeroed], metric, draws)


def told(trends: Mapping[str, Trend]) -> str:
    """One line: the dose response of the multi-attempt rate."""
    t = trends["multi_attempt_rate"]
    if t.slope is None:
        return "no dose response can be said"
    reach = "" if t.low is None or t.high is None else f" [{t.low:+.1%}, {t.high:+.1%}]"
    p = "" if t.p is None else f", p = {t.p:.2g}"
    return f"multi-attempt rate from no to all detectors clamped: slope {t.slope:+.1%}{reach}{p}"


async def ablate(study: Study, condition: str, values: Mapping[int, float]) -> None:
    """Replays every cell with latents clamped to `values`."""
    clamps = tuple(Intervention("clamp", k, v) for k, v in values.items())
    trials = [study.at(cell, condition) for cell in await study.cells()]
    await study.measure(condition, [replace(t, interventions=t.interventions + clamps) for t in trials])
