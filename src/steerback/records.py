"""The nouns: what is asked of a model, what came back, and what a judge made of it.

Everything here is frozen and plain (no tensors, no I/O), so that a record can be hashed, stored and compared.
Layers are 0-based and name the residual stream *after* that block.
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
FinishReason = Literal["stop", "length", "error", "unknown"]  # unknown: imported, and the file does not say
Status = Literal["scored", "empty", "unscored"]
LatentKey = int | str  # index into the SAE, or the name of a direction where there is no SAE


@dataclass(frozen=True, slots=True)
class Latent:
    """A latent of an SAE (`key` is its index), or a named direction (`key` is its name)."""

    key: LatentKey
    label: str | None = None


@dataclass(frozen=True, slots=True)
class BoostPrior:
    """Threshold boost before any trial: normal(mean, sd) on [low, high], in raw decoder units."""

    mean: float
    sd: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (self.sd > 0 and self.low < self.high and self.low <= self.mean <= self.high):
            raise SteerbackError(f"boost_prior {asdict(self)}: needs sd > 0 and low <= mean <= high, low < high")


LEAST_TEMPERATURE = 1e-4
"""Of what is not greedy: logits divided by much less leave float32's range, and at this one all is greedy anyway."""


def is_temperature(value: float) -> bool:
    """Whether tokens can be drawn at this temperature: 0 (greedy), or finite and at least LEAST_TEMPERATURE."""
    return value == 0 or LEAST_TEMPERATURE <= value < float("inf")


FLOAT32_MAX = 3.4028234663852886e38
"""Engines compute in float32 or less: a larger number would become infinite there."""


