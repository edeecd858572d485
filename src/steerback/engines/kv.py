"""Key/value storage with a position of its own for every row, and the attention that reads it.

Decoding works on fixed slots: keys and values lie in pages (page, row, head, position, dim), a row's next token goes
to its own position, and no row is padded on the left. Attention multiplies page by page in the same shapes whatever the
longest row is, and masked positions add exact zeros, so that a row's numbers do not depend on its neighbours.
Knows nothing of steering, sampling or requests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache

ATTENTION = "steerback"


class PromptCache(Cache):  # type: ignore[misc]
    """Collects keys and values (rows, heads, length, dim) of a batch of prompts that start at position 0."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        self.kept[layer_idx] = (key_states, value_states)
        return key_states, value_states


class PagedCache(Cache):  # type: ignore[misc]
    """Keys and values of `rows` slots; `positions` says where each row writes next."""

    def __init__(self, rows: int, pages: int, page: int) -> None:
        super().__init__(layers=[])
        self.rows, self.pages, self.page = rows, pages, page
        self.used = 1  # pages that the longest live row needs; what lies beyond is masked for everybody
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._index: tuple[Tensor, Tensor, Tensor] | None = None

    def admit(self, prompts: PromptCache, rows: list[int], slots: list[int]) -> None:
        """Copies rows of a prompt batch into slots."""
        for layer, fresh in prompts.kept.items():
            if layer not in self._kept:
                self._kept[layer] = (self._room(fresh[0]), self._room(fresh[1]))
            for stored, new in zip(self._kept[layer], fresh, strict=True):
                for first in range(0, new.shape[2], self.page):
                    part = new[rows, :, first : first + self.page]
                    stored[first // self.page][slots, :, : part.shape[2]] = part

    def seek(self, positions: Tensor) -> None:
        """Where the next `update` writes: positions (rows,)."""
        row = torch.arange(self.rows, device=positions.device)
        self._index = (positions // self.page, row, positions % self.page)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        """Writes one token per row; returns the used pages of keys and of values."""
        assert self._index is not None
        page, row, offset = self._index
        keys, values = self._kept[layer_idx]
        keys[page, row, :, offset] = key_states[:, :, 0]
        values[page, row, :, offset] = value_states[:, :, 0]
        return keys[: self.used], values[: self.used]

    def _room(self, like: Tensor) -> Tensor:
        # Zeros, not garbage: a masked position still meets a multiplication by 0, which NaN would survive.
        return like.new_zeros(self.pages, self.rows, like.shape[1], self.page, like.shape[3])


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in the interface of transformers: query (B, H, Q, D) -> (B, Q, H, D).

    key and value are (B, G, L, D) for prompts, or pages (n, B, G, page, D) while decoding (Q = 1); G divides H.
    The mask is additive, (B or 1, 1, Q, L).
    """
    rows, heads, length, dim = query.shape
    groups = key.shape[-3]
    folded = query.reshape(rows, groups, heads // groups * length, dim)
    folded = folded * (dim**-0.5 if scaling is None else scaling)
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


AttentionInterface.register(ATTENTION, attention)


def mask(query_positions: Tensor, length: int, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """Additive causal mask (B, 1, Q, length) for queries at positions (B, Q); `window` is a sliding window."""
    at = torch.arange(length, device=query_positions.device)
    before = query_positions[..., None] - at
    allowed = before >= 0
    if window is not None:
        allowed = allowed & (before < window)
    lowest = torch.finfo(dtype).min
    return torch.zeros(allowed.shape, dtype=dtype, device=at.device).masked_fill_(~allowed, lowest)[:, None]
