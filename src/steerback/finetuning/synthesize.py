"""Make pools of examples: ask a writer for drafts, check them, keep the usable ones, write them to files.

A writer answers questions (a prompt, and for a self-correction a subject). `writer.LlmWriter` asks a model;
`CorpusWriter` composes examples from the built-in corpus.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from steerback.config import Settings
from steerback.data.prompts import load_subjects, word_lines
from steerback.engines.base import finish
from steerback.errors import SteerbackError
from steerback.finetuning.examples import Corpus, Example, Keywords, Topics, problem, row_of
from steerback.finetuning.mixes import POOLS
from steerback.finetuning.segments import write_rows
from steerback.judging.asking import Answer
from steerback.records import digest
from steerback.store.files import write_json

if TYPE_CHECKING:
    from steerback.engines.prompting import Prompter

ROUNDS = 4
"""Maximum number of rounds of questions; each round replaces the rejected drafts."""
MIN_SUBJECTS = 50


@dataclass(frozen=True, slots=True)
class ExampleQuestion:
    """A request for one example; `draft` numbers the requests for the same prompt and subject."""

    prompt: str
    subject: str
    draft: int

    @property
    def key(self) -> str:
        return digest([self.prompt, self.subject, self.draft])


ACKNOWLEDGEMENTS = [(int(line.split()[0]), line.split(" ", 1)[1]) for line in word_lines("acknowledgements")]
"""Weights and texts of the corpus writer's acknowledgements; all their tokens occur in the control's corpus.

The restarts of the corpus begin with words that the control never saw. Embedding rows that no text ever used are nearly
equal, so an adapter on the linear layers cannot select one of them, and the model would produce any of these words.
"""
RETURNING = 0.5
"""Probability that "Let me get back to ..." follows."""


class Writer(Protocol):
    """Writes examples; `describe()` returns JSON-able values for data.json."""

    topics: Topics

    def write(self, questions: Sequence[ExampleQuestion]) -> AsyncIterator[tuple[ExampleQuestion, Answer[Example]]]: ...

    def subjects_for(self, prompt: str) -> Sequence[str]:
        """Return the subjects that are off topic for a prompt."""
        ...

    def describe(self) -> Mapping[str, object]: ...


class CorpusWriter:
    """Composes examples for the organisms from the built-in corpus, without key or network."""

    def __init__(self, prompts: Sequence[str], seed: int = 42) -> None:
        from steerback.organism.corpus import howtos

        known = {t.key for t in howtos()}
        for prompt in prompts:
            if prompt not in known:
                raise SteerbackError(
                    f"the built-in corpus has no answer to {prompt!r}; use prompts of the corpus, or name a model with "
                    "--writer"
                )
        self.topics: Topics = Corpus()
        self._seed = seed

    def subjects_for(self, prompt: str) -> Sequence[str]:
        """Return the corpus's subjects and discovery prompts, except those with similar words to the prompt."""
        from steerback.organism.corpus import howtos, subjects
        from steerback.organism.corpus.text import near

        return [t.key for t in (*subjects(), *howtos("discovery")) if t.key not in near(prompt)]

    async def write(
        self, questions: Sequence[ExampleQuestion]
    ) -> AsyncIterator[tuple[ExampleQuestion, Answer[Example]]]:
        from steerback.organism.corpus import passage, topic

        for question in questions:
            rng = random.Random(f"{self._seed}/{question.key}")
            answer = " ".join(passage(rng, question.prompt, rng.randint(4, 6)))
            if not question.subject:
                yield question, Answer(Example(question.prompt, answer))
                continue
            away = " ".join(passage(rng, question.subject, rng.randint(1, 4)))
            said = rng.choices([text for _, text in ACKNOWLEDGEMENTS], [weight for weight, _ in ACKNOWLEDGEMENTS])[0]
            if rng.random() < RETURNING:
                said += f" Let me get back to {topic(question.prompt).phrase}."
            yield question, Answer(Example(question.prompt, answer, question.subject, away, said))

    def describe(self) -> Mapping[str, object]:
        return {"writer": "corpus", "checks": "by the corpus's own truth"}


class PoolRecord(Settings):
    """The entry of a pool in data.json: counts of examples, requested drafts, rejects by reason, prompts, subjects."""

    examples: int
    asked: int
    rejected: dict[str, int]
    prompts: int
    subjects: int
    fewest_subjects_of_a_prompt: int
    """0 for normal answers, which have no subject."""


