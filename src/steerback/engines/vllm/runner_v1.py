"""Hook points of vLLM's first model runner (CPU builds, older releases, and models the second does not serve yet)."""

from __future__ import annotations

from typing import Any

from steerback.engines.vllm.hooks import follow
from steerback.engines.vllm.slots import Slots, Step

NAME = "v1"
NEEDS = ("_prepare_inputs", "_dummy_run", "execute_model", "input_batch")
"""What a runner of this generation has."""


def hook(runner: Any, slots: Slots) -> None:
    """Keeps `slots` informed of what this runner does."""

    def batch(_: Any, num_scheduled_tokens: Any, *__: Any, **___: Any) -> Step:
        state, n = runner.input_batch, len(num_scheduled_tokens)
        return Step(state.req_ids[:n], num_scheduled_tokens, state.num_computed_tokens_cpu[:n])

    follow(runner, slots, "_prepare_inputs", batch)
