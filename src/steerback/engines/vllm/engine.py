"""The vLLM engine of a target: checks requests, sends them to one or more vLLM engines and builds completions.

A request that a worker cannot handle is refused before anything is sent, with one line that names the field. This
module does not know about judges, ledgers or experiments.
"""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from steerback.engines.base import START_LOG, Arriving, EngineRecord
from steerback.engines.checks import check_texts, checked
from steerback.engines.interventions import ARITHMETIC_VERSION, check, check_directions, check_layer
from steerback.engines.options import VllmOptions
from steerback.engines.vllm import jobs
from steerback.engines.vllm.driver import (
    Driver,
    SamplingFields,
    VllmAnswer,
    VllmJob,
    close,
    one_line_if_dead,
    positions_fed,
    start,
)
from steerback.engines.vllm.loading import (
    TESTED,
    PreparedTarget,
    device_shares,
    engine_arguments,
    gpus,
    output_to,
    prepare,
    require_vllm,
    save_directions,
    shared_arguments,
)
from steerback.engines.vllm.settings import TableSettings, Ticket
from steerback.errors import VERSION, SteerbackError, one_line
from steerback.records import Completion, FinishReason, Intervention, Prefix, Receipt, Request, digest
from steerback.store.files import make_folder, user_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    from steerback.engines.base import Over, Pooling, ReadAt
    from steerback.targets import Target

QUESTION = "What is the capital of France?"
"""Prompt of the self-test of a new engine, which is run steered and unsteered."""
UNSEEN = ("model", "revision", "skip_tokenizer_init")
"""Arguments that the record of an engine does not repeat."""
WORKER = "steerback.engines.vllm.worker.SteeredWorker"


