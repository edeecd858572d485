"""Table A1: activation of each detector on matched and shuffled pairs.

The pairs are the unsteered responses to the run's prompts, each after the correct prompt (matched) and after another
prompt (shuffled). The detector search did not use these prompts, so the statistics are out of sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from steerback.config import RunConfig
from steerback.experiments.base import Experiment
from steerback.experiments.detectors import AUTHORS, SearchOptions, contrast, detectors_of, search_responses
from steerback.store.facts import PAIR_ACTIVATIONS, PairActivations
from steerback.study.study import Study


class DetectorStatistics(Experiment[SearchOptions]):
    """Report mean, sd, median, frequency, AUC and effect size of each detector on matched and shuffled pairs."""

    name = "detector-statistics"
    needs_sae = True
    title = "Detectors on matched and shuffled pairs (Table A1)"
    options_type = SearchOptions
    authors: ClassVar[Mapping[str, object]] = AUTHORS
    calibrates = False
    reports_rates = False

    def conditions(self, config: RunConfig) -> int:
        return 0

    def further(self, config: RunConfig) -> dict[str, int]:
        return search_responses(self.options)

    async def run(self, study: Study) -> None:
        """Read the activations of the detectors on matched and shuffled pairs."""
        if study.run.ledger.get(study.name, PAIR_ACTIVATIONS) is not None:
            return
        detectors = await detectors_of(study, self.options)
        matched, mismatched, prompts = await contrast(study, detectors.latents, self.options.over)
        pairs = PairActivations(matched=matched.tolist(), mismatched=mismatched.tolist(), prompts=prompts)
        study.run.ledger.put(study.name, PAIR_ACTIVATIONS, pairs)
