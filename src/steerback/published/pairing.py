"""Numbers of imported trials. Trials with the same number in different conditions are paired."""

from __future__ import annotations

from collections.abc import Sequence

from steerback.errors import SteerbackError
from steerback.records import LatentKey

Entry = tuple[str, str, int | None, int | None]
"""Condition, prompt, seed, and the number of the trial in an export of steerback (else None)."""


class TrialNumbers:
    """Numbers trials so that trials of different conditions can be paired.

    A trial gets the number of the trial with the same latent, prompt and seed in an earlier condition. If the seeds
    differ (the authors' meta-prompt runs draw new ones), trials of the same latent and prompt are paired in order.
    """

    def __init__(self) -> None:
        self._next = 0
        self._prompts: dict[str, int] = {}
        self._places: dict[tuple[str, LatentKey, int], list[tuple[int, int | None]]] = {}
        self._used: dict[tuple[str, str], set[int]] = {}

    def numbers(self, target: str, latent: LatentKey, entries: Sequence[Entry], where: str) -> list[int]:
        """Return the numbers of a latent's trials in one file. Raises SteerbackError if an exported number is taken."""
        numbers: list[int | None] = [None] * len(entries)
        for i, (condition, prompt, seed, given) in enumerate(entries):
            used = self._used.setdefault((target, condition), set())
            if given is not None:
                if given in used:
                    raise SteerbackError(
                        f"{where}: trial {given} of {target}, {condition} has a different content in an earlier file; "
                        "import the files of one run at a time, or set a --condition for each"
                    )
                numbers[i] = given
                self._next = max(self._next, given + 1)
            elif seed is not None:
                known = self._places.get(self._place(target, latent, prompt), [])
                numbers[i] = next((n for n, s in known if s == seed and n not in used), None)
            if (number := numbers[i]) is not None:
                used.add(number)
        for i, (condition, prompt, seed, _) in enumerate(entries):
            if numbers[i] is None:
                numbers[i] = self._in_order(target, latent, condition, prompt, seed)
        return [n for n in numbers if n is not None]

    def _in_order(self, target: str, latent: LatentKey, condition: str, prompt: str, seed: int | None) -> int:
        """Return the first number of this latent and prompt that is unused in the condition, or a new number."""
        used = self._used.setdefault((target, condition), set())
        known = self._places.setdefault(self._place(target, latent, prompt), [])
        number = next((n for n, _ in known if n not in used), None)
        if number is None:
            number, self._next = self._next, self._next + 1
            known.append((number, seed))
        used.add(number)
        return number

    def _place(self, target: str, latent: LatentKey, prompt: str) -> tuple[str, LatentKey, int]:
        return target, latent, self._prompts.setdefault(prompt, len(self._prompts))
