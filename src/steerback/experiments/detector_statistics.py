"""Table A1: activation of each detector on matched against shuffled pairs.

Measured on the unsteered responses to the run's own prompts, which the search has never seen: each response after its
own prompt and after another one. The statistics are therefore out of sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from steerback.config import RunConfig
from steerback.experiments.base import Analysis, Experiment, planted, settings
from steerback.experiments.detectors import (
    AUTHORS,
    SearchOptions,
    contrast,
    detectors_of,
    searched,
    stored_detectors,
    targets_with,
)
from steerback.figures.tables import Table, show
from steerback.latents.separation import Separation, separation
from steerback.metrics import Estimate
from steerback.metrics.regions import auc_of
from steerback.store.ledger import Ledger
from steerback.study.study import Study

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

FACT = "pair activations"


class DetectorStatistics(Experiment):
    """Mean, sd, median, frequency, AUC and effect size of each detector, matched against shuffled."""

    name = "detector-statistics"
    needs_sae = True
    title = "Detectors on matched and shuffled pairs (Table A1)"
    options = SearchOptions
    authors: Mapping[str, Any] = AUTHORS
    calibrates = False

    def conditions(self, config: RunConfig) -> int:
        return 0

    def further(self, config: RunConfig) -> dict[str, int]:
        return searched(settings(self, config))

    async def run(self, study: Study) -> None:
        """Reads the detectors on both arms."""
        if study.run.ledger.fact(study.name, FACT) is not None:
            return
        chosen = settings(self, study.config)
        detectors = await detectors_of(study, chosen)
        matched, mismatched, prompts = await contrast(study, detectors.latents, bool(chosen["include_prompt"]))
        values = {"matched": matched.tolist(), "mismatched": mismatched.tolist(), "prompts": prompts}
        study.run.ledger.set_fact(study.name, FACT, values)

    def analyse(self, ledger: Ledger, judge: str, draws: int) -> Analysis:
        """Table A1 and the distributions behind it."""
        from steerback.figures import detector_statistics as figure

        found = {target: statistics(ledger, target, draws) for target in targets_with(ledger, FACT)}
        return Analysis(
            summary={
                "experiment": self.name,
                "targets": {
                    t: {
                        "detectors": list(s.latents),
                        "pairs": len(s.matched),
                        "prompts": s.prompts,
                        "separation": s.separation.to_json(),
                        "auc": [asdict(e) for e in s.auc],
                    }
                    for t, s in found.items()
                },
            },
            tables={"tableA1": table(found)},
            figures={"tableA1": partial(figure.draw, found, planted(found))},
            lines=[_told(target, s) for target, s in found.items()],
        )


@dataclass(frozen=True, eq=False)
class Statistics:
    """Detectors of one target with both arms, (n pairs, k detectors), and per detector what Table A1 shows."""

    latents: Sequence[int]
    labels: Sequence[str | None]
    matched: Floats
    mismatched: Floats
    prompts: int
    separation: Separation
    auc: Sequence[Estimate]


def statistics(ledger: Ledger, target: str, draws: int) -> Statistics:
    """Statistics of the pairs that a run read; AUC with an interval from resampled prompts."""
    stored, detectors = ledger.fact(target, FACT), stored_detectors(ledger, target)
    matched, mismatched = (np.array(stored[arm], dtype=np.float64) for arm in ("matched", "mismatched"))
    prompt = np.array(stored["prompts"], dtype=np.int64)
    return Statistics(
        detectors.latents,
        [entry["label"] for entry in detectors.stored["detectors"]],
        matched,
        mismatched,
        len(np.unique(prompt)),
        separation(matched, mismatched),
        [auc_of(matched[:, k], mismatched[:, k], prompt, draws) for k in range(matched.shape[1])],
    )


def table(found: Mapping[str, Statistics]) -> Table:
    """One row per detector, both arms side by side."""
    cells, records = [], []
    for target, s in found.items():
        x = s.separation
        for i, (latent, label, auc) in enumerate(zip(s.latents, s.labels, s.auc, strict=True)):
            arms = [
                f"{getattr(x, f'matched_{name}')[i]:{form}} / {getattr(x, f'mismatched_{name}')[i]:{form}}"
                for name, form in (("mean", ".2f"), ("sd", ".2f"), ("median", ".2f"), ("frequency", ".0%"))
            ]
            effect = f"{x.effect[i]:.2f}" if np.isfinite(x.effect[i]) else "∞"
            cells.append((target, str(latent), label or "-", *arms, show(auc, False), effect))
            records.append(
                {"target": target, "latent": latent, "label": label}
                | {name: _finite(getattr(x, name)[i]) for name in Separation.__dataclass_fields__}
                | {"auc_low": auc.low, "auc_high": auc.high, "pairs": len(s.matched), "prompts": s.prompts}
            )
    return Table(
        ("target", "latent", "label", "mean", "sd", "median", "active", "AUC", "d"),
        cells,
        "Matched / shuffled pairs: largest activation in a response after its own and after another prompt; active: "
        "share of responses with any. Responses to prompts that were not searched; AUC with a 95 % interval from "
        "resampled prompts; d: Cohen's, pooled sd.",
        records,
        left=3,
    )


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _told(target: str, s: Statistics) -> str:
    high = sum(e.value is not None and e.value >= 0.9 for e in s.auc)
    return (
        f"{target}: {high} of {len(s.latents)} detectors at AUC >= 0.9 on {len(s.matched)} pairs of "
        f"{s.prompts} prompts that were not searched"
    )
