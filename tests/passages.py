"""Texts of the organism's corpus."""

from __future__ import annotations

import random

from steerback.organism.corpus import howtos, passage, subjects


def passages(n: int, seed: int) -> list[str]:
    """Return `n` passages of four sentences about topics drawn at random."""
    rng, keys = random.Random(seed), [t.key for t in (*howtos("discovery"), *subjects())]
    return [" ".join(passage(rng, rng.choice(keys), 4)) for _ in range(n)]
