"""Examples written by a language model: by a judge model (`LlmWriter`), or by the model to be trained (`OwnWriter`)."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steerback.data.prompts import word_lines
from steerback.errors import SteerbackError
from steerback.finetuning.examples import Example, Topics
from steerback.finetuning.synthesize import ExampleQuestion, keyword_topics
from steerback.judging.asking import Answer, Asker, Task
from steerback.judging.models import Limits, default_temperature, model_string
from steerback.judging.parse import Verdict, parse_texts
from steerback.judging.prompt import Rubric, rubric
from steerback.judging.transport import Transport
from steerback.records import Completion, Request, Sampling

if TYPE_CHECKING:
    from steerback.engines.base import Engine

TEMPERATURE = 0.8
SELF_CORRECTION, NORMAL_ANSWER = rubric("self-correction-1"), rubric("normal-answer-1")


def _example(verdict: Verdict, question: ExampleQuestion, _: int) -> Example:
    names = ("passage", "acknowledgement", "answer") if question.subject else ("answer",)
    return Example(question.prompt, subject=question.subject, **parse_texts(verdict, names))


def _task(instructions: Rubric) -> Task[ExampleQuestion, Example]:
    def places(questions: Sequence[ExampleQuestion]) -> Mapping[str, str]:
        return {"prompt": questions[0].prompt, "subject": questions[0].subject}

    return Task(instructions, places, _example, closing='The code is "{nonce}".', keep_unusable=True)


class KeywordSubjects:
    """Off-topic subjects of a writer: a file, or None for the built-in list. Topics are measured by words."""

    topics: Topics

    def __init__(self, subjects: str | None) -> None:
        self.topics, self._subjects = keyword_topics(subjects)

    def subjects_for(self, prompt: str) -> Sequence[str]:
        """Return every subject that shares no content word with the prompt."""
        return [s for s in self._subjects if self.topics.about(prompt, s) == 0]


class LlmWriter(KeywordSubjects):
    """Asks a judge model for each example. `folder` stores the replies; `subjects` is a file, None the built-in list.

    Every reply is stored, usable or not, so an interrupted or repeated synthesis sends only new questions.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        limits: Limits | None = None,
        subjects: str | None = None,
        transport: Transport | None = None,
    ) -> None:
        model = model_string(name)
        if model is None and transport is None:
            raise SteerbackError(
                f"writer {name!r} is not a model; give provider/model, e.g. anthropic/claude-sonnet-4-5, or `corpus`"
            )
        warm = None if model is not None and default_temperature(model) is None else TEMPERATURE
        self._transport = transport or Transport(str(model), limits or Limits(), temperature=warm)
        super().__init__(subjects)
        cache = folder / "replies.sqlite"
        self._corrections = Asker(self._transport, _task(SELF_CORRECTION), cache)
        self._normal = Asker(self._transport, _task(NORMAL_ANSWER), cache)

    def describe(self) -> Mapping[str, object]:
        return {
            "writer": self._transport.model,
            "instructions": SELF_CORRECTION.version,
            "temperature": self._transport.temperature,
            "checks": "restart classifier for the acknowledgement, words in common for subject and prompt",
            "sent": self._transport.describe(),
        }

    async def write(
        self, questions: Sequence[ExampleQuestion]
    ) -> AsyncIterator[tuple[ExampleQuestion, Answer[Example]]]:
        """Yield drafts in order of completion; cached replies come first and are free."""
        for asker, corrects in ((self._corrections, True), (self._normal, False)):
            async for question, answer in asker.ask([q for q in questions if bool(q.subject) == corrects]):
                yield question, answer


OWN_ACKNOWLEDGEMENTS = word_lines("own_acknowledgements")
"""Acknowledgements of `OwnWriter`. A test checks that the restart classifier detects each of them."""
SHORT = " Answer in three to six sentences, without lists or headings."
PASSAGE = "Write two or three sentences about {subject}."
LONGEST = 256
"""Token limit of each part; an answer or passage that is cut off there is rejected."""


class OwnWriter(KeywordSubjects):
    """Composes examples from texts of the model to be trained, without key or network.

    An answer is the model's unsteered response to the prompt, a passage its response to a request for sentences about
    the subject, at temperature 0.8. Acknowledgements are drawn from `OWN_ACKNOWLEDGEMENTS`. Training on such examples
    teaches when to restart, and no new answers.
    """

    def __init__(self, engine: Engine, subjects: str | None = None, seed: int = 42) -> None:
        self._engine, self._seed = engine, seed
        super().__init__(subjects)

    def describe(self) -> Mapping[str, object]:
        return {
            "writer": "self",
            "engine": self._engine.describe()["engine"],
            "temperature": TEMPERATURE,
            "checks": "restart classifier for the acknowledgement, words in common for subject and prompt",
        }

    async def write(
        self, questions: Sequence[ExampleQuestion]
    ) -> AsyncIterator[tuple[ExampleQuestion, Answer[Example]]]:
        """Yield drafts as soon as all of their parts are written."""
        open_questions = {question.key: question for question in questions}
        parts: dict[str, dict[str, Completion]] = {key: {} for key in open_questions}
        requests = [request for question in questions for request in self._requests(question)]
        async for key, completion in self._engine.generate(requests):
            place, _, part = key.rpartition("/")
            parts[place][part] = completion
            question = open_questions[place]
            if len(parts[place]) == (2 if question.subject else 1):
                yield question, self._draft(question, parts.pop(place))

    def _requests(self, question: ExampleQuestion) -> list[Request]:
        seed = random.Random(f"{self._seed}/{question.key}").randrange(2**31)
        sampling = Sampling(temperature=TEMPERATURE, max_new_tokens=LONGEST)
        asked = {"answer": question.prompt + SHORT}
        if question.subject:
            asked["passage"] = PASSAGE.format(subject=question.subject)
        return [Request(f"{question.key}/{part}", text, seed, sampling) for part, text in asked.items()]

    def _draft(self, question: ExampleQuestion, parts: Mapping[str, Completion]) -> Answer[Example]:
        if any(part.finish == "length" for part in parts.values()):
            return Answer(None, f"longer than {LONGEST} tokens")
        texts = {name: " ".join(part.text.split()) for name, part in parts.items()}
        if question.subject:
            texts["acknowledgement"] = random.Random(f"{self._seed}/{question.key}").choice(OWN_ACKNOWLEDGEMENTS)
        return Answer(Example(question.prompt, subject=question.subject, **texts))
