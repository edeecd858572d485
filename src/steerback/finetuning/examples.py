"""Examples of self-correction and normal answers, how they are checked, and the segments they become.

The checks are the same whoever wrote the example.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from steerback.data.prompts import word_list
from steerback.engines.prompting import Prompter
from steerback.finetuning.segments import Row, Segment
from steerback.judging.restarts import find_restarts
from steerback.judging.text import words

SLACK = 3
"""Characters between the passage's end and the place where the acknowledgement is found."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its answer; without a passage it is a normal answer, with one a self-correction."""

    prompt: str
    answer: str
    subject: str = ""
    passage: str = ""
    acknowledgement: str = ""

    @property
    def corrects(self) -> bool:
        """Return whether it is a self-correction."""
        return bool(self.passage)

    @property
    def response(self) -> str:
        """The whole response as one text."""
        return " ".join(part for part in (self.passage, self.acknowledgement, self.answer) if part)

    def note(self) -> dict[str, str]:
        """Return the keys that a file has with its segments."""
        return {
            "kind": "self-correction" if self.corrects else "normal",
            "prompt": self.prompt,
            "subject": self.subject,
        }


class Topics(Protocol):
    """A measure of how much a text is about a topic: a prompt or a subject."""

    def about(self, text: str, topic: str) -> float:
        """Return a share in [0, 1]; 0 is not at all."""
        ...


class Keywords:
    """Topics by their words: the share of a prompt's or a subject's content words that a text has.

    `terms` gives further words of a subject. Words are compared by their stems. The check is weak, as the data card
    says: it recognises answers to other prompts and passages about something else, not wrong answers.
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
    """Topics of the built-in corpus, which knows what its sentences are about: the share of words about the topic."""

    def about(self, text: str, topic: str) -> float:
        from steerback.organism.corpus.truth import read

        return max(read(text).shares(topic), default=0.0)


def problem(example: Example, topics: Topics) -> str:
    """Return why an example is unfit, or "" if it is as it should be."""
    if not example.answer.strip():
        return "no answer"
    if re.search("[\ud800-\udfff]", example.response):
        return "half of a surrogate pair, which no file can hold"
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
    """The text that a template puts around a response: before it, the end that is learned, the rest that is not.

    `lead` opens the response if there is no template.
    """

    head: str
    end: str
    rest: str = ""
    lead: str = ""


_MARK = "The response stands here."


def frame(prompter: Prompter, prompt: str) -> Frame:
    """Return the template's text around the response to a prompt, special tokens as the template has them."""
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
    """Return an example's row: prompt and passage masked; acknowledgement, answer and the end of the turn trained."""
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


_EMPTY = word_list("function") | word_list("asking")
_ENDING = re.compile(r"(?:ations?|ings?|ers?|ies|es|ed|s|e|y)$")


def stems(text: str) -> set[str]:
    """Return the content words of a text without their endings."""
    found = (w for w in words(text) if w not in _EMPTY and len(w) > 2)
    return {_ENDING.sub("", w) if len(w) > 4 else w for w in found}
