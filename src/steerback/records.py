"""Records of the package: requests, responses, trials and verdicts.

All records are immutable and plain (no tensors, no I/O), so that they can be hashed, stored and compared.
Layers are 0-based. Layer n is the residual stream after block n.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from operator import eq
from typing import TYPE_CHECKING, Any, Literal, get_args

from steerback.errors import SteerbackError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Mode = Literal["add", "clamp", "scale"]
MODES = get_args(Mode)
Positions = Literal["all", "generated", "prompt"]
FinishReason = Literal["stop", "length", "error", "unknown"]  # unknown: imported from a file without this field
Status = Literal["scored", "empty", "unscored"]
LatentKey = int | str  # index of an SAE latent, or name of a direction


@dataclass(frozen=True, slots=True)
class Latent:
    """A latent of an SAE (`key` is its index), or a named direction (`key` is its name)."""

    key: LatentKey
    label: str | None = None


@dataclass(frozen=True, slots=True)
class BoostPrior:
    """Prior distribution of the threshold boost: normal(mean, sd) on [low, high], in raw decoder units."""

    mean: float
    sd: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (self.sd > 0 and self.low < self.high and self.low <= self.mean <= self.high):
            raise SteerbackError(f"boost_prior {asdict(self)}: must have sd > 0, low < high and low <= mean <= high")


LEAST_TEMPERATURE = 1e-4
"""Smallest temperature above 0. Logits divided by much less overflow float32; sampling is practically greedy here."""


def is_temperature(value: float) -> bool:
    """Return True for a valid temperature: 0 (greedy), or finite and at least LEAST_TEMPERATURE."""
    return value == 0 or LEAST_TEMPERATURE <= value < float("inf")


FLOAT32_MAX = 3.4028234663852886e38
"""Largest value of an intervention. Engines compute in float32 or less, where larger values are infinite."""


@dataclass(frozen=True, slots=True)
class Intervention:
    """One edit of the residual stream.

    add:   h <- h + value * d, with d the latent's decoder direction (raw decoder units) or the named direction.
    clamp: h <- h + (value - z_k(h)) * W_dec[k], with z_k of the residual before any addition.
    scale: h <- h + (value - 1) * z_k(h) * W_dec[k], which multiplies the activation of each token by `value`.
    `layer` None: the target's steer layer for additions, its clamp layer for clamp and scale.
    """

    mode: Mode
    latent: LatentKey
    value: float
    positions: Positions = "all"
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SteerbackError(f"unknown intervention mode {self.mode!r}; choose one of: {', '.join(MODES)}")
        if self.positions not in ("all", "generated", "prompt"):
            raise SteerbackError(f"unknown intervention positions {self.positions!r}; choose all, generated or prompt")
        if not abs(self.value) <= FLOAT32_MAX:  # also True for NaN
            raise SteerbackError(f"intervention value {self.value!r} of latent {self.latent!r} is not finite (float32)")


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters. Temperature 0 means greedy decoding."""

    temperature: float = 0.6
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recording:
    """Latents whose activations are recorded at `layer` (None: the target's read layer).

    The recorded value is z_k of the residual before clamps and additions of that layer.
    """

    latents: tuple[int, ...]
    layer: int | None = None


