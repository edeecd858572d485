"""Fork data of the viewer: the position of each fork in the parent's response, and its arms with rates and trials."""

from __future__ import annotations

from steerback.analysis.forks import Forked, ForkedArm
from steerback.figures.forks import NAMES, SHOWN, TESTED, left_out, note
from steerback.figures.tables import p_value, show
from steerback.metrics import METRICS
from steerback.records import Intervention
from steerback.report.view_trials import ShownRun

AROUND = 120
"""Number of response characters shown before and after the fork."""


def forks_of(number: int, shown: ShownRun) -> list[dict[str, object]]:
    """Return the forks of run `number` on the page."""
    return [_fork(number, shown, forked) for forked in shown.forks]


def _fork(number: int, shown: ShownRun, forked: Forked) -> dict[str, object]:
    fork = forked.fork
    parents = shown.run.ledger.rows(keys=[fork.parent])
    text = parents[0].judged_text if parents else ""
    prefix = next((row.trial.prefix for arm in forked.arms for row in arm.rows), None)
    lead = (parents[0].trial.prefill if parents else "") + (prefix.text if prefix is not None else "")
    return {
        "run": number,
        "parent": fork.parent,
        "tokens": fork.tokens,
        "at": "" if fork.at == str(fork.tokens) else fork.at,
        "throughout": fork.throughout,
        "before": lead[-AROUND:],
        "after": text[len(lead) : len(lead) + AROUND],
        "note": note(forked),
        "arms": [_arm(arm, list(edits.edits)) for arm, edits in zip(forked.arms, fork.arms, strict=True)],
    }


def _arm(arm: ForkedArm, edits: list[Intervention]) -> dict[str, object]:
    rate = arm.summary["multi_attempt_rate"]
    tests = [] if arm.comparison is None else [(NAMES[m], p_value(arm.comparison[m].p_holm)) for m in TESTED]
    return {
        "name": arm.name,
        "edits": [f"{e.mode} {e.latent} {'x' if e.mode == 'add' else 'to'} {e.value:.4g}" for e in edits],
        "n": rate.n,
        "left": left_out(arm),
        "rate": [rate.value, rate.low, rate.high],
        "shown": [(NAMES[m], show(arm.summary[m], METRICS[m].rate)) for m in SHOWN],
        "tests": tests,
        "trials": [row.trial.key for row in arm.rows],
    }
