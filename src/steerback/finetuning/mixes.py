"""Mixes of self-corrections and normal answers at exact ratios, each split into training and validation examples.

Mixes are nested: of each kind, a larger mix contains all examples of a smaller one, so that mixes differ as little as
possible.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from steerback.errors import SteerbackError
from steerback.finetuning.segments import Row, read_rows, write_rows
from steerback.records import digest
from steerback.store.files import make_folder, write_json

RATIOS = (10, 20, 30, 40, 50, 60, 70, 80, 90)
VALIDATION = 0.05
POOLS = ("self_correction", "normal")
"""File names of the two pools."""


@dataclass(frozen=True, slots=True)
class Mix:
    """A mix: its percent of self-corrections and its rows."""

    percent: int
    training: tuple[Row, ...]
    validation: tuple[Row, ...]
    corrections: int
    """Number of self-corrections in both parts together."""

    @property
    def name(self) -> str:
        """Name of the mix, also of its folder."""
        return f"mix-{self.percent}"

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.training) + len(self.validation)


def largest(percent: int, corrections: int, normal: int) -> int:
    """Return the largest size of a mix with exactly `percent` self-corrections from pools of these sizes."""
    if not 0 <= percent <= 100:
        raise SteerbackError(f"a mix of {percent} % self-corrections is impossible; give percents from 0 to 100")
    step = 100 // math.gcd(percent, 100)
    bounds = [corrections * 100 // percent if percent else math.inf]
    bounds.append(normal * 100 // (100 - percent) if percent < 100 else math.inf)
    return int(min(bounds)) // step * step


def make_mixes(
    corrections: Sequence[Row],
    normal: Sequence[Row],
    ratios: Sequence[int] = RATIOS,
    size: int | None = None,
    seed: int = 42,
) -> tuple[list[Mix], list[str]]:
    """Return the mixes and notes about their sizes.

    `size` None takes the largest size that all mixes can have. A mix that cannot reach `size` gets its largest size.
    Raises SteerbackError if a mix would be empty.
    """
    if len(set(ratios)) != len(ratios) or not ratios:
        raise SteerbackError("mixes: give at least one percent, and each percent once")
    most = {percent: largest(percent, len(corrections), len(normal)) for percent in ratios}
    # all ratios are exact at multiples of this size
    step = math.lcm(*(100 // math.gcd(percent, 100) for percent in ratios))
    common = min(most.values()) // step * step
    pools = []  # training and validation parts, equal for all mixes
    for n, pool in enumerate((corrections, normal)):
        order = list(pool)
        random.Random(seed + n).shuffle(order)
        held = round(len(order) * VALIDATION)
        pools.append((order[held:], order[:held]))
    mixes, notes = [], []
    even = None if size is None else size // step * step
    if even and even != size:
        notes.append(f"{even} examples instead of {size}, so that every ratio is exact at one size")
    for percent in ratios:
        wanted = common if size is None else even or size
        unit = 100 // math.gcd(percent, 100)  # sizes that allow the exact ratio are multiples of this
        total = min(wanted // unit * unit, most[percent])
        if total == 0:
            raise SteerbackError(
                f"a mix of {percent} % would be empty: the pool has {len(corrections)} self-corrections and "
                f"{len(normal)} normal answers, and the exact ratio needs at least {unit} examples"
            )
        if total < wanted:
            notes.append(
                f"mix {percent} %: {total} examples instead of {wanted}, the most for its pool and exact ratio"
            )
        taken = (total * percent // 100, total - total * percent // 100)
        parts: tuple[list[Row], list[Row]] = ([], [])
        for (training, validation), n in zip(pools, taken, strict=True):
            held = round(n * VALIDATION)
            parts[0].extend(training[: n - held])
            parts[1].extend(validation[:held])
        for part in parts:
            random.Random(seed).shuffle(part)
        mixes.append(Mix(percent, tuple(parts[0]), tuple(parts[1]), taken[0]))
    if len({m.size for m in mixes}) > 1:
        notes.append("the mixes differ in size, so adapters trained on them differ in more than the ratio")
    return mixes, notes


def write_mixes(folder: Path, mixes: Sequence[Mix], notes: Sequence[str], seed: int) -> Path:
    """Write mix-N/train.jsonl, mix-N/validation.jsonl, and mixes.json (returned) with sizes and hashes."""
    for mix in mixes:
        make_folder(folder / mix.name)
        write_rows(folder / mix.name / "train.jsonl", mix.training)
        write_rows(folder / mix.name / "validation.jsonl", mix.validation)
    listed = [
        {
            "name": mix.name,
            "percent": mix.percent,
            "self_corrections": mix.corrections,
            "size": mix.size,
            "training": len(mix.training),
            "validation": len(mix.validation),
            "hash": hash_rows(mix.training, mix.validation),
        }
        for mix in mixes
    ]
    return write_json(folder / "mixes.json", {"mixes": listed, "notes": list(notes), "seed": seed})


def hash_rows(*parts: Sequence[Row]) -> str:
    """Hash the content of training data: segments and labels in order."""
    return digest([[[(s.text, s.train) for s in row] for row in part] for part in parts])


def read_pools(folder: Path) -> tuple[list[Row], list[Row]]:
    """Return the self-corrections and normal answers of a data folder."""
    corrections, normal = (read_rows(folder / f"{name}.jsonl") for name in POOLS)
    return corrections, normal
