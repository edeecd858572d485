"""Responses with known attempts and relevance, and how well a judge finds them.

Cases are composed from sentences whose topic is known (hand-written files, or the organism's corpus through
`from_segments`). Works with any judge; knows nothing of how one decides.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steerback.judging.base import JudgeItem, References
from steerback.records import Judgement

Segment = tuple[str, str]  # kind ("on", "off", "restart" or "other"), text


@dataclass(frozen=True, slots=True)
class Case:
    """A response with its truth: per attempt (start, end of its restart phrase, share of words on topic or None)."""

    item: JudgeItem
    attempts: tuple[tuple[int, int, float | None], ...]
    kind: str


@dataclass(frozen=True, slots=True)
class Validity:
    """Result of a validity test. Rates are None if their denominator is 0."""

    cases: int
    restarts: int
    found: int
    exact_start: int
    false_alarms: int
    unscored: int
    scored_attempts: int
    rank_correlation: float | None
    missed: tuple[str, ...]
    alarmed: tuple[str, ...]

    @property
    def recall(self) -> float | None:
        return self.found / self.restarts if self.restarts else None

    @property
    def precision(self) -> float | None:
        return self.found / (self.found + self.false_alarms) if self.found + self.false_alarms else None


def from_segments(key: str, prompt: str, segments: Sequence[Segment], kind: str, **fields: Any) -> Case:
    """A case from segments in order; `fields` go to the JudgeItem. "other" sentences make the share unknown."""
    text = ""
    attempts: list[list[Any]] = [[0, 0, 0, 0, False]]  # start, phrase end, words on, words, unknown
    for what, sentence in segments:
        joined = sentence if not text or sentence[0] in ".,–—-" or sentence.startswith(" ") else " " + sentence
        at = len(text) + len(joined) - len(joined.lstrip(" .,–—-"))
        text += joined
        if what == "restart":
            attempts.append([at, len(text), 0, 0, False])
            continue
        count = len(sentence.split())
        attempts[-1][2] += count if what == "on" else 0
        attempts[-1][3] += count
        attempts[-1][4] |= what == "other"
    truth = tuple((a, b, None if unknown or not n else on / n) for a, b, on, n, unknown in attempts)
    return Case(JudgeItem(key, prompt, text, **fields), truth, kind)


def references(data: Mapping[str, Any], seed: int = 0, responses: int = 6) -> References:
    """Unsteered responses made of three quarters of each prompt's sentences; the rest is never shown to a judge."""
    rng = random.Random(seed)
    made = {}
    for prompt, entry in data["prompts"].items():
        known = _known(entry["sentences"])
        made[prompt] = [" ".join(rng.sample(known, min(4, len(known)))) for _ in range(responses)]
    return References(made, {})


def compose(data: Mapping[str, Any], seed: int = 0, rounds: int = 3) -> list[Case]:
    """Cases from a data file: every restart phrasing and every hard negative occurs `rounds` times."""
    rng = random.Random(seed)
    prompts, subjects = list(data["prompts"]), list(data["subjects"])
    cases: list[Case] = []

    def add(kind: str, prompt: str, label: str, segments: Sequence[Segment]) -> None:
        cases.append(from_segments(f"{kind}/{len(cases)}", prompt, segments, kind, label=label))

    for _ in range(rounds):
        for phrase in [*data["restarts"], *data["inline"]]:
            prompt, label = rng.choice(prompts), rng.choice(subjects)
            entry = data["prompts"][prompt]
            off = _some(rng, "off", data["subjects"][label], 1, 3)
            if phrase in data["inline"]:
                off[-1] = ("off", off[-1][1].rstrip("."))
            said = [("restart", phrase.replace("{task}", entry["task"]))]
            before = _some(rng, "on", entry["sentences"], 0, 2)
            add("restart", prompt, label, [*before, *off, *said, *_some(rng, "on", entry["sentences"], 1, 4)])
        for sentence in data["negatives"]:
            prompt, label = rng.choice(prompts), rng.choice(subjects)
            answer = _some(rng, "on", data["prompts"][prompt]["sentences"], 2, 4)
            answer.insert(rng.randint(1, len(answer) - 1), ("other", sentence))
            add("hard negative", prompt, label, answer)
        for prompt in prompts:
            label = rng.choice(subjects)
            sentences, strange = data["prompts"][prompt]["sentences"], data["subjects"][label]
            other = data["prompts"][rng.choice([p for p in prompts if p != prompt])]["sentences"]
            add("answer", prompt, label, _some(rng, "on", sentences, 3, 4))
            add("drift", prompt, label, [*_some(rng, "on", sentences, 1, 3), *_some(rng, "off", strange, 1, 3)])
            add("other answer", prompt, label, [*_some(rng, "on", sentences, 0, 2), *_some(rng, "off", other, 1, 4)])
            add("steered", prompt, label, _some(rng, "off", strange, 2, 3))
    return cases


def measure(cases: Sequence[Case], judgements: Iterable[Judgement]) -> Validity:
    """Count detected restarts (start within the true phrase), false alarms, and rank correlation of the scores."""
    from scipy.stats import spearmanr

    restarts = found = exact = alarms = unscored = 0
    shares: list[float] = []
    scores: list[float] = []
    missed, alarmed = [], []
    for case, judgement in zip(cases, judgements, strict=True):
        text, truth = case.item.response, case.attempts[1:]
        restarts += len(truth)
        if judgement.status != "scored":
            unscored += 1
            continue
        starts = [a.start for a in judgement.gated_attempts()][1:]
        hit = [(a, b) for a, b, _ in truth if any(a <= s < b for s in starts)]
        found += len(hit)
        exact += sum(a in starts for a, _ in hit)
        wrong = [s for s in starts if not any(a <= s < b for a, b in hit)]
        alarms += len(wrong)
        missed += [text[a:b] for a, b, _ in truth if (a, b) not in hit]
        alarmed += [text[s : s + 60] for s in wrong]
        if len(starts) == len(truth) == len(hit):
            pairs = [(t[2], a.score) for t, a in zip(case.attempts, judgement.gated_attempts(), strict=True)]
            shares += [s for s, _ in pairs if s is not None]
            scores += [x for s, x in pairs if s is not None]
    rho = float(spearmanr(shares, scores)[0]) if len(set(shares)) > 1 else None
    return Validity(
        len(cases), restarts, found, exact, alarms, unscored, len(scores), rho, tuple(missed), tuple(alarmed)
    )


def _known(sentences: Sequence[str]) -> list[str]:
    return [s for i, s in enumerate(sentences) if i % 4 != 3]


def _some(rng: random.Random, kind: str, sentences: Sequence[str], low: int, high: int) -> list[Segment]:
    return [(kind, s) for s in rng.sample(list(sentences), min(rng.randint(low, high), len(sentences)))]
