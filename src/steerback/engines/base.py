"""What any engine must give; it knows nothing of judges, ledgers or experiments."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from steerback.records import Completion, Request

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Pooling = Literal["max", "none"]


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
    ) -> NDArray[np.float32]:
        """Unsteered SAE activations at the read layer, max-pooled over the response tokens.

        Special and chat-template tokens are excluded; `include_prompt` pools over the user's words as well.
        Returns shape (n texts, n latents), all latents of the SAE where `latents` is None.
        """
        ...

    def close(self) -> None: ...
