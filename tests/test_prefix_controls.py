"""Controls that continue prefixes of responses: planted rates of both arms, and the position of the cut."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from planted import Peaked, Runs, headline, inside, thresholds
from steerback.analysis.conditions import after_cut
from steerback.engines.scripted import RESTART
from steerback.experiments.prefill_control import cut
from steerback.records import Attempt, Completion, Judgement, Receipt, Request, Trial
from steerback.store.ledger import Row


@dataclass(frozen=True)
class Continuing(Peaked):
    """Goes on from a prefill: restarts with a known probability, more often when nothing is added."""

    steered: float = 0.2
    free: float = 0.6
    corrected: float = 80.0
    plain: float = 30.0

    def __call__(self, request: Request) -> str:
        if not request.prefill:
            return super().__call__(request)
        if "/continuation/" in request.key:
            score = self.corrected if request.prefill.startswith(RESTART) else self.plain
            return f" [[score {score:.1f}]] and further on."
        again = random.Random(f"{request.seed}/{request.key}").random() < (
            self.steered if request.interventions else self.free
        )
        return " and further on." + (f" {RESTART} [[score 90.0]] Here is the answer." if again else "")


@pytest.fixture(scope="module")
def continuing(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        made = Runs(tmp_path_factory.mktemp("continuing"), patch, Continuing(thresholds=thresholds(), restart_rate=0.4))
        made.run("esr")
        yield made


def test_prefill_control_recovers_both_arms(continuing: Runs) -> None:
    analysis, _ = continuing.run("prefill-control", "options.characters=60", base="esr")
    fact = analysis.summary["targets"]["planted"]["prefill"]
    assert fact["characters"] == 60
    for k in ("1n", "2n", "3n", "4n"):
        assert inside(headline(analysis.summary, f"unsteered {k}")["multi_attempt_rate"], 0.6)
        assert inside(headline(analysis.summary, f"steered {k}")["multi_attempt_rate"], 0.2)
    comparison = analysis.summary["targets"]["planted"]["comparisons"]["unsteered 2n"]
    assert comparison["against"] == "steered 2n"
    assert comparison["tests"]["multi_attempt_rate"]["low"] > 0
    source = {r.trial.index: r for r in continuing.ledger("esr").rows(stage="measure", judge="scripted")}
    for row in continuing.ledger("prefill-control").rows(stage="measure"):
        if row.trial.prefill:
            text = source[row.trial.index].judged_text
            assert text.startswith(row.trial.prefill)
            assert RESTART not in row.trial.prefill
            assert text[len(row.trial.prefill)] == " "
            assert len(row.trial.prefill) <= int(row.trial.condition.split()[1][0]) * 60
    used = {k: sum(tally.values()) for k, tally in fact["prefixes"].items()}
    assert set(used.values()) == {len(source)}


def test_prefill_default_is_where_restarts_are(continuing: Runs) -> None:
    analysis, _ = continuing.run("prefill-control", "options.multiples=[1]", base="esr", name="default-cut")
    rows = continuing.ledger("esr").rows(stage="measure", judge="scripted")
    starts = [r.judged_text.index(RESTART) for r in rows if RESTART in r.judged_text]
    assert analysis.summary["targets"]["planted"]["prefill"]["characters"] == round(np.mean(starts))


def row(text: str, attempts: list[tuple[int, int, float, bool]], prefill: str = "") -> Row:
    trial = Trial("t/measure/c/0", "t", "measure", "c", 0, "p", 1, prefill=prefill)
    spans = tuple(Attempt(a, b, s, "Wait" if n else "", g) for n, (a, b, s, g) in enumerate(attempts))
    done = Completion(text, tuple(range(5)), 3, "stop", Receipt())
    return Row(trial, done, Judgement("j", "r", "scored", spans))


def test_restarts_before_the_cut_do_not_count() -> None:
    one = row("x" * 60, [(0, 20, 10, True), (20, 40, 50, True), (40, 100, 90, True)], prefill="y" * 40)
    (after,) = after_cut([one])
    assert after.judgement is not None
    assert [(a.start, a.end, a.score) for a in after.judgement.attempts] == [(0, 40, 30), (40, 100, 90)]
    ungated = row("x" * 60, [(0, 50, 10, True), (50, 100, 90, False)], prefill="y" * 40)
    (after,) = after_cut([ungated])
    assert after.judgement is not None
    assert len(after.judgement.attempts) == 2
    assert len(after.judgement.gated_attempts()) == 1


def test_cuts_are_before_a_space_and_before_any_restart() -> None:
    class Engine:
        def token_ends(self, done: Completion) -> list[int]:
            return list(range(1, len(done.text) + 1))

    engine: Any = Engine()
    text = "one two three Wait, four five"
    found = row(text, [(0, 14, 10, True), (14, len(text), 90, True)])
    assert cut(found, 9, engine) == ("one two", "used")
    assert cut(found, 20, engine) == ("", "restarted before the cut")
    assert cut(found, len(text), engine) == ("", "too short")
    broken = row("no no no no no no " * 3, [(0, 54, 10, True)])
    assert cut(broken, 30, engine)[1] == "degraded"
    assert cut(Row(found.trial, found.completion, None), 9, engine)[1] == "not scored"


def test_matched_prefix_scores_the_continuation_alone(continuing: Runs) -> None:
    analysis, _ = continuing.run("matched-prefix", base="esr")
    own, generic = (headline(analysis.summary, c)["mean_first"] for c in ("own correction", "generic prefix"))
    assert (own["value"], generic["value"]) == (80, 30)
    rows = continuing.ledger("matched-prefix").rows(stage="continuation", judge="scripted")
    by_index: dict[int, list[Row]] = {}
    for found in rows:
        by_index.setdefault(found.trial.index, []).append(found)
    for pair in by_index.values():
        generic_row, own_row, whole = sorted(pair, key=lambda r: r.trial.condition)
        assert whole.trial.prefill.endswith(own_row.trial.prefill)
        assert len(whole.trial.prefill) > len(own_row.trial.prefill)
        assert own_row.trial.prefill.startswith(RESTART)
        assert own_row.trial.seed == generic_row.trial.seed
        assert len(own_row.trial.prefill) - 20 <= len(generic_row.trial.prefill) <= len(own_row.trial.prefill)
        assert own_row.trial.interventions == generic_row.trial.interventions != ()
        assert own_row.judged_text == own_row.completion.text  # type: ignore[union-attr]
