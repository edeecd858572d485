"""Typed facts that a run stores in its ledger besides trials, and the names of conditions, stages and groups.

Plans write facts and analyses read them. `Fact` combines a fact's name with the type of its value. Facts whose type
belongs to another stage (thresholds, random sets) are declared where that type is defined.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from steerback.errors import SteerbackError
from steerback.records import Intervention, Latent, Spend

T = TypeVar("T")

# Conditions: every trial at its threshold; the same with all detectors clamped to zero.
BASELINE, ABLATED = "baseline", "ablated"
# Conditions of the recorded trials.
EPISODES, DRIFTS, UNSTEERED = "episodes", "steered, no restart", "unsteered"
REREAD = "re-read unsteered"  # the authors' baseline: steered single attempts on topic, read again without steering
# Groups of recorded latents.
DETECTORS, BACKTRACKING, STEERED = "detectors", "backtracking", "steered"
# Conditions on prompts that neither calibration nor detector search has used.
HELD_OUT, HELD_OUT_UNSTEERED = "held-out", "held-out unsteered"
# Arms of a prefill control. A condition is named after arm and prefix length, for example `unsteered 2n`.
PREFILL_ARMS = ("unsteered", "steered")
# Conditions of the matched-prefix control.
OWN_CORRECTION, OWN_CORRECTION_IN_CONTEXT = "own correction", "own correction after its drift"
GENERIC_PREFIX = "generic prefix"
CONTINUATION = "continuation"  # stage of the matched-prefix control: judges see the continuation without its prefix
HUMAN = "human:"  # prefix of the names of human judges: `human:NAME` is the labeller NAME
FLOOR = "floor"  # stage of unsteered responses that are judged like steered ones, to measure the judge's floor
REPLAY = "replay"  # stage of the recorded trials, which replay prompts, seeds and boosts of measured ones
FORK = "fork"  # stage of the continuations of one response; the run's rates leave them out


@dataclass(frozen=True)
class Fact(Generic[T]):
    """Name of a fact and the type of its value."""

    name: str
    adapter: TypeAdapter[T]

    @classmethod
    def of(cls, name: str, kind: type[T]) -> Fact[T]:
        """Return a fact with values of type `kind`: a pydantic model, a dataclass, or a list or dict of these."""
        return cls(name, TypeAdapter(kind))

    def dump(self, value: T) -> JsonValue:
        """Return the JSON form of a value."""
        stored: JsonValue = self.adapter.dump_python(value, mode="json", by_alias=True, exclude_unset=True)
        return stored

    def load(self, stored: JsonValue, where: str) -> T:
        """Parse a stored JSON form. Raises SteerbackError that names `where` if it does not match the type."""
        try:
            return self.adapter.validate_python(stored)
        except ValidationError as error:
            place, reason = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
            raise SteerbackError(f"{where}: fact {self.name!r} is damaged ({place}: {reason})") from None


class Record(BaseModel):
    """Base class of the facts. It keeps unknown fields, so copying the ledger of a newer version loses nothing."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=True)


class Selection(Record):
    """Latents of a run in order, and the number of candidates after each filter."""

    chosen: list[Latent]
    counts: dict[str, JsonValue] = {}


class EngineIdentity(Record):
    """Engine that a target was started with."""

    fingerprint: str
    engine: dict[str, object] = {}


class ImportedFiles(Record):
    """Result files that a run was imported from."""

    files: list[str] = []
    counts: dict[str, int] = {}
    unknown: list[str] = []  # settings that the files lack or disagree on; the config's values mean nothing


class Provenance(Record):
    """Origin of a target's behaviour: `planted` for the built-in organisms."""

    planted: bool


