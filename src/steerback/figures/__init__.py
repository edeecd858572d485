"""Presentation of results: figures, tables and lines of text for each experiment."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING

from steerback.errors import unknown

if TYPE_CHECKING:
    from steerback.analysis.base import Results
    from steerback.figures.base import Presentation

MODULES = {
    "esr": "esr",
    "no-steering": "first_scores",
    "boost-sweep": "boost_sweep",
    "meta-prompts": "meta_prompts",
    "held-out": "conditions",
    "prefill-control": "prefill",
    "matched-prefix": "matched_prefix",
    "imported": "conditions",
    "detectors": "detectors",
    "detector-ablation": "doses",
    "random-ablation": "random_ablation",
    "detector-statistics": "detector_statistics",
    "traces": "traces",
    "episode-statistics": "episode_statistics",
    "finetuning": "finetuning",
    "cross-judge": "cross_judge",
}


def present(experiment: str, results: Results) -> Presentation:
    """Return tables, figures and lines of an experiment's results, with the parts that all experiments share."""
    from steerback.analysis.base import measured_of
    from steerback.figures.base import floor_lines, planted_note
    from steerback.figures.recovery import draw_time_course, recovery_table

    if experiment not in MODULES:
        raise unknown("experiment", experiment, sorted(MODULES))
    module = importlib.import_module(f"steerback.figures.{MODULES[experiment]}")
    presentation: Presentation = module.present(results)
    measured = measured_of(results)
    if measured is None:
        return presentation
    tables, figures = dict(presentation.tables), dict(presentation.figures)
    if measured.recovery.conditions:
        tables["recovery"] = recovery_table(measured)
        figures["time_course"] = lambda: draw_time_course(measured, planted_note(results))
    lines = [*presentation.lines, *floor_lines(measured)]
    return replace(presentation, tables=tables, figures=figures, lines=lines)
