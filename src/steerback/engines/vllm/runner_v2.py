"""Hook points of vLLM's second model runner (the default on GPUs today)."""

from __future__ import annotations

from typing import Any

from steerback.engines.vllm.runner_v1 import arrivals
from steerback.engines.vllm.slots import Batch, Slots


def matches(runner: Any) -> bool:
    """Whether `runner` is of this generation."""
    return all(hasattr(runner, name) for name in ("prepare_inputs", "_dummy_run", "execute_model", "req_states"))


def token_room(runner: Any) -> int:
    """Above the most tokens, padding included, that one forward pass can have."""
    return max(int(runner.max_num_tokens), int(runner.compilation_config.max_cudagraph_capture_size or 0)) + 8


def hook(runner: Any, slots: Slots) -> None:
    """Keeps `slots` informed: what arrives and what a step computes, before its forward pass; its end, after it."""
    prepare, dummy, execute = runner.prepare_inputs, runner._dummy_run, runner.execute_model

    def prepare_inputs(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        slots.admit(arrivals(scheduler_output))  # a preempted request comes again as a new one
        slots.preemptions += len(scheduler_output.preempted_req_ids or ())
        batch = prepare(scheduler_output, *args, **kwargs)
        slots.step(Batch(batch.req_ids, batch.num_scheduled_tokens, batch.num_computed_tokens_np))
        return batch

    def dummy_run(*args: Any, **kwargs: Any) -> Any:
        slots.idle()
        return dummy(*args, **kwargs)

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        out = execute(*args, **kwargs)
        slots.after()
        return out

    runner.prepare_inputs, runner._dummy_run, runner.execute_model = prepare_inputs, dummy_run, execute_model
