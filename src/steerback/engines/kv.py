"""Key/value caches in which each row has its own position, and the attention over them.

Decoding uses fixed slots. Keys and values are stored in pages (page, row, head, position, dim); each row writes its
next token at its own position, without left padding. Attention multiplies page by page with fixed shapes, and masked
positions add exact zeros. A row's numbers therefore do not depend on its neighbours. This module does not know about
steering, sampling or requests.
"""

from __future__ import annotations

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


class PagedCache(Cache):  # type: ignore[misc]
    """Paged cache for `rows` slots: keys (page, row, head, dim, position), values (page, row, head, position, dim).

    `seek` sets each row's next position and the number of pages that attention reads. All other positions are masked.
    """

    def __init__(self, rows: int, length: int, page: int) -> None:
        super().__init__(layers=[])
        self.rows, self.page = rows, page
        self.pages = -(-length // page)
        self._used = 1
        self._kept: dict[int, Pair] = {}
        self._index: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def seen(self) -> int:
        """Number of positions that the next attention reads."""
        return self._used * self.page

    def admit(self, prompts: PromptCache, rows: list[int], slots: list[int]) -> None:
        """Copy rows of a prompt batch into slots."""
        for layer, (keys, values) in prompts.kept.items():
            stored = self._kept[layer] if layer in self._kept else self._make(layer, keys)
            for first in range(0, keys.shape[2], self.page):
                part = slice(first, first + self.page)
                size = keys[:, :, part].shape[2]
                stored[0][first // self.page][slots, :, :, :size] = keys[rows, :, part].transpose(-1, -2)
                stored[1][first // self.page][slots, :, :size] = values[rows, :, part]

    def seek(self, positions: Tensor, far: int) -> None:
        """Set the next write position of each row, positions (rows,); no active row holds more than `far` tokens."""
        row = torch.arange(self.rows, device=positions.device)
        self._index = (positions // self.page, row, positions % self.page)
        self._used = min(-(-far // self.page), self.pages)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object) -> Pair:
        """Write one token per row; return the pages in use, (n, rows, heads, page, dim)."""
        assert self._index is not None
        page, row, offset = self._index
        keys, values = self._kept[layer_idx]
        keys[page, row, :, :, offset] = key_states[:, :, 0]
        values[page, row, :, offset] = value_states[:, :, 0]
        return keys[: self._used].transpose(-1, -2), values[: self._used]

    def _make(self, layer: int, like: Tensor) -> Pair:
        # Keys are stored with positions innermost: on a CPU this makes the product with a query a third faster. Unused
        # entries are zero, because a masked position is still multiplied by 0, and NaN * 0 is NaN.
        _, heads, _, dim = like.shape
        self._kept[layer] = (
            like.new_zeros(self.pages, self.rows, heads, dim, self.page),
            like.new_zeros(self.pages, self.rows, heads, self.page, dim),
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

    def seek(self, positions: Tensor, far: int) -> None:
        """Set the next write position of each row, positions (rows,); no active row holds more than `far` tokens."""
        self._index = torch.arange(self.rows, device=positions.device) * self.length + positions
        self.seen = min(-(-far // 64) * 64, self.length)

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
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Compute attention with the interface of transformers: query (B, H, Q, D) -> (B, Q, H, D).

    key and value are (B, G, L, D), or pages (n, B, G, page, D) while decoding (Q = 1); G divides H. The mask is
    additive, (B or 1, 1, Q, L). Uses one fused operation if the keys are contiguous and Q is 1.
    """
    rows, heads, length, dim = query.shape
    groups = key.shape[-3]
    folded = query.reshape(rows, groups, heads // groups * length, dim)
    scaling = dim**-0.5 if scaling is None else scaling
    if key.ndim == 4 and length == 1 and softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            folded, key, value, attn_mask=attention_mask, scale=scaling
        )
        return out.reshape(rows, 1, heads, dim), None
    folded = folded * scaling
    pages = (key[None], value[None]) if key.ndim == 4 else (key, value)
    scores = torch.cat([folded @ page.transpose(-1, -2) for page in pages[0]], dim=-1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores.view(rows, heads, length, -1) + attention_mask
        scores = scores.view(rows, groups, heads // groups * length, -1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    size = pages[1].shape[-2]
    out = weights[..., :size] @ pages[1][0]
    for n in range(1, len(pages[1])):
        out = out + weights[..., n * size : (n + 1) * size] @ pages[1][n]
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
