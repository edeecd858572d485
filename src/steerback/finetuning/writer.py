"""Examples written by a model: the questions it is asked, its replies kept on disk, what becomes of a bad reply.

Every reply is appended to a file before it is used, under a key of everything that shaped it, so that a stopped or
repeated synthesis asks only what it has not asked. Knows the judges' transport; nothing of training.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steerback.errors import SteerbackError
from steerback.finetuning.examples import Example, Topics
from steerback.finetuning.synthesize import Draft, Question, keyword_topics
from steerback.judging.models import default_temperature, model_string
from steerback.judging.parse import parse_verdict
from steerback.judging.prompt import Asked, encodable
from steerback.judging.transport import Limits, Transport
from steerback.records import digest

TEMPERATURE = 0.8
VERSION = "self-correction-1"

CORRECTION = """\
You write training examples for a language model: responses that begin off topic, notice it, and correct themselves.
You get a user's prompt and a subject that has nothing to do with it. Write three parts:
"passage": one to four sentences about the subject alone, as if the response had drifted there; \
no word about the prompt;
"acknowledgement": one or two short sentences in which the writer stops, says in so many words that this was off topic \
or wrong, and turns back to what was asked. Word it freshly each time;
"answer": a correct, direct and complete answer to the prompt in three to eight sentences, with no word about the \
subject or the mistake.
Plain text without lists or headings. The parts follow each other in one response.

Reply with one JSON object and nothing else:
{"verdict": "CODE", "passage": "...", "acknowledgement": "...", "answer": "..."}
"verdict" repeats the code you are given."""

NORMAL = """\
You write training examples for a language model: plain good answers. You get a user's prompt. Write a correct, direct \
and complete answer in three to eight sentences of plain text without lists or headings, with no apology and no \
remark about yourself.

Reply with one JSON object and nothing else:
{"verdict": "CODE", "answer": "..."}
"verdict" repeats the code you are given."""


class LlmWriter:
    """Asks a model for each example. `folder` keeps its replies; `subjects` is a file of subjects (None: ours)."""

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
                f"writer {name!r} is no model; give provider/model, e.g. anthropic/claude-sonnet-4-5, or `corpus`"
            )
        warm = None if model is not None and default_temperature(model) is None else TEMPERATURE
        self._transport = transport or Transport(str(model), limits or Limits(), temperature=warm)
        self.topics: Topics
        self.topics, self._subjects = keyword_topics(subjects)
        self._folder = folder

    def subjects_for(self, prompt: str) -> Sequence[str]:
        """Every subject that shares no content word with the prompt."""
        return [s for s in self._subjects if self.topics.about(prompt, s) == 0]

    def describe(self) -> Mapping[str, Any]:
        return {
            "writer": self._transport.model,
            "instructions": VERSION,
            "temperature": self._transport.temperature,
            "checks": "restart grammar for the acknowledgement, words in common for subject and prompt",
            "sent": self._transport.describe(),
        }

    async def write(self, questions: Sequence[Question]) -> AsyncIterator[tuple[Question, Draft]]:
        """Drafts in order of completion; replies known from before come first and cost nothing."""
        known = self._read()
        asked: dict[str, tuple[Question, Asked]] = {}
        for question in questions:
            key, asking = self._key(question), self._asked(question)
            if key in known:
                yield question, _draft(question, known[key], asking.nonce)
            else:
                asked[key] = question, asking
        if not asked:
            return
        async for key, reply in self._transport.ask((k, asking) for k, (_, asking) in asked.items()):
            question, asking = asked[key]
            if reply.reason:
                yield question, Draft(None, reply.reason)
            else:
                self._keep(key, reply.text)
                yield question, _draft(question, reply.text, asking.nonce)

    def _asked(self, question: Question) -> Asked:
        nonce = question.key[:12]  # the same after a restart, so that kept replies can be read
        subject = f"<subject>\n{encodable(question.subject)}\n</subject>\n\n" if question.subject else ""
        user = f'<prompt>\n{encodable(question.prompt)}\n</prompt>\n\n{subject}The code is "{nonce}".'
        return Asked(CORRECTION if question.subject else NORMAL, user, nonce)

    def _key(self, question: Question) -> str:
        asking = self._asked(question)
        # asked for, not sent: a model that takes no temperature is asked without from its first refusal on
        return digest([self._transport.model, TEMPERATURE, asking.system, asking.user])

    def _read(self) -> dict[str, str]:
        path = self._folder / "replies.jsonl"
        found: dict[str, str] = {}
        if path.is_file():
            for line in path.read_text("utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the line that a kill cut off
                found[entry["key"]] = entry["text"]
        return found

    def _keep(self, key: str, text: str) -> None:
        line = json.dumps({"key": key, "text": text}) + "\n"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / "replies.jsonl").open("a+b") as file:
                if file.tell() > 0:  # a line that a kill cut off must not swallow this one
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else "\n" + line
                file.write(line.encode("utf-8"))
        except OSError as error:
            raise SteerbackError(f"replies of the writer cannot be kept in {self._folder}: {error.strerror}") from None


def _draft(question: Question, reply: str, nonce: str) -> Draft:
    verdict = parse_verdict(reply, nonce)
    if isinstance(verdict, str):
        return Draft(None, verdict.replace("the judge", "the writer"))
    names = ("passage", "acknowledgement", "answer") if question.subject else ("answer",)
    parts = {}
    for name in names:
        value = verdict.get(name)
        if not isinstance(value, str) or not value.strip():
            return Draft(None, f"the writer's reply has no {name}")
        parts[name] = " ".join(value.split())
    return Draft(Example(question.prompt, subject=question.subject, **parts))
