"""Train and check the restart classifiers of the offline judges.

python -m tools.judge train      train both and write src/steerback/judging/restarts-*.json (about two minutes)
python -m tools.judge check      cross-validate: train on four fifths of the phrasings and responses, try on the rest
"""

from __future__ import annotations

import json
import random
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import BernoulliNB

from steerback.judging.restarts import Classifier, features
from tools.judge.examples import (
    TRAINING_MODELS,
    Example,
    negative_examples,
    real_examples,
    responses,
    restart_examples,
)

WEIGHTS = Path(__file__).parent.parent.parent / "src" / "steerback" / "judging"
CUT = {"offline": 0.6, "offline-bayes": 2.0}
"""Log-odds above which a clause is a restart, chosen by cross-validation. It is subtracted from the stored constant."""
FOLDS = 5


def examples(seed: int = 0) -> list[Example]:
    """Return all training examples; the same seed gives the same examples."""
    rng, rows = random.Random(seed), [responses(model) for model in TRAINING_MODELS]
    return [
        *restart_examples(rng, rows[0]),
        *negative_examples(rng, rows[0]),
        *real_examples([r for cases in rows for r in cases]),
    ]


def fit(cases: Sequence[Example], judge: str) -> Classifier:
    """Return a classifier trained on the examples: log-odds = sum of the weights of a clause's features + constant."""
    counter = CountVectorizer(analyzer=lambda e: _features(e, judge), binary=True, min_df=2)
    table = counter.fit_transform(cases)
    table.indices, table.indptr = table.indices.astype(np.int32), table.indptr.astype(np.int32)  # liblinear wants these
    truth, weight = [e.restart for e in cases], [e.weight for e in cases]
    if judge == "offline":
        model = LogisticRegression(C=0.3, solver="liblinear", random_state=0).fit(table, truth, weight)
        weights, constant = model.coef_[0], float(model.intercept_[0])
    else:
        bayes = BernoulliNB(alpha=0.5).fit(table, truth, weight)
        present = bayes.feature_log_prob_
        absent = np.log1p(-np.exp(present))
        weights = (present - absent)[1] - (present - absent)[0]
        constant = float((absent[1] - absent[0]).sum())
    named = zip(counter.get_feature_names_out(), weights, strict=True)
    return Classifier(
        {name: round(float(w), 2) for name, w in named if abs(w) >= 0.02}, round(constant - CUT[judge], 2)
    )


def _features(example: Example, judge: str) -> list[str]:
    """Return the features of an example. Naive Bayes uses only single words and pairs."""
    cases = features(example.clause)
    return cases if judge == "offline" else [f for f in cases if f.startswith("w ") and f.count(" ") <= 2]


def cross_validated(cases: Sequence[Example], judge: str) -> NDArray[np.float64]:
    """Return the log-odds of each example by a classifier that saw nothing of its source."""
    fold = np.array([zlib.crc32(e.source.encode()) % FOLDS for e in cases])
    odds = np.zeros(len(cases))
    for k in range(FOLDS):
        classifier = fit([e for e, f in zip(cases, fold, strict=True) if f != k], judge)
        for i in np.flatnonzero(fold == k):
            odds[i] = classifier.log_odds(cases[i].clause)
    return odds


def train() -> None:
    """Train both classifiers and store them."""
    cases = examples()
    for judge in CUT:
        trained = fit(cases, judge)
        body = {"constant": trained.constant, "weights": dict(sorted(trained.weights.items()))}
        text = json.dumps(body, ensure_ascii=False, indent=0, separators=(",", ":"))
        (WEIGHTS / f"restarts-{judge}.json").write_text(text + "\n", encoding="utf-8")
        print(judge, len(trained.weights), "weights from", len(cases), "clauses")


def check() -> None:
    """Print recall by kind of phrasing and the false alarms in real text, at several cuts."""
    cases = examples()
    truth, weight = np.array([e.restart for e in cases]), np.array([e.weight for e in cases])
    for judge in CUT:
        odds = cross_validated(cases, judge)
        for cut in (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0):
            flagged = odds > cut
            real = {
                e.source for e, f, w in zip(cases, flagged, weight, strict=True) if f and not e.restart and w == 1.0
            }
            print(
                f"{judge} at {cut:+.1f}: recall of listed phrasings {flagged[truth & (weight == 2)].mean():.3f}, "
                f"of templates {flagged[truth & (weight == 1)].mean():.3f}; alarms in hard negatives "
                f"{flagged[~truth & (weight == 3)].mean():.3f}, in {len(real)} real responses"
            )


if __name__ == "__main__":
    {"train": train, "check": check}[sys.argv[1]]()
