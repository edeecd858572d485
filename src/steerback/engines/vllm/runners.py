"""Hook points in vLLM's model runners, which report new requests and each step to the worker's `Slots`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import vllm
from numpy.typing import NDArray
from torch import nn

from steerback.engines.vllm.slots import Arrival, EngineStep, Slots
from steerback.errors import SteerbackError

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput


class ModelRunner(Protocol):
    """The parts of vLLM's model runners that this package uses; only the first generation has `input_batch`."""

    max_num_tokens: int
    compilation_config: Any
    model_config: Any
    input_batch: Any
    model_memory_usage: int
    execute_model: Callable[..., object]
    _dummy_run: Callable[..., object]

    def get_model(self) -> nn.Module: ...


class StepInputs(Protocol):
    """Inputs of a step, as the second generation prepares them."""

    req_ids: Sequence[str]
    num_scheduled_tokens: NDArray[Any]
    num_computed_tokens_np: NDArray[Any]


@dataclass(frozen=True, slots=True)
class Generation:
    """A generation of vLLM's model runner.

    `prepare` names the method that prepares a step's inputs, `step(runner, result, *its arguments)` describes the step,
    and `needs` lists the attributes that identify the generation.
    """

    name: str
    prepare: str
    step: Callable[..., EngineStep]
    needs: tuple[str, ...]


def _first_step(
    runner: ModelRunner, _made: object, num_scheduled_tokens: NDArray[Any], *_: object, **__: object
) -> EngineStep:
    state, n = runner.input_batch, len(num_scheduled_tokens)
    return EngineStep(state.req_ids[:n], num_scheduled_tokens, state.num_computed_tokens_cpu[:n])


def _second_step(_runner: ModelRunner, made: StepInputs, *_: object, **__: object) -> EngineStep:
    return EngineStep(made.req_ids, made.num_scheduled_tokens, made.num_computed_tokens_np)


COMMON = ("_dummy_run", "execute_model")
GENERATIONS = (
    Generation("v2", "prepare_inputs", _second_step, ("prepare_inputs", *COMMON, "req_states")),  # GPUs
    Generation("v1", "_prepare_inputs", _first_step, ("_prepare_inputs", *COMMON, "input_batch")),  # CPUs, old releases
)


def generation(runner: object) -> Generation:
    """Return the generation of a model runner; raise SteerbackError if its hook points are unknown."""
    for known in GENERATIONS:
        if all(hasattr(runner, name) for name in known.needs):
            return known
    points = ", or ".join(", ".join(known.needs) for known in GENERATIONS)
    raise SteerbackError(
        f"vLLM {vllm.__version__}: its model runner {type(runner).__name__} has none of the known hook points "
        f"({points}); use --engine transformers"
    )


def token_room(runner: ModelRunner) -> int:
    """Return an upper bound on the tokens of one forward pass, with padding."""
    return max(int(runner.max_num_tokens), int(runner.compilation_config.max_cudagraph_capture_size or 0)) + 8


def follow(runner: ModelRunner, slots: Slots) -> None:
    """Report new requests and each step to `slots` before the forward pass, and again after its launch."""
    kind = generation(runner)
    prepare, dummy, execute = getattr(runner, kind.prepare), runner._dummy_run, runner.execute_model

    def prepare_inputs(scheduler_output: SchedulerOutput, *args: object, **kwargs: object) -> object:
        slots.admit(arrivals(scheduler_output))
        slots.preemptions += len(scheduler_output.preempted_req_ids or ())
        made = prepare(scheduler_output, *args, **kwargs)
        slots.step(kind.step(runner, made, *args, **kwargs))
        return made

    def dummy_run(*args: object, **kwargs: object) -> object:
        slots.idle()
        return dummy(*args, **kwargs)

    def execute_model(*args: object, **kwargs: object) -> object:
        result = execute(*args, **kwargs)
        slots.after()
        return result

    setattr(runner, kind.prepare, prepare_inputs)
    runner._dummy_run, runner.execute_model = dummy_run, execute_model


def arrivals(scheduler_output: SchedulerOutput) -> list[Arrival]:
    """Return the new requests of a step."""
    return [
        Arrival(
            request=new.req_id,
            args=None if new.sampling_params is None else new.sampling_params.extra_args,
            prompt_tokens=len(new.prompt_token_ids or ()),
            cached=new.num_computed_tokens,
        )
        for new in scheduler_output.scheduled_new_reqs
    ]
