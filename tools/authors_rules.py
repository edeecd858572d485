"""The authors' published rules in plain Python, and their largest differences from this package.

    python -m tools.authors_rules            # print the table; --write puts it into docs/paper-data.md

The rules follow the specification, the paper and the description of the authors' code; none of their code is copied.
`RULES` contains for each rule a function that draws a random case and returns the difference between both results.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from steerback.analysis.base import outcomes_of
from steerback.analysis.episode_statistics import region_values
from steerback.analysis.episodes import Recorded, Trace
from steerback.calibration.bisection import Calibrator
from steerback.config import CalibrationConfig
from steerback.latents.detectors import make_pairs, search_detectors
from steerback.metrics import METRICS, Outcomes, view
from steerback.metrics.regions import mean_of, ratio_of
from steerback.published.authors import import_authors
from steerback.published.schema import judgement_of
from steerback.records import Attempt, BoostPrior, Completion, Judgement, Receipt, Trial, is_degraded
from steerback.store.ledger import Ledger
from steerback.store.rows import Row

PAGE = Path(__file__).parents[1] / "docs" / "paper-data.md"
BEGIN, END = "<!-- tools/authors_rules.py writes this table -->", "<!-- end -->"
BOUNDS = (1e-12, 1e-9, 1e-6, 1e-3)
"""Upper bounds for display: a difference is shown as the smallest bound above it."""
Score = Mapping[str, object]
Values = dict[str, float | None]


# -- rates ------------------------------------------------------------------------------------------------------------
def their_metrics(scores: Sequence[Score]) -> Values:
    """Return the metrics of a list of verdicts, without attempts without a score and trials without attempts."""
    kept = [[a["score"] for a in s["attempts"] if a["score"] is not None] for s in scores]  # type: ignore[attr-defined]
    trials = [attempts for attempts in kept if attempts]
    several = [t for t in trials if len(t) > 1]
    better = [t for t in several if t[-1] > t[0]]

    def share(part: float, whole: Sequence[object]) -> float | None:
        return part / len(whole) if whole else None

    return {
        "multi_attempt_rate": share(len(several), trials),
        "esr_rate": share(len(better), trials),
        "improvement_rate": share(len(better), several),
        "msi": share(sum(t[-1] - t[0] for t in several), trials),
        "msi_multi": share(sum(t[-1] - t[0] for t in several), several),
        "mean_attempts": share(sum(len(t) for t in trials), trials),
        "mean_first": share(sum(t[0] for t in trials), trials),
    }


def our_metrics(outcomes: Outcomes) -> Values:
    seen, computed = view(outcomes), dict[str, float | None]()
    for name, metric in METRICS.items():
        numerator, denominator = metric.parts(seen)
        computed[name] = float(numerator.sum() / denominator.sum()) if denominator.sum() else None
    return computed


def rates(scores: Sequence[Score]) -> float:
    """Return the difference of all metrics. The package reads the verdicts as an import does."""
    judged = [judgement_of(json.loads(json.dumps(s)), "a response", "judge")[0] for s in scores]
    rows = [(n % 5, n, True, judgement, False) for n, judgement in enumerate(judged)]
    return _gap(their_metrics(scores), our_metrics(Outcomes.from_rows(rows, ())))


def random_scores(rng: random.Random) -> list[Score]:
    def attempt() -> dict[str, object]:
        return {"attempt_text": "", "score": None if rng.random() < 0.1 else rng.randint(0, 100)}

    return [{"attempts": [attempt() for _ in range(rng.choice((0, 1, 1, 1, 2, 3)))]} for _ in range(rng.randint(1, 60))]


def pooled(files: Sequence[Sequence[Score]]) -> float:
    """Return the difference of all metrics over the pooled trials of several files of one model, imported from JSON."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, scores in enumerate(files):
            trials = [
                {"prompt": f"Prompt {n % 3}.", "seed": n, "threshold": 1.0, "response": "a response", "score": score}
                for n, score in enumerate(scores)
            ]
            feature = {"feature_index_in_sae": number % 2, "feature_label": "x", "threshold": 1.0, "trials": trials}
            body = {"experiment_config": {"model_name": "m"}, "results_by_feature": [feature], "number": number}
            paths.append(Path(folder) / f"{number}.json")
            paths[-1].write_text(json.dumps(body))
        import_authors(paths, Path(folder) / "run")
        with Ledger(Path(folder) / "run" / "ledger.sqlite", read_only=True) as ledger:
            ours = our_metrics(outcomes_of([*ledger.outlines(judge="imported")], True))
    return _gap(their_metrics([score for scores in files for score in scores]), ours)


