"""Detectors: separation of matched from mismatched pairs, on search prompts and on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from pydantic import JsonValue

from steerback.analysis.base import Results, planted
from steerback.latents.separation import Separation, separation
from steerback.metrics import Estimate
from steerback.metrics.intervals import Floats
from steerback.metrics.regions import auc_of
from steerback.store.facts import DETECTOR_SET, PAIR_ACTIVATIONS, DetectorSet, PairActivations
from steerback.store.ledger import Ledger


@dataclass(frozen=True, eq=False)
class DetectorResults(Results):
    """Detectors of each target."""

    detectors: Mapping[str, DetectorSet]
    planted: Sequence[str]

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json."""
        return {
            "experiment": "detectors",
            "targets": {target: DETECTOR_SET.dump(d) for target, d in self.detectors.items()},
        }

    def data(self) -> dict[str, JsonValue]:
        """Return one list of latents per target, in the authors' format."""
        return {f"off_topic_detectors_{target}": list(d.latents) for target, d in self.detectors.items()}


def analyse(ledger: Ledger, judge: str, draws: int, options: object = None) -> DetectorResults:
    """Return the stored detectors; needs neither judge nor bootstrap."""
    detectors = ledger.targets_with(DETECTOR_SET)
    return DetectorResults(detectors, planted(ledger, detectors))


@dataclass(frozen=True, eq=False)
class PairStatistics:
    """Detectors of one target: matched and shuffled activations (n pairs, k detectors), and Table A1's numbers."""

    latents: Sequence[int]
    labels: Sequence[str | None]
    matched: Floats
    mismatched: Floats
    prompts: int
    separation: Separation
    auc: Sequence[Estimate]

    def to_json(self) -> dict[str, object]:
        """Return the part of summary.json for one target."""
        return {
            "detectors": list(self.latents),
            "pairs": len(self.matched),
            "prompts": self.prompts,
            "separation": self.separation.to_json(),
            "auc": [asdict(e) for e in self.auc],
        }


@dataclass(frozen=True, eq=False)
class DetectorStatisticsResults(Results):
    """Statistics of each target."""

    statistics: Mapping[str, PairStatistics]
    planted: Sequence[str]

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json."""
        return {
            "experiment": "detector-statistics",
            "targets": {target: s.to_json() for target, s in self.statistics.items()},
        }


def statistics(ledger: Ledger, judge: str, draws: int, options: object = None) -> DetectorStatisticsResults:
    """Return statistics of every target with activations of the pairs; needs no judge."""
    detectors = ledger.targets_with(DETECTOR_SET)
    pairs = ledger.targets_with(PAIR_ACTIVATIONS)
    statistics = {target: statistics_of(p, detectors[target], draws) for target, p in pairs.items()}
    return DetectorStatisticsResults(statistics, planted(ledger, statistics))


def statistics_of(pairs: PairActivations, detectors: DetectorSet, draws: int) -> PairStatistics:
    """Return statistics of the pairs; the interval of the AUC resamples prompts."""
    matched, mismatched = (np.array(arm, dtype=np.float64) for arm in (pairs.matched, pairs.mismatched))
    prompt = np.array(pairs.prompts, dtype=np.int64)
    return PairStatistics(
        detectors.latents,
        [d.label for d in detectors.detectors],
        matched,
        mismatched,
        len(np.unique(prompt)),
        separation(matched, mismatched),
        [auc_of(matched[:, k], mismatched[:, k], prompt, draws) for k in range(matched.shape[1])],
    )
