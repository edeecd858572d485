"""Table of one fork: rates of each arm over its seeds, and tests against the first arm."""

from __future__ import annotations

from steerback.analysis.forks import Forked, ForkedArm
from steerback.figures import panels
from steerback.figures.tables import HEADINGS, Table, p_value, show
from steerback.metrics import METRICS

SHOWN = ("multi_attempt_rate", "esr_rate", "mean_first", "msi")
NAMES = HEADINGS | {"multi_attempt_rate": "restarts %", "mean_first": "score until then"}
TESTED = ("multi_attempt_rate", "mean_first", "msi")


def fork_table(forked: Forked) -> Table:
    """Return one row for each arm."""
    tested = [f"p: {NAMES[name].removesuffix(' %')}" for name in TESTED]
    cells = []
    for arm in forked.arms:
        rates = [show(arm.summary[name], METRICS[name].rate) for name in SHOWN]
        tests = ["" if arm.comparison is None else p_value(arm.comparison[name].p_holm) for name in TESTED]
        cells.append([arm.name, str(arm.summary[SHOWN[0]].n), *rates, *tests, str(left_out(arm))])
    return Table(("arm", "n", *(NAMES[name] for name in SHOWN), *tested, "left out"), cells, note(forked))


def left_out(arm: ForkedArm) -> int:
    """Return the number of continuations that do not count: unscored, empty, invalid (or degraded)."""
    return sum(arm.summary.counts.get(name, 0) for name in panels.left_out([arm.summary]))


def note(forked: Forked) -> str:
    """Return sentences that explain the table of a fork."""
    where = "everywhere, including prompt and kept tokens" if forked.fork.throughout else "from the fork on"
    return (
        f"{forked.fork.parent}, forked after {forked.fork.tokens} tokens ({forked.fork.at}); arms edit {where}. "
        "n: seeds, the same in all arms; 95 % intervals and tests are over seeds and hold only for this "
        "response. Restarts: those that begin after the fork. Score until then: score of the text before them. "
        f"p: paired by seed against {forked.arms[0].name!r}, Holm over the arms. Judge: {forked.judge}."
    )
