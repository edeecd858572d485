"""Tasks for language models: attempts, whole responses, episode boundaries, concreteness of labels, labels of latents.

Each task is an `asking.Task`: a rubric, the texts of the question, and the function that parses the verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from steerback.engines.base import finish
from steerback.errors import SteerbackError
from steerback.judging import parse
from steerback.judging.asking import Answer, Asker, Task
from steerback.judging.base import JudgeItem
from steerback.judging.parse import Quotable
from steerback.judging.prompt import numbered, rubric
from steerback.judging.transport import Transport
from steerback.judging.windows import cut
from steerback.records import Attempt, Judgement, Spend
from steerback.store.facts import Boundaries, WholeScore

LABELS_PER_CALL = 40
Snippets = tuple[str, ...]


def _response(items: Sequence[JudgeItem]) -> Mapping[str, str]:
    (item,) = items
    return {"prompt": item.prompt, "topic": item.label or "", "response": item.response}


def _windows(items: Sequence[JudgeItem]) -> Mapping[str, str]:
    (item,) = items
    parts = numbered([item.response[s.start : s.end] for s in cut(item.response)])
    return {"prompt": item.prompt, "topic": item.label or "", "response": parts}


# A change of a rubric's text needs a new version, because the version is stored with every verdict.
ATTEMPTS: Task[JudgeItem, tuple[Attempt, ...]] = Task(
    rubric("attempts-1"),
    _response,
    lambda verdict, item, _: parse.parse_attempts(verdict, item.response, item.drop_unscored),
    "response",
)
WHOLE: Task[JudgeItem, WholeScore] = Task(
    rubric("whole-1"), _response, lambda verdict, item, _: parse.parse_whole(verdict), "response"
)
"""Scores whole responses 0-10 for their return to the prompt, with or without a restart phrase.

A control for gradual recovery.
"""
BOUNDARIES: Task[JudgeItem, Boundaries] = Task(
    rubric("boundaries-1"),
    _response,
    lambda verdict, item, _: parse.parse_boundaries(verdict, item.response),
    "response",
)
WINDOWS: Task[JudgeItem, tuple[float, ...]] = Task(
    rubric("windows-1"),
    _windows,
    lambda verdict, item, _: parse.parse_windows(verdict, len(cut(item.response))),
    "response",
    output_tokens=200,
)
"""Scores each sentence of a response; one call per response."""
CONCRETENESS: Task[str, float] = Task(
    rubric("concreteness-1"),
    lambda labels: {"labels": numbered(labels)},
    lambda verdict, label, number: parse.parse_rating(verdict, number),
    "labels",
    items_per_call=LABELS_PER_CALL,
    output_tokens=10 * LABELS_PER_CALL,
)
LABEL: Task[Snippets, str] = Task(
    rubric("label-1"),
    lambda items: {"snippets": numbered(*items)},
    lambda verdict, snippets, _: parse.parse_label(verdict),
    "snippets",
    output_tokens=40,
)


class LLMRater:
    """Rates the concreteness of labels (0-100) with a language model; implements `concreteness.Rater`.

    Repeated labels are asked about once.
    """

    version = CONCRETENESS.rubric.version

    def __init__(self, name: str, transport: Transport, cache: Path | None = None) -> None:
        self.name = name
        self._asker = Asker(transport, CONCRETENESS, cache)

    def rate(self, labels: Sequence[str]) -> list[float | None]:
        """Return one rating per label, None where the model gave none. Works inside a running event loop.

        Raises SteerbackError if the budget is spent before all labels are rated; finished ratings stay in the cache.
        """
        answers = finish(self._answers(list(dict.fromkeys(labels))))
        refused = [answer for answer in answers.values() if answer.over_budget]
        if refused:
            raise SteerbackError(
                f"rater {self.name}: {refused[0].reason}; {len(answers) - len(refused)} of {len(answers)} ratings are "
                "in the cache; run again with a larger budget"
            )
        return [answers[label].value for label in labels]

    async def _answers(self, labels: Sequence[str]) -> dict[str, Answer[float]]:
        return {label: answer async for label, answer in self._asker.ask(labels)}

    def estimate(self, labels: Sequence[str]) -> Spend:
        """Estimate calls, tokens and cost of rating those `labels` that have no cached rating."""
        return self._asker.estimate(list(dict.fromkeys(labels)))

    def drain(self) -> Spend:
        """Return the spend since the last call of this method."""
        return self._asker.transport.drain()


@dataclass
class Labelled:
    """Labels by latent, with counts of the latents that got none.

    `nothing`: latents whose snippets have nothing in common. `failed`: latents without an answer, by reason.
    """

    labels: dict[int, str] = field(default_factory=dict)
    nothing: int = 0
    failed: Counter[str] = field(default_factory=Counter)


async def label_latents(asker: Asker[Snippets, str], snippets: Mapping[int, Snippets]) -> Labelled:
    """Ask for one label per latent. `snippets` are ordered from most to least active; equal tuples share one call."""
    answers = {shown: answer async for shown, answer in asker.ask(list(dict.fromkeys(snippets.values())))}
    made = Labelled()
    for latent, shown in snippets.items():
        answer = answers[shown]
        if answer.value:
            made.labels[latent] = answer.value
        elif answer.value is None:
            made.failed[answer.reason] += 1
        else:
            made.nothing += 1
    return made


def offline_boundaries(response: str, judgement: Judgement) -> Boundaries | None:
    """Derive episode boundaries from a judgement, without a language model.

    Takes the first restart whose attempt scores more than the attempt before it. Boundaries: start of the attempt
    before, start of the restart phrase, end of the restart phrase. None if no restart improves the score.
    """
    for before, attempt in pairwise(judgement.gated_attempts()):
        if attempt.score > before.score and attempt.phrase:
            span = Quotable(response[attempt.start : attempt.end]).find(attempt.phrase)
            end = attempt.start + (span[1] if span else len(attempt.phrase))
            while end < attempt.end and not response[end].isalnum():  # skip punctuation after the phrase
                end += 1
            return Boundaries(off_topic=before.start, correction=attempt.start, on_topic=end)
    return None