class VllmEngine:
    """Generate steered responses for one target on unmodified vLLM.

    A target's LoRA adapter is served with its model, not merged; `serving` returns the engine of another adapter.
    """

    def __init__(self, target: Target, options: VllmOptions, directions: Mapping[str, Tensor] | None = None) -> None:
        version = require_vllm()
        replicas, needed = options.replicas, options.replicas * options.tensor_parallel
        if 0 < (available := gpus()) < needed and options.tensor_parallel > 1:
            raise SteerbackError(
                f"{replicas} replicas of {options.tensor_parallel} GPUs each need {needed}, and {available} are "
                "visible here; lower replicas or tensor_parallel"
            )
        self.target = target
        self._directions = dict(directions or {})
        shape, rest = prepare(target, tuple(self._directions))
        site = shape.site
        check_directions(directions or {}, site.d_model)
        for layer in options.layers:
            check_layer("vLLM engine: layers", layer, site)
        length = min(options.max_model_len or 4096, shape.context)
        sharing = options.per_gpu(available)
        rows = options.batch_size or (max(128, 512 // sharing) if available else 64)
        self.settings = TableSettings(
            site=site,
            layers=tuple(sorted({site.steer_layer, site.sae_layer, site.read_layer, *options.layers})),
            rows=rows + max(8, rows // 8),
            columns=options.columns if target.sae is not None else 0,
            room=length * options.record_latents,
            poolers=options.poolers if target.sae is not None else 0,
            length=length,
            arithmetic=ARITHMETIC_VERSION,
            version=VERSION,
            sae=target.sae,
            kind=shape.sae_kind,
            k=shape.sae_k,
            directions=save_directions(directions or {}),
        )
        self._adapters = tuple(dict.fromkeys([*filter(None, [target.adapter]), *options.adapters]))
        own = engine_arguments(target, length, rows, options, self._adapters)
        self._arguments = own | shared_arguments(target, options, available, shape.triton) | dict(options.options)
        self._log = START_LOG.get() or make_folder(user_folder("logs")) / "vllm.log"
        shares = device_shares(replicas, options.tensor_parallel, available)
        self._drivers = self._start(shares, lambda: self._prepare(rest))
        try:
            self._begin(version)
        except BaseException:
            self.close()
            raise

    def _prepare(self, rest: Callable[[], PreparedTarget]) -> None:
        self._loaded = rest()
        asked = len(self._loaded.prompter.tokens(QUESTION))
        jobs.check_length(self.settings, "self-test of the vLLM engine", asked, 3)

    def _begin(self, version: str) -> None:
        """Note what answers this target's requests, and test that it is steered."""
        self._adapter = self._request_of(self.target.adapter)
        with one_line_if_dead():
            self._record = self._describe(version)
            self._self_test(version)

    def serving(self, target: Target) -> VllmEngine | None:
        """Return the engine of another adapter, or of the model alone, on the same processes; None if it needs others.

        Closing either ends both.
        """
        same = replace(target, name=self.target.name, adapter=self.target.adapter) == self.target
        if not same or (target.adapter is not None and target.adapter not in self._adapters):
            return None
        other = copy.copy(self)
        other.target = target
        other._loaded = prepare(target, tuple(self._directions))[1]()
        other._begin(str(self._record["vllm"]))
        return other

    def _request_of(self, adapter: str | None) -> LoRARequest | None:
        if adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"adapter-{self._adapters.index(adapter)}", self._adapters.index(adapter) + 1, adapter)

    # ---- start and end

    def _start(self, shares: Sequence[str], meanwhile: Callable[[], None]) -> list[Driver]:
        """Start an engine for each share of the GPUs, and call `meanwhile` while they start.

        Engines that measure the free memory of a GPU they share start one after the other.
        """
        measuring = len(set(shares)) < len(shares) and "kv_cache_memory_bytes" not in self._arguments
        try:
            with output_to(self._log):
                return start(self.settings, self._launch, shares, measuring, meanwhile)
        except (RuntimeError, ValueError, OSError, TypeError) as error:
            raise SteerbackError(
                f"vLLM could not start {self.target.name!r} ({one_line(error)[:300]}); its messages are in {self._log}"
            ) from error

    def _launch(self) -> AsyncLLM:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            **self._arguments,
            worker_cls=WORKER,
            additional_config=self.settings,
            disable_log_stats=True,
            trust_remote_code=False,
        )
        return AsyncLLM.from_engine_args(arguments)

    def close(self) -> None:
        """End vLLM's processes."""
        close(self._drivers)

    def _self_test(self, version: str) -> None:
        prompt = self._loaded.prompter.tokens(QUESTION)
        norms = self._loaded.norms
        latent = None if norms is None else int((norms > 0).argmax())  # some SAEs have latents with a zero decoder row

        def fault_of(driver: Driver) -> str | None:
            boost = self.target.boost_prior.high
            return jobs.steering_fault(driver, self.settings, prompt, boost, latent, self._adapter)

        with ThreadPoolExecutor(len(self._drivers)) as pool:
            for fault in filter(None, pool.map(fault_of, self._drivers)):
                raise SteerbackError(
                    f"vLLM {version} (tested: {TESTED}) does not steer this model: {fault}; use --engine transformers"
                )

    # ---- identity

    @property
    def fingerprint(self) -> str:
        """Hash of everything except the request that shapes a completion."""
        return digest(self._record)

    def describe(self) -> EngineRecord:
        """Return the settings that are needed to repeat a run: the same plan and seeds; with vLLM texts may differ."""
        return self._record.copy()

    def _describe(self, version: str) -> EngineRecord:
        import torch

        site, state = self.settings.site, self._drivers[0].call("steerback_state")[0]
        shown = {k: v for k, v in self._arguments.items() if k not in UNSEEN}
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
            "replicas": len(self._drivers),
            "layers": {"steer": site.steer_layer, "sae": site.sae_layer, "read": site.read_layer},
            "prompt_format": self._loaded.prompter.style,
            "sae": self._loaded.sae_hash,
            "directions": {k: digest(v.detach().cpu().tolist()) for k, v in sorted(self._directions.items())},
            "target": self.target.name,
            **self._loaded.files,
        }

    # ---- generation

    async def generate(
        self, requests: Sequence[Request], more: Arriving | None = None
    ) -> AsyncIterator[tuple[str, Completion]]:
        """Yield (key, completion) as responses finish; all requests are checked before generation starts."""
        loop = asyncio.get_running_loop()
        done: asyncio.Queue[tuple[Request, Future[VllmAnswer]] | list[Request] | None] = asyncio.Queue()
        running: dict[Future[VllmAnswer], int] = {}  # the engine of each request
        loads = [0] * len(self._drivers)
        listening: asyncio.Task[None] | None = None

        def submit(requests: Sequence[Request]) -> None:
            for request, job in zip(requests, self._check(requests), strict=True):
                least = loads.index(min(loads))
                loads[least] += 1
                future = self._drivers[least].submit(job)
                running[future] = least

                def put(finished: Future[VllmAnswer], request: Request = request) -> None:
                    loop.call_soon_threadsafe(done.put_nowait, (request, finished))

                future.add_done_callback(put)

        async def listen(more: Arriving) -> None:
            try:
                while (arrived := await more()) is not None:
                    done.put_nowait(list(arrived))
            finally:
                done.put_nowait(None)

        submit(requests)
        if more is not None:
            listening = asyncio.create_task(listen(more))
        try:
            open_ended = more is not None
            while running or open_ended:
                event = await done.get()
                if event is None:
                    open_ended = False
                    if listening is not None:
                        await listening  # raises the error of `listening`, if any
                elif isinstance(event, tuple):
                    request, finished = event
                    loads[running.pop(finished)] -= 1
                    with one_line_if_dead():
                        answer = finished.result()
                    yield request.key, self._completion(request, answer)
                else:
                    submit(event)
        finally:
            if listening is not None:
                listening.cancel()
            for future in running:
                future.cancel()

    def _completion(self, request: Request, answer: VllmAnswer) -> Completion:
        output = answer.output.outputs[0]
        prompter = self._loaded.prompter
        end = prompter.finish(output.token_ids, request, self._loaded.ends, 0)
        finish: FinishReason
        if end is None:
            text = prompter.continuation(output.token_ids, request.prefix)
            size, finish = len(output.token_ids), "error"
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
        if self._arguments["skip_tokenizer_init"]:
            jobs.check_stops(requests)
        return [
            jobs.job_of(where, request, self.settings, self._loaded, self._adapter)
            for where, request in checked(requests, self.settings.site)
        ]

    # ---- activations

    def activations(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        latents: Sequence[int] | None = None,
        over: Over = "response",
        pool: Pooling = "max",
        at: ReadAt = "read",
    ) -> NDArray[np.float32]:
        """Return unsteered SAE activations, pooled on the device while it reads the texts; see `Engine.activations`."""
        site = self.settings.site
        check_texts(prompts, responses, latents, site)
        chosen = None if latents is None else list(latents)
        out = np.zeros((len(prompts), site.n_latents if chosen is None else len(chosen)), dtype=np.float32)
        pending: deque[tuple[int, Future[VllmAnswer]]] = deque()  # dropped after reading: large
        for n, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            ids, positions = self._loaded.prompter.pooled(prompt, response, over)
            jobs.check_length(self.settings, f"text {n}", len(ids), 1)
            if not positions:
                continue
            ticket = Ticket(f"activations/{n}", layer=site.layer_named(at), pool=jobs.spans(positions), how=pool)
            once = SamplingFields(max_tokens=1, temperature=0.0, detokenize=False)
            job = VllmJob(ticket, ids, once, self._adapter)
            pending.append((n, self._drivers[n % len(self._drivers)].submit(job)))
        while pending:
            n, future = pending.popleft()
            with one_line_if_dead():
                entry = future.result().entry
            assert entry is not None  # the ticket requests pooling
            whole = np.frombuffer(entry["pooled"], dtype=np.float32)
            out[n] = whole if chosen is None else whole[chosen]
        return out

    def decoder_norms(self) -> NDArray[np.float32]:
        """Return the L2 norm of each latent's decoder direction: (n latents,)."""
        if self._loaded.norms is None:
            raise SteerbackError("decoder norms need an SAE, but this target has none")
        return self._loaded.norms

    def token_ends(self, completion: Completion, prefix: Prefix | None = None) -> list[int]:
        """Return the character at which each token ends; see `Engine.token_ends`."""
        return self._loaded.prompter.ends(completion.token_ids, len(completion.text), prefix)

    # ---- proof

    def teacher_forced(
        self, token_ids: Sequence[int], interventions: Sequence[Intervention], prompt_tokens: int
    ) -> NDArray[np.float32]:
        """Return log-probabilities (T, vocabulary) of a steered text, for comparison with the reference engine.

        The first `prompt_tokens` positions are the prompt. The text is prefilled; needs `max_logprobs=-1` in options.
        """
        check("teacher_forced", interventions, None, self.settings.site)
        jobs.check_length(self.settings, "teacher_forced", len(token_ids), 1)
        ticket = Ticket("teacher_forced", tuple(interventions), prompt=prompt_tokens)
        jobs.check_ticket("teacher_forced", ticket, self.settings)
        sampling = SamplingFields(max_tokens=1, temperature=0.0, prompt_logprobs=-1, logprobs=-1, detokenize=False)
        job = VllmJob(ticket, tuple(token_ids), sampling, self._adapter)
        output = self._drivers[0].submit(job).result().output
        rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
        out = np.full((len(rows), len(rows[0])), -np.inf, dtype=np.float32)
        for n, row in enumerate(rows):
            for token, entry in row.items():
                out[n, token] = entry.logprob
        return out
