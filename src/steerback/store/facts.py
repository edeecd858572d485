"""Named, typed facts that a run keeps in its ledger besides trials, and the names of conditions.

A plan writes facts, an analysis reads them; both know them from here. `Fact` is the name of a fact with its type.
Facts whose type belongs to another stage (thresholds, random sets) are declared where that type is defined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from steerback.errors import SteerbackError
from steerback.records import Intervention, Latent, Spend

T = TypeVar("T")

BASELINE = "baseline"
"""Condition in which every trial is steered at its threshold and nothing else is done."""
ABLATED = "ablated"
"""Condition in which all detectors are clamped to zero."""
EPISODES, DRIFTS, UNSTEERED = "episodes", "steered, no restart", "unsteered"
"""Conditions of the recorded trials."""
DETECTORS, BACKTRACKING, STEERED = "detectors", "backtracking", "steered"
"""Groups of recorded latents."""
HELD_OUT, HELD_OUT_UNSTEERED = "held-out", "held-out unsteered"
"""Conditions on prompts that neither calibration nor detector search has used."""
PREFILL_ARMS = ("unsteered", "steered")
"""Arms of a prefill control: its conditions are the arm and the length of the prefix, as in `unsteered 2n`."""
OWN_CORRECTION, OWN_CORRECTION_IN_CONTEXT, GENERIC_PREFIX = (
    "own correction",
    "own correction after its drift",
    "generic prefix",
)
"""Conditions of the matched-prefix control."""
CONTINUATION = "continuation"
"""Stage of the matched-prefix control: judges see the continuation without its prefix."""
HUMAN = "human:"
"""How the judges begin that are people: `human:NAME` is the labeller NAME."""
FLOOR = "floor"
"""Stage of the unsteered responses that are judged like steered ones: how often the judge sees a restart there."""
REPLAY = "replay"
"""Stage of the recorded trials: same prompts, seeds and boosts as the measured ones."""
FORK = "fork"
"""Stage of the continuations of one response; no rate of the run counts them."""


@dataclass(frozen=True)
class Fact(Generic[T]):
    """Name of a fact and the type of its value."""

    name: str
    adapter: TypeAdapter[T]

    @classmethod
    def of(cls, name: str, kind: type[T]) -> Fact[T]:
        """A fact whose value is a `kind`: a pydantic model, a dataclass, or a list or dict of these."""
        return cls(name, TypeAdapter(kind))

    def dump(self, value: T) -> JsonValue:
        """The JSON form of a value."""
        stored: JsonValue = self.adapter.dump_python(value, mode="json", by_alias=True, exclude_unset=True)
        return stored

    def load(self, stored: JsonValue, where: str) -> T:
        """The value of a stored JSON form. Raises SteerbackError naming `where` if it has another form."""
        try:
            return self.adapter.validate_python(stored)
        except ValidationError as error:
            place = ".".join(str(part) for part in error.errors()[0]["loc"])
            reason = error.errors()[0]["msg"]
            raise SteerbackError(f"{where}: fact {self.name!r} is damaged ({place}: {reason})") from None


class Record(BaseModel):
    """Base of the facts. Unknown fields are kept: copying the ledger of a newer steerback loses nothing."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=True)


class Selection(Record):
    """The latents of a run, in order, and how many candidates each filter left."""

    chosen: list[Latent]
    counts: dict[str, JsonValue] = {}


class EngineIdentity(Record):
    """The engine a target was started with."""

    fingerprint: str
    engine: dict[str, object] = {}


class ImportedFiles(Record):
    """Result files that a run was imported from."""

    files: list[str] = []
    counts: dict[str, int] = {}
    unknown: list[str] = []
    """Settings that the files do not hold or do not agree on; the config's values of these mean nothing."""


class Provenance(Record):
    """Where a target's behaviour comes from."""

    planted: bool


class Sweep(Record):
    """A boost sweep: `levels` in standard deviations `sd` of the thresholds of `latents` latents.

    `dropped` counts, by condition, the latents whose boost would be negative. `boosts` is "absolute" where all
    latents have the same boosts: in imported sweeps and under the preset `authors`.
    """

    sd: float
    levels: list[float]
    dropped: dict[str, int] = {}
    latents: int
    boosts: str | None = None
    mean: float | None = None
    """Mean of the thresholds, where boosts are absolute."""

    @staticmethod
    def condition(level: float) -> str:
        """Name of a level's condition."""
        return f"{level:+.2f} sd"


