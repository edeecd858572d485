"""Key/value caches in which each row has its own position, and the attention over them.

Decoding uses fixed slots. Each row writes its next token at its own position, without left padding. On a CPU, keys and
values are stored in pages, and attention multiplies each page with fixed shapes. Masked positions and unread pages add
exact zeros, so a row's numbers do not depend on its neighbours. This module does not know about steering, sampling or
requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache

ATTENTION = "steerback"
Pair = tuple[Tensor, Tensor]
"""Keys and values."""


class PromptCache(Cache):  # type: ignore[misc]
    """Keys and values (rows, heads, length, dim) of a batch of prompts that start at position 0."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kept: dict[int, Pair] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object) -> Pair:
        self.kept[layer_idx] = (key_states, value_states)
        return key_states, value_states


@dataclass(frozen=True, slots=True)
class Pages:
    """Pages in use: keys (entry, head, dim, position) and values (entry, head, position, dim) of one layer.

    The first entries are the first pages of all rows, in order. `row` and `place` (row * `count` + page) are those of
    each entry, and `count` is the number of pages of the longest row. `later` lists the other entries by page.
    """

    keys: Tensor
    values: Tensor
    count: int
    row: Tensor
    place: Tensor
    later: Tensor

    def scores(self, query: Tensor) -> Tensor:
        """Return products of queries (rows, G, N, D) with the keys, (rows, G, N, L): 0 where a row has no page."""
        products = query.index_select(0, self.row) @ self.keys
        spread = products.new_zeros(len(query) * self.count, *products.shape[1:]).index_copy_(0, self.place, products)
        return spread.view(len(query), self.count, *products.shape[1:]).permute(0, 2, 3, 1, 4).flatten(3)

    def weighted(self, weights: Tensor) -> Tensor:
        """Return sums (rows, G, N, D) of the values with weights (rows, G, N, L), added in the order of the pages."""
        spread = weights.view(*weights.shape[:3], self.count, -1).permute(0, 3, 1, 2, 4).flatten(0, 1)
        parts = spread.index_select(0, self.place) @ self.values
        further = parts.index_select(0, self.later)
        return parts[: len(weights)].index_add_(0, self.row.index_select(0, self.later), further)


