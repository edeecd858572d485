"""Analyses: one module per experiment computes results from ledger rows, using only metrics and the store.

Every module has a function `analyse(ledger, judge, draws, options)` that returns its `Results`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from steerback.errors import unknown

if TYPE_CHECKING:
    from steerback.analysis.base import Results
    from steerback.store.ledger import Ledger

MODULES = {
    "esr": "esr",
    "no-steering": "no_steering",
    "boost-sweep": "boost_sweep",
    "meta-prompts": "meta_prompts",
    "held-out": "conditions",
    "prefill-control": "prefill_control",
    "matched-prefix": "matched_prefix",
    "imported": "conditions",
    "detectors": "detectors",
    "detector-ablation": "detector_ablation",
    "random-ablation": "random_ablation",
    "detector-statistics": "detector_statistics",
    "traces": "traces",
    "episode-statistics": "episode_statistics",
    "finetuning": "finetuning",
    "cross-judge": "cross_judge",
}


def analyse(experiment: str, ledger: Ledger, judge: str, draws: int, options: object = None) -> Results:
    """Return the results of a ledger's experiment by one judge, with `draws` bootstrap draws.

    `options` are the experiment's parsed options. Each analysis declares the options that it uses in a protocol.
    """
    if experiment not in MODULES:
        raise unknown("experiment", experiment, sorted(MODULES))
    module = importlib.import_module(f"steerback.analysis.{MODULES[experiment]}")
    results: Results = module.analyse(ledger, judge, draws, options)
    return results
