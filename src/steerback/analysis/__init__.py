"""Analyses: one function per experiment computes results from ledger rows, using only metrics and the store.

Each is called as `analyse(ledger, judge, draws, options)` and returns its `Results`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from steerback.errors import unknown

if TYPE_CHECKING:
    from steerback.analysis.base import Results
    from steerback.store.ledger import Ledger

ANALYSES = {
    "esr": "esr.analyse",
    "no-steering": "no_steering.analyse",
    "boost-sweep": "boost_sweep.analyse",
    "meta-prompts": "conditions.meta_prompts",
    "held-out": "conditions.analyse",
    "prefill-control": "conditions.prefill_control",
    "matched-prefix": "conditions.matched_prefix",
    "imported": "conditions.analyse",
    "detectors": "detectors.analyse",
    "detector-ablation": "ablation.doses",
    "random-ablation": "ablation.random_sets",
    "detector-statistics": "detectors.statistics",
    "traces": "traces.analyse",
    "episode-statistics": "episode_statistics.analyse",
    "finetuning": "finetuning.analyse",
    "cross-judge": "cross_judge.analyse",
}


def analyse(experiment: str, ledger: Ledger, judge: str, draws: int, options: object = None) -> Results:
    """Return the results of a ledger's experiment by one judge, with `draws` bootstrap draws.

    `options` are the experiment's parsed options. Each analysis declares the options that it uses in a protocol.
    """
    if experiment not in ANALYSES:
        raise unknown("experiment", experiment, sorted(ANALYSES))
    module, _, name = ANALYSES[experiment].partition(".")
    function = getattr(importlib.import_module(f"steerback.analysis.{module}"), name)
    results: Results = function(ledger, judge, draws, options)
    return results