class PagedCache(Cache):  # type: ignore[misc]
    """Paged cache for `rows` slots. The pages that rows have reached are adjacent, and attention reads no others.

    `seek` sets each row's next position. All other positions are masked.
    """

    def __init__(self, rows: int, length: int, page: int) -> None:
        super().__init__(layers=[])
        self.rows, self.page = rows, page
        self._most = rows * -(-length // page)
        self._places = [(row, 0) for row in range(rows)]  # row and page of each entry
        self._entries = {place: entry for entry, place in enumerate(self._places)}
        self._kept: dict[int, Pair] = {}
        every = torch.arange(rows)
        self._used: tuple[int, Tensor, Tensor, Tensor] = (1, every, every, every[:0])  # as in `Pages`
        self._next: Pair | None = None  # index of each row's next position in keys and values

    @property
    def seen(self) -> int:
        """Number of positions that the next attention reads."""
        return self.page * self._used[0]

    def admit(self, prompts: PromptCache, rows: list[int], slots: list[int]) -> None:
        """Copy rows of a prompt batch into slots."""
        for layer, (keys, values) in prompts.kept.items():
            stored = self._kept[layer] if layer in self._kept else self._make(layer, keys)
            for first in range(0, keys.shape[2], self.page):
                part = slice(first, first + self.page)
                size, entries = keys[:, :, part].shape[2], [self._entry((slot, first // self.page)) for slot in slots]
                stored[0][entries, :, :, :size] = keys[rows, :, part].transpose(-1, -2)
                stored[1][entries, :, :size] = values[rows, :, part]

    def seek(self, positions: Tensor, reached: Mapping[int, int]) -> None:
        """Set the next write position of each row, positions (rows,); `reached` contains those of the active rows."""
        for place in self._places[self.rows :]:
            if reached.get(place[0], 0) < place[1] * self.page:
                self._drop(place)
        entries = [self._entry((row, reached.get(row, 0) // self.page)) for row in range(self.rows)]
        row, page = torch.tensor(self._places).unbind(1)
        count = int(page.max()) + 1
        self._used = (count, row, row * count + page, page[self.rows :].argsort(stable=True) + self.rows)
        _, heads, dim, _ = next(iter(self._kept.values()))[0].shape  # all layers have the same shape
        head, offset = torch.tensor(entries)[:, None] * heads + torch.arange(heads), (positions % self.page)[:, None]
        inner = (head[..., None] * dim + torch.arange(dim)) * self.page + offset[..., None]
        self._next = (inner.flatten(), (head * self.page + offset).flatten())

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Pages, Pages]:
        """Write one token per row; return the pages in use, twice: as keys and as values."""
        keys, values = self._kept[layer_idx]
        assert self._next is not None
        keys.view(-1).scatter_(0, self._next[0], key_states.flatten())
        values.flatten(0, 2).index_copy_(0, self._next[1], value_states.flatten(0, 2))
        size = len(self._places)
        pages = Pages(keys[:size], values[:size], *self._used)
        return pages, pages

    def _entry(self, place: tuple[int, int]) -> int:
        """Return the entry of a row's page, a new one if it has none."""
        if place not in self._entries:
            self._entries[place] = len(self._places)
            self._places.append(place)
        return self._entries[place]

    def _drop(self, place: tuple[int, int]) -> None:
        """Remove a row's page; the last entry takes its place."""
        hole, last = self._entries.pop(place), self._places.pop()
        if last != place:
            for stored in (tensor for pair in self._kept.values() for tensor in pair):
                stored[hole] = stored[len(self._places)]
            self._places[hole], self._entries[last] = last, hole

    def _make(self, layer: int, like: Tensor) -> Pair:
        # Keys are stored with positions innermost: on a CPU this makes the product with a query a third faster. Unused
        # entries are zero, because a masked position is still multiplied by 0, and NaN * 0 is NaN.
        _, heads, _, dim = like.shape
        self._kept[layer] = (
            like.new_zeros(self._most, heads, dim, self.page),
            like.new_zeros(self._most, heads, self.page, dim),
        )
        return self._kept[layer]


class FlatCache(Cache):  # type: ignore[misc]
    """Cache without pages, (row, position, head, dim), for GPUs, where each kernel launch is costly."""

    def __init__(self, rows: int, length: int) -> None:
        super().__init__(layers=[])
        self.rows, self.length = rows, -(-length // 64) * 64
        self.seen = 64
        self._kept: dict[int, Pair] = {}
        self._index: Tensor | None = None

    def admit(self, prompts: PromptCache, rows: list[int], slots: list[int]) -> None:
        """Copy rows of a prompt batch into slots."""
        for layer, fresh in prompts.kept.items():
            if layer not in self._kept:
                _, heads, _, dim = fresh[0].shape
                shape = (self.rows, self.length, heads, dim)
                self._kept[layer] = (fresh[0].new_zeros(shape), fresh[0].new_zeros(shape))
            for stored, new in zip(self._kept[layer], fresh, strict=True):
                stored[slots, : new.shape[2]] = new[rows].transpose(1, 2)

    def seek(self, positions: Tensor, reached: Mapping[int, int]) -> None:
        """Set the next write position of each row, positions (rows,); `reached` contains those of the active rows."""
        self._index = torch.arange(self.rows, device=positions.device) * self.length + positions
        self.seen = min(-(-(max(reached.values()) + 1) // 64) * 64, self.length)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object) -> Pair:
        """Write one token per row; return keys and values (rows, heads, seen, dim)."""
        assert self._index is not None
        for stored, new in zip(self._kept[layer_idx], (key_states, value_states), strict=True):
            stored.flatten(0, 1).index_copy_(0, self._index, new[:, :, 0])
        keys, values = (stored[:, : self.seen].transpose(1, 2) for stored in self._kept[layer_idx])
        return keys, values


def attention(
    module: object,
    query: Tensor,
    key: Tensor | Pages,
    value: Tensor | Pages,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Compute attention with the interface of transformers: query (B, H, Q, D) -> (B, Q, H, D).

    key and value are (B, G, L, D), or pages while decoding (Q = 1); G divides H. The mask is additive, (B or 1, 1, Q,
    L). Uses one fused operation if the keys are contiguous and Q is 1.
    """
    rows, heads, length, dim = query.shape
    groups = (key.keys if isinstance(key, Pages) else key).shape[1]
    folded = query.reshape(rows, groups, heads // groups * length, dim)
    scaling = dim**-0.5 if scaling is None else scaling
    if isinstance(key, Tensor) and isinstance(value, Tensor) and length == 1 and softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            folded, key, value, attn_mask=attention_mask, scale=scaling
        )
        return out.reshape(rows, 1, heads, dim), None
    folded = folded * scaling
    scores = key.scores(folded) if isinstance(key, Pages) else folded @ key.transpose(-1, -2)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores.view(rows, heads, length, -1) + attention_mask
        scores = scores.view(rows, groups, heads // groups * length, -1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    out = value.weighted(weights) if isinstance(value, Pages) else weights @ value
    return out.view(rows, heads, length, dim).transpose(1, 2), None


KeyValues = PromptCache | PagedCache | FlatCache


AttentionInterface.register(ATTENTION, attention)


def mask(query_positions: Tensor, length: int, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Return the additive causal mask (B, 1, Q, length) for queries at positions (B, Q); `window` is optional."""
    at = torch.arange(length, device=query_positions.device)
    before = query_positions[..., None] - at
    allowed = before >= 0
    if window is not None:
        allowed = allowed & (before < window)
    lowest = torch.finfo(dtype).min
    return torch.zeros(allowed.shape, dtype=dtype, device=at.device).masked_fill_(~allowed, lowest)[:, None]