@dataclass(frozen=True, slots=True)
class Prefix:
    """Exact first tokens of a response, which the model continues. `text` is their decoded text."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """Input of an engine for one response. `key` identifies the response."""

    key: str
    prompt: str  # complete user message (object-level prompt and meta-prompt)
    seed: int
    sampling: Sampling = Sampling()
    interventions: tuple[Intervention, ...] = ()
    prefill: str = ""  # assistant text that the model continues; part of the prompt, not of the completion
    system: str | None = None
    record: Recording | None = None
    prefix: Prefix | None = None  # follows `prefill`; its last token counts as generated: it predicts the next one

    def content_hash(self) -> str:
        """Return the SHA-256 of all fields that affect the response (all except `key`)."""
        body = _fields(self)
        del body["key"]
        if self.prefix is None:  # keeps the cache keys of versions without this field valid
            del body["prefix"]
        return digest(body)

    def boundary(self, prompt: int) -> int:
        """Return the first position that counts as generated, for a prompt of `prompt` tokens."""
        return prompt if self.prefix is None else prompt - 1


@dataclass(frozen=True, slots=True)
class Receipt:
    """Edits that an engine applied to one response, counted at the point of the edit.

    `prompt_positions` and `generated_positions` are numbers of distinct edited positions. `added_norm` is the mean L2
    norm of the added vector per edited position (0 without edits).
    """

    prompt_positions: int = 0
    generated_positions: int = 0
    added_norm: float = 0.0

    @property
    def positions(self) -> int:
        return self.prompt_positions + self.generated_positions


def touched(interventions: tuple[Intervention, ...]) -> tuple[bool, bool]:
    """Return two flags: `interventions` edit prompt positions, and they edit generated positions."""
    kinds = {i.positions for i in interventions}
    return bool(kinds & {"all", "prompt"}), bool(kinds & {"all", "generated"})


def touched_positions(
    phases: tuple[bool, bool], prompt: int, generated: int, continued: bool = False
) -> tuple[int, int]:
    """Return the expected numbers of edited prompt and generated positions, for the flags of `touched`.

    The last generated token is never fed back, so `all` expects prompt + generated - 1 positions in total. If the
    response was `continued` from a prefix, the last position of the prompt counts as generated.
    """
    in_prompt, in_generated = phases
    return (prompt - continued if in_prompt else 0, max(generated - 1 + continued, 0) if in_generated else 0)


def expected_positions(
    interventions: tuple[Intervention, ...], prompt: int, generated: int, continued: bool = False
) -> tuple[int, int]:
    """Return the numbers of prompt and generated positions that `interventions` must edit (`touched_positions`)."""
    return touched_positions(touched(interventions), prompt, generated, continued)


@dataclass(frozen=True, slots=True)
class Completion:
    """A response. `text` is the generated text, without prompt and prefill.

    `activations`, if recorded, have the shape (prompt_tokens + fed-back generated tokens, recorded latents). They are
    ignored when records are compared.
    """

    text: str
    token_ids: tuple[int, ...] = field(repr=False)
    prompt_tokens: int
    finish: FinishReason
    receipt: Receipt
    activations: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)

    def receipt_matches(self, interventions: tuple[Intervention, ...], continued: bool = False) -> bool:
        """Return True if all planned positions were edited and no others. `continued`: the response has a prefix."""
        wanted = expected_positions(interventions, self.prompt_tokens, len(self.token_ids), continued)
        return wanted == (self.receipt.prompt_positions, self.receipt.generated_positions)


@dataclass(frozen=True, slots=True)
class Trial:
    """Plan of one response: the inputs of the engine and of the judge.

    `prompt` is the object-level prompt. `meta_prompt` is appended to it for the model; the judge does not see it.
    `label` is the label of the steering latent that the judge sees, also in runs without steering. `latent` is the
    cluster of the trial in the statistics, also without steering.
    """

    key: str  # "<target>/<stage>/<condition>/<index>", unique in a run
    target: str
    stage: (
        str  # "reference", "floor", "calibration", "verification", "measure", "continuation" (judged without prefill)
    )
    condition: str
    index: int
    prompt: str
    seed: int
    latent: LatentKey | None = None
    label: str | None = None
    meta_prompt: str = ""
    prefill: str = ""
    interventions: tuple[Intervention, ...] = ()
    record: Recording | None = None
    prefix: Prefix | None = None

    @property
    def lead(self) -> str:
        """Beginning of the response that the model received: prefill, then prefix."""
        return self.prefill + (self.prefix.text if self.prefix is not None else "")

    @property
    def boost(self) -> float | None:
        """Boost of the latent in raw decoder units: the sum of its additions, or 0; None without a latent.

        In a continued response only additions to the continuation count.
        """
        if self.latent is None:
            return None
        past = ("prompt",) if self.prefix is not None else ()
        own = (i for i in self.interventions if i.mode == "add" and i.latent == self.latent and i.positions not in past)
        return float(sum(i.value for i in own))

    def request(self, sampling: Sampling) -> Request:
        """Return the request for the engine. The tokens of a prefix count towards `max_new_tokens`."""
        text = f"{self.prompt} {self.meta_prompt}" if self.meta_prompt else self.prompt
        if self.prefix is not None:
            left = sampling.max_new_tokens - len(self.prefix.token_ids)
            sampling = replace(sampling, max_new_tokens=max(left, 1))
        return Request(
            key=self.key,
            prompt=text,
            seed=self.seed,
            sampling=sampling,
            interventions=self.interventions,
            prefill=self.prefill,
            record=self.record,
            prefix=self.prefix,
        )


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt: characters [start, end) of the response, with a score from 0 to 100.

    `phrase` is the restart phrase at its beginning ("" for the first attempt). `gated` is True if the span really
    starts with that phrase, and for the first attempt.
    """

    start: int
    end: int
    score: float
    phrase: str = ""
    gated: bool = True