class Sweep(Record):
    """Boost sweep: `levels` in standard deviations `sd` of the thresholds of `latents` latents.

    `dropped` counts, by condition, the latents whose boost would be negative. `boosts` is "absolute" if all latents
    have the same boosts (imported sweeps, preset `authors`); `mean` is then the mean threshold.
    """

    sd: float
    levels: list[float]
    dropped: dict[str, int] = {}
    latents: int
    boosts: str | None = None
    mean: float | None = None

    @staticmethod
    def condition(level: float) -> str:
        """Return the name of a level's condition."""
        return f"{level:+.2f} sd"


class MetaPromptSet(Record):
    """Texts of the measured meta-prompts by name, and the number of model parameters (None: unknown)."""

    variants: dict[str, str | None]
    cells_without_label: int = 0
    parameters: int | None = None


class PrefixCounts(Record):
    """Prefixes of a prefill control: for each length, the number used and the number rejected by reason."""

    characters: int
    prefixes: dict[str, dict[str, int]]


class PrefixPairs(Record):
    """Pairs of prefixes of a matched-prefix run: the number used and the number rejected, by reason."""

    pairs: dict[str, int]
    repeats: int


class Dose(Record):
    """Clamp condition of `latents` detectors, the share `share` of all, each clamped to a part `level` of its activity.

    `scaled`: `level` is a part of the activation at each token; otherwise of the detector's mean on mismatched pairs.
    """

    condition: str
    share: float
    level: float
    latents: int = 0
    scaled: bool = False


class Detector(Record):
    """Detector with its separation; `level` is its mean pooled activation on mismatched pairs."""

    latent: int
    label: str | None = None
    level: float
    auc: float
    held_out_auc: float | None = None
    held_out_effect: float | None = None


class NullCount(Record):
    """Observed count of latents and its distribution under permutation of the prompts."""

    draws: int
    observed: int
    expected: float
    high: float
    p: float


class SearchHalf(Record):
    """One half of the prompts of a detector search, with its null distribution."""

    n_prompts: int
    n_texts: int
    perfect: NullCount
    high_auc: NullCount
    max_auc_null: float


class Search(Record):
    """Detector search: the searched half (all latents) and the held-out half (the detectors only)."""

    latents: list[int]
    rule: str
    n_passed: int
    search: SearchHalf
    held_out: SearchHalf | None = None


class DetectorSet(Record):
    """Detectors of a target, best first, and the search that selected them (None: named by the user)."""

    source: str
    detectors: list[Detector]
    search: Search | None = None

    @property
    def latents(self) -> tuple[int, ...]:
        return tuple(d.latent for d in self.detectors)


class PairActivations(Record):
    """Pooled activations (n pairs, k detectors) on matched and mismatched pairs, and each pair's prompt number (n,)."""

    matched: list[list[float]]
    mismatched: list[list[float]]
    prompts: list[int]


class SetQuality(Record):
    """Match of a random set to the detectors: differences in standard deviations over the live latents."""

    difference: dict[str, float]
    distance: float | None = None
    removed_ratio: float | None = None  # norm per token removed by clamping the set, relative to the detectors


class ControlSets(Record):
    """Random sets of latents, each as large as the detector set, and the quality of each match."""

    sets: list[list[int]]
    method: str
    quality: list[SetQuality]
    n_candidates: int | None  # number of live latents that the sets were drawn from; None: unknown
    overlap: float

    @staticmethod
    def condition(number: int) -> str:
        """Return the name of the condition that clamps set `number` (from 1) to zero."""
        return f"random {number}"

    @property
    def conditions(self) -> list[str]:
        """Names of the conditions of all sets, in order."""
        return [self.condition(number) for number in range(1, len(self.sets) + 1)]


class Adapter(Record):
    """Fine-tuned target: base model, adapter name, percentage of self-corrections, and model card."""

    base: str
    adapter: str
    percent: float | None = None
    card: str | None = None


class StratumWeights(Record):
    """Number of trials of the source runs that each sampled trial represents."""

    several: float = 1.0
    single: float = 1.0


