"""Matched prefix: scores of continuations of the model's own corrections and of generic prefixes, under steering."""

from __future__ import annotations

from steerback.analysis.matched_prefix import MatchedPrefixResults
from steerback.figures.base import Presentation, measured_tables, planted_note
from steerback.figures.conditions import draw

SHOWN = ("mean_first", "multi_attempt_rate", "degraded_share")


def present(results: MatchedPrefixResults) -> Presentation:
    """Return the figure, the tables, and the numbers of prefix pairs."""
    note = f"Scores cover only the continuation, under steering. {planted_note(results)}"
    return Presentation(
        tables=measured_tables(results.measured),
        figures={"matched_prefix": lambda: draw(results.measured, metrics=SHOWN, note=note)},
        lines=[
            f"{target}: " + ", ".join(f"{n} {why}" for why, n in counts.pairs.items())
            for target, counts in results.pairs.items()
        ],
    )
