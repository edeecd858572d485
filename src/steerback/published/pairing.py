"""Numbers of imported trials: the same number in several conditions means the same latent, prompt and seed."""

from __future__ import annotations

from collections.abc import Sequence

from steerback.errors import SteerbackError
from steerback.records import LatentKey

Entry = tuple[str, str, int | None, int | None]
"""Condition, prompt, seed, and the number that one of our own exports gives (else None)."""


class TrialNumbers:
    """Numbers trials so that conditions can be compared in pairs.

    A trial takes the number of the trial with the same latent, prompt and seed in an earlier condition. Where the
    seeds are others (the authors' meta-prompt runs draw new ones), trials of a latent and prompt pair in their order.
    """

    def __init__(self) -> None:
        self._next = 0
        self._prompts: dict[str, int] = {}
        self._places: dict[tuple[str, LatentKey, int], list[tuple[int, int | None]]] = {}
        self._used: dict[tuple[str, str], set[int]] = {}

    def numbers(self, target: str, latent: LatentKey, entries: Sequence[Entry], where: str) -> list[int]:
        """Return the numbers of a latent's trials in one file. Raises SteerbackError if a given number is taken."""
        found: list[int | None] = [None] * len(entries)
        for i, (condition, prompt, seed, given) in enumerate(entries):
            used = self._used.setdefault((target, condition), set())
            if given is not None:
                if given in used:
                    raise SteerbackError(
                        f"{where}: trial {given} of {target}, {condition} is in an earlier file as well, with another "
                        "content; import the files of one run at a time, or give them a --condition each"
                    )
                found[i] = given
                self._next = max(self._next, given + 1)
            elif seed is not None:
                known = self._places.get(self._place(target, latent, prompt), [])
                found[i] = next((n for n, s in known if s == seed and n not in used), None)
            if (number := found[i]) is not None:
                used.add(number)
        for i, (condition, prompt, seed, _) in enumerate(entries):
            if found[i] is None:
                found[i] = self._in_order(target, latent, condition, prompt, seed)
        return [n for n in found if n is not None]

    def _in_order(self, target: str, latent: LatentKey, condition: str, prompt: str, seed: int | None) -> int:
        """The first number of this latent and prompt that the condition has not used, or a new one."""
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
