"""Examples of self-correction and normal answers, how they are checked, and the segments they become.

An example's parts are text; whether they are what they should be is checked by program, whoever wrote them. Knows chat
templates through a prompter; nothing of writers, files or training.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any, Protocol

from steerback.engines.prompting import Prompter
from steerback.finetuning.segments import Row, Segment
from steerback.judging.restarts import find_restarts
from steerback.judging.text import words

SLACK = 3
"""Characters between the passage's end and the place where the acknowledgement is found."""


@dataclass(frozen=True, slots=True)
class Example:
    """What a user asked and what is answered; without a passage it is a normal answer."""

    prompt: str
    answer: str
    subject: str = ""
    passage: str = ""
    acknowledgement: str = ""

    @property
    def corrects(self) -> bool:
        """Whether it is a self-correction."""
        return bool(self.passage)

    @property
    def response(self) -> str:
        return " ".join(part for part in (self.passage, self.acknowledgement, self.answer) if part)

    def note(self) -> dict[str, Any]:
        """What stands beside its segments in a file."""
        return {
            "kind": "self-correction" if self.corrects else "normal",
            "prompt": self.prompt,
            "subject": self.subject,
        }

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Topics(Protocol):
    """Says how much a text is about a topic: a prompt or a subject."""

    def about(self, text: str, topic: str) -> float:
        """In [0, 1]; 0 is not at all."""
        ...


class Keywords:
    """Topics by their words: the share of a prompt's or a subject's own content words that a text has.

    `terms` gives further words of a subject. Words are compared by their stems. A weak check, and it says so in the
    data card: it finds answers to other prompts and passages about something else, not wrong ones.
    """

    def __init__(self, terms: Mapping[str, Sequence[str]] | None = None) -> None:
        self._terms = terms or {}

    def about(self, text: str, topic: str) -> float:
        wanted = stems(topic)
        further = stems(" ".join(self._terms.get(topic, ())))
        found = stems(text)
        own = len(wanted & found) / len(wanted) if wanted else 0.0
        other = len(further & found) / len(further) if further else 0.0
        return max(own, other)


class Corpus:
    """Topics by the built-in corpus's own truth: the share of words in sentences about the topic."""

    def about(self, text: str, topic: str) -> float:
        from steerback.organism.corpus.truth import read

        return max(read(text).shares(topic), default=0.0)


def problem(example: Example, topics: Topics) -> str:
    """Why an example is unfit, or "" where it is as it should be."""
    if not example.answer.strip():
        return "no answer"
    restarts = find_restarts(example.response, example.prompt)
    on_topic = topics.about(example.answer, example.prompt)
    if not example.corrects:
        if restarts:
            return "a normal answer restarts"
        return "" if on_topic > 0 else "the answer is not about the prompt"
    if not example.acknowledgement.strip():
        return "no acknowledgement"
    end = len(example.passage)
    here = [r for r in restarts if end - SLACK <= r.start <= end + SLACK]
    if not here:
        return "the acknowledgement does not say that something went wrong"
    if len(restarts) > 1:
        return "restarts elsewhere as well"
    if topics.about(example.passage, example.subject) <= topics.about(example.answer, example.subject):
        return "the off-topic part is not about the subject"
    if on_topic <= topics.about(example.passage, example.prompt):
        return "the answer is not about the prompt"
    return ""


@dataclass(frozen=True, slots=True)
class Frame:
    """What a template puts around a response: text before it, the end that is learned, and what follows unlearned.

    `lead` is what a response begins with where there is no template.
    """

    head: str
    end: str
    rest: str = ""
    lead: str = ""


_MARK = "The response stands here."


def frame(prompter: Prompter, prompt: str) -> Frame:
    """The template's text around the response to a prompt, special tokens as the template has them."""
    tokenizer = prompter.tokenizer
    head = prompter.render(prompt)
    if prompter.style == "plain":
        begin = tokenizer.bos_token or ""
        added = bool(begin) and tokenizer(head)["input_ids"][:1] == [tokenizer.bos_token_id]
        return Frame((begin if added else "") + head, tokenizer.eos_token or "", lead=" ")
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": _MARK}]
    whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    tail = whole[whole.rindex(_MARK) + len(_MARK) :]
    special = [t for t in tokenizer.all_special_tokens if t in tail]
    if not special:
        return Frame(head, tokenizer.eos_token or "")
    end = min(tail.index(t) + len(t) for t in special)
    return Frame(head, tail[:end], tail[end:])


def row_of(example: Example, prompter: Prompter) -> Row:
    """Prompt and passage masked; acknowledgement and answer (or the whole normal answer) and the end trained."""
    around = frame(prompter, example.prompt)
    said = " ".join(part for part in (example.acknowledgement, example.answer) if part)
    pieces = [Segment(around.head, False)]
    if example.corrects:
        pieces.append(Segment(around.lead + example.passage, False))
    # the space belongs to the word after it, as tokenizers have it
    said = (" " if example.corrects else around.lead) + said
    pieces.append(Segment(said + around.end, True))
    if around.rest:
        pieces.append(Segment(around.rest, False))
    return tuple(pieces)


@cache
def _function_words() -> frozenset[str]:
    text = resources.files("steerback.data").joinpath("words", "function.txt").read_text("utf-8")
    listed = {w for line in text.splitlines() if not line.startswith("#") for w in line.split()}
    asking = "how do you i we it can explain describe tell me what why when which does did is are"
    return frozenset(listed | set(asking.split()))


_ENDING = re.compile(r"(?:ations?|ings?|ers?|ies|es|ed|s|e|y)$")


def stems(text: str) -> set[str]:
    """Content words without their endings."""
    found = (w for w in words(text) if w not in _function_words() and len(w) > 2)
    return {_ENDING.sub("", w) if len(w) > 4 else w for w in found}
