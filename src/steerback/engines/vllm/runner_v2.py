"""Hook points of vLLM's second model runner (the default on GPUs today)."""

from __future__ import annotations

from typing import Any

from steerback.engines.vllm.hooks import follow
from steerback.engines.vllm.slots import Slots, Step

NAME = "v2"
NEEDS = ("prepare_inputs", "_dummy_run", "execute_model", "req_states")
"""What a runner of this generation has."""


def hook(runner: Any, slots: Slots) -> None:
    """Keeps `slots` informed of what this runner does."""

    def batch(made: Any, *_: Any, **__: Any) -> Step:
        return Step(made.req_ids, made.num_scheduled_tokens, made.num_computed_tokens_np)

    follow(runner, slots, "prepare_inputs", batch)