class JudgedSample(Record):
    """Sample of a cross-judge run; `several_keys` are the trials drawn as multi-attempt trials."""

    model_config = Record.model_config | ConfigDict(populate_by_name=True)

    available: int = 0
    several: int = 0
    single: int = 0
    weights: StratumWeights = StratumWeights()
    several_keys: list[str] = Field([], alias="several keys")


class LabelStratum(Record):
    """Stratum of a label sample: `drawn` of `available` scored responses of a condition, with one or more attempts."""

    stage: str
    condition: str
    several: bool
    available: int
    drawn: int


class LabelSample(Record):
    """Responses of a target, drawn at random for human labelling.

    The verdicts of `judge` define the strata. `size`, `seed` and `conditions` repeat the command's options (no
    conditions: all). `items` maps the displayed number of a response to its trial key.
    """

    judge: str
    size: int
    seed: int
    conditions: list[str] = []
    strata: list[LabelStratum]
    items: dict[str, str]


class ForkArm(Record):
    """One way to continue a response; `edits` act on the continuation."""

    name: str
    edits: list[Intervention] = []


class Fork(Record):
    """Continuations of the response of trial `parent` after its first `tokens` tokens.

    All arms use the same `n` seeds, and the first arm is the reference of all comparisons. `at` is the place in the
    user's words. Prompt and kept tokens get the parent's edits, or those of the arm if `throughout`.
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
        """Name of the fork within its target: the parent's key without the target, and the number of kept tokens."""
        return f"{self.parent.partition('/')[2]}@{self.tokens}{' throughout' if self.throughout else ''}"

    def condition(self, arm: ForkArm) -> str:
        """Return the name of the condition of an arm."""
        return f"{self.name}: {arm.name}"


class Boundaries(Record):
    """Start characters of an episode's regions, as a judge marked them; `reason` explains None, `raw` is the reply."""

    off_topic: int | None = None
    correction: int | None = None
    on_topic: int | None = None
    reason: str = ""
    raw: str = ""


class RereadActivity(Record):
    """Mean activation per token of `latents` (k,) over responses read again without steering, (k,) by trial key."""

    latents: list[int]
    means: dict[str, list[float]]


class WholeScore(Record):
    """Score 0-10 for how fully a response returns to the prompt (None: unscored, with a reason)."""

    score: float | None = None
    on_topic_from_start: bool = False
    reason: str = ""
    raw: str = ""


class ProbeAnswer(Record):
    """Score of a planted response that gives orders to the judge; `obeyed` if the judge followed them."""

    score: float | None = None
    obeyed: bool = False
    reason: str = ""
    raw: str = ""


CONFIG = Fact.of("config", dict[str, JsonValue])
LATENTS = Fact.of("latents", Selection)
ENGINE = Fact.of("engine", EngineIdentity)
PROVENANCE = Fact.of("provenance", Provenance)
MEASURED = Fact.of("measured", bool)
"""Whether all trials of a target are done."""
JUDGES = Fact.of("judges", dict[str, dict[str, object]])
PROBES = Fact.of("judge probes", dict[str, dict[str, ProbeAnswer]])  # by judge and planted response
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
LABEL_SAMPLES = Fact.of("label samples", dict[str, LabelSample])  # by identifier, a hash of the sampled responses
FORKS = Fact.of("forks", dict[str, Fork])  # by name
TOKEN_ENDS = Fact.of("token ends", dict[str, list[int]])
RECORDED_LATENTS = Fact.of("watched", dict[str, list[int]])
RECORDED_LABELS = Fact.of("watched labels", dict[int, str])
REREAD_ACTIVITY = Fact.of("re-read", RereadActivity)


def whole_scores(judge: str) -> Fact[dict[str, WholeScore]]:
    """Return the fact of a judge's scores of whole responses, by trial key."""
    return Fact.of(f"whole by {judge}", dict[str, WholeScore])


def boundaries(judge: str) -> Fact[dict[str, Boundaries]]:
    """Return the fact of the region boundaries that a judge marked, by trial key."""
    return Fact.of(f"boundaries by {judge}", dict[str, Boundaries])
