"""What the hook points of vLLM's model runners have in common; where they differ is in `runner_v1` and `runner_v2`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steerback.engines.vllm.slots import Arrival, Slots, Step


def token_room(runner: Any) -> int:
    """Above the most tokens, padding included, that one forward pass can have."""
    return max(int(runner.max_num_tokens), int(runner.compilation_config.max_cudagraph_capture_size or 0)) + 8


def follow(runner: Any, slots: Slots, name: str, batch: Callable[..., Step]) -> None:
    """Keeps `slots` informed: what arrives and what a step computes, before its forward pass; its end, after it.

    `name` is the method that gets a step's inputs ready; `batch(result, *its arguments)` says what it made ready.
    """
    prepare, dummy, execute = getattr(runner, name), runner._dummy_run, runner.execute_model

    def prepare_inputs(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        slots.admit(arrivals(scheduler_output))
        slots.preemptions += len(scheduler_output.preempted_req_ids or ())
        out = prepare(scheduler_output, *args, **kwargs)
        slots.step(batch(out, *args, **kwargs))
        return out

    def dummy_run(*args: Any, **kwargs: Any) -> Any:
        slots.idle()
        return dummy(*args, **kwargs)

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        out = execute(*args, **kwargs)
        slots.after()
        return out

    setattr(runner, name, prepare_inputs)
    runner._dummy_run, runner.execute_model = dummy_run, execute_model


def arrivals(scheduler_output: Any) -> list[Arrival]:
    """The requests that a step brings. A preempted one comes again where the runner forgot it; `slots` did not."""
    return [
        Arrival(
            request=new.req_id,
            args=None if new.sampling_params is None else new.sampling_params.extra_args,
            prompt_tokens=len(new.prompt_token_ids or ()),
            cached=new.num_computed_tokens,
        )
        for new in scheduler_output.scheduled_new_reqs
    ]
