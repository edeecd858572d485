"""Reference engine: a Hugging Face model with hooks on its blocks and continuous batching in fixed shapes.

All other engines are tested against its numbers. It does not know about judges, ledgers or experiments.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from steerback.engines.base import Arriving, EngineRecord
from steerback.engines.batch import PAGE, DecodingBatch, Item, Queue, Shape
from steerback.engines.checks import check_texts, checked
from steerback.engines.interventions import ARITHMETIC_VERSION, check, check_directions
from steerback.engines.loading import LoadedModel, batch_rows, out_of_memory
from steerback.engines.options import SMALL
from steerback.engines.prompting import Conversation
from steerback.engines.steering import Pass, Steering
from steerback.errors import VERSION, SteerbackError
from steerback.records import Completion, Intervention, Prefix, Request, digest
from steerback.targets.sae import Sae

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from steerback.engines.base import Over, Pooling, ReadAt

CHUNK_TOKENS = 1024
"""Tokens that are encoded at one time, so that a (tokens, latents) matrix cannot fill the memory."""


class TransformersEngine:
    """Generate steered responses for one target on CPU, CUDA or MPS.

    `batch_size` (rows that decode together) is estimated from the machine's memory by default and halved if memory
    still runs out. Small models on a CPU decode in several such batches (`workers`) in parallel. A request's tokens
    depend neither on the other requests in its batch nor on the number of workers (measured bit for bit on a CPU). They
    do depend on batch size, threads, device and library versions, which are all in `describe()`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        batch_size: int | None = None,
        directions: Mapping[str, Tensor] | None = None,
        workers: int | None = None,
    ) -> None:
        directions = directions or {}
        self.runner, self.sae, self._loaded = loaded.runner, loaded.sae, loaded
        check_directions(directions, self.runner.site.d_model)
        self.directions = {name: v.to(self.runner.device, torch.float32) for name, v in directions.items()}
        self._direction_hashes = {name: digest(v.cpu().tolist()) for name, v in sorted(self.directions.items())}
        on_cpu = self.runner.device.type == "cpu"
        self.shape = Shape(batch_size or batch_rows(self.runner), page=PAGE if on_cpu else None)
        self._halvings: list[str] = []
        # Batches run in threads so that the event loop stays free for judges. Small models gain more from parallel
        # batches than from threads within a matrix product, which synchronise at every operation.
        small = on_cpu and sum(p.numel() for p in self.runner.model.parameters()) < SMALL
        if small:  # products with matrices in this order are slightly faster, and equal; embeddings keep their order
            for module in self.runner.model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight = torch.nn.Parameter(module.weight.t().contiguous().t(), requires_grad=False)
        threads = torch.get_num_threads()
        self.workers = workers or (min(threads, 4) if small else 1)
        self._threads = 1 if small else threads
        self._pool = ThreadPoolExecutor(
            self.workers, "steerback-engine", initializer=torch.set_num_threads, initargs=(self._threads,)
        )

    @property
    def fingerprint(self) -> str:
        """Hash of everything except the request that shapes a completion."""
        # The batch shape shows halvings, and parallel batches do not affect each other.
        return digest({k: v for k, v in self.describe().items() if k not in ("halved_on_out_of_memory", "workers")})

    def describe(self) -> EngineRecord:
        """Return the settings that are needed to reproduce the texts."""
        import transformers

        site = self.runner.site
        return {
            "engine": "transformers",
            "arithmetic": ARITHMETIC_VERSION,
            "steerback": VERSION,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": self._device_name,
            "threads": self._threads if self.runner.device.type == "cpu" else None,
            "dtype": str(self.runner.dtype).removeprefix("torch."),
            "batch": {"rows": self.shape.rows, "prefill_rows": self.shape.prefill_rows, "page": self.shape.page},
            "workers": self.workers,
            "halved_on_out_of_memory": list(self._halvings),
            "layers": {"steer": site.steer_layer, "sae": site.sae_layer, "read": site.read_layer},
            "prompt_format": self.runner.prompter.style,
            "sae": self.sae.hash if self.sae is not None else None,
            "directions": self._direction_hashes,
            "target": self._loaded.target,
            **self._loaded.provenance,
        }

    @cached_property
    def _device_name(self) -> str:
        device = self.runner.device
        if device.type == "cpu":
            return f"cpu {torch.backends.cpu.get_cpu_capability()}"  # kernels differ, and so do the last bits
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    async def generate(
        self, requests: Sequence[Request], more: Arriving | None = None
    ) -> AsyncIterator[tuple[str, Completion]]:
        """Yield (key, completion) as responses finish; all requests are checked before generation starts."""
        queue, later = Queue(self._check(requests)), list[Item]()
        batches: list[DecodingBatch] = []
        running: dict[asyncio.Future[list[tuple[str, Completion]]], DecodingBatch] = {}
        arrival = None if more is None else asyncio.ensure_future(more())
        try:
            while running or len(queue) or later or arrival is not None:
                if not running and later:  # too long for the batches that were running
                    queue, later, batches = Queue([*queue.drain(), *later]), [], []
                if not running and not batches and len(queue):
                    batches = [
                        DecodingBatch(self.runner, queue, self.shape, self.sae, self.directions)
                        for _ in range(self.workers)
                    ]
                if len(queue):
                    idle = [batch for batch in batches if batch not in running.values()]
                    running |= {self._advance(batch): batch for batch in idle}
                awaited: list[asyncio.Future[Any]] = [*running, *([] if arrival is None else [arrival])]
                ready, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                if arrival is not None and arrival in ready:
                    arrived, arrival = arrival.result(), None
                    if arrived is not None and more is not None:
                        items, arrival = self._check(arrived), asyncio.ensure_future(more())
                        later += [item for item in items if not queue.put(item)]
                if any(self._short_of_memory(future) for future in running if future in ready):
                    await asyncio.wait(running)  # all batches must release memory before the shape shrinks
                    ready = set(running)
                stopped = {future: running.pop(future) for future in list(running) if future in ready}
                short = {future for future in stopped if self._short_of_memory(future)}
                finished = [done for future in stopped if future not in short for done in future.result()]
                if short:
                    waiting = [*queue.drain(), *later, *(item for b in stopped.values() for item in b.unfinished())]
                    queue, later, batches = Queue(waiting), [], []
                    self._halve()
                else:
                    running |= {self._advance(batch): batch for batch in stopped.values() if batch.pending}
                for done in finished:
                    yield done
        finally:
            for future in running:
                future.cancel()
            if arrival is not None:
                arrival.cancel()

    def _advance(self, batch: DecodingBatch) -> asyncio.Future[list[tuple[str, Completion]]]:
        return asyncio.get_running_loop().run_in_executor(self._pool, batch.advance)

    def _short_of_memory(self, future: asyncio.Future[list[tuple[str, Completion]]]) -> bool:
        error = future.exception()
        return error is not None and out_of_memory(error) and self.shape.rows > 1

    def _halve(self) -> None:
        """Halve the batch after memory ran out, and record it.

        accelerate's `find_executable_batch_size` is not suitable. It restarts its function, which would generate
        finished responses again, and it does not record the batch shape that the ledger needs.
        """
        before, after = self.shape.rows, self.shape.rows // 2
        self.shape = Shape(after, self.shape.prefill_rows, self.shape.page)
        self._halvings.append(f"{before} -> {after}")
        gc.collect()
        if self.runner.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check(self, requests: Sequence[Request]) -> list[Item]:
        items: list[Item] = []
        for where, request in checked(requests, self.runner.site):
            prompt = self.runner.prompt_of(request)
            self.runner.check_length(where, len(prompt), request.sampling.max_new_tokens)
            items.append((request, prompt))
        return items

    @torch.inference_mode()
    def activations(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        latents: Sequence[int] | None = None,
        over: Over = "response",
        pool: Pooling = "max",
        at: ReadAt = "read",
    ) -> NDArray[np.float32]:
        """Return unsteered SAE activations, pooled over tokens; see `Engine.activations`."""
        check_texts(prompts, responses, latents, self.runner.site)
        assert self.sae is not None
        prompter = self.runner.prompter
        texts = [prompter.pooled(p, r, over) for p, r in zip(prompts, responses, strict=True)]
        out = np.zeros((len(texts), self.sae.n_latents if latents is None else len(latents)), dtype=np.float32)
        layer = self.runner.site.layer_named(at)
        sae = self.sae if latents is not None else self.encoder
        for n, states in self.states([ids for ids, _ in texts], (layer,)):
            chosen = list(texts[n][1])
            for first in range(0, len(chosen), CHUNK_TOKENS):
                z = sae.encode(states[layer][chosen[first : first + CHUNK_TOKENS]].float(), latents)
                if pool == "max":
                    np.maximum(out[n], z.amax(dim=0).float().cpu().numpy(), out=out[n])
                else:
                    z = z if pool == "mean" else (z > 0).float()
                    out[n] += z.sum(dim=0).float().cpu().numpy() / len(chosen)
        return out

    @cached_property
    def encoder(self) -> Sae:
        """The SAE for encoding all latents; its encoder moves to the device once if there is enough memory."""
        assert self.sae is not None
        try:
            return self.sae.encoder_to(self.runner.device)
        except torch.OutOfMemoryError:
            return self.sae  # copied in blocks at each use

    @torch.inference_mode()
    def residuals(
        self, prompts: Sequence[str], responses: Sequence[str], layers: Collection[int]
    ) -> Iterator[tuple[int, tuple[int, ...], dict[int, Tensor]]]:
        """Yield unsteered residuals over the words of each response: (text, token ids, {layer: (tokens, d) float32}).

        Texts are ordered by length; special and template tokens are excluded. Raises SteerbackError for a layer that
        the model does not have, or for a text that exceeds its context.
        """
        for layer in layers:
            if not 0 <= layer < self.runner.site.n_layers:
                raise SteerbackError(f"layer {layer} is outside 0..{self.runner.site.n_layers - 1}")
        texts = [self.runner.prompter.conversation(p, r) for p, r in zip(prompts, responses, strict=True)]
        for n, states in self.states([text.token_ids for text in texts], layers):
            chosen = list(texts[n].response)
            ids = tuple(texts[n].token_ids[i] for i in chosen)
            yield n, ids, {layer: h[chosen].float() for layer, h in states.items()}

    def words(self, text: Conversation) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return a conversation's tokens and the positions of the words in prompt and answer, without position 0."""
        return text.token_ids, tuple(n for n in (*text.user, *text.response) if n)

    def states(
        self, texts: Sequence[Sequence[int]], layers: Collection[int]
    ) -> Iterator[tuple[int, dict[int, Tensor]]]:
        """Yield (text, residuals (padded T, d) after each of `layers`) for token ids, shortest text first."""
        rows = self.shape.prefill_rows
        order = sorted(range(len(texts)), key=lambda n: Shape.bucket(len(texts[n])))
        while order:
            bucket = Shape.bucket(len(texts[order[0]]))
            part = [n for n in order[:rows] if Shape.bucket(len(texts[n])) == bucket]
            order = order[len(part) :]
            ids = torch.zeros(rows, bucket, dtype=torch.long)
            for row, n in enumerate(part):
                self.runner.check_length(f"text {n}", len(texts[n]), 0)
                ids[row, : len(texts[n])] = torch.tensor(texts[n])
            residuals = self.runner.residuals(ids, layers)
            for row, n in enumerate(part):
                yield n, {layer: h[row] for layer, h in residuals.items()}

    def decoder_norms(self) -> NDArray[np.float32]:
        """Return the L2 norm of each latent's decoder direction: (n latents,)."""
        if self.sae is None:
            raise SteerbackError("decoder norms need an SAE, but this target has none")
        norms: NDArray[np.float32] = self.sae.decoder_norms.numpy()
        return norms

    def token_ends(self, completion: Completion, prefix: Prefix | None = None) -> list[int]:
        """Return the character at which each token ends; see `Engine.token_ends`."""
        return self.runner.prompter.ends(completion.token_ids, len(completion.text), prefix)

    @torch.inference_mode()
    def teacher_forced(
        self, token_ids: Sequence[int], interventions: Sequence[Intervention], prompt_tokens: int
    ) -> Tensor:
        """Return logits (T, vocabulary) of a steered text in one pass, for comparison with other engines.

        The first `prompt_tokens` positions are the prompt.
        """
        request = Request("teacher_forced", "", 0, interventions=tuple(interventions))
        return self.runner.logits(self._forced(request, token_ids, prompt_tokens)[0])[0].float()

    @torch.inference_mode()
    def reread(self, request: Request, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return activations along an existing response, computed in one pass; see `Rereads.reread`."""
        layer = self.runner.site.record_layer(request.record)
        if request.record is None or layer is None:
            raise SteerbackError("reread needs a request with latents to record")
        prompt = self.runner.prompt_of(request)
        ids = (*prompt, *token_ids[:-1])
        self.runner.check_length(request.key, len(ids), 0)
        _, phases = self._forced(request, ids, request.boundary(len(prompt)))
        kept = torch.stack([phase.records[layer].kept[0] for phase in phases]).sum(dim=0)  # 0 outside its phase
        values: NDArray[np.float32] = kept[:, : len(request.record.latents)].float().cpu().numpy()
        return values

    def _forced(
        self, request: Request, token_ids: Sequence[int], prompt_tokens: int
    ) -> tuple[Tensor, tuple[Steering, Steering]]:
        """Return final hidden states (1, T, d) of a steered text, and the steering objects of prompt and response."""
        site, device = self.runner.site, self.runner.device
        check(request.key, request.interventions, request.record, site)
        ids = torch.tensor([list(token_ids)], device=device)
        positions = torch.arange(ids.shape[1], device=device)[None]
        prompt = Steering("prompt", 1, ids.shape[1], site, self.sae, self.directions, device)
        generated = Steering("generated", 1, ids.shape[1], site, self.sae, self.directions, device)
        prompt.admit(0, request)
        generated.admit(0, request)
        forward = Pass(positions, [(prompt, positions < prompt_tokens), (generated, positions >= prompt_tokens)])
        return self.runner.hidden(ids, positions, ids.shape[1], None, forward), (prompt, generated)

    def close(self) -> None:
        """Wait for the current block of steps to end, then release the model."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.runner.hooks.remove()
        with contextlib.suppress(AttributeError):
            del self.runner.model, self.runner.decoder
        self.sae = None
        self.__dict__.pop("encoder", None)
