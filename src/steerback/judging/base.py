"""Protocols of judges and of paid judges. This module knows nothing about engines or ledgers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol, runtime_checkable

from steerback.records import Judgement, LatentKey, Spend

ESTIMATED_TOGETHER = 512
"""Responses in memory while the cost of judging is estimated."""


@dataclass(frozen=True, slots=True)
class JudgeItem:
    """One response to judge. `prompt` excludes the meta-prompt; `label` is None for targets without labels."""

    key: str
    prompt: str
    response: str
    label: str | None = None
    latent: LatentKey | None = None
    drop_unscored: bool = False  # attempts without a score are left out; else the response is unscored


@dataclass(frozen=True, slots=True)
class References:
    """Reference texts of the offline judges; LLM judges ignore them.

    `responses` holds unsteered responses of the target by object-level prompt. `contexts` holds top-activating text
    snippets by latent; a latent without known snippets has no entry. `expected` is the largest number of responses to
    judge, if it is known: the judge prepares for many.
    """

    responses: Mapping[str, Sequence[str]] = field(default_factory=dict)
    contexts: Mapping[LatentKey, Sequence[str]] = field(default_factory=dict)
    expected: int = 0


@runtime_checkable
class Judge(Protocol):
    """Judges responses. Each item is returned exactly once: scored, empty, or unscored with a reason.

    `name` is the name that the user chose. `fingerprint` hashes everything that shapes a verdict: judge, rubric text
    and version, references, sampling. The cache key of a verdict is made of fingerprint, response, prompt and label.
    """

    name: str
    rubric: str  # version of the rubric, e.g. "offline-2"

    @property
    def fingerprint(self) -> str: ...

    def describe(self) -> dict[str, object]: ...

    def prepare(self, references: References) -> None:
        """Take the reference texts; called once per target before the first `judge`."""
        ...

    def judge(self, items: Sequence[JudgeItem]) -> AsyncIterator[tuple[str, Judgement]]:
        """Yield (item key, judgement) in any order."""
        ...


@runtime_checkable
class Paid(Protocol):
    """A judge or rater whose calls cost money."""

    def drain(self) -> Spend:
        """Return the spend since the last call of this method, by the provider's token counts."""
        ...


@runtime_checkable
class PaidJudge(Paid, Protocol):
    """A judge that can estimate its cost."""

    def estimate(self, items: Sequence[JudgeItem]) -> Spend:
        """Estimate calls, tokens and cost of judging `items`, from the lengths of their texts."""
        ...


def estimated(judge: Judge, items: Iterable[JudgeItem]) -> Spend | None:
    """Estimate calls, tokens and cost of judging `items`, which are read in batches; None for a free judge."""
    return estimate_in_batches(judge.estimate, items) if isinstance(judge, PaidJudge) else None


def estimate_in_batches(
    estimate: Callable[[Sequence[JudgeItem]], Spend | None], items: Iterable[JudgeItem]
) -> Spend | None:
    """Return the sum of the estimates for `items`, which are read in batches; None if it costs nothing."""
    total, waiting = estimate([]), iter(items)
    while total is not None and (some := list(islice(waiting, ESTIMATED_TOGETHER))):
        total += estimate(some) or Spend()
    return total


def drain(judge: object) -> Spend | None:
    """Return the judge's spend since the last call; None for a free judge, or if no question was asked."""
    spent = judge.drain() if isinstance(judge, Paid) else Spend()
    return spent if spent.calls else None
