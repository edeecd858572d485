"""Examples written by a language model, as two tasks of `judging.asking`.

The cache keeps every reply, usable or not, so an interrupted or repeated synthesis sends only new questions.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from steerback.errors import SteerbackError
from steerback.finetuning.examples import Example, Topics
from steerback.finetuning.synthesize import Draft, ExampleQuestion, keyword_topics
from steerback.judging.asking import Asker, Task
from steerback.judging.models import Limits, default_temperature, model_string
from steerback.judging.parse import Verdict, parse_texts
from steerback.judging.prompt import Rubric, rubric
from steerback.judging.transport import Transport

TEMPERATURE = 0.8
SELF_CORRECTION, NORMAL_ANSWER = rubric("self-correction-1"), rubric("normal-answer-1")


def _places(questions: Sequence[ExampleQuestion]) -> Mapping[str, str]:
    (question,) = questions
    return {"prompt": question.prompt, "subject": question.subject}


def _example(verdict: Verdict, question: ExampleQuestion, _: int) -> Example:
    names = ("passage", "acknowledgement", "answer") if question.subject else ("answer",)
    return Example(question.prompt, subject=question.subject, **parse_texts(verdict, names))


def _task(instructions: Rubric) -> Task[ExampleQuestion, Example]:
    return Task(instructions, _places, _example, closing='The code is "{nonce}".', keep_unusable=True)


class LlmWriter:
    """Asks a model for each example. `folder` stores the replies; `subjects` is a file, None the built-in list."""

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
        self.topics: Topics
        self.topics, self._subjects = keyword_topics(subjects)
        cache = folder / "replies.sqlite"
        self._corrections = Asker(self._transport, _task(SELF_CORRECTION), cache)
        self._normal = Asker(self._transport, _task(NORMAL_ANSWER), cache)

    def subjects_for(self, prompt: str) -> Sequence[str]:
        """Return every subject that shares no content word with the prompt."""
        return [s for s in self._subjects if self.topics.about(prompt, s) == 0]

    def describe(self) -> Mapping[str, object]:
        return {
            "writer": self._transport.model,
            "instructions": SELF_CORRECTION.version,
            "temperature": self._transport.temperature,
            "checks": "restart classifier for the acknowledgement, words in common for subject and prompt",
            "sent": self._transport.describe(),
        }

    async def write(self, questions: Sequence[ExampleQuestion]) -> AsyncIterator[tuple[ExampleQuestion, Draft]]:
        """Yield drafts in order of completion; cached replies come first and are free."""
        corrections = [question for question in questions if question.subject]
        normal = [question for question in questions if not question.subject]
        for asker, asked in ((self._corrections, corrections), (self._normal, normal)):
            async for question, answer in asker.ask(asked):
                yield question, Draft(answer.value, answer.reason, answer.over_budget)
