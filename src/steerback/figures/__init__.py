"""Presentation of results: figures, tables and lines of text for each experiment."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING

from steerback.errors import unknown

if TYPE_CHECKING:
    from steerback.analysis.base import Results
    from steerback.figures.base import Presentation

FIGURES = {
    "esr": "esr.present",
    "no-steering": "first_scores.present",
    "boost-sweep": "boost_sweep.present",
    "meta-prompts": "conditions.meta_prompts",
    "held-out": "conditions.present",
    "prefill-control": "prefill.present",
    "matched-prefix": "conditions.matched_prefix",
    "imported": "conditions.present",
    "detectors": "detectors.present",
    "detector-ablation": "ablation.present_doses",
    "random-ablation": "ablation.present_random_sets",
    "detector-statistics": "detectors.statistics",
    "traces": "traces.present",
    "episode-statistics": "episode_statistics.present",
    "finetuning": "finetuning.present",
    "cross-judge": "cross_judge.present",
}


def present(experiment: str, results: Results) -> Presentation:
    """Return tables, figures and lines of an experiment's results, with the parts that all experiments share."""
    from steerback.analysis.base import measured_of
    from steerback.figures.base import floor_lines, planted_note
    from steerback.figures.recovery import draw_time_course, recovery_table

    if experiment not in FIGURES:
        raise unknown("experiment", experiment, sorted(FIGURES))
    module, _, name = FIGURES[experiment].partition(".")
    function = getattr(importlib.import_module(f"steerback.figures.{module}"), name)
    presentation: Presentation = function(results)
    measured = measured_of(results)
    if measured is None:
        return presentation
    tables, figures = dict(presentation.tables), dict(presentation.figures)
    if measured.recovery.conditions:
        tables["recovery"] = recovery_table(measured)
        figures["time_course"] = lambda: draw_time_course(measured, planted_note(results))
    lines = [*presentation.lines, *floor_lines(measured)]
    return replace(presentation, tables=tables, figures=figures, lines=lines)
