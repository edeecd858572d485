"""A trial with what came of it, and the form in which the tables of the ledger hold it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from steerback.records import Attempt, Completion, Intervention, Judgement, Prefix, Receipt, Recording, Trial
from steerback.store.database import dump_json, now, pack_array, storable, unpack_array


@dataclass(frozen=True, slots=True)
class Row:
    """A trial with what came of it so far."""

    trial: Trial
    completion: Completion | None
    judgement: Judgement | None

    @property
    def valid_receipt(self) -> bool:
        """Whether the response exists and was steered exactly where its plan says."""
        done = self.completion
        if done is None or done.finish == "error":
            return False
        return done.receipt_matches(self.trial.interventions, self.trial.prefix is not None)

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """The gated attempts of a valid, scored response; empty if it is invalid, unscored or not judged yet."""
        judged = self.judgement
        return (
            judged.gated_attempts() if self.valid_receipt and judged is not None and judged.status == "scored" else ()
        )

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

    @property
    def judged_text(self) -> str:
        """What judges see and spans refer to: lead and response; in stage `continuation` the response alone."""
        text = self.completion.text if self.completion is not None else ""
        return text if self.trial.stage == "continuation" else self.trial.lead + text


def trial_values(t: Trial) -> tuple[Any, ...]:
    """Return a trial as the columns of the table `trials`."""
    return (
        t.key,
        t.target,
        t.stage,
        t.condition,
        t.index,
        None if t.latent is None else dump_json(t.latent),
        t.label,
        None if t.boost is None else float(t.boost),  # derived; kept as a column for those who read the file
        t.prompt,
        t.meta_prompt,
        t.prefill,
        t.seed,
        dump_json([asdict(i) for i in t.interventions]),
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


def trial_of(stored: tuple[Any, ...]) -> Trial:
    """Return the trial in the columns of `trials`, followed by text and token ids of its prefix."""
    key, target, stage, condition, index, latent, label, _, prompt, meta, prefill, seed, edits, record = stored[:14]
    start, ids = stored[14:16]
    recording = json.loads(record) if record else None
    return Trial(
        key=key,
        target=target,
        stage=stage,
        condition=condition,
        index=index,
        prompt=prompt,
        seed=seed,
        latent=None if latent is None else json.loads(latent),
        label=label,
        meta_prompt=meta,
        prefill=prefill,
        interventions=tuple(Intervention(**i) for i in json.loads(edits)),
        record=Recording(tuple(recording["latents"]), recording["layer"]) if recording else None,
        prefix=None if ids is None else Prefix(start, tuple(json.loads(ids))),
    )


def row_of(stored: tuple[Any, ...]) -> Row:
    """Return the row in the columns of a trial, its completion and its judgement."""
    completion = None
    if stored[16] is not None:
        text, ids, prompt_tokens, finish, in_prompt, generated, norm, blob = stored[16:24]
        receipt = Receipt(in_prompt, generated, norm)
        tokens = tuple(json.loads(ids))
        completion = Completion(text, tokens, prompt_tokens, finish, receipt, unpack_array(blob))
    judgement = None
    if stored[24] is not None:
        judge, rubric, status, attempts, reason, raw = stored[24:30]
        spans = tuple(Attempt(**a) for a in json.loads(attempts))
        judgement = Judgement(judge, rubric, status, spans, reason, raw)
    return Row(trial_of(stored), completion, judgement)


def prefix_values(t: Trial) -> tuple[Any, ...] | None:
    """Return a trial's prefix as the columns of the table `prefixes`, None for a trial without one."""
    return None if t.prefix is None else (t.key, storable(t.prefix.text), dump_json(list(t.prefix.token_ids)))
