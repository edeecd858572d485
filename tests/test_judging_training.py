"""The offline judge on text that it was not trained on."""

from __future__ import annotations

from pathlib import Path

from steerback.judging.restarts import find_restarts
from tools.judge.examples import HELD_OUT_MODEL, TRAINING_MODELS, responses, written


def test_restarts_are_rarely_invented_in_responses_of_a_model_that_was_not_trained_on() -> None:
    """docs/judging.md has 3 of 1,300; the grammar that was here before invented 77."""
    assert HELD_OUT_MODEL not in TRAINING_MODELS
    rows = [r for r in responses(HELD_OUT_MODEL) if not r.topic]
    assert len(rows) >= 1000
    assert sum(bool(find_restarts(r.text, r.prompt)) for r in rows) <= 3


def test_held_out_phrasings_are_no_training_text() -> None:
    known = {line for section in written("examples").values() for line in section}
    known |= {line for section in written("negatives").values() for line in section}
    for name in ("heldout3", "heldout4"):
        held = {
            line for section in written(name, Path(__file__).parent / "data" / "judging").values() for line in section
        }
        assert not held & known
