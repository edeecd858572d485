"""ESR across models: rates, MSI and intervals per target, and the quality of the calibration (Fig. 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations

from steerback.analysis.base import Measured, Results, measured, planted
from steerback.analysis.calibration import CalibratedLatent, calibrated_latents
from steerback.calibration import CalibrationReport, assess
from steerback.calibration.thresholds import THRESHOLDS
from steerback.metrics import Outcomes, TwoSampleTest, between, correct_pairs
from steerback.store.facts import LATENTS, Selection
from steerback.store.ledger import Ledger


@dataclass(frozen=True, eq=False)
class EsrResults(Results):
    """Summaries of each target, with its calibration and the selection of its latents."""

    measured: Measured
    calibration: Mapping[str, CalibrationReport]
    selection: Mapping[str, Selection | None]
    planted: Sequence[str]
    latents: Mapping[str, Sequence[CalibratedLatent]] = field(default_factory=dict)
    """Calibration of each target by latent."""
    between: Mapping[tuple[str, str], Mapping[str, TwoSampleTest]] = field(default_factory=dict)
    """Tests of every pair of targets (a, b): b minus a, Holm-corrected over the pairs; empty for a single target."""

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json."""
        calibration = {
            target: {**asdict(report), "selection": selected.counts if (selected := self.selection[target]) else {}}
            for target, report in self.calibration.items()
        }
        further: dict[str, object] = {}
        if self.between:
            further["between_models"] = [
                {"a": a, "b": b, "tests": {metric: asdict(test) for metric, test in tests.items()}}
                for (a, b), tests in self.between.items()
            ]
        return self.measured.to_json(
            "esr", {t: {"calibration": report} for t, report in calibration.items()}, **further
        )


def analyse(ledger: Ledger, judge: str, draws: int, options: object = None) -> EsrResults:
    """Return rates, MSI and intervals per target, and the calibration of its latents."""
    conditions = measured(ledger, judge, draws)
    thresholds = {target: ledger.get(target, THRESHOLDS) or [] for target in conditions.targets}
    return EsrResults(
        conditions,
        {target: assess([entry.threshold for entry in stored]) for target, stored in thresholds.items()},
        {target: ledger.get(target, LATENTS) for target in conditions.targets},
        planted(ledger, conditions.targets),
        {target: calibrated_latents(ledger, target, judge) for target, stored in thresholds.items() if stored},
        between_models({target: conditions.outcomes[target, c] for target, c in conditions.summaries}),
    )


def between_models(outcomes: Mapping[str, Outcomes]) -> dict[tuple[str, str], dict[str, TwoSampleTest]]:
    """Compare every pair of targets in the order of the mapping, Holm-corrected over all pairs."""
    pairs = {f"{a}\n{b}": (a, b) for a, b in combinations(outcomes, 2)}
    tests = correct_pairs({name: between(outcomes[a], outcomes[b]) for name, (a, b) in pairs.items()})
    return {pairs[name]: own for name, own in tests.items()}