@dataclass(frozen=True, slots=True)
class Judgement:
    """Verdict of one judge on one response. An `unscored` verdict has a reason and no attempts; it is not a score of 0.

    `over_budget` marks a response that was not sent because the judge's budget is spent. Such a verdict is not stored.
    """

    judge: str
    rubric: str
    status: Status
    attempts: tuple[Attempt, ...] = ()
    reason: str = ""
    raw: str = ""
    over_budget: bool = False

    def __post_init__(self) -> None:
        if self.status == "scored" and not self.attempts:
            raise ValueError("a scored judgement needs at least one attempt")
        if self.status == "unscored" and not self.reason:
            raise ValueError("an unscored judgement needs a reason")

    def gated_attempts(self) -> tuple[Attempt, ...]:
        """Attempts after gating: an attempt without its restart phrase at the start is merged into the previous one.

        The score of a merged attempt is the mean of its parts, weighted by length.
        """
        if len(self.attempts) < 2:  # most responses of a large ledger
            return self.attempts
        merged: list[Attempt] = []
        for attempt in self.attempts:
            if not merged or attempt.gated:
                merged.append(attempt)
                continue
            before = merged[-1]
            a, b = max(before.end - before.start, 1), max(attempt.end - attempt.start, 1)
            score = (before.score * a + attempt.score * b) / (a + b)
            merged[-1] = Attempt(before.start, attempt.end, score, before.phrase, before.gated)
        return tuple(merged)


@dataclass(frozen=True, slots=True)
class WindowScores:
    """Relevance scores (0 to 100) of the windows of one response. `starts` are their first characters.

    A result without scores has a `reason`. `over_budget`: the response was not sent; such a result is not stored.
    """

    judge: str
    rubric: str
    starts: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    reason: str = ""
    raw: str = ""
    over_budget: bool = False

    def __post_init__(self) -> None:
        if len(self.starts) != len(self.scores):
            raise ValueError("every window needs a start and a score")
        if not self.scores and not self.reason:
            raise ValueError("windows without scores need a reason")


@dataclass(frozen=True, slots=True)
class Spend:
    """Calls and tokens, spent or estimated. `cost` is in USD; None if the price is unknown."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float | None = 0.0

    def __add__(self, other: Spend) -> Spend:
        cost = None if self.cost is None or other.cost is None else self.cost + other.cost
        tokens = (self.input_tokens + other.input_tokens, self.output_tokens + other.output_tokens)
        return Spend(self.calls + other.calls, *tokens, cost)

    def __sub__(self, other: Spend) -> Spend:
        cost = None if self.cost is None or other.cost is None else self.cost - other.cost
        tokens = (self.input_tokens - other.input_tokens, self.output_tokens - other.output_tokens)
        return Spend(self.calls - other.calls, *tokens, cost)

    def __mul__(self, times: int) -> Spend:
        cost = None if self.cost is None else self.cost * times
        return Spend(self.calls * times, self.input_tokens * times, self.output_tokens * times, cost)

    def __str__(self) -> str:
        money = "price unknown (--judge-price IN OUT)" if self.cost is None else f"{self.cost:,.2f} USD"
        return f"{self.calls:,} calls, {self.input_tokens:,} input and {self.output_tokens:,} output tokens, {money}"


def is_degraded(text: str) -> bool:
    """Return True for a text with five or more identical consecutive words, split on whitespace (specification).

    As in the authors' code, words of one character (`- - - - -`) do not count.
    """
    words = text.split()
    if b"\1\1\1\1" not in bytes(map(eq, words, words[1:])):  # equal to the next word, four times in a row
        return False
    return b"\1\1\1\1" in bytes(a == b and len(a) > 1 for a, b in pairwise(words))


def digest(value: Any) -> str:
    """Return the SHA-256 of a value as canonical JSON (sorted keys, no spaces, exact floats)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _fields(record: Any) -> dict[str, Any]:
    # asdict copies them, which takes longer than the hash
    return {name: getattr(record, name) for name in record.__dataclass_fields__}


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if hasattr(value, "__dataclass_fields__"):
        return _fields(value)
    raise TypeError(f"cannot hash a {type(value).__name__}")
