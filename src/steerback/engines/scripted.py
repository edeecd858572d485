"""Fake engine: a function or a planted model writes the responses, with the same receipts as a real engine.

It runs whole pipelines in milliseconds, has known true rates and can simulate failures. It needs neither torch nor a
model. `judging.scripted` reads the true scores from the text.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import math
import random
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from steerback.engines.base import Arriving, EngineRecord
from steerback.engines.checks import check_sampling
from steerback.errors import SteerbackError
from steerback.records import Completion, LatentKey, Prefix, Receipt, Request, digest, expected_positions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from steerback.engines.base import Over, Pooling, ReadAt

RESTART = "Wait, that is not right."
"""First words of each planted second attempt."""


@dataclass(frozen=True)
class PlantedModel:
    """A model with known resistance: marks in the text such as `[[score 43.0]]` contain the true scores.

    The first score falls from `unsteered` to 100 - `unsteered` along a logistic of the boost, with its midpoint at the
    latent's threshold. `slope` is the scale of the logistic in boost units, `spread` the sd of the noise. A steered
    response restarts with probability `restart_rate`. The second attempt then scores higher with probability
    `success_rate`, else lower. Clamping all `detectors` multiplies the restart rate by 1 - `ablation_effect`; clamping
    some of them has a proportional effect. In recordings, `detectors` are active at the `lead` words before a restart,
    and `backtrackers` within its phrase. Each text of `prompt_factors` that occurs in the prompt multiplies the restart
    rate by its factor.
    """

    thresholds: Mapping[LatentKey, float] = field(default_factory=dict)
    threshold: float = 10.0
    slope: float = 2.0
    spread: float = 10.0
    unsteered: float = 95.0
    restart_rate: float = 0.2
    success_rate: float = 0.8
    detectors: tuple[int, ...] = ()
    ablation_effect: float = 0.5
    lead: int = 4
    backtrackers: tuple[int, ...] = ()
    prompt_factors: Mapping[str, float] = field(default_factory=dict)
    degraded_rate: float = 0.0
    empty_rate: float = 0.0
    unscored_rate: float = 0.0

    def mean_first_score(self, latent: LatentKey | None, boost: float) -> float:
        """Return the expected first score, without noise and clipping."""
        if latent is None:
            return self.unsteered
        x = (boost - self.thresholds.get(latent, self.threshold)) / self.slope
        low = 100 - self.unsteered
        return low + (self.unsteered - low) * (1 - 1 / (1 + math.exp(-max(min(x, 50), -50))))

    def restart_probability(self, request: Request) -> float:
        """Return the probability that the response to this request restarts; 0 without an addition."""
        if all(i.mode != "add" or i.value == 0 for i in request.interventions):
            return 0.0
        lost = {i.latent: 1 - i.value if i.mode == "scale" else 1.0 for i in request.interventions if i.mode != "add"}
        share = sum(lost.get(k, 0.0) for k in self.detectors) / len(self.detectors) if self.detectors else 0.0
        rate = self.restart_rate * (1 - self.ablation_effect * share)
        for text, factor in self.prompt_factors.items():
            rate *= factor if text in request.prompt else 1.0
        return min(rate, 1.0)

    def __call__(self, request: Request) -> str:
        added = next((i for i in request.interventions if i.mode == "add"), None)
        latent, boost = (None, 0.0) if added is None else (added.latent, added.value)
        # Draws depend only on seed and latent, so conditions that replay both differ only in the planted effect.
        draw = random.Random(f"{request.seed}/{latent}")
        noise, u_restart, u_success, u_other = draw.gauss(0, self.spread), *(draw.random() for _ in range(3))
        first = min(max(self.mean_first_score(latent, boost) + noise, 0.0), 100.0)
        if u_other < self.empty_rate:
            return "[[empty]] Which one do you mean?"
        if u_other < self.empty_rate + self.unscored_rate:
            return "A response without any mark."
        text = f"[[score {first:.1f}]] On {request.prompt} there is much to say."
        if u_other > 1 - self.degraded_rate:
            text += " stone" * 6
        if u_restart < self.restart_probability(request):
            second = first + (100 - first) * 0.6 if u_success < self.success_rate else first * 0.5
            text += f" {RESTART} [[score {second:.1f}]] On {request.prompt} one begins at the beginning."
        return text


Script = Callable[[Request], str | Completion]
Chosen = Callable[[Request], bool]


class ScriptedEngine:
    """Engine that runs a script: deterministic, in order (or `shuffled` by request hash), with correct receipts.

    `fail_receipts` selects requests that get a wrong receipt, `raise_on` requests that raise SteerbackError.
    `generated` counts completions.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        target: str = "scripted",
        n_latents: int = 1024,
        fail_receipts: Chosen | None = None,
        raise_on: Chosen | None = None,
        shuffled: bool = False,
    ) -> None:
        self.script: Script = PlantedModel() if script is None else script
        self.target, self.n_latents = target, n_latents
        self.fail_receipts, self.raise_on, self.shuffled = fail_receipts, raise_on, shuffled
        self.generated = 0

    @functools.cached_property
    def fingerprint(self) -> str:
        return digest(self.describe())

    def describe(self) -> EngineRecord:
        """Return the settings of the planted model, or the name of the script."""
        script = self.script
        settings = {k: str(v) for k, v in asdict(script).items()} if isinstance(script, PlantedModel) else None
        name = f"{getattr(script, '__module__', '')}.{getattr(script, '__qualname__', type(script).__qualname__)}"
        return {"engine": "scripted", "target": self.target, "script": settings or name, "n_latents": self.n_latents}

    async def generate(
        self, requests: Sequence[Request], more: Arriving | None = None
    ) -> AsyncIterator[tuple[str, Completion]]:
        """Yield (key, completion). Raises SteerbackError for a latent out of range or a repeated key."""
        pool = self._ordered(requests)
        arrival = None if more is None else asyncio.ensure_future(more())
        try:
            while pool or arrival is not None:
                await asyncio.sleep(0)  # let other tasks run, as a real engine does
                if more is not None and arrival is not None and (arrival.done() or not pool):
                    arrived = await arrival
                    arrival = None if arrived is None else asyncio.ensure_future(more())
                    pool = self._ordered([*pool, *(arrived or ())])
                    continue
                request = pool.pop(0)
                if self.raise_on is not None and self.raise_on(request):
                    raise SteerbackError(f"request {request.key!r}: scripted failure")
                self.generated += 1
                yield request.key, self._complete(request)
        finally:
            if arrival is not None:
                arrival.cancel()

    def _ordered(self, requests: Sequence[Request]) -> list[Request]:
        if len({r.key for r in requests}) != len(requests):
            raise SteerbackError("two requests have the same key")
        for request in requests:
            check_sampling(f"request {request.key!r}", request.sampling)
            named = [i.latent for i in request.interventions] + list(request.record.latents if request.record else ())
            for latent in named:
                if isinstance(latent, int) and not 0 <= latent < self.n_latents:
                    raise SteerbackError(f"request {request.key!r}: latent {latent} is outside 0..{self.n_latents - 1}")
        return sorted(requests, key=lambda r: _seed(r.key)) if self.shuffled else list(requests)

    def _complete(self, request: Request) -> Completion:
        text = self.script(request)
        if isinstance(text, Completion):
            return text
        tokens = tuple(_seed(word) % 50_000 for word in text.split()) or (0,)
        prompt = len(f"{request.system or ''} {request.prompt} {request.prefill}".split()) + 4  # like a chat template
        continued = request.prefix is not None
        prompt += len(request.prefix.token_ids) if request.prefix is not None else 0
        before, after = expected_positions(request.interventions, prompt, len(tokens), continued)
        norm = math.sqrt(sum(i.value**2 for i in request.interventions if i.mode == "add"))
        if self.fail_receipts is not None and self.fail_receipts(request):
            before, after, norm = 0, 0, 0.0
        return Completion(
            text=text,
            token_ids=tokens,
            prompt_tokens=prompt,
            finish="stop",
            receipt=Receipt(before, after, norm if before + after else 0.0),
            activations=self._recorded(request, text, prompt, prompt + len(tokens) - 1),
        )

    def _recorded(self, request: Request, text: str, prompt: int, length: int) -> NDArray[np.float32] | None:
        if request.record is None:
            return None
        import numpy as np

        latents = request.record.latents
        columns = [_sparse(f"{request.content_hash()}/{latent}", length, 0.1) for latent in latents]
        values = np.stack(columns, axis=1) if columns else np.zeros((length, 0), dtype=np.float32)
        if isinstance(self.script, PlantedModel) and RESTART in text:
            at = prompt + len(text[: text.index(RESTART)].split())
            values[max(at - self.script.lead, 0) : at, np.isin(latents, self.script.detectors)] += 2.0
            values[at : at + len(RESTART.split()), np.isin(latents, self.script.backtrackers)] += 2.0
        return values

    def activations(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        latents: Sequence[int] | None = None,
        over: Over = "response",
        pool: Pooling = "max",
        at: ReadAt = "read",
    ) -> NDArray[np.float32]:
        """Return sparse noise from the texts; planted detectors are active if a response does not match its prompt.

        A latent that is active in a text is active at a tenth of its tokens.
        """
        import numpy as np

        detectors = self.script.detectors if isinstance(self.script, PlantedModel) else ()
        values = np.zeros((len(prompts), self.n_latents), dtype=np.float32)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            text = response if over == "response" else f"{prompt} {response}"
            values[row] = _sparse(text, self.n_latents, 0.02) if text.strip() else 0.0
            if response:
                values[row, list(detectors)] = 0.0 if prompt in response else 2.0 + values[row, list(detectors)]
        if pool == "active":
            values = (values > 0).astype(np.float32)
        if pool != "max":
            values *= np.float32(0.1)
        return values if latents is None else values[:, list(latents)]

    def decoder_norms(self) -> NDArray[np.float32]:
        """Return ones: all directions have length 1."""
        import numpy as np

        return np.ones(self.n_latents, dtype=np.float32)

    def token_ends(self, completion: Completion, prefix: Prefix | None = None) -> list[int]:
        """Return the end of each word; words are the tokens of this engine."""
        return [word.end() for word in re.finditer(r"\S+", completion.text)] or [len(completion.text)]

    def close(self) -> None:
        """Do nothing; there is no model to release."""


@functools.lru_cache(100_000)
def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _sparse(text: str, n: int, density: float) -> NDArray[np.float32]:
    import numpy as np

    draw = np.random.default_rng(_seed(text))
    values: NDArray[np.float32] = draw.exponential(1.0, n).astype(np.float32)
    return values * (draw.random(n) < density).astype(np.float32)
