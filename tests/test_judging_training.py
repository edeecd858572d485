"""The shipped weights of the offline judges are those that their training data give."""

from __future__ import annotations

import pytest

from steerback.judging.restarts import classifier
from tools.judge.__main__ import examples, fit
from tools.judge.examples import HELD_OUT_MODEL, TRAINING_MODELS


@pytest.mark.slow
def test_training_again_gives_the_shipped_weights() -> None:
    found = examples()
    assert sum(e.restart for e in found) > 5000
    assert sum(not e.restart for e in found) > 15000
    for judge in ("offline", "offline-bayes"):
        fresh, shipped = fit(found, judge), classifier(judge)
        assert fresh.constant == pytest.approx(shipped.constant, abs=0.05)
        names = fresh.weights.keys() | shipped.weights.keys()
        assert max(abs(fresh.weights.get(n, 0.0) - shipped.weights.get(n, 0.0)) for n in names) < 0.05


def test_the_held_out_model_is_no_training_model() -> None:
    assert HELD_OUT_MODEL not in TRAINING_MODELS
