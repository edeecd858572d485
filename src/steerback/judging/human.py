"""Human labels: the sample of a run that people label, and the verdicts in the files they return.

A labeller sees numbered prompts and responses without any other facts about them, marks where attempts restart, and
scores each attempt. The sample is stratified by condition and by whether the run's judge saw several attempts. It is
shown in random order, so that a labeller who stops early has still labelled a random sample.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steerback.errors import SteerbackError, one_line
from steerback.readers import Json
from steerback.records import Attempt, Judgement, digest
from steerback.store.facts import HUMAN, LabelSample, LabelStratum
from steerback.store.rows import Row, TrialRow

RUBRIC = "human-1"
FORMAT = "steerback-labels-1"
LEAST = 2
"""Minimum number of responses per stratum (all, if a stratum has fewer): one response cannot show the spread."""
PHRASE_WORDS = 6
"""Number of words at the start of an attempt that are stored as its restart phrase."""

_SENTENCE = re.compile(r"(?:(?<=[.!?…:;])|(?<=[.!?…][\"'”’)\]*]))[ \t]+(?=\S)|\n\s*(?=\S)")
_WORD = re.compile(r"\S+")


@dataclass(frozen=True, slots=True)
class LabelItem:
    """A response as a labeller sees it, with its number in the sample."""

    number: str
    prompt: str
    topic: str | None
    response: str


class Label(BaseModel):
    """A labeller's verdict on one response.

    `restarts` are the character offsets at which further attempts begin; `scores` has one score (0-100) per attempt.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    status: Literal["scored", "empty", "unscored"] = "scored"
    restarts: list[int] = []
    scores: list[Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]] = []


class LabelFile(BaseModel):
    """The file that the labelling page saves; `labels` maps a response's number in the sample to its verdict."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal["steerback-labels-1"]
    run: str = ""
    sample: str
    rubric: str
    labels: dict[str, Label]


def judge_name(labeller: str) -> str:
    """Return the name of the judge under which a labeller's verdicts are stored. Raises SteerbackError if invalid."""
    if not re.fullmatch(r"[\w.-]{1,60}", labeller):
        raise SteerbackError(f"labeller {labeller[:80]!r}: a name has 1 to 60 letters, digits or . _ -")
    return HUMAN + labeller


def draw(
    pools: Mapping[str, Sequence[TrialRow]], judge: str, size: int, seed: int, conditions: Sequence[str] = ()
) -> dict[str, LabelSample]:
    """Draw `size` responses over all targets; return one sample per target.

    `pools` holds the scored rows of each target that may be drawn, with the verdicts of `judge`. Each stratum (target,
    stage, condition, one attempt or several) gets an equal share, or all its responses if it has fewer. Raises
    SteerbackError if a stratum would get fewer than two responses.
    """
    rng = random.Random(seed)
    strata: dict[tuple[str, str, str, bool], list[str]] = {}
    for target, rows in pools.items():
        for row in rows:
            stratum = (target, row.trial.stage, row.trial.condition, len(row.attempts) > 1)
            strata.setdefault(stratum, []).append(row.trial.key)
    if not strata:
        raise SteerbackError("the run has no scored response to label")
    shares = _shares([len(keys) for keys in strata.values()], size)
    least = sum(min(LEAST, len(keys)) for keys in strata.values())
    if any(share < min(LEAST, len(keys)) for share, keys in zip(shares, strata.values(), strict=True)):
        raise SteerbackError(
            f"--n {size} is too small: {len(strata)} strata (condition x verdict) need at least {least} responses; "
            "raise --n, or choose conditions with --condition"
        )
    drawn = {s: rng.sample(keys, share) for (s, keys), share in zip(strata.items(), shares, strict=True)}
    order = [(stratum[0], key) for stratum, keys in drawn.items() for key in keys]
    rng.shuffle(order)
    return {
        target: LabelSample(
            judge=judge,
            size=size,
            seed=seed,
            conditions=list(conditions),
            strata=[
                LabelStratum(
                    stage=stage, condition=condition, several=several, available=len(keys), drawn=len(drawn[stratum])
                )
                for stratum, keys in strata.items()
                for owner, stage, condition, several in (stratum,)
                if owner == target
            ],
            items={str(number): key for number, (owner, key) in enumerate(order, 1) if owner == target},
        )
        for target in pools
    }


