"""Detectors: separation of matched from mismatched pairs, on search prompts and on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from steerback.analysis.base import Results, planted
from steerback.store.facts import DETECTOR_SET, DetectorSet
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
