"""The vLLM engine of a target: checks requests, hands them to one or more vLLM engines, builds completions.

Everything a worker cannot do is refused here, before anything is sent, in one line that names the field. Knows
nothing of judges, ledgers or experiments.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from steerback.engines.checks import check_texts, checked
from steerback.engines.interventions import ARITHMETIC_VERSION, check, check_directions, check_layer
from steerback.engines.vllm import jobs
from steerback.engines.vllm.driver import Answer, Driver, VllmJob, positions_fed
from steerback.engines.vllm.loading import (
    TESTED,
    check_options,
    check_sizes,
    device_shares,
    engine_arguments,
    gpus,
    prepare,
    require_vllm,
    save_directions,
)
from steerback.engines.vllm.selftest import fault
from steerback.engines.vllm.settings import TableSettings, Ticket
from steerback.errors import VERSION, SteerbackError
from steerback.records import Completion, FinishReason, Intervention, Receipt, Request, digest

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from steerback.engines.base import Pooling
    from steerback.targets import Target

QUESTION = "What is the capital of France?"
"""What an engine that has just started is asked, steered and unsteered."""
WORKER = "steerback.engines.vllm.worker.SteeredWorker"


class VllmEngine:
    """Generates steered responses for one target on stock vLLM.

    batch_size: requests that run together (vLLM's `max_num_seqs`); replicas: engines, one GPU (or `tensor_parallel`
    GPUs) each; max_model_len: longest prompt + response, at most the model's context; layers: further layers that
    interventions and recordings may name; columns: distinct latents that may be clamped or recorded at one time;
    record_latents: how many latents a request of full length may record (shorter requests: more); options: further
    arguments of vLLM's engine. A target's LoRA adapter is served beside its model, not merged.
    """

    def __init__(
        self,
        target: Target,
        batch_size: int | None = None,
        *,
        replicas: int = 1,
        tensor_parallel: int = 1,
        max_model_len: int | None = None,
        directions: Mapping[str, Tensor] | None = None,
        layers: Sequence[int] = (),
        columns: int = 128,
        record_latents: int = 32,
        poolers: int = 128,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        version = require_vllm()
        check_options(options or {})
        check_sizes(1, replicas=replicas, tensor_parallel=tensor_parallel, batch_size=batch_size, poolers=poolers)
        check_sizes(1, max_model_len=max_model_len)
        check_sizes(0, columns=columns, record_latents=record_latents)
        if 0 < (there := gpus()) < (needed := replicas * tensor_parallel):
            raise SteerbackError(
                f"{replicas} replicas of {tensor_parallel} GPUs each need {needed}, and {there} are visible here; "
                "lower replicas or tensor_parallel"
            )
        self.target = target
        self._loaded = prepare(target, tuple(directions or ()))
        site = self._loaded.site
        check_directions(directions or {}, site.d_model)
        for layer in layers:
            check_layer("vLLM engine: layers", layer, site)
        length = min(max_model_len or 4096, self._loaded.context)
        rows = batch_size or (256 if gpus() else 64)
        self.settings = TableSettings(
            site=site,
            layers=tuple(sorted({site.steer_layer, site.sae_layer, site.read_layer, *layers})),
            rows=rows + max(8, rows // 8),
            columns=columns if target.sae is not None else 0,
            room=length * record_latents,
            recorders=rows + max(8, rows // 8),
            poolers=poolers if target.sae is not None else 0,
            length=length,
            arithmetic=ARITHMETIC_VERSION,
            version=VERSION,
            sae=None if target.sae is None else asdict(target.sae),
            directions=save_directions(directions or {}),
        )
        asked = len(self._loaded.prompter.tokens(QUESTION))
        jobs.check_length(self.settings, "the vLLM engine's test of itself", asked, 3)
        self._arguments = engine_arguments(target, length, rows, tensor_parallel) | dict(options or {})
        self._drivers = self._start(replicas, tensor_parallel)
        try:
            with _one_line():
                self._facts = self._describe(version, replicas, directions or {})
                self._self_test(version)
        except BaseException:
            self.close()
            raise

    # ---- start and end

    def _start(self, replicas: int, tensor_parallel: int) -> list[Driver]:
        adapter = None
        if self.target.adapter:
            from vllm.lora.request import LoRARequest

            adapter = LoRARequest("adapter", 1, self.target.adapter)
        drivers: list[Driver] = []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        try:
            for share in device_shares(replicas, tensor_parallel):
                if replicas > 1:
                    os.environ["CUDA_VISIBLE_DEVICES"] = share
                drivers.append(Driver(self.settings, self._launch, adapter))
        except BaseException as error:
            _close(drivers)
            if isinstance(error, (RuntimeError, ValueError, OSError, TypeError)):
                reason = " ".join(str(error).split())[:300]
                raise SteerbackError(
                    f"vLLM could not start {self.target.name!r} ({reason}); its own messages stand above"
                ) from error
            raise
        finally:
            if replicas > 1:
                os.environ.pop("CUDA_VISIBLE_DEVICES")
                if visible is not None:
                    os.environ["CUDA_VISIBLE_DEVICES"] = visible
        return drivers

    def _launch(self) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            **self._arguments,
            worker_cls=WORKER,
            additional_config=self.settings.as_config(),
            disable_log_stats=True,
        )
        return AsyncLLM.from_engine_args(arguments)

    def close(self) -> None:
        """Ends vLLM's processes."""
        _close(self._drivers)

    def _self_test(self, version: str) -> None:
        prompt = self._loaded.prompter.tokens(QUESTION)
        norms = self._loaded.norms
        latent = None if norms is None else int((norms > 0).argmax())  # some SAEs have latents that write nothing
        for driver in self._drivers:
            found = fault(driver, self.settings, prompt, self.target.boost_prior.high, latent)
            if found:
                raise SteerbackError(
                    f"vLLM {version} (tested: {TESTED}) does not steer this model: {found}; use --engine transformers"
                )

    # ---- identity

    @property
    def fingerprint(self) -> str:
        """Hash of all that shapes a completion except the request."""
        return digest(self._facts)

    def describe(self) -> dict[str, object]:
        """What is needed to repeat a run, JSON-able. vLLM promises equal plans and seeds, not equal texts."""
        return dict(self._facts)

    def _describe(self, version: str, replicas: int, directions: Mapping[str, Tensor]) -> dict[str, object]:
        import torch

        site, state = self.settings.site, self._drivers[0].call("steerback_state")[0]
        shown = {k: v for k, v in self._arguments.items() if k not in ("model", "revision")}
        return {
            "engine": "vllm",
            "vllm": version,
            "runner": state["runner"],
            "arithmetic": ARITHMETIC_VERSION,
            "steerback": VERSION,
            "torch": torch.__version__,
            "device": state["device"],
            "dtype": self.target.dtype,
            "arguments": {
                k: v if isinstance(v, (int, float, str, bool, type(None))) else repr(v) for k, v in shown.items()
            },
            "replicas": replicas,
            "layers": {"steer": site.steer_layer, "sae": site.sae_layer, "read": site.read_layer},
            "prompt_format": self._loaded.prompter.style,
            "sae": self._loaded.sae_hash,
            "directions": {k: digest(v.detach().cpu().tolist()) for k, v in sorted(directions.items())},
            **self._loaded.provenance,
        }

    # ---- generation

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[tuple[str, Completion]]:
        """Yields (key, completion) as responses finish; everything is checked before anything is generated."""
        planned = self._check(requests)
        loop = asyncio.get_running_loop()
        done: asyncio.Queue[tuple[Request, Any]] = asyncio.Queue()
        futures = []
        for n, (request, job) in enumerate(zip(requests, planned, strict=True)):
            future = self._drivers[n % len(self._drivers)].submit(job)
            futures.append(future)

            def tell(finished: Any, request: Request = request) -> None:
                loop.call_soon_threadsafe(done.put_nowait, (request, finished))

            future.add_done_callback(tell)
        try:
            for _ in futures:
                request, finished = await done.get()
                with _one_line():
                    answer = finished.result()
                yield request.key, self._completion(request, answer)
        finally:
            for future in futures:
                future.cancel()

    def _completion(self, request: Request, answer: Answer) -> Completion:
        output = answer.output.outputs[0]
        sampling, prompter = request.sampling, self._loaded.prompter
        end = prompter.finish(output.token_ids, sampling.max_new_tokens, self._loaded.ends, sampling.stop, 0)
        finish: FinishReason
        if end is None:
            size, text, finish = len(output.token_ids), prompter.text(output.token_ids), "error"
        else:
            size, text, finish = end
        prompt = len(answer.output.prompt_token_ids)
        entry = answer.entry
        activations = None
        if request.record is not None:
            flat = np.frombuffer(b"" if entry is None else entry["record"], dtype=np.float32)
            kept = flat.reshape(positions_fed(answer.output), len(request.record.latents))
            activations = kept[: prompt + size - 1].copy()
            if not np.isfinite(activations).all():
                raise RuntimeError(f"request {request.key!r}: some positions were not recorded")
        return Completion(
            text=text,
            token_ids=tuple(output.token_ids[:size]),
            prompt_tokens=prompt,
            finish=finish,
            receipt=Receipt() if entry is None else Receipt(entry["prompt"], entry["generated"], entry["norm"]),
            activations=activations,
        )

    def _check(self, requests: Sequence[Request]) -> list[VllmJob]:
        return [jobs.job_of(*one, self.settings, self._loaded) for one in checked(requests, self.settings.site)]

    # ---- activations

    def activations(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        latents: Sequence[int] | None = None,
        include_prompt: bool = False,
        pool: Pooling = "max",
    ) -> NDArray[np.float32]:
        """Unsteered SAE activations at the read layer, pooled over the response's tokens: (n texts, n latents).

        Special and template tokens are excluded; `include_prompt` pools over the user's words as well. A text without
        such tokens gets zeros. Pooled on the device while the texts are read.
        """
        site = self.settings.site
        check_texts(prompts, responses, latents, site)
        chosen = None if latents is None else list(latents)
        out = np.zeros((len(prompts), site.n_latents if chosen is None else len(chosen)), dtype=np.float32)
        pending: deque[tuple[int, Any]] = deque()  # forgotten as they are read: each holds all latents
        for n, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            spoken = self._loaded.prompter.spoken(prompt, response)
            jobs.check_length(self.settings, f"text {n}", len(spoken.token_ids), 1)
            positions = sorted([*spoken.user, *spoken.response] if include_prompt else spoken.response)
            if not positions:
                continue
            ticket = Ticket(f"activations/{n}", pool=_spans(positions), how=pool)
            job = VllmJob(ticket, spoken.token_ids, {"max_tokens": 1, "temperature": 0.0, "detokenize": False})
            pending.append((n, self._drivers[n % len(self._drivers)].submit(job)))
        while pending:
            n, future = pending.popleft()
            with _one_line():
                whole = np.frombuffer(future.result().entry["pooled"], dtype=np.float32)
            out[n] = whole if chosen is None else whole[chosen]
        return out

    def decoder_norms(self) -> NDArray[np.float32]:
        """L2 norm of each latent's decoder direction: (n latents,)."""
        if self._loaded.norms is None:
            raise SteerbackError("decoder norms need an SAE and this target has none")
        return self._loaded.norms

    def token_ends(self, completion: Completion) -> list[int]:
        """Where each token ends in the text; a character of several tokens ends with its last one."""
        return self._loaded.prompter.ends(completion.token_ids, len(completion.text))

    # ---- proof

    def teacher_forced(
        self, token_ids: Sequence[int], interventions: Sequence[Intervention], prompt_tokens: int
    ) -> NDArray[np.float32]:
        """Log-probabilities (T, vocabulary) of a given text, steered: what the reference engine is compared with.

        The first `prompt_tokens` positions are the prompt. The text is prefilled; needs `max_logprobs=-1` in options.
        """
        check("teacher_forced", interventions, None, self.settings.site)
        jobs.check_length(self.settings, "teacher_forced", len(token_ids), 1)
        ticket = Ticket("teacher_forced", tuple(interventions), prompt=prompt_tokens)
        jobs.check_ticket("teacher_forced", ticket, self.settings)
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": -1, "logprobs": -1, "detokenize": False}
        output = self._drivers[0].submit(VllmJob(ticket, tuple(token_ids), sampling)).result().output
        rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
        out = np.full((len(rows), len(rows[0])), -np.inf, dtype=np.float32)
        for n, row in enumerate(rows):
            for token, found in row.items():
                out[n, token] = found.logprob
        return out


def _close(drivers: Sequence[Driver]) -> None:
    """Ends them all, also when one cannot be ended."""
    with contextlib.ExitStack() as ending:
        for driver in drivers:
            ending.callback(driver.close)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """A vLLM that died is the user's to restart."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise SteerbackError(
            "vLLM stopped (its own messages stand above); what was finished is kept, resume the run"
        ) from error


def _spans(positions: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending positions as [first, last + 1) pairs."""
    out: list[list[int]] = []
    for at in positions:
        if out and out[-1][1] == at:
            out[-1][1] = at + 1
        else:
            out.append([at, at + 1])
    return tuple((a, b) for a, b in out)
