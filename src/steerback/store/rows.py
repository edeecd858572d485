"""Trials with their results: complete (`Row`), without texts (`Outline`), or the verdict alone (`Verdict`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from pydantic_core import from_json

from steerback.records import (
    Attempt,
    Completion,
    FinishReason,
    Intervention,
    Judgement,
    LatentKey,
    Prefix,
    Receipt,
    Recording,
    Trial,
    WindowScores,
    is_degraded,
    touched,
    touched_positions,
)
from steerback.store.database import dump_json, now, pack_array, storable, unpack_array

KEYS = "SELECT value FROM json_each(?)"
"""Keys of trials that a statement gets as one JSON list."""

MIDDLE = "SELECT (min(idx) + max(idx) + 1) / 2 FROM trials WHERE target = ? AND stage = ? AND condition = ?"

Stored: TypeAlias = Sequence[Any]
"""Row as SQLite returns it."""

TRIAL = "t.key, t.target, t.stage, t.condition, t.idx, t.latent, t.label, t.prompt, t.meta_prompt, t.prefill, t.seed, "
TRIAL += "t.interventions, t.record"
COMPLETION = "c.text, c.token_ids, c.prompt_tokens, c.finish, c.prompt_positions, c.generated_positions, c.added_norm"
OUTLINE = "o.finish, o.prompt_tokens, o.tokens, o.prompt_positions, o.generated_positions, o.degraded"
JUDGEMENT = "j.judge, j.rubric, j.status, j.attempts, j.reason"
OUTLINES_OF = "LEFT JOIN outlines o ON o.trial = t.key LEFT JOIN judgements j ON j.trial = t.key AND j.judge = ?"


class TrialRow:
    """Attempts that count in a trial, and the quantities derived from them."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def trial(self) -> Trial: ...

        @property
        def judgement(self) -> Judgement | None: ...

        @property
        def finish(self) -> FinishReason | None: ...

        @property
        def valid_receipt(self) -> bool: ...

        @property
        def degraded(self) -> bool: ...

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Gated attempts of a valid, scored response; empty if it is invalid, unscored or not judged."""
        return attempts_of(self.valid_receipt, self.judgement)

    @property
    def gain(self) -> float:
        """Score of the last gated attempt minus that of the first, in points; 0 without attempts."""
        attempts = self.attempts
        return attempts[-1].score - attempts[0].score if attempts else 0.0

    @property
    def is_episode(self) -> bool:
        """Whether the response corrects itself: two attempts or more, the last better than the first."""
        return self.gain > 0

    def is_drift(self, below: float) -> bool:
        """Whether the response is a single attempt that scores less than `below`."""
        return len(self.attempts) == 1 and self.attempts[0].score < below

    def is_on_topic(self, least: float) -> bool:
        """Whether the response is a single attempt that scores at least `least`."""
        return len(self.attempts) == 1 and self.attempts[0].score >= least


def attempts_of(valid: bool, judged: Judgement | None) -> tuple[Attempt, ...]:
    """Return the attempts that count (`TrialRow.attempts`)."""
    return judged.gated_attempts() if valid and judged is not None and judged.status == "scored" else ()


class Verdict(NamedTuple):
    """Input of the rates: place and cluster of a trial, and properties of its response as in `Outline`.

    It is read in two thirds of the time of an `Outline`.
    """

    key: str
    pair: int
    cluster: LatentKey | None
    finish: FinishReason | None
    valid_receipt: bool
    degraded: bool
    judgement: Judgement | None


def verdict_of(row: TrialRow, cluster: Callable[[Trial], LatentKey | None] = lambda t: t.latent) -> Verdict:
    """Return the verdict of a row, clustered by latent or by `cluster`."""
    t = row.trial
    return Verdict(t.key, t.index, cluster(t), row.finish, row.valid_receipt, row.degraded, row.judgement)


@dataclass(frozen=True, slots=True)
class Outline(TrialRow):
    """Trial with the properties of its response that metrics need. It takes a twentieth of the memory of a `Row`.

    `judgement` lacks the judge's raw reply; `tokens` is the number of generated tokens.
    """

    trial: Trial
    finish: FinishReason | None
    valid_receipt: bool
    degraded: bool
    tokens: int
    judgement: Judgement | None


@dataclass(frozen=True, slots=True)
class Row(TrialRow):
    """Trial with its completion and its judgement, as far as they exist."""

    trial: Trial
    completion: Completion | None
    judgement: Judgement | None

    @property
    def finish(self) -> FinishReason | None:
        """Reason why the response ended; None before it exists."""
        return None if self.completion is None else self.completion.finish

    @property
    def valid_receipt(self) -> bool:
        """Whether the response exists and was steered exactly at the planned positions."""
        done = self.completion
        if done is None or done.finish == "error":
            return False
        return done.receipt_matches(self.trial.interventions, self.trial.prefix is not None)

    @property
    def degraded(self) -> bool:
        """Whether the response repeats a word five times (`records.is_degraded`)."""
        return self.completion is not None and is_degraded(self.completion.text)

    @property
    def judged_text(self) -> str:
        """Text that judges see and that spans refer to: lead and response, or the response alone in stage
        `continuation`.
        """
        return judged_text(self.trial, self.completion.text if self.completion is not None else "")


def judged_text(trial: Trial, response: str) -> str:
    """Return the text that judges see (`Row.judged_text`)."""
    return response if trial.stage == "continuation" else trial.lead + response


def plain(record: Intervention | Attempt) -> dict[str, object]:
    """Return the fields of a flat record. `dataclasses.asdict` takes ten times as long."""
    return {name: getattr(record, name) for name in record.__slots__}


def trial_values(t: Trial) -> tuple[Any, ...]:
    """Return a trial as the columns of the table `trials`."""
    return (
        t.key,
        t.target,
        t.stage,
        t.condition,
        t.index,
        None if t.latent is None else _latent_text(t.latent),
        t.label,
        t.boost,  # derived from the interventions; stored for people who read the file
        t.prompt,
        t.meta_prompt,
        t.prefill,
        t.seed,
        _interventions_text(t.interventions),
        None if t.record is None else dump_json(asdict(t.record)),
    )


def completion_values(key: str, c: Completion, engine: str) -> tuple[Any, ...]:
    """Return a completion as the columns of the table `completions`."""
    receipt = c.receipt
    return (
        key,
        storable(c.text),
        dump_json(list(c.token_ids)),
        c.prompt_tokens,
        c.finish,
        receipt.prompt_positions,
        receipt.generated_positions,
        receipt.added_norm,
        pack_array(c.activations),
        engine,
        now(),
    )


def judgement_values(key: str, j: Judgement) -> tuple[Any, ...]:
    """Return a judgement as the columns of the table `judgements`."""
    attempts = storable(dump_json([asdict(a) for a in j.attempts]))
    return key, j.judge, j.rubric, j.status, attempts, storable(j.reason), storable(j.raw), now()


def window_values(key: str, w: WindowScores) -> tuple[Any, ...]:
    """Return window scores as the columns of the table `windows`."""
    starts, scores = dump_json(w.starts), dump_json(w.scores)
    return key, w.judge, w.rubric, starts, scores, storable(w.reason), storable(w.raw), now()


def prefix_values(t: Trial) -> tuple[Any, ...] | None:
    """Return the prefix of a trial as the columns of the table `prefixes`, or None for a trial without prefix."""
    return None if t.prefix is None else (t.key, storable(t.prefix.text), dump_json(list(t.prefix.token_ids)))


def read_trial(stored: Stored) -> Trial:
    """Return the trial from the columns `TRIAL` and those of its prefix. Texts shared by many trials are kept once."""
    key, target, stage, condition, index, latent, label, prompt, meta, prefill, seed, edits, record = stored[:13]
    start, ids = stored[13:15]
    return Trial(
        key=key,
        target=sys.intern(target),
        stage=sys.intern(stage),
        condition=sys.intern(condition),
        index=index,
        prompt=sys.intern(prompt),
        seed=seed,
        latent=None if latent is None else _latent(latent),
        label=None if label is None else sys.intern(label),
        meta_prompt=sys.intern(meta),
        prefill=prefill,
        interventions=interventions_of(edits),
        record=_recording(record) if record else None,
        prefix=None if ids is None else Prefix(start, tuple(from_json(ids))),
    )


def read_row(stored: Stored) -> Row:
    """Return the row from the columns of trial and prefix, `COMPLETION`, activations, `JUDGEMENT` and raw reply."""
    completion = None
    if stored[15] is not None:
        text, ids, prompt_tokens, finish, in_prompt, generated, norm, blob = stored[15:23]
        receipt = Receipt(in_prompt, generated, norm)
        tokens = tuple(from_json(ids))
        completion = Completion(text, tokens, prompt_tokens, finish, receipt, unpack_array(blob))
    return Row(read_trial(stored), completion, _judgement(stored[23:28], stored[28]))


def read_outline(stored: Stored) -> Outline:
    """Return the outline from the columns of trial and prefix, `OUTLINE` and `JUDGEMENT`."""
    finish, _, tokens, _, _, degraded = stored[15:21]
    right = _receipt_matches(stored[11], stored[14] is not None, *stored[15:20])
    return Outline(read_trial(stored), finish, right, bool(degraded), tokens or 0, _judgement(stored[21:26]))


def read_verdict(stored: Stored) -> Verdict:
    """Return the verdict, clustered by latent, from the columns of `read_outline`."""
    right = _receipt_matches(stored[11], stored[14] is not None, *stored[15:20])
    latent = None if stored[5] is None else _latent(stored[5])
    return Verdict(stored[0], stored[4], latent, stored[15], right, bool(stored[20]), _judgement(stored[21:26]))


ODD = "CASE WHEN instr(j.attempts, 'NaN') + instr(j.attempts, 'Infinity') > 0 THEN j.attempts ELSE '' END"
"""Attempts with scores that are no numbers, which do not count; "" for all others."""
KIND = f"t.target, t.stage, t.condition, t.interventions, {OUTLINE}, j.status, j.reason, {ODD}"
SAME = f"t.target, t.condition, t.interventions, o.finish, o.degraded, j.status, j.reason, {ODD}, "
SAME += "o.prompt_positions - o.prompt_tokens, o.prompt_positions = 0, o.generated_positions - o.tokens, "
SAME += "o.generated_positions = 0"
"""Trials of one stage that agree in this, and in whether they have a prefix, are of one kind (`kind_of`)."""


def kinds_query(trial: str, tables: str) -> str:
    """Return the query for the kinds of trials in a stage, from the columns of a trial and their tables.

    Its rows are those of `kind_of`, then the number of such trials, and key and place of the first one.
    """
    prefixed = f"{trial.rpartition(',')[2]} IS NOT NULL"
    query = f"SELECT {KIND}, {prefixed}, count(*), t.key, min(t.rowid) FROM {tables} {OUTLINES_OF} "
    return query + f"WHERE t.stage = ? GROUP BY {SAME}, {prefixed}"


def kind_of(stored: Stored) -> tuple[object, ...]:
    """Return the facts that decide whether and why a trial counts, from the columns `KIND` and whether it has a
    prefix.
    """
    right = _receipt_matches(stored[3], bool(stored[13]), *stored[4:9])
    return *stored[:3], stored[4], right, *stored[9:13]


def _receipt_matches(
    edits: str, continued: bool, finish: str | None, prompt_tokens: int, tokens: int, in_prompt: int, generated: int
) -> bool:
    if finish in (None, "error"):
        return False
    return (in_prompt, generated) == touched_positions(_touched(edits), prompt_tokens, tokens, continued)


def _judgement(stored: Stored, raw: str = "") -> Judgement | None:
    judge, rubric, status, attempts, reason = stored
    if judge is None:
        return None
    spans = tuple([Attempt(a["start"], a["end"], a["score"], a["phrase"], a["gated"]) for a in from_json(attempts)])
    return Judgement(sys.intern(judge), sys.intern(rubric), status, spans, reason, raw)


@lru_cache(4096)
def _latent_text(key: LatentKey) -> str:
    return dump_json(key)


@lru_cache(4096)
def _interventions_text(edits: tuple[Intervention, ...]) -> str:
    return dump_json([plain(i) for i in edits])


@lru_cache(4096)
def _latent(text: str) -> LatentKey:
    key: LatentKey = from_json(text)
    return key


@lru_cache(4096)
def latent_repr(text: str | None) -> str:
    """Return the repr of a stored latent."""
    return repr(None if text is None else _latent(text))


@lru_cache(4096)
def interventions_of(text: str) -> tuple[Intervention, ...]:
    """Return the interventions of a trial from their stored form."""
    return tuple(Intervention(**i) for i in from_json(text))


@lru_cache(4096)
def _touched(text: str) -> tuple[bool, bool]:
    return touched(interventions_of(text))


@lru_cache(64)
def _recording(text: str) -> Recording:
    recording = from_json(text)
    return Recording(tuple(recording["latents"]), recording["layer"])


def where_clause(
    target: str | None,
    stage: str | None,
    condition: str | None,
    keys: Sequence[str] | None,
    half: int | None = None,
) -> tuple[str, list[str]]:
    """Return the condition of a statement about trials, and its values.

    `half` 0 or 1 chooses the trials below or from the middle index of a target, stage and condition.
    """
    chosen = {"t.target": target, "t.stage": stage, "t.condition": condition}
    where = ["1", *(f"{column} = ?" for column, value in chosen.items() if value is not None)]
    values = [value for value in chosen.values() if value is not None]
    if keys is not None:
        where.append(f"t.key IN ({KEYS})")
        values.append(dump_json(list(keys)))
    if half is not None:
        where.append(f"t.idx {'>=' if half else '<'} ({MIDDLE})")
        values += [value for value in (target, stage, condition) if value is not None]
    return " AND ".join(where), values
