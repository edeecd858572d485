"""Responses as people read them: attempts with scores and spans. Model text is untrusted and printed as text."""

from __future__ import annotations

import textwrap
from collections import Counter

from steerback.errors import SteerbackError, visible
from steerback.records import LatentKey
from steerback.store.ledger import Ledger, Row

WIDTH = 100
BOLD, DIM, RESET = "\x1b[1m", "\x1b[2m", "\x1b[0m"


def choose(ledger: Ledger, judge: str, key: str | None, condition: str | None, restarts: bool, count: int) -> list[Row]:
    """The trial of that key, or up to `count` measured ones: largest gains first, each latent once before twice."""
    if key is not None:
        found = ledger.rows(keys=[key], judge=judge)
        if not found:
            raise SteerbackError(f"no trial {key!r} in {ledger.path}; keys look like {_example(ledger)!r}")
        return found
    rows = [r for r in ledger.outlines(stage="measure", condition=condition, judge=judge) if r.finish is not None]
    if not rows:
        known = ", ".join(sorted({c for _, c in ledger.conditions()})) or "none yet"
        raise SteerbackError(f"no measured responses in {ledger.path} (conditions: {known})")
    if restarts:
        rows = [r for r in rows if len(r.attempts) >= 2]
    rows.sort(key=lambda r: (-r.gain, -len(r.attempts), r.trial.key))
    seen: Counter[LatentKey | None] = Counter()
    turns: list[tuple[int, int, str]] = []
    for row in rows:
        turns.append((seen[row.trial.latent], len(turns), row.trial.key))
        seen[row.trial.latent] += 1
    return list(ledger.stream([key for _, _, key in sorted(turns)[:count]], judge))


def transcript(row: Row, colour: bool = False) -> str:
    """Header, then each attempt with its score, restart phrase and character span."""
    bold, dim, reset = (BOLD, DIM, RESET) if colour else ("", "", "")
    trial, done = row.trial, row.completion
    lines = [f"{bold}{visible(trial.key)}{reset}", f"{dim}prompt  {reset} {visible(trial.prompt)}"]
    if trial.meta_prompt:
        lines.append(f"{dim}meta    {reset} {visible(trial.meta_prompt)}")
    if trial.latent is not None:
        label = f" ({visible(trial.label)})" if trial.label else ""
        boost = f", boost {trial.boost:.4g}" if trial.boost is not None else ""
        lines.append(f"{dim}latent  {reset} {visible(trial.latent)}{label}{boost}, seed {trial.seed}")
    if done is None:
        return "\n".join([*lines, "(not generated yet)", ""])
    receipt = done.receipt
    steered = f"{receipt.prompt_positions} prompt + {receipt.generated_positions} generated positions steered"
    right = "" if row.valid_receipt else ", NOT AS PLANNED: the trial is invalid"
    lines.append(f"{dim}receipt {reset} {steered}, mean norm added {receipt.added_norm:.4g}{right}; {done.finish}")
    text = row.judged_text
    judged = row.judgement
    if judged is None or judged.status != "scored":
        state = "not judged yet" if judged is None else f"{judged.status}: {visible(judged.reason)}"
        return "\n".join([*lines, f"{dim}{state}{reset}", _wrap(text), ""])
    for number, span in enumerate(judged.attempts, 1):
        phrase = f", restarts with {visible(span.phrase)!r}" if span.phrase else ""
        gated = "" if span.gated else " (phrase does not open it: not counted)"
        where = f"characters {span.start}-{span.end}"
        lines.append(f"{bold}attempt {number}: {span.score:.0f}/100{reset} {dim}[{where}{phrase}{gated}]{reset}")
        lines.append(_wrap(text[span.start : span.end]))
    return "\n".join([*lines, ""])


def _wrap(text: str) -> str:
    lines = visible(text).strip().splitlines() or ["(empty)"]
    return "\n".join(textwrap.fill(line, WIDTH, initial_indent="    ", subsequent_indent="    ") for line in lines)


def _example(ledger: Ledger) -> str:
    rows = ledger.conditions()
    return f"{rows[0][0]}/measure/{rows[0][1]}/0" if rows else "<target>/measure/<condition>/0"


def pair(prompt: str, what: str, unsteered: str, steered: str, told: str) -> str:
    """An unsteered and a steered response one above the other, for reading."""
    return "\n".join(
        [
            f"prompt    {visible(prompt)}",
            f"steering  {visible(what)}",
            "unsteered",
            _wrap(unsteered),
            f"steered   ({told})",
            _wrap(steered),
        ]
    )