def _shares(available: Sequence[int], size: int) -> list[int]:
    """Divide `size` equally over strata with `available` responses each; larger strata make up for small ones."""
    shares = [0] * len(available)
    left = min(size, sum(available))
    while left:
        for i, most in enumerate(available):
            if left and shares[i] < most:
                shares[i] += 1
                left -= 1
    return shares


def items_of(samples: Mapping[str, LabelSample], rows: Mapping[str, Row]) -> list[LabelItem]:
    """Return the responses of a sample in display order; `rows` maps trial keys to rows."""
    numbered = {int(number): key for sample in samples.values() for number, key in sample.items.items()}
    return [
        LabelItem(str(number), rows[key].trial.prompt, rows[key].trial.label, rows[key].judged_text)
        for number, key in sorted(numbered.items())
    ]


def identifier(items: Sequence[LabelItem]) -> str:
    """Hash the prompts and responses of a sample, so that labels of other texts are refused."""
    return digest([RUBRIC, [[i.number, i.prompt, i.response] for i in items]])[:16]


def words(text: str) -> list[int]:
    """Return the character offsets at which the words of a text begin."""
    return [match.start() for match in _WORD.finditer(text)]


def sentences(text: str) -> list[int]:
    """Return the character offsets at which the sentences and lines of a text begin."""
    first = next(iter(words(text)), None)
    return [] if first is None else sorted({first, *(m.end() for m in _SENTENCE.finditer(text) if m.end() > first)})


def parse_labels(value: Json, where: str) -> LabelFile:
    """Parse a label file. Raises SteerbackError that names the wrong entry; `where` names the file in messages."""
    try:
        return LabelFile.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = one_line(".".join(str(part) for part in first["loc"])) or "file"
        raise SteerbackError(f"{where} is not a label file of steerback: {place}: {first['msg']}") from None


def judgements(labels: LabelFile, items: Sequence[LabelItem], judge: str, where: str) -> dict[str, Judgement]:
    """Return the judgement of each labelled response by its number. Raises SteerbackError for an invalid label."""
    if labels.rubric != RUBRIC:
        raise SteerbackError(f"{where} uses rubric {labels.rubric!r}; this version of steerback imports {RUBRIC}")
    known = {item.number: item for item in items}
    if not labels.labels:
        raise SteerbackError(f"{where} has no complete label; mark and score responses on the page, then save")
    strangers = [number for number in labels.labels if number not in known]
    if strangers:
        raise SteerbackError(f"{where} labels response {strangers[0]!r}; the sample has responses 1 to {len(known)}")
    return {
        number: _judgement(label, known[number].response, judge, f"{where}, response {number}")
        for number, label in labels.labels.items()
    }


def _judgement(label: Label, text: str, judge: str, where: str) -> Judgement:
    raw = label.model_dump_json()
    if label.status != "scored":
        if label.restarts or label.scores:
            raise SteerbackError(f"{where} is {label.status}, so it must have no restarts and no scores")
        reason = "the labeller could not tell" if label.status == "unscored" else ""
        return Judgement(judge, RUBRIC, label.status, (), reason, raw)
    body = text.rstrip()
    if any(a >= b for a, b in pairwise(label.restarts)):
        raise SteerbackError(f"{where}: restarts must increase strictly; got {label.restarts}")
    for place in label.restarts:
        if not (0 < place < len(body) and text[:place].strip()):
            raise SteerbackError(
                f"{where}: a restart at character {place} is outside the text ({len(body)} characters) or has no "
                "text before it"
            )
    if len(label.scores) != len(label.restarts) + 1:
        raise SteerbackError(
            f"{where} has {len(label.scores)} scores for {len(label.restarts) + 1} attempts; each attempt needs a score"
        )
    starts = [0, *label.restarts]
    ends = [*(len(text[:place].rstrip()) for place in label.restarts), len(body)]
    attempts = tuple(
        Attempt(start, end, score, phrase=" ".join(text[start:end].split()[:PHRASE_WORDS]) if start else "")
        for start, end, score in zip(starts, ends, label.scores, strict=True)
    )
    return Judgement(judge, RUBRIC, "scored", attempts, "", raw)