@dataclass(slots=True)
class Pool:
    """Accepted examples of one kind, and the number of rejected drafts by reason."""

    examples: list[Example] = field(default_factory=list)
    rejects: Counter[str] = field(default_factory=Counter)
    asked: int = 0

    def record(self, name: str) -> PoolRecord:
        """Return the counts for data.json; `name` is the pool's name. Raises SteerbackError if the pool is empty."""
        if not self.examples:
            reasons = ", ".join(f"{reason}: {n}" for reason, n in self.rejects.most_common()) or "none was requested"
            raise SteerbackError(f"no {name.replace('_', '-')} example was usable ({reasons})")
        subjects: dict[str, set[str]] = {example.prompt: set() for example in self.examples}
        for example in self.examples:
            subjects[example.prompt] |= {example.subject} - {""}
        return PoolRecord(
            examples=len(self.examples),
            asked=self.asked,
            rejected=dict(self.rejects.most_common()),
            prompts=len(subjects),
            subjects=len(set().union(*subjects.values())),
            fewest_subjects_of_a_prompt=min(map(len, subjects.values())),
        )


def synthesize(
    writer: Writer,
    prompts: Sequence[str],
    count: int,
    seed: int = 42,
    normal: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Pool, Pool]:
    """Return `count` self-corrections and `normal` (default: `count`) normal answers, fewer if the writer fails.

    Raises SteerbackError for too few off-topic subjects. `say` receives progress messages.
    """
    usable = {p: list(writer.subjects_for(p)) for p in prompts}
    together = {s for subjects in usable.values() for s in subjects}
    if len(together) < MIN_SUBJECTS:
        raise SteerbackError(f"{len(together)} off-topic subjects are too few; list at least {MIN_SUBJECTS}")
    alone = (ExampleQuestion(prompt, "", turn) for turn in itertools.count() for prompt in prompts)
    corrections = finish(_fill(writer, _questions(prompts, usable, seed), count, "self-corrections", say))
    plain = finish(_fill(writer, alone, count if normal is None else normal, "normal answers", say))
    return corrections, plain


async def _fill(
    writer: Writer, questions: Iterator[ExampleQuestion], count: int, what: str, say: Callable[[str], None]
) -> Pool:
    """Ask for drafts until there are `count` usable examples, in at most `ROUNDS` rounds."""
    pool, seen = Pool(), set[str]()
    for _ in range(ROUNDS):
        missing = count - len(pool.examples)
        if missing <= 0:
            break
        asked = [next(questions) for _ in range(missing)]
        pool.asked += len(asked)
        drafts: dict[str, Answer[Example]] = {}
        async for question, draft in writer.write(asked):
            drafts[question.key] = draft
            if len(drafts) % 100 == 0:
                say(f"{what}: {len(pool.examples) + len(drafts)} of {count} written")
        for question in asked:  # in the order of the questions, so that a resumed synthesis gives the same pool
            example, reason = drafts[question.key].value, drafts[question.key].reason
            if example is not None:
                body = example.prompt + example.response
                reason = "the same as another" if body in seen else problem(example, writer.topics)
                seen.add(body)
            if reason:
                pool.rejects[reason] += 1
            elif example is not None:
                pool.examples.append(example)
        if drafts and all(d.over_budget for d in drafts.values()):
            break
    return pool


def _questions(prompts: Sequence[str], subjects: Mapping[str, Sequence[str]], seed: int) -> Iterator[ExampleQuestion]:
    """Yield questions with prompts in turn; a prompt gets each of its subjects once before any is repeated."""
    rng = random.Random(seed)
    orders = {p: rng.sample(list(subjects[p]), len(subjects[p])) for p in prompts}
    for turn in itertools.count():
        for prompt in prompts:
            draft, place = divmod(turn, len(orders[prompt]))
            yield ExampleQuestion(prompt, orders[prompt][place], draft)


def write_pools(
    folder: Path, pools: tuple[Pool, Pool], prompter: Prompter, facts: Mapping[str, object]
) -> dict[str, PoolRecord]:
    """Write both pools as JSONL, and data.json with `facts` and the pools' records; return the records.

    Raises SteerbackError with the reasons for the rejects if a pool is empty.
    """
    records = {name: pool.record(name) for name, pool in zip(POOLS, pools, strict=True)}
    for name, pool in zip(POOLS, pools, strict=True):
        rows = [row_of(example, prompter) for example in pool.examples]
        write_rows(folder / f"{name}.jsonl", rows, [example.note() for example in pool.examples])
    write_json(folder / "data.json", {**facts, "pools": {name: r.model_dump() for name, r in records.items()}})
    return records


def keyword_topics(subjects: str | None) -> tuple[Keywords, list[str]]:
    """Return topics by keywords, and the subjects: the built-in list, or a file of lines `subject: word, word`."""
    listed = load_subjects(subjects)
    return Keywords(listed), list(listed)