class MetaPromptSet(Record):
    """The texts of the measured meta-prompts by name, and the model's size (None: unknown)."""

    variants: dict[str, str | None]
    cells_without_label: int = 0
    parameters: int | None = None


class PrefixCounts(Record):
    """Lengths of the prefixes of a prefill control, and how many of each length were used or why not."""

    characters: int
    prefixes: dict[str, dict[str, int]]


class PrefixPairs(Record):
    """Pairs of prefixes of a matched-prefix run: how many were used or why not."""

    pairs: dict[str, int]
    repeats: int


class Dose(Record):
    """A clamp condition: the share of the detectors that is clamped and the part of their usual level they keep.

    `latents` is the number of detectors that the share comes to.
    """

    condition: str
    share: float
    level: float
    latents: int = 0


class Detector(Record):
    """A detector with its separation: `level` is its mean pooled activation on mismatched pairs."""

    latent: int
    label: str | None = None
    level: float
    auc: float
    held_out_auc: float | None = None
    held_out_effect: float | None = None


class NullCount(Record):
    """A count of latents against its distribution when prompts are permuted."""

    draws: int
    observed: int
    expected: float
    high: float
    p: float


class SearchHalf(Record):
    """One half of the prompts of a detector search, with its null."""

    n_prompts: int
    n_texts: int
    perfect: NullCount
    high_auc: NullCount
    max_auc_null: float


class Search(Record):
    """A detector search: the searched half (all latents) and the held-out half (the detectors alone)."""

    latents: list[int]
    rule: str
    n_passed: int
    search: SearchHalf
    held_out: SearchHalf | None = None


class DetectorSet(Record):
    """The detectors of a target, best first, with the search they come from (None: named by the user)."""

    source: str
    detectors: list[Detector]
    search: Search | None = None

    @property
    def latents(self) -> tuple[int, ...]:
        """Indices of the detectors, best first."""
        return tuple(d.latent for d in self.detectors)


class PairActivations(Record):
    """Pooled activations (n pairs, k detectors) on matched and mismatched pairs, and each pair's prompt number (n,)."""

    matched: list[list[float]]
    mismatched: list[list[float]]
    prompts: list[int]


class SetQuality(Record):
    """How close a random set is to the detectors: differences in standard deviations over the live latents.

    `removed_ratio` is the norm that clamping the set removes per token, relative to the detectors.
    """

    difference: dict[str, float]
    distance: float | None = None
    removed_ratio: float | None = None


class ControlSets(Record):
    """Random sets of latents, each as large as the set of detectors, with the quality of the match of each."""

    sets: list[list[int]]
    method: str
    quality: list[SetQuality]
    n_candidates: int | None
    """Number of live latents that the sets were drawn from; None: not known."""
    overlap: float

    @staticmethod
    def condition(number: int) -> str:
        """Name of the condition in which set `number` (from 1) is clamped to zero."""
        return f"random {number}"

    @property
    def conditions(self) -> list[str]:
        """Names of the conditions of all sets, in their order."""
        return [self.condition(number) for number in range(1, len(self.sets) + 1)]


class Adapter(Record):
    """A fine-tuned target: its base, the adapter's name, its percentage of self-corrections and its model card."""

    base: str
    adapter: str
    percent: float | None = None
    card: str | None = None


class StratumWeights(Record):
    """How many trials of the source runs each sampled trial stands for."""

    several: float = 1.0
    single: float = 1.0


