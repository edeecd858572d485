"""The caches of keys and values hold each row at its own position."""

from __future__ import annotations

import pytest
import torch

from steerback.engines.kv import FlatCache, PagedCache, PromptCache


@pytest.mark.parametrize("paged", [True, False])
def test_caches_hold_each_row_at_its_own_position(paged: bool) -> None:
    cache = PagedCache(rows=3, length=7, page=4) if paged else FlatCache(rows=3, length=7)
    prompts = PromptCache()
    fresh = torch.arange(2 * 1 * 6 * 2.0).view(2, 1, 6, 2)
    prompts.update(fresh, fresh + 100, 0)
    cache.admit(prompts, [1, 0], [0, 2])
    cache.seek(torch.tensor([6, 0, 3]), far=7)
    new = -torch.ones(3, 1, 1, 2)
    keys, values = cache.update(new, new, 0)
    keys, values = (t.permute(1, 2, 0, 3, 4) if paged else t for t in (keys, values))
    flat = keys.reshape(3, cache.seen, 2)
    assert torch.equal(flat[0, :6], fresh[1, 0])
    assert (flat[0, 6] == -1).all()
    assert (flat[1, 0] == -1).all()
    assert torch.equal(flat[2, :3], fresh[0, 0, :3])
    assert (flat[2, 3] == -1).all()
    other = values.reshape(3, cache.seen, 2)
    assert torch.equal(other[0, :6], fresh[1, 0] + 100)
    assert torch.equal(other[2, :3], fresh[0, 0, :3] + 100)