def _gap(theirs: Values, ours: Values) -> float:
    """Return the largest difference; infinite if only one of the two is defined."""
    gaps = [0.0]
    for name, value in theirs.items():
        other = ours[name]
        both = value is not None and other is not None
        gaps.append(abs(value - other) if both else 0.0 if value is other else math.inf)  # type: ignore[operator]
    return max(gaps)


# -- degraded responses -----------------------------------------------------------------------------------------------
def their_degraded(text: str) -> bool:
    """Return True for five identical words in a row; words of one character never count."""
    before, times = "", 0
    for word in text.split():
        times = times + 1 if word == before else 1
        before = word
        if times >= 5 and len(word) > 1:
            return True
    return False


def degraded(text: str) -> float:
    return float(their_degraded(text) != is_degraded(text))


def random_text(rng: random.Random) -> str:
    return " ".join(
        rng.choice(("go", "-", "stop", "a")) for _ in range(rng.randint(0, 12)) for _ in range(rng.randint(1, 5))
    )


# -- calibration ------------------------------------------------------------------------------------------------------
def below(target: float, score: float) -> float:
    """Return P(x < target), x of Beta(1/2 + 5 s, 1/2 + 5 (1 - s)), by Gauss-Legendre after x = sin^2(angle)."""
    nodes, weights = np.polynomial.legendre.leggauss(80)

    def area(end: float) -> float:
        angle = end / 2 * (nodes + 1)
        return float(end / 2 * np.sum(weights * np.sin(angle) ** (10 * score) * np.cos(angle) ** (10 * (1 - score))))

    return area(math.asin(math.sqrt(target))) / area(math.pi / 2)


def their_threshold(scores: Sequence[float], prior: BoostPrior, target: float) -> float:
    """Return the median of the posterior after one mean score (0-1) a step, each taken at the median before it.

    The sign says on which side of the boost the threshold lies, p how likely that is; below 1/2 the sign flips.
    """
    step = (prior.high - prior.low) / 9_999
    grid = [prior.low + n * step for n in range(10_000)]
    density = [math.exp(-0.5 * ((x - prior.mean) / prior.sd) ** 2) for x in grid]
    at = _median(density)
    for score in scores:
        sign = 1 if score > target else -1
        p = below(target, score)
        p = 1 - p if sign > 0 else p
        if p < 0.5:
            sign, p = -sign, 1 - p
        left, right = (1 - p, p) if sign > 0 else (p, 1 - p)
        density = [d * (left if n < at else right if n > at else 0.5) for n, d in enumerate(density)]
        at = _median(density)
    return grid[at]


def _median(density: Sequence[float]) -> int:
    total, half = 0.0, math.fsum(density) / 2
    for n, d in enumerate(density):
        total += d
        if total >= half:
            return n
    return len(density) - 1


def calibration(scores: Sequence[float], target: float) -> float:
    """Return the difference of the thresholds in steps of the grid."""
    prior = BoostPrior(7.0, 5.0, 0.0, 100.0)
    settings = CalibrationConfig(target_score=100 * target, weight=5, estimate="posterior", max_iterations=len(scores))
    ours = Calibrator(prior, settings, draws=1)
    for score in scores:
        boost = ours.next_boost()
        assert boost is not None
        ours.update(boost, [100 * score])
    computed = ours._quantile(0.5)
    return abs(computed - their_threshold(scores, prior, target)) / (prior.high - prior.low) * 9_999


# -- activity by region -----------------------------------------------------------------------------------------------
Episode = tuple[Sequence[float], int, int]
"""Activation of each token, first token of the correction, first token after it."""