@dataclass(frozen=True, slots=True)
class Intervention:
    """One edit of the residual stream.

    add:   h <- h + value * d, with d the latent's decoder direction (raw decoder units) or the named direction.
    clamp: h <- h + (value - z_k(h)) * W_dec[k], z_k from the residual as it arrives, before any addition.
    scale: h <- h + (value - 1) * z_k(h) * W_dec[k]: a clamp of each token to `value` times its own activation.
    `layer` None means the target's steer layer for additions and the layer of its clamps for the other two.
    """

    mode: Mode
    latent: LatentKey
    value: float
    positions: Positions = "all"
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise SteerbackError(f"intervention mode {self.mode!r} is not one of: {', '.join(MODES)}")
        if self.positions not in ("all", "generated", "prompt"):
            raise SteerbackError(f"intervention positions {self.positions!r} is not one of: all, generated, prompt")
        if not abs(self.value) <= FLOAT32_MAX:  # NaN compares false
            raise SteerbackError(f"intervention value {self.value!r} of latent {self.latent!r} is not finite (float32)")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy."""

    temperature: float = 0.6
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recording:
    """Which latents' activations to keep, at `layer` (None: the target's read layer).

    Recorded is z_k of the residual as it arrives, before clamps and additions of that layer.
    """

    latents: tuple[int, ...]
    layer: int | None = None


@dataclass(frozen=True, slots=True)
class Prefix:
    """The exact tokens with which a response begins and which the model continues; `text` is what they decode to."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """All an engine needs to produce one response; `key` identifies it in what comes back."""

    key: str
    prompt: str  # the user message as the model sees it (object-level prompt and meta-prompt)
    seed: int
    sampling: Sampling = Sampling()
    interventions: tuple[Intervention, ...] = ()
    prefill: str = ""  # assistant text the model continues; part of the prompt, not of the completion
    system: str | None = None
    record: Recording | None = None
    prefix: Prefix | None = None  # comes after `prefill`; its last token counts as generated, as it draws the next one

    def content_hash(self) -> str:
        """SHA-256 of everything that shapes the response except the engine (the key is left out)."""
        body = asdict(self)
        del body["key"]
        if self.prefix is None:  # cache keys of requests without one stay what they were before there were any
            del body["prefix"]
        return digest(body)

    def boundary(self, prompt: int) -> int:
        """Return the first position whose edits are those of generated positions, in a prompt of `prompt` tokens."""
        return prompt if self.prefix is None else prompt - 1


@dataclass(frozen=True, slots=True)
class Receipt:
    """What an engine really did to one response, counted where the edit happens.

    `prompt_positions` and `generated_positions` count distinct positions at which an intervention was applied;
    `added_norm` is the mean L2 norm of what was added per such position (0 where nothing was).
    """

    prompt_positions: int = 0
    generated_positions: int = 0
    added_norm: float = 0.0

    @property
    def positions(self) -> int:
        return self.prompt_positions + self.generated_positions


def touched(interventions: tuple[Intervention, ...]) -> tuple[bool, bool]:
    """Whether `interventions` edit positions of the prompt, and generated ones."""
    kinds = {i.positions for i in interventions}
    return bool(kinds & {"all", "prompt"}), bool(kinds & {"all", "generated"})


def touched_positions(
    phases: tuple[bool, bool], prompt: int, generated: int, continued: bool = False
) -> tuple[int, int]:
    """Prompt and generated positions that edits of these phases (`touched`) must have reached.

    The last generated token is never fed back, so `all` expects prompt + generated - 1 positions in total. In a
    response that was `continued` from a prefix, the last position of the prompt counts as generated.
    """
    in_prompt, in_generated = phases
    return (prompt - continued if in_prompt else 0, max(generated - 1 + continued, 0) if in_generated else 0)


def expected_positions(
    interventions: tuple[Intervention, ...], prompt: int, generated: int, continued: bool = False
) -> tuple[int, int]:
    """Prompt and generated positions that `interventions` must have touched (`touched_positions`)."""
    return touched_positions(touched(interventions), prompt, generated, continued)


@dataclass(frozen=True, slots=True)
class Completion:
    """A response: `text` is what was generated after prompt and prefill.

    `activations` (when recorded) has shape (prompt_tokens + fed-back generated tokens, n recorded latents) and
    takes no part in comparisons.
    """

    text: str
    token_ids: tuple[int, ...] = field(repr=False)
    prompt_tokens: int
    finish: FinishReason
    receipt: Receipt
    activations: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)

    def receipt_matches(self, interventions: tuple[Intervention, ...], continued: bool = False) -> bool:
        """Whether every planned position was edited, and no other; `continued`: the response began with a prefix."""
        wanted = expected_positions(interventions, self.prompt_tokens, len(self.token_ids), continued)
        return wanted == (self.receipt.prompt_positions, self.receipt.generated_positions)


@dataclass(frozen=True, slots=True)
class Trial:
    """One planned response: what is needed to regenerate it, and what the judge is told about it.

    `prompt` is the object-level prompt alone; `meta_prompt` is appended after it for the model and never shown
    to the judge. `label` is the steering label the judge sees (in no-steering runs the one the trial would have
    had). `latent` clusters trials for the statistics even where nothing is steered.
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
        """The text of the response that was handed to the model: prefill, then prefix."""
        return self.prefill + (self.prefix.text if self.prefix is not None else "")

    @property
    def boost(self) -> float | None:
        """Boost of the latent, in raw decoder units: the sum of its additions, 0 if it is not added.

        In a continued response only what is added to the continuation counts. None for a trial without a latent.
        """
        if self.latent is None:
            return None
        past = ("prompt",) if self.prefix is not None else ()
        own = (i for i in self.interventions if i.mode == "add" and i.latent == self.latent and i.positions not in past)
        return float(sum(i.value for i in own))

    def request(self, sampling: Sampling) -> Request:
        """The engine's view of this trial; the tokens of a prefix count towards the limit of new tokens."""
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
    """One attempt at the prompt: characters [start, end) of the response, scored 0-100.

    `phrase` is the restart phrase that opens it ("" for the first attempt).
    `gated` says whether that phrase really opens the span (always true for the first attempt).
    """

    start: int
    end: int
    score: float
    phrase: str = ""
    gated: bool = True


@dataclass(frozen=True, slots=True)
class Judgement:
    """One judge's verdict on one response. Never 0 by default: *unscored* has a reason instead of attempts.

    `over_budget` marks a response that was not sent because the judge's budget is spent; such a verdict is not stored.
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
        """Attempts after gating: one whose restart phrase does not open its span is merged into the one before.

        The merged attempt's score is the length-weighted mean of its parts, as it covers both texts.
        """
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
    """A judge's relevance scores (0-100) of the windows of one response, which begin at characters `starts`.

    Without scores there is a `reason`. `over_budget`: the response was not sent; such a result is not stored.
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
    """Calls and tokens that were spent or are estimated; `cost` in USD, None if the price is unknown."""

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
    """Five or more identical consecutive words (split on whitespace), the specification's mark of degradation.

    As in the authors' code, words of one character (`- - - - -`) do not count.
    """
    words = text.split()
    if b"\1\1\1\1" not in bytes(map(eq, words, words[1:])):  # equal to the next word, four times in a row
        return False
    return b"\1\1\1\1" in bytes(a == b and len(a) > 1 for a, b in pairwise(words))


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value in canonical form (sorted keys, no spaces, exact floats)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_plain)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if hasattr(value, "__dataclass_fields__"):
        return asdict(value)
    raise TypeError(f"cannot hash a {type(value).__name__}")
