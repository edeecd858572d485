"""The protocol of judges, and of those that cost money; it knows nothing of engines or ledgers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from steerback.records import Judgement, LatentKey, Spend


@dataclass(frozen=True, slots=True)
class JudgeItem:
    """One response to be judged. `prompt` carries no meta-prompt; `label` is None for targets without labels."""

    key: str
    prompt: str
    response: str
    label: str | None = None
    latent: LatentKey | None = None
    drop_unscored: bool = False  # attempts without a score are left out; else the response is unscored


@dataclass(frozen=True, slots=True)
class References:
    """What an offline judge may compare with; LLM judges ignore it.

    `responses` are the model's own unsteered responses per object-level prompt; `contexts` are top-activating
    text snippets per latent (empty where unknown).
    """

    responses: Mapping[str, Sequence[str]] = field(default_factory=dict)
    contexts: Mapping[LatentKey, Sequence[str]] = field(default_factory=dict)


@runtime_checkable
class Judge(Protocol):
    """Judges responses one by one; every item comes back exactly once, scored, empty or unscored with a reason.

    `name` is what the user asked for, `fingerprint` hashes all that shapes a verdict (judge, rubric text and version,
    references, sampling); verdicts are cached under it together with response, prompt and label.
    """

    name: str
    rubric: str  # version of the rubric, e.g. "offline-2"

    @property
    def fingerprint(self) -> str: ...

    def describe(self) -> dict[str, object]: ...

    def prepare(self, references: References) -> None:
        """Called once per target before the first `judge`."""
        ...

    def judge(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, Judgement]]:
        """Yields (item key, judgement) in any order."""
        ...


@runtime_checkable
class Paid(Protocol):
    """A judge or rater that costs money."""

    def drain(self) -> Spend:
        """Return what was spent since the last call of this method, by the provider's counts."""
        ...


@runtime_checkable
class PaidJudge(Paid, Protocol):
    """A judge that can estimate what it would cost."""

    def estimate(self, items: Sequence[JudgeItem]) -> Spend:
        """Return what judging `items` would take, from their lengths."""
        ...


def estimated(judge: Judge, items: Sequence[JudgeItem]) -> Spend | None:
    """Return what judging `items` would take; None for a judge that costs nothing."""
    return judge.estimate(items) if isinstance(judge, PaidJudge) else None


def drain(judge: object) -> Spend | None:
    """Return what was spent since the last call; None for what costs nothing, or where nothing was asked."""
    spent = judge.drain() if isinstance(judge, Paid) else Spend()
    return spent if spent.calls else None