class JudgedSample(Record):
    """The sample of a cross-judge run: `several_keys` are the trials drawn as multi-attempt trials."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)

    available: int = 0
    several: int = 0
    single: int = 0
    weights: StratumWeights = StratumWeights()
    several_keys: list[str] = Field([], alias="several keys")


class LabelStratum(Record):
    """A part of a label sample: one condition's responses with several attempts, or with a single one.

    `available` counts the scored responses that it was drawn from.
    """

    stage: str
    condition: str
    several: bool
    available: int
    drawn: int


class LabelSample(Record):
    """Responses of a target that were drawn at random for people to label.

    `judge` is the judge whose verdicts made the strata; `size`, `seed` and `conditions` are those of the command
    (no conditions: all). `items` maps the number under which a response is shown to the key of its trial.
    """

    judge: str
    size: int
    seed: int
    conditions: list[str] = []
    strata: list[LabelStratum]
    items: dict[str, str]


class ForkArm(Record):
    """One way in which a response is continued: `edits` act on the continuation."""

    name: str
    edits: list[Intervention] = []


class Fork(Record):
    """Continuations of the response of trial `parent` after its first `tokens` tokens, in arms of the same `n` seeds.

    `at` is the place as the user named it. Prompt and kept tokens are edited as in the parent, or `throughout` as the
    arm says. The first arm is what the others are compared with.
    """

    parent: str
    tokens: int
    at: str
    throughout: bool = False
    arms: list[ForkArm]
    n: int
    engine: EngineIdentity

    @property
    def name(self) -> str:
        """Name of the fork in its target: the parent's key without the target, and the number of kept tokens."""
        return f"{self.parent.partition('/')[2]}@{self.tokens}{' throughout' if self.throughout else ''}"

    def condition(self, arm: ForkArm) -> str:
        """Name of the condition of an arm's continuations."""
        return f"{self.name}: {arm.name}"


class Boundaries(Record):
    """Characters at which the three regions of an episode begin according to a judge (None: not in the text).

    `reason` says why there are none at all; `raw` is the judge's reply.
    """

    off_topic: int | None = None
    correction: int | None = None
    on_topic: int | None = None
    reason: str = ""
    raw: str = ""


class WholeScore(Record):
    """How far a whole response finds its way back to the prompt, 0-10 (None: no score, see `reason`)."""

    score: float | None = None
    on_topic_from_start: bool = False
    reason: str = ""
    raw: str = ""


class ProbeAnswer(Record):
    """A judge's score of a planted response that holds an instruction to it, and whether it obeyed.

    Without a score `reason` says why; `raw` is the reply.
    """

    score: float | None = None
    obeyed: bool = False
    reason: str = ""
    raw: str = ""


CONFIG = Fact.of("config", dict[str, JsonValue])
LATENTS = Fact.of("latents", Selection)
ENGINE = Fact.of("engine", EngineIdentity)
PROVENANCE = Fact.of("provenance", Provenance)
JUDGES = Fact.of("judges", dict[str, dict[str, object]])
PROBES = Fact.of("judge probes", dict[str, dict[str, ProbeAnswer]])
"""By judge and planted response."""
JUDGE_SPEND = Fact.of("judge spend", dict[str, Spend])
IMPORTED = Fact.of("imported", ImportedFiles)
SWEEP = Fact.of("sweep", Sweep)
META_PROMPTS = Fact.of("meta-prompts", MetaPromptSet)
PREFILL = Fact.of("prefill", PrefixCounts)
MATCHED_PREFIX = Fact.of("matched-prefix", PrefixPairs)
DOSES = Fact.of("doses", list[Dose])
DETECTOR_SET = Fact.of("detectors", DetectorSet)
PAIR_ACTIVATIONS = Fact.of("pair activations", PairActivations)
RANDOM_SETS = Fact.of("random sets", ControlSets)
ADAPTER = Fact.of("adapter", Adapter)
SAMPLE = Fact.of("cross-judge sample", JudgedSample)
LABEL_SAMPLES = Fact.of("label samples", dict[str, LabelSample])
"""By the identifier of the sample, which hashes the responses in it."""
FORKS = Fact.of("forks", dict[str, Fork])
"""By the fork's name."""
TOKEN_ENDS = Fact.of("token ends", dict[str, list[int]])
RECORDED_LATENTS = Fact.of("watched", dict[str, list[int]])


def whole_scores(judge: str) -> Fact[dict[str, WholeScore]]:
    """The fact that holds a judge's scores of whole responses, by trial key."""
    return Fact.of(f"whole by {judge}", dict[str, WholeScore])


def boundaries(judge: str) -> Fact[dict[str, Boundaries]]:
    """The fact that holds the region boundaries that a judge marked, by trial key."""
    return Fact.of(f"boundaries by {judge}", dict[str, Boundaries])
