"""The run that the tests of the viewer use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from labelled import FIRST, make_run, text_of, verdict
from steerback.calibration.thresholds import THRESHOLDS, LatentThreshold, Threshold, verified
from steerback.records import (
    Completion,
    Intervention,
    Judgement,
    Receipt,
    Recording,
    Trial,
    WindowScores,
)
from steerback.store.facts import DETECTOR_SET, TOKEN_ENDS, Detector, DetectorSet
from steerback.store.run import Run

STEERED, DETECTOR, SILENT = 7, 40, 41
SEVERAL = text_of(True)
WORDS = SEVERAL.split(" ")
PROMPT_TOKENS = 3


def ends_of(text: str) -> list[int]:
    """One token a word, with the space before it."""
    ends, at = [], 0
    for n, word in enumerate(text.split(" ")):
        at += len(word) + (n > 0)
        ends.append(at)
    return ends


def recorded_activations(words: Sequence[str]) -> np.ndarray:
    """Token n has activation n at the steered latent; the detector is 2.5 at `Wait,` alone."""
    fed = len(words) - 1
    values = np.zeros((PROMPT_TOKENS + fed, 3), dtype=np.float32)
    values[PROMPT_TOKENS:, 0] = np.arange(fed)
    values[PROMPT_TOKENS + list(words).index("Wait,"), 1] = 2.5
    return values


def viewed_run(place: Path) -> Path:
    """A run with a baseline of 6 trials, one of them recorded, an ablated twin of that, and two calibrated latents."""
    make_run(place, {"plain": [[False, False], [True, False]]})
    with Run.reopen(place) as run:
        add = Intervention("add", STEERED, 30.0)
        base = Trial(
            "model/measure/baseline/0",
            "model",
            "measure",
            "baseline",
            100,
            "Why is the sky blue?",
            99,
            STEERED,
            "penguins",
            interventions=(add,),
            record=Recording((STEERED, DETECTOR, SILENT)),
        )
        clamped = (add, Intervention("clamp", DETECTOR, 0.0))
        twin = replace(base, key="model/measure/ablated/0", condition="ablated", interventions=clamped, record=None)
        broken = replace(base, key="model/measure/ablated/1", condition="ablated", index=101, seed=5, record=None)
        run.ledger.add_trials([base, twin, broken])
        n = len(WORDS)
        receipt = Receipt(PROMPT_TOKENS, n - 1, 30.0)
        done = Completion(SEVERAL, tuple(range(n)), PROMPT_TOKENS, "stop", receipt, recorded_activations(WORDS))
        short = Completion(FIRST, (1, 2), PROMPT_TOKENS, "length", Receipt(PROMPT_TOKENS, 1, 30.0))
        wrong = replace(short, receipt=Receipt(0, 0, 0.0), finish="stop")
        run.ledger.add_completions([(base.key, done, "e"), (twin.key, short, "e"), (broken.key, wrong, "e")])
        run.ledger.add_judgements([(base.key, verdict("machine", True)), (twin.key, verdict("machine", False))])
        second = Judgement("critic", "other-1", "unscored", (), "the reply is no JSON", "I <b>refuse</b>")
        run.ledger.add_judgements([(base.key, second), (broken.key, verdict("machine", False))])
        run.ledger.put("model", TOKEN_ENDS, {base.key: ends_of(SEVERAL)})
        run.ledger.put(
            "model",
            DETECTOR_SET,
            DetectorSet(
                source="test", detectors=[Detector(latent=DETECTOR, label="notices errors", level=1.0, auc=1.0)]
            ),
        )
        starts = tuple(SEVERAL.index(words) for words in ("Penguins", "They", "Wait", "Fold", "Tuck"))
        scores = WindowScores("machine", "windows-1", starts, (5.0, 12.5, 90.0, 95.0, 100.0))
        few = WindowScores("machine", "windows-1", (0,), (5.0,))
        run.ledger.add_windows([(base.key, scores), (twin.key, few)])
        _calibrate(run)
    return place


def _calibrate(run: Run) -> None:
    tries = [(b, s) for b, s in ((10.0, 95.0), (20.0, 80.0), (30.0, 52.0), (40.0, 20.0), (50.0, 5.0)) for _ in range(2)]
    threshold = Threshold(
        boost=30.5, low=27.0, high=34.0, status="converged", reason="the fitted curve crosses the target",
        target_score=50.0, tolerance=5.0, score=50.0, score_se=3.0, n_rounds=5, n_trials=10, n_unscored=0,
        posterior_median=30.0, posterior_low=26.0, posterior_high=35.0,
    )  # fmt: skip
    lost = replace(threshold, boost=60.0, status="at bound", reason="the score stays above 50 up to the bound 60")
    entries = [LatentThreshold.of(STEERED, verified(threshold, [45.0, 55.0, 50.0])), LatentThreshold.of(8, lost)]
    run.ledger.put("model", THRESHOLDS, entries)
    for i, (boost, score) in enumerate(tries):
        key = f"model/calibration/threshold/{i}"
        edits = (Intervention("add", STEERED, boost),)
        trial = Trial(key, "model", "calibration", "threshold", i, "p", i, STEERED, "penguins", interventions=edits)
        run.ledger.add_trials([trial])
        run.ledger.add_completions([(key, Completion("x", (1, 2), 3, "stop", Receipt(3, 1, boost)), "e")])
        attempt = replace(verdict("machine", False, text="x").attempts[0], score=score)
        run.ledger.add_judgements([(key, Judgement("machine", "test-1", "scored", (attempt,)))])
