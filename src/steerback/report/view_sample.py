"""Sample of trials on the viewer's page, and their texts in compressed chunks of limited total size.

Rows are read in batches, so memory does not grow with the number of responses.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from steerback.report import pages
from steerback.report.view_trials import Group, Light, ShownRun, TableRow, details
from steerback.store.processes import collector_paused, second_process
from steerback.store.run import Run

CHUNK = 25
SEED = 42
MANY = 1000
"""Number of sampled trials from which a second process for their chunks is worth its start."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Trials on the page as (number of the run, trial key), and the total number they were drawn from."""

    keys: Sequence[tuple[int, str]]
    total: int
    why: str = ""


@collector_paused()
def draw(runs: Sequence[ShownRun], stages: Sequence[str], limit: int, why: str) -> Sample:
    """Draw at most `limit` trials of the runs, or take all.

    Trials of one latent, prompt and seed stay together. Each target and latent contributes the same share of its
    groups. Trials with activations recorded for the page come first, and so do forks and their parents.
    """
    groups: dict[Group, list[tuple[int, str]]] = defaultdict(list)
    order: dict[tuple[int, str], int] = {}
    for number, shown in enumerate(runs):
        for key, group in shown.run.ledger.groups(stages):
            groups[group].append((number, key))
            order[number, key] = len(order)
    if len(order) <= limit:
        return Sample(list(order), len(order))
    strata: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for group in groups:
        strata[group[:2]].append(group)
    generator = random.Random(SEED)
    first = [{*r.readings, *_of_forks(r)} for r in runs]
    read = {group for group, members in groups.items() if any(key in first[n] for n, key in members)}
    ranked: list[tuple[float, Group]] = [(-1.0, group) for group in read]
    for members in strata.values():
        generator.shuffle(members)
        ranked += [
            ((n + generator.random()) / len(members), group) for n, group in enumerate(members) if group not in read
        ]
    chosen: list[tuple[int, str]] = []
    for _, group in sorted(ranked):
        if len(chosen) + len(groups[group]) > limit:
            break
        chosen += groups[group]
    return Sample(sorted(chosen, key=order.__getitem__), len(order), why)


def _of_forks(shown: ShownRun) -> Iterator[str]:
    """Yield the keys of a run's forked trials and of their continuations."""
    for forked in shown.forks:
        yield forked.fork.parent
        yield from (row.trial.key for arm in forked.arms for row in arm.rows)


def sampled(
    runs: Sequence[ShownRun], stages: Sequence[str], limit: int, room: int
) -> tuple[Sample, dict[str, object], list[str]]:
    """Return a sample, its table columns and its chunks; the sample shrinks until the chunks fit into `room` bytes."""
    why = most(limit)
    sample = runs[0].sample if len(runs) == 1 else None
    while True:
        sample = sample or draw(runs, stages, limit, why)
        entries, chunks = _chunks(runs, sample.keys, room)
        fits = _fitting(chunks[: len(sample.keys) // CHUNK], room)
        if fits is None:
            light = Light()
            for entry in entries:
                light.add(entry)
            return sample, light.columns(), chunks
        limit = max(min(int(fits * CHUNK * 0.9), int(limit * 0.9)), 1)
        sample, why = None, f"the page holds at most {room / 1e6:.0f} MB of responses"


def most(limit: int) -> str:
    """Return the reason for a sample of at most `limit` trials."""
    return f"the page holds at most {limit:,} trials"


def _fitting(chunks: Sequence[str], room: int) -> int | None:
    """Return the number of chunks that fit into `room` bytes, or None if all fit."""
    size = 0
    for number, chunk in enumerate(chunks):
        size += len(chunk)
        if size > room:
            return number
    return None


def _chunks(runs: Sequence[ShownRun], keys: Sequence[tuple[int, str]], room: int) -> tuple[list[TableRow], list[str]]:
    """Return the rows and chunks of trials, up to `room` bytes or a little more; two processes share many trials."""
    if len(keys) < MANY:
        return _half(runs, keys, room)
    middle = len(keys) // 2 // CHUNK * CHUNK

    def second() -> tuple[list[TableRow], list[str]]:
        with ExitStack() as stack:
            opened = [replace(shown, run=stack.enter_context(Run.read(shown.run.folder))) for shown in runs]
            return _half(opened, keys[middle:], room)

    rest = second_process(second)
    (entries, chunks), (more, others) = _half(runs, keys[:middle], room), rest()
    return entries + more, chunks + others


def _half(runs: Sequence[ShownRun], keys: Sequence[tuple[int, str]], room: int) -> tuple[list[TableRow], list[str]]:
    """Return the rows and chunks of trials. Stops when the chunks exceed `room` bytes."""
    entries: list[TableRow] = []
    chunks: list[str] = []
    pending: list[dict[str, object]] = []
    size = 0
    for entry, detail in details(runs, keys):
        entries.append(entry)
        pending.append(detail)
        if len(pending) == CHUNK:
            chunks.append(pages.packed(pending))
            size, pending = size + len(chunks[-1]), []
            if size > room:
                break
    return entries, [*chunks, *([pages.packed(pending)] if pending else [])]
