"""The vLLM engine of a target: checks requests, hands them to one or more vLLM engines, builds completions.

Everything a worker cannot do is refused here, before anything is sent, in one line that names the field. Knows
nothing of judges, ledgers or experiments.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

import steerback
from steerback.engines.prompting import Prompter
from steerback.engines.vllm.driver import Answer, Driver, Job
from steerback.engines.vllm.settings import Settings, Ticket
from steerback.errors import SteerbackError
from steerback.interventions import ARITHMETIC_VERSION, Site, check, check_directions
from steerback.records import Completion, FinishReason, Intervention, Receipt, Request, digest

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from steerback.targets import Target

TESTED = ("0.26.0", "0.32.0")
"""The oldest and the newest vLLM release that the tests ran on; others have to pass the self-test at start as well."""
WORKER = "steerback.engines.vllm.worker.SteeredWorker"


@dataclass(frozen=True)
class Loaded:
    """What the engine process knows of a target without loading its model."""

    prompter: Prompter
    ends: frozenset[int]
    site: Site
    context: int
    sae_hash: str | None
    provenance: dict[str, object]


class VllmEngine:
    """Generates steered responses for one target on stock vLLM.

    batch_size: requests that run together (vLLM's `max_num_seqs`); replicas: engines, one GPU (or `tensor_parallel`
    GPUs) each; max_model_len: longest prompt + response, at most the model's context; layers: further layers that
    interventions and recordings may name; columns: distinct latents that may be clamped or recorded at one time;
    record_latents: how many latents a request of full length may record (shorter requests: more); lora: folder of an
    adapter; options: further arguments of vLLM's engine.
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
        poolers: int = 32,
        lora: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        version = require_vllm()
        self.target = target
        self._loaded = prepare(target, tuple(directions or ()))
        site = self._loaded.site
        check_directions(directions or {}, site.d_model)
        length = min(max_model_len or 4096, self._loaded.context)
        rows = batch_size or (256 if has_cuda() else 64)
        self.settings = Settings(
            site=site,
            layers=tuple(sorted({site.steer_layer, site.sae_layer, site.read_layer, *layers})),
            rows=rows + max(8, rows // 8),
            columns=columns if target.sae is not None else 0,
            room=length * record_latents,
            recorders=rows + max(8, rows // 8),
            poolers=poolers if target.sae is not None else 0,
            length=length,
            arithmetic=ARITHMETIC_VERSION,
            version=steerback.__version__,
            sae=None if target.sae is None else {"location": target.sae.location, "format": target.sae.format},
            directions=_save(directions or {}),
        )
        self._arguments = {
            "model": _model_alone(target),
            "revision": target.revision,
            "dtype": target.dtype,
            "max_model_len": length,
            "max_num_seqs": rows,
            "tensor_parallel_size": tensor_parallel,
            "seed": 0,
            "generation_config": "vllm",
            **({} if has_cuda() else {"kv_cache_memory_bytes": 1 << 30}),
            **(_lora_arguments(lora) if lora else {}),
            **(options or {}),
        }
        if self._arguments.get("pipeline_parallel_size", 1) != 1:
            raise SteerbackError("the vLLM engine does not steer under pipeline parallelism; use tensor_parallel")
        self._drivers = self._start(replicas, tensor_parallel, lora)
        self._facts = self._describe(version, replicas, tensor_parallel, lora, directions or {})
        self._self_test(version)

    # ---- start and end

    def _start(self, replicas: int, tensor_parallel: int, lora: str | None) -> list[Driver]:
        adapter = None
        if lora:
            from vllm.lora.request import LoRARequest

            adapter = LoRARequest("adapter", 1, lora)
        drivers: list[Driver] = []
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        try:
            for n in range(replicas):
                if replicas > 1:
                    devices = visible.split(",") if visible else [str(i) for i in range(replicas * tensor_parallel)]
                    own = devices[n * tensor_parallel : (n + 1) * tensor_parallel]
                    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
                drivers.append(Driver(self.settings, self._launch, adapter))
        except BaseException:
            for driver in drivers:
                driver.close()
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
        for driver in self._drivers:
            driver.close()

    # ---- identity

    @property
    def fingerprint(self) -> str:
        """Hash of all that shapes a completion except the request."""
        return digest(self._facts)

    def describe(self) -> dict[str, object]:
        """What is needed to repeat a run, JSON-able. vLLM promises equal plans and seeds, not equal texts."""
        return dict(self._facts)

    def _describe(
        self,
        version: str,
        replicas: int,
        tensor_parallel: int,
        lora: str | None,
        directions: Mapping[str, Tensor],
    ) -> dict[str, object]:
        import torch

        site = self.settings.site
        shown = {k: v for k, v in self._arguments.items() if k not in ("model", "revision")}
        return {
            "engine": "vllm",
            "vllm": version,
            "runner": self._drivers[0].call("steerback_state")[0]["runner"],
            "arithmetic": ARITHMETIC_VERSION,
            "steerback": steerback.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if has_cuda() else "cpu",
            "dtype": self.target.dtype,
            "arguments": {
                k: v if isinstance(v, (int, float, str, bool, type(None))) else repr(v) for k, v in shown.items()
            },
            "replicas": replicas,
            "layers": {"steer": site.steer_layer, "sae": site.sae_layer, "read": site.read_layer},
            "prompt_format": self._loaded.prompter.style,
            "sae": self._loaded.sae_hash,
            "directions": {k: digest(v.detach().cpu().tolist()) for k, v in sorted(directions.items())},
            "lora": _hash_folder(lora) if lora else None,
            **self._loaded.provenance,
        }

    # ---- generation

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[tuple[str, Completion]]:
        """Yields (key, completion) as responses finish; everything is checked before anything is generated."""
        jobs = self._check(requests)
        loop = asyncio.get_running_loop()
        done: asyncio.Queue[tuple[Request, Any]] = asyncio.Queue()
        futures = []
        for n, (request, job) in enumerate(zip(requests, jobs, strict=True)):
            future = self._drivers[n % len(self._drivers)].submit(job)
            futures.append(future)

            def tell(finished: Any, request: Request = request) -> None:
                loop.call_soon_threadsafe(done.put_nowait, (request, finished))

            future.add_done_callback(tell)
        try:
            for _ in futures:
                request, finished = await done.get()
                yield request.key, self._completion(request, finished.result())
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
        if entry is not None and request.record is not None:
            kept = np.frombuffer(entry["record"], dtype=np.float32).reshape(-1, len(request.record.latents))
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

    def _check(self, requests: Sequence[Request]) -> list[Job]:
        jobs: list[Job] = []
        keys: set[str] = set()
        for request in requests:
            where = f"request {request.key!r}"
            if request.key in keys:
                raise SteerbackError(f"{where}: another request has the same key")
            keys.add(request.key)
            check(where, request.interventions, request.record, self.settings.site)
            prompt = self._loaded.prompter.tokens(request.prompt, request.prefill, request.system)
            sampling = self._sampling(where, request)
            self._check_length(where, len(prompt), request.sampling.max_new_tokens)
            ticket = self._ticket(where, request, len(prompt) + request.sampling.max_new_tokens)
            jobs.append(Job(ticket, prompt, sampling))
        return jobs

    def _check_length(self, where: str, prompt: int, new: int) -> None:
        if prompt == 0:
            raise SteerbackError(f"{where}: the prompt has no tokens")
        if prompt + new > self.settings.length:
            raise SteerbackError(
                f"{where}: prompt of {prompt} tokens and max_new_tokens {new} exceed {self.settings.length}, the "
                "engine's max_model_len; shorten the prompt, lower max_new_tokens or raise max_model_len"
            )

    def _ticket(self, where: str, request: Request, until: int) -> Ticket:
        """What the worker is told, once it is known to fit its tables."""
        site, record = self.settings.site, request.record
        layer = -1 if record is None else site.read_layer if record.layer is None else record.layer
        for field, used in (
            *((f"interventions[{n}].layer", site.layer_of(i)) for n, i in enumerate(request.interventions)),
            *((("record.layer", layer),) if record is not None else ()),
        ):
            if used not in self.settings.layers:
                raise SteerbackError(
                    f"{where}: {field} {used} is not prepared; this engine edits and reads layers "
                    f"{', '.join(map(str, self.settings.layers))}; start it with layers=[{used}] as well"
                )
        latents = () if record is None else tuple(record.latents)
        ticket = Ticket(request.key, request.interventions, latents, layer, until)
        if len(set(latents)) != len(latents):
            raise SteerbackError(f"{where}: record.latents names a latent twice")
        if len(ticket.latents()) > self.settings.columns:
            raise SteerbackError(
                f"{where}: {len(ticket.latents())} latents clamped or recorded, the engine has {self.settings.columns} "
                "columns; start it with more columns"
            )
        if until * len(latents) > self.settings.room:
            raise SteerbackError(
                f"{where}: record.latents: {len(latents)} latents at {until} positions are more than the "
                f"{self.settings.room} values prepared for a request; start the engine with a higher record_latents"
            )
        return ticket

    def _sampling(self, where: str, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        for field, good in (
            ("temperature", 0 <= sampling.temperature < float("inf")),
            ("top_p", 0 < sampling.top_p <= 1),
            ("repetition_penalty", 0 < sampling.repetition_penalty < float("inf")),
            ("max_new_tokens", sampling.max_new_tokens >= 1),
        ):
            if not good:
                raise SteerbackError(f"{where}: sampling.{field} {getattr(sampling, field)!r} is out of range")
        if "" in sampling.stop:
            raise SteerbackError(f"{where}: sampling.stop contains an empty string, which would stop every response")
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "repetition_penalty": sampling.repetition_penalty,
            "max_tokens": sampling.max_new_tokens,
            "seed": request.seed % (1 << 31),
            "stop": list(sampling.stop),
            "stop_token_ids": sorted(self._loaded.ends),
            "ignore_eos": True,  # the same tokens end a response as in the reference engine, and are kept
            "detokenize": bool(sampling.stop),
        }

    # ---- activations

    def activations(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        latents: Sequence[int] | None = None,
        include_prompt: bool = False,
    ) -> NDArray[np.float32]:
        """Unsteered SAE activations at the read layer, max-pooled over the response's tokens: (n texts, n latents).

        Special and template tokens are excluded; `include_prompt` pools over the user's words as well. A text without
        such tokens gets zeros. The maxima are taken on the device while the texts are read.
        """
        site = self.settings.site
        if not self.settings.poolers:
            raise SteerbackError("activations need an SAE and this target has none")
        if len(prompts) != len(responses):
            raise SteerbackError(f"activations: {len(prompts)} prompts and {len(responses)} responses")
        for latent in latents or ():
            if not 0 <= latent < site.n_latents:
                raise SteerbackError(f"activations: latent {latent} is outside 0..{site.n_latents - 1}")
        chosen = None if latents is None else list(latents)
        out = np.zeros((len(prompts), site.n_latents if chosen is None else len(chosen)), dtype=np.float32)
        futures: dict[Any, int] = {}
        for n, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            spoken = self._loaded.prompter.spoken(prompt, response)
            self._check_length(f"text {n}", len(spoken.token_ids), 1)
            positions = sorted([*spoken.user, *spoken.response] if include_prompt else spoken.response)
            if not positions:
                continue
            ticket = Ticket(f"activations/{n}", pool=_spans(positions))
            job = Job(ticket, spoken.token_ids, {"max_tokens": 1, "temperature": 0.0, "detokenize": False})
            futures[self._drivers[n % len(self._drivers)].submit(job)] = n
        for future, n in futures.items():
            whole = np.frombuffer(future.result().entry["pooled"], dtype=np.float32)
            out[n] = whole if chosen is None else whole[chosen]
        return out

    # ---- proof

    def teacher_forced(
        self, token_ids: Sequence[int], interventions: Sequence[Intervention], prompt_tokens: int
    ) -> NDArray[np.float32]:
        """Log-probabilities (T, vocabulary) of a given text, steered: what the reference engine is compared with.

        The first `prompt_tokens` positions are the prompt. The text is prefilled; needs `max_logprobs=-1` in options.
        """
        check("teacher_forced", interventions, None, self.settings.site)
        self._check_length("teacher_forced", len(token_ids), 1)
        ticket = Ticket("teacher_forced", tuple(interventions), prompt=prompt_tokens)
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": -1, "logprobs": -1, "detokenize": False}
        output = self._drivers[0].submit(Job(ticket, tuple(token_ids), sampling)).result().output
        rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
        out = np.full((len(rows), len(rows[0])), -np.inf, dtype=np.float32)
        for n, row in enumerate(rows):
            for token, found in row.items():
                out[n, token] = found.logprob
        return out

    def _self_test(self, version: str) -> None:
        """Checks arithmetic, hooks and effect on every worker: an engine that cannot steer must not start."""
        known = "" if version in TESTED else f" (tested with {' and '.join(TESTED)})"
        for driver in self._drivers:
            fault = self._fault(driver)
            if fault:
                self.close()
                raise SteerbackError(
                    f"vLLM {version}{known} does not steer this model: {fault}; use --engine transformers"
                )

    def _fault(self, driver: Driver) -> str | None:
        """What is wrong with an engine's steering, if anything."""
        site = self.settings.site
        latents: list[int | str] = [*site.directions[:1], *range(min(site.n_latents, 1))]
        if not latents:
            return None
        clamps = [
            Intervention("clamp", k, 1.5, layer=n) for k in range(min(site.n_latents, 3)) for n in self.settings.layers
        ]
        mixed = Ticket("check", (Intervention("add", latents[0], 2.0, "generated"), *clamps[: self.settings.columns]))
        error = max(driver.call("steerback_check", mixed.as_args(), 0))
        if error > 1e-3:
            return f"its edits are off by {error:.1e} of their size"
        edits = (Intervention("add", latents[0], self.target.boost_prior.high),)
        prompt = self._loaded.prompter.tokens("What is the capital of France?")
        sampling = {"temperature": 0.0, "max_tokens": 3, "logprobs": 1, "ignore_eos": True, "detokenize": False}
        jobs = [Job(Ticket(key, e), prompt, sampling) for key, e in (("plain", ()), ("steered", edits), ("again", ()))]
        plain, steered, again = (driver.submit(job).result() for job in jobs)
        entry = steered.entry or {}
        if (entry.get("prompt"), entry.get("generated")) != (len(prompt), 2):
            return f"of {len(prompt)} + 2 positions it edited {entry.get('prompt')} + {entry.get('generated')}"
        first = [next(iter(a.output.outputs[0].logprobs[0].items())) for a in (plain, steered, again)]
        if first[0][0] == first[1][0] and abs(first[0][1].logprob - first[1][1].logprob) < 1e-6:
            return "a strong addition leaves the next token's probability as it was"
        if first[0][0] != first[2][0] or abs(first[0][1].logprob - first[2][1].logprob) > 0.1:
            return "an unsteered request differs before and after a steered one"
        return None


def _spans(positions: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending positions as [first, last + 1) pairs."""
    out: list[list[int]] = []
    for at in positions:
        if out and out[-1][1] == at:
            out[-1][1] = at + 1
        else:
            out.append([at, at + 1])
    return tuple((a, b) for a, b in out)


def require_vllm() -> str:
    """vLLM's version, or a SteerbackError that says how to get it."""
    try:
        import vllm
    except ImportError as error:
        raise SteerbackError(
            f"engine 'vllm' needs vLLM ({error}); install vllm {TESTED[0]} to {TESTED[1]}, or use --engine transformers"
        ) from error
    return str(vllm.__version__)


def has_cuda() -> bool:
    """Whether vLLM will run on CUDA here (asked without initialising it)."""
    import torch

    return torch.cuda.device_count() > 0


def prepare(target: Target, directions: tuple[str, ...]) -> Loaded:
    """Tokenizer, layers and hashes of a target; SteerbackError for what is missing or does not fit together."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from steerback.engines.loading import hash_files
    from steerback.engines.runner import end_tokens
    from steerback.targets.sae import load_sae

    folder = Path(target.model)
    origin: dict[str, Any] = {} if folder.is_dir() else {"revision": target.revision}
    try:
        config = AutoConfig.from_pretrained(target.model, **origin)
        tokenizer = AutoTokenizer.from_pretrained(target.model, **origin)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SteerbackError(f"target {target.name!r}: cannot load {target.model}: {reason}") from error
    try:
        generation = GenerationConfig.from_pretrained(target.model, **origin)
    except OSError:
        generation = None
    text = config.get_text_config()
    sae_hash, sae_layer, n_latents = None, target.steer_layer, 0
    if target.sae is not None:
        sae = load_sae(Path(target.sae.location), target.sae.format)
        sae.check(f"SAE of target {target.name!r}", text.hidden_size, text.num_hidden_layers)
        sae_hash, sae_layer, n_latents = sae.hash, sae.layer, sae.n_latents
    site = Site(
        n_layers=text.num_hidden_layers,
        d_model=text.hidden_size,
        steer_layer=target.steer_layer,
        sae_layer=sae_layer,
        read_layer=target.read_layer,
        n_latents=n_latents,
        directions=directions,
    )
    for field in ("steer_layer", "read_layer"):
        if not 0 <= getattr(site, field) < site.n_layers:
            value = getattr(site, field)
            raise SteerbackError(f"target {target.name!r}: {field} {value} is outside 0..{site.n_layers - 1}")
    return Loaded(
        prompter=Prompter(tokenizer, target.prompt_format),
        ends=end_tokens(SimpleNamespace(generation_config=generation, config=config), tokenizer),
        site=site,
        context=getattr(text, "max_position_embeddings", 4096),
        sae_hash=sae_hash,
        provenance={
            "target": target.name,
            "model": target.model if not folder.is_dir() else target.name,
            "revision": target.revision,
            "files": hash_files(target.model, target.revision),
        },
    )


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "steerback" / "vllm"


def _model_alone(target: Target) -> str:
    """A folder with the model's files only: vLLM takes every safetensors file it finds for weights of the model.

    Links under a name that stays, as the path is part of the key of vLLM's compile cache.
    """
    folder = Path(target.model)
    if not (folder / "sae.safetensors").is_file():
        return target.model
    links = _cache() / "models" / digest(str(folder.resolve()))[:16]
    links.mkdir(parents=True, exist_ok=True)
    for old in links.iterdir():
        old.unlink()
    for path in folder.iterdir():
        if path.is_file() and path.name != "sae.safetensors":
            (links / path.name).symlink_to(path.resolve())
    return str(links)


def _save(directions: Mapping[str, Tensor]) -> str | None:
    """A file with the directions, named by its contents for the same reason."""
    if not directions:
        return None
    import torch
    from safetensors.torch import save

    data = save({k: v.detach().to("cpu", torch.float32).contiguous() for k, v in directions.items()})
    path = _cache() / "directions" / f"{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def _lora_arguments(folder: str) -> dict[str, Any]:
    import json

    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise SteerbackError(f"lora {folder!r}: no adapter_config.json there")
    rank = int(json.loads(path.read_text(encoding="utf-8"))["r"])
    return {"enable_lora": True, "max_lora_rank": next((r for r in (8, 16, 32, 64, 128, 256, 512) if r >= rank), rank)}


def _hash_folder(folder: str) -> dict[str, str]:
    from steerback.engines.loading import hash_files

    return hash_files(folder, None)