def their_activity(episodes: Sequence[Episode], baselines: Sequence[Sequence[float]]) -> Values:
    """Return the mean over responses of the mean over a region's tokens, and each region's ratio to the baseline."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    base = mean([mean(tokens) for tokens in baselines])
    off = mean([mean(tokens[:start]) for tokens, start, _ in episodes])
    correction = mean([mean(tokens[start:resume]) for tokens, start, resume in episodes])
    on = mean([mean(tokens[resume:]) for tokens, _, resume in episodes])
    means: Values = {"off-topic": off, "correction": correction, "on-topic": on, "unsteered": base}
    return means | {f"{name} / unsteered": value / base for name, value in means.items() if value is not None}


def activity(episodes: Sequence[Episode], baselines: Sequence[Sequence[float]]) -> float:
    """Return the difference of all means and ratios."""
    told = [_trace(tokens, start, resume) for tokens, start, resume in episodes]
    recorded = Recorded(told, [], [_trace(tokens) for tokens in baselines], {"detectors": [1]}, 0, 0)
    values = region_values(recorded, "detectors")
    names = ("off-topic", "correction", "on-topic", "unsteered")
    ours: Values = {name: mean_of(*values[name]).value for name in names}
    ours |= {f"{name} / unsteered": ratio_of(*values[name], *values["unsteered"], draws=2).value for name in names}
    return _gap(their_activity(episodes, baselines), ours)


def _trace(tokens: Sequence[float], start: int | None = None, resume: int | None = None) -> Trace:
    trial = Trial("t/measure/baseline/0", "t", "measure", "baseline", 0, "p", 0, latent=len(tokens) % 3)
    verdict = Judgement("j", "r", "scored", (Attempt(0, 1, 10.0), Attempt(1, 2, 90.0)))
    row = Row(trial, Completion("ab", (), 0, "stop", Receipt()), verdict)
    sums = {"detectors": np.array(tokens)}
    return Trace(row, ("x",) * len(tokens), sums, start, resume, None if resume is None else len(tokens))


def random_activity(rng: random.Random) -> float:
    def tokens(least: int) -> list[float]:
        return [rng.choice((0.0, 10 * rng.random())) + 0.01 for _ in range(rng.randint(least, 30))]

    episodes = []
    for _ in range(rng.randint(1, 20)):
        values = tokens(3)
        start = rng.randint(1, len(values) - 2)
        episodes.append((values, start, rng.randint(start + 1, len(values) - 1)))
    return activity(episodes, [tokens(1) for _ in range(rng.randint(1, 20))])


# -- detectors --------------------------------------------------------------------------------------------------------
def their_detectors(matched: Sequence[Sequence[float]], mismatched: Sequence[Sequence[float]]) -> list[int]:
    """Return latents that are zero on all matched pairs and not zero on at least 80 % of the mismatched ones."""
    computed = []
    for k in range(len(matched[0])):
        silent = all(row[k] == 0 for row in matched)
        if silent and 10 * sum(row[k] != 0 for row in mismatched) >= 8 * len(mismatched):
            computed.append(k)
    return computed


def random_detectors(rng: random.Random) -> float:
    """Return the number of latents that only one of the two searches detects."""
    n, latents = rng.choice((5, 10, 13)), 30

    def arm(most: float) -> list[list[float]]:
        silent = [rng.random() * most for _ in range(latents)]
        return [[0.0 if rng.random() < silent[k] else rng.random() for k in range(latents)] for _ in range(n)]

    matched, mismatched = arm(1.0), arm(0.4)
    for k in range(0, latents, 2):
        for row in matched:
            row[k] = 0.0
    pairs = make_pairs([f"prompt {i}" for i in range(n)], held_out=False)
    ours = search_detectors(np.array(matched), np.array(mismatched), pairs, "authors", draws=1)
    return float(len(set(ours.latents) ^ set(their_detectors(matched, mismatched))))


@dataclass(frozen=True)
class Rule:
    """A rule, its source, the unit of the difference, a random case, and the number of cases of the table."""

    name: str
    source: str
    unit: str
    case: Callable[[random.Random], float]
    cases: int


RULES = (
    Rule(
        "multi-attempt, ESR and improvement rate, MSI over all and over multi-attempt trials, attempts, first score",
        "specification; their plots",
        "share, points",
        lambda rng: rates(random_scores(rng)),
        500,
    ),
    Rule(
        "the same over several pooled files of one model",
        "their plots",
        "share, points",
        lambda rng: pooled([random_scores(rng) for _ in range(rng.randint(2, 4))]),
        3,
    ),
    Rule(
        "degraded: five identical words in a row", "their code", "texts", lambda rng: degraded(random_text(rng)), 2000
    ),
    Rule(
        "calibration: median of the posterior after up to 10 steps",
        "their code",
        "steps of the grid",
        lambda rng: calibration([rng.random() for _ in range(rng.randint(1, 10))], rng.choice((0.3, 0.5))),
        10,
    ),
    Rule("activity by region, and its ratio to the baseline", "paper, A.7", "activation, ratio", random_activity, 100),
    Rule(
        "detectors: silent on matched, active on 80 % of mismatched pairs",
        "their code",
        "latents",
        random_detectors,
        50,
    ),
)


def largest(rule: Rule) -> float:
    """Return the largest difference over the rule's cases, which have fixed seeds."""
    rng = random.Random(0)
    return max(rule.case(rng) for _ in range(rule.cases))


def table() -> str:
    """Return the table of all rules."""
    lines = [
        "| rule, written again from its description | source | random cases | largest difference |",
        "|---|---|---|---|",
    ]
    for rule in RULES:
        gap = largest(rule)
        bound = next((f"below {b:g}" for b in BOUNDS if gap < b), f"{gap:g}") if gap else "0"
        lines.append(f"| {rule.name} | {rule.source} | {rule.cases:,} | {bound} ({rule.unit}) |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="put the table into docs/paper-data.md")
    made = table()
    print(made)
    if parser.parse_args().write:
        before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
