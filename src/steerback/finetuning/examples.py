"""Examples of self-correction and normal answers: their checks, and their conversion to segments.

The checks do not depend on the writer of an example.
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
"""Largest distance in characters between the end of the passage and the start of the detected restart."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its answer; with an off-topic passage it is a self-correction, without one a normal answer."""

    prompt: str
    answer: str
    subject: str = ""
    passage: str = ""
    acknowledgement: str = ""

    @property
    def corrects(self) -> bool:
        """Whether the example is a self-correction."""
        return bool(self.passage)

    @property
    def response(self) -> str:
        """The whole response as one text."""
        return " ".join(part for part in (self.passage, self.acknowledgement, self.answer) if part)

    def note(self) -> dict[str, str]:
        """Return the keys that a data file stores next to the segments."""
        return {
            "kind": "self-correction" if self.corrects else "normal",
            "prompt": self.prompt,
            "subject": self.subject,
        }


class Topics(Protocol):
    """Measures how much a text is about a topic, which is a prompt or a subject."""

    def about(self, text: str, topic: str) -> float:
        """Return a share in [0, 1]; 0 means not about the topic."""
        ...


class Keywords:
    """Measures topics by words: the share of the topic's content words that a text contains.

    `terms` lists further words of a subject. Words are compared by stem. The check is weak, as the data card states:
    it detects answers to other prompts and passages about other subjects, but no wrong answers.
    """

    def __init__(self, terms: Mapping[str, Sequence[str]] | None = None) -> None:
        self._terms = terms or {}

    def about(self, text: str, topic: str) -> float:
        text_stems, shares = stems(text), [0.0]
        for wanted in (stems(topic), stems(" ".join(self._terms.get(topic, ())))):
            if wanted:
                shares.append(len(wanted & text_stems) / len(wanted))
        return max(shares)


class Corpus:
    """Measures topics of the built-in corpus by its ground truth: the share of words in sentences about the topic."""

    def about(self, text: str, topic: str) -> float:
        from steerback.organism.corpus.truth import read

        return max(read(text).shares(topic), default=0.0)


def problem(example: Example, topics: Topics) -> str:
    """Return the reason why an example is unusable, "" if it is usable."""
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
    opening = [r for r in restarts if end - SLACK <= r.start <= end + SLACK]
    if not opening:
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
    """The chat template's text around a response: `head` before it, `end` after it (trained), `rest` (not trained).

    `lead` begins the response if there is no template.
    """

    head: str
    end: str
    rest: str = ""
    lead: str = ""


_MARK = "The response stands here."


def frame(prompter: Prompter, prompt: str) -> Frame:
    """Return the template's text around the response to a prompt, with special tokens written out."""
    tokenizer = prompter.tokenizer
    head = prompter.render(prompt)
    if prompter.style == "plain":
        begin = tokenizer.bos_token or ""
        added = bool(begin) and tokenizer(head)["input_ids"][:1] == [tokenizer.bos_token_id]
        return Frame((begin if added else "") + head, tokenizer.eos_token or "", lead=" ")
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": _MARK}]
    whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    tail = whole[whole.rindex(_MARK) + len(_MARK) :]
    marked = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special = [t for t in marked.union(tokenizer.all_special_tokens) if t in tail]
    if not special:
        return Frame(head, tokenizer.eos_token or "")
    end = min(tail.index(t) + len(t) for t in special)
    return Frame(head, tail[:end], tail[end:])


def row_of(example: Example, prompter: Prompter) -> Row:
    """Convert an example to a row: prompt and passage are masked; acknowledgement, answer and end of turn trained."""
    around = frame(prompter, example.prompt)
    said = " ".join(part for part in (example.acknowledgement, example.answer) if part)
    pieces = [Segment(around.head, False)]
    if example.corrects:
        pieces.append(Segment(around.lead + example.passage, False))
    # a space belongs to the token of the word after it
    said = (" " if example.corrects else around.lead) + said
    pieces.append(Segment(said + around.end, True))
    if around.rest:
        pieces.append(Segment(around.rest, False))
    return tuple(pieces)


_EMPTY = word_list("function") | word_list("asking")
_ENDING = re.compile(r"(?:ations?|ings?|ers?|ies|es|ed|s|e|y)$")


def stems(text: str) -> set[str]:
    """Return the content words of a text without their endings."""
    content = (w for w in words(text) if w not in _EMPTY and len(w) > 2)
    return {_ENDING.sub("", w) if len(w) > 4 else w for w in content}
