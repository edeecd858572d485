"""Forks: continue a response from one of its tokens in several arms, with equal seeds in all arms.

An arm is a set of edits that act on the continuation, starting at the position that draws its first token. The tokens
before the fork are those of the response and keep its edits, unless the arm edits the whole sequence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from steerback.errors import SteerbackError, unknown
from steerback.records import MODES, Intervention, LatentKey, Prefix, Trial
from steerback.store.facts import FORK, Fork, ForkArm
from steerback.store.ledger import Row
from steerback.study.seeds import SEED_OFFSETS

ON, OFF, CLAMPED = "steering on", "steering off", "detectors clamped"
NAME = re.compile(r"[\w][\w .+-]{0,39}")
EDITS = ("boost:VALUE", *(f"{mode}:LATENT:VALUE" for mode in MODES))


def usual_arms(trial: Trial) -> list[ForkArm]:
    """Return the default arms of a fork: the response's edits and, if it was steered, these without additions."""
    edits = list(trial.interventions)
    if not any(e.mode == "add" and e.value for e in edits):
        return [ForkArm(name=OFF, edits=edits)]
    return [ForkArm(name=ON, edits=edits), ForkArm(name=OFF, edits=[e for e in edits if e.mode != "add"])]


def boosted(trial: Trial, boost: float) -> ForkArm:
    """Return the arm that adds the trial's latent with another boost; boost 0 gives the arm without steering."""
    rest = [e for e in trial.interventions if e.mode != "add"]
    if boost == 0:
        return ForkArm(name=OFF, edits=rest)
    if trial.latent is None:
        raise SteerbackError(f"trial {trial.key} has no latent to boost; use --arm 'NAME=add:LATENT:{boost:g}'")
    return ForkArm(name=f"boost {boost:g}", edits=[Intervention("add", trial.latent, boost), *rest])


def clamped(trial: Trial, latents: Sequence[int], name: str) -> ForkArm:
    """Return the arm that adds clamps of `latents` to zero to the response's edits."""
    return ForkArm(name=name, edits=_with(trial.interventions, [Intervention("clamp", k, 0.0) for k in latents]))


def parse_arm(trial: Trial, text: str) -> ForkArm:
    """Parse an arm `NAME=EDIT;EDIT` of the user: its edits, each one of EDITS, are added to the response's edits.

    `boost:VALUE` replaces the additions of the response. Raises SteerbackError for a wrong name or edit.
    """
    name, _, described = text.partition("=")
    if not NAME.fullmatch(name := name.strip()) or not described.strip():
        raise SteerbackError(
            f"arm {text[:80]!r} must have the form NAME=EDIT;EDIT with edits {', '.join(EDITS)}; a name has up to 40 "
            "letters, digits, spaces and . _ + -"
        )
    edits = list(trial.interventions)
    for part in described.split(";"):
        kind, *rest = part.strip().split(":")
        number = _number(rest[-1]) if rest else None
        mode = next((mode for mode in MODES if mode == kind), None)
        if number is None or (mode is None and kind != "boost") or len(rest) != (1 if mode is None else 2):
            raise unknown("edit", part.strip(), EDITS)
        if mode is None:
            edits = boosted(trial, number).edits
        else:
            latent: LatentKey = int(rest[0]) if rest[0].isdecimal() else rest[0]
            edits = _with(edits, [Intervention(mode, latent, number)])
    return ForkArm(name=name, edits=edits)


def _with(edits: Sequence[Intervention], more: Sequence[Intervention]) -> list[Intervention]:
    """Return `edits` and `more`; a new clamp or scale replaces an earlier one of the same latent."""
    clamps = {e.latent for e in more if e.mode != "add"}
    return [*(e for e in edits if e.mode == "add" or e.latent not in clamps), *more]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def joined(before: Fork | None, now: Fork) -> Fork:
    """Merge a stored fork with a new request: arms and seeds of both.

    Raises SteerbackError if an arm of the same name has other edits, or if the engine differs.
    """
    if before is None:
        return now
    known = {arm.name: arm for arm in before.arms}
    for arm in now.arms:
        if known.setdefault(arm.name, arm) != arm:
            raise SteerbackError(
                f"fork {now.name} already has an arm {arm.name!r} with other edits; give this arm another name"
            )
    if before.engine.fingerprint != now.engine.fingerprint:
        raise SteerbackError(
            f"fork {now.name} was started with another engine or engine version; continue with that engine, or fork at "
            "another token"
        )
    return now.model_copy(update={"at": before.at, "arms": [*known.values()], "n": max(before.n, now.n)})


def prefix_of(row: Row, tokens: int, ends: Sequence[int]) -> Prefix:
    """Return the first `tokens` tokens of a response as a prefix; `ends` are the character offsets of token ends."""
    done, before = row.completion, row.trial.prefix or Prefix("", ())
    assert done is not None  # only finished responses are forked
    if not 0 <= tokens < len(done.token_ids):
        raise SteerbackError(
            f"--at {tokens}: trial {row.trial.key} has {len(done.token_ids)} tokens; choose a token from 0 to "
            f"{len(done.token_ids) - 1}"
        )
    text = done.text[: ends[tokens - 1]] if tokens else ""
    return Prefix(before.text + text, (*before.token_ids, *done.token_ids[:tokens]))


def trials_of(fork: Fork, parent: Trial, prefix: Prefix, first_seed: int) -> list[Trial]:
    """Return the trials of a fork, seed by seed, so that arms stay comparable if the fork is interrupted."""
    return [
        replace(
            parent,
            key=f"{parent.target}/{FORK}/{fork.condition(arm)}/{i}",
            stage=FORK,
            condition=fork.condition(arm),
            index=i,
            seed=first_seed + SEED_OFFSETS[FORK] + i,
            prefix=prefix,
            interventions=edits_of(parent.interventions, arm.edits, fork.throughout),
            record=None,
        )
        for i in range(fork.n)
        for arm in fork.arms
    ]


def edits_of(
    past: Sequence[Intervention], future: Sequence[Intervention], throughout: bool
) -> tuple[Intervention, ...]:
    """Return the edits of a continuation: `past` before the fork and `future` after it.

    `throughout` applies `future` to all positions. Positions before the fork count as prompt, those of the continuation
    as generated (`Request.boundary`).
    """
    if throughout:
        return tuple(future)
    after = [e if e in past else replace(e, positions="generated") for e in future]
    return (*after, *(replace(e, positions="prompt") for e in past if e not in future))
