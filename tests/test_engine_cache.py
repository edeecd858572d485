"""The caches of keys and values hold each row at its own position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steerback.engines.kv import FlatCache, PagedCache, Pages, PromptCache


def flat(found: tuple[Pages, Pages] | tuple[Tensor, Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Return keys and values (rows, length, 2): products with unit vectors, and sums with one weight of 1."""
    keys, values = found
    if isinstance(keys, Tensor) or isinstance(values, Tensor):
        return keys[:, 0], values[:, 0]
    rows = int(keys.row.max()) + 1
    each = torch.eye(length).expand(rows, 1, -1, -1)
    return keys.scores(torch.eye(2).expand(rows, 1, 2, 2))[:, 0].mT, values.weighted(each)[:, 0]


@pytest.mark.parametrize("paged", [True, False])
def test_caches_hold_each_row_at_its_own_position(paged: bool) -> None:
    cache = PagedCache(rows=3, length=7, page=4) if paged else FlatCache(rows=3, length=7)
    prompts = PromptCache()
    fresh = torch.arange(2 * 1 * 6 * 2.0).view(2, 1, 6, 2)
    prompts.update(fresh, fresh + 100, 0)
    cache.admit(prompts, [1, 0], [0, 2])
    cache.seek(torch.tensor([6, 0, 3]), {0: 6, 2: 3})
    new = -torch.ones(3, 1, 1, 2)
    keys, values = flat(cache.update(new, new, 0), cache.seen)
    assert torch.equal(keys[0, :6], fresh[1, 0])
    assert (keys[0, 6] == -1).all()
    assert (keys[1, 0] == -1).all()
    assert torch.equal(keys[2, :3], fresh[0, 0, :3])
    assert (keys[2, 3] == -1).all()
    assert torch.equal(values[0, :6], fresh[1, 0] + 100)
    assert torch.equal(values[2, :3], fresh[0, 0, :3] + 100)


def test_only_pages_that_rows_have_reached_are_read_and_each_row_keeps_its_own() -> None:
    """Rows of different lengths, of which one ends and starts again: keys and values as in the cache without pages."""
    paged, whole = PagedCache(rows=4, length=20, page=4), FlatCache(rows=4, length=20)
    generator, steps = torch.Generator().manual_seed(0), [3, 9, 14, 6]
    prompts = PromptCache()
    prompts.update(torch.randn(4, 1, 14, 2, generator=generator), torch.randn(4, 1, 14, 2, generator=generator), 0)
    for cache in (paged, whole):
        cache.admit(prompts, [0, 1, 2, 3], [0, 1, 2, 3])
    for step in range(8):
        if step == 5:  # row 2 ends, and another request with a short prompt takes its place
            steps[2] = 2
        positions = {row: start + (step if row != 2 or step < 5 else step - 5) for row, start in enumerate(steps)}
        if step >= 4:
            del positions[3]  # this row has ended and idles
        at = torch.tensor([positions.get(row, 0) for row in range(4)])
        new = torch.randn(2, 4, 1, 1, 2, generator=generator)
        read = []
        for cache in (paged, whole):
            cache.seek(at, positions)
            read.append(flat(cache.update(new[0], new[1], 0), cache.seen))
        for row, position in positions.items():
            for ours, theirs in zip(*read, strict=True):
                assert torch.equal(ours[row, : position + 1], theirs[row, : position + 1])
        assert paged.seen == 4 * (max(positions.values()) // 4 + 1)
        entries = paged.update(new[0], new[1], 0)[0].keys
        assert len(entries) == sum(positions.get(row, 0) // 4 + 1 for row in range(4))
