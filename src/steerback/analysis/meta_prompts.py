"""Meta-prompts: every variant compared with the baseline, paired (Fig. 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from steerback.analysis.base import Measured, Results, measured, planted
from steerback.store.facts import META_PROMPTS, MetaPromptSet
from steerback.store.ledger import Ledger


@dataclass(frozen=True, eq=False)
class MetaPromptResults(Results):
    """Summaries and comparisons of the variants, with their texts and the size of each model."""

    measured: Measured
    variants: Mapping[str, MetaPromptSet]
    planted: Sequence[str]

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json."""
        return self.measured.to_json(
            "meta-prompts", {target: {"meta_prompts": META_PROMPTS.dump(v)} for target, v in self.variants.items()}
        )


def analyse(ledger: Ledger, judge: str, draws: int, options: object = None) -> MetaPromptResults:
    """Compare every variant with the baseline, paired by latent, prompt and seed."""
    conditions = measured(ledger, judge, draws)
    stored = ledger.targets_with(META_PROMPTS)
    return MetaPromptResults(
        conditions, {t: stored[t] for t in conditions.targets}, planted(ledger, conditions.targets)
    )
