"""Hook points of vLLM's first model runner (CPU builds, older releases, and models the second does not serve yet)."""

from __future__ import annotations

from typing import Any

from steerback.engines.vllm.slots import Arrival, Batch, Slots


def matches(runner: Any) -> bool:
    """Whether `runner` is of this generation."""
    return all(hasattr(runner, name) for name in ("_prepare_inputs", "_dummy_run", "execute_model", "input_batch"))


def token_room(runner: Any) -> int:
    """Above the most tokens, padding included, that one forward pass can have."""
    return max(int(runner.max_num_tokens), int(runner.compilation_config.max_cudagraph_capture_size or 0)) + 8


def hook(runner: Any, slots: Slots) -> None:
    """Keeps `slots` informed: what arrives and what a step computes, before its forward pass; its end, after it."""
    prepare, dummy, execute = runner._prepare_inputs, runner._dummy_run, runner.execute_model

    def prepare_inputs(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        slots.admit(arrivals(scheduler_output))
        slots.preemptions += len(scheduler_output.preempted_req_ids or ())
        out = prepare(scheduler_output, *args, **kwargs)
        state = runner.input_batch
        counts = args[0] if args else kwargs["num_scheduled_tokens"]
        n = len(counts)
        slots.step(Batch(state.req_ids[:n], counts, state.num_computed_tokens_cpu[:n]))
        return out

    def dummy_run(*args: Any, **kwargs: Any) -> Any:
        slots.idle()
        return dummy(*args, **kwargs)

    def execute_model(*args: Any, **kwargs: Any) -> Any:
        out = execute(*args, **kwargs)
        slots.after()
        return out

    runner._prepare_inputs, runner._dummy_run, runner.execute_model = prepare_inputs, dummy_run, execute_model


def arrivals(scheduler_output: Any) -> list[Arrival]:
    """The requests that a step brings; a preempted one keeps its state here and does not come again."""
    return [
        Arrival(
            request=new.req_id,
            args=None if new.sampling_params is None else new.sampling_params.extra_args,
            prompt_tokens=len(new.prompt_token_ids or ()),
            cached=new.num_computed_tokens,
        )
        for new in scheduler_output.scheduled_new_reqs
    ]
