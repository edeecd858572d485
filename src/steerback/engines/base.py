"""What any engine must give; it knows nothing of judges, ledgers or experiments."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from steerback.records import Completion, Request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Pooling = Literal["max", "mean", "active"]
"""Over tokens: the largest activation, the mean one, or the share of tokens at which a latent is active."""


@runtime_checkable
class Engine(Protocol):
    """Generates steered responses and reads activations for one target.

    `fingerprint` hashes everything but the request that shapes a completion (model, revision, SAE, engine and its
    version, dtype, batch shape, threads, version of the steering arithmetic); completions are cached under it.
    `describe()` is the human-readable, JSON-able form that goes into the manifest.
    """

    @property
    def fingerprint(self) -> str: ...

    def describe(self) -> dict[str, object]: ...

    def generate(self, requests: Sequence[Request]) -> AsyncIterator[tuple[str, Completion]]:
        """Yields (request key, completion) in completion order.

        Raises SteerbackError before anything is generated if a request is impossible (latent out of range, prompt
        too long, ...), naming the field.
        """
        ...

    def activations(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        latents: Sequence[int] | None = None,
        include_prompt: bool = False,
        pool: Pooling = "max",
    ) -> NDArray[np.float32]:
        """Unsteered SAE activations at the read layer, pooled over the response tokens.

        Special and chat-template tokens are excluded; `include_prompt` pools over the user's words as well.
        Returns shape (n texts, n latents), all latents of the SAE where `latents` is None.
        """
        ...

    def decoder_norms(self) -> NDArray[np.float32]:
        """L2 norm of each latent's decoder direction, shape (n latents of the SAE,)."""
        ...

    def token_ends(self, completion: Completion) -> list[int]:
        """Character of `completion.text` at which each of its tokens ends, never decreasing, shape (n tokens,)."""
        ...

    def close(self) -> None: ...
