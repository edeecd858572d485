"""The authors' result files as typed records. Their texts are untrusted and stay text.

A file is `{experiment_config, results_by_feature: [{feature_index_in_sae, feature_label, threshold, error, trials:
[{prompt, threshold, seed, response, score: {attempts: [{attempt_text, score}]} | {error}, error}]}]}`, with further
keys by experiment. Thresholds are numbers, or in older files objects with a `threshold`; labels of SAEs without labels
are `feature_<index>`. A field of another form than expected counts as missing, unless a run could not be built from it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from steerback.errors import SteerbackError
from steerback.readers import decode, parse_json, read_bytes
from steerback.records import Attempt, FinishReason, Judgement, LatentKey

RUBRIC = "imported"
MODELS = ("llama-3.3-70b", "llama-3.1-8b", "gemma-2-2b", "gemma-2-9b", "gemma-2-27b")
LARGEST = 2**63 - 1
"""The largest whole number that a ledger holds."""

FileKind = Literal["ours", "plain", "variant", "ablated", "unsteered", "sweep"]


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _threshold(value: object) -> float | None:
    number = _number(value.get("threshold") if isinstance(value, Mapping) else value)
    return number if number is not None and math.isfinite(number) else None


def _whole(value: object) -> int | None:
    if not isinstance(value, int):
        return None
    if abs(value) > LARGEST:
        raise ValueError(f"a whole number beyond {LARGEST}")
    return int(value)


def _latent(value: object) -> object:
    valid = 0 <= value <= LARGEST if isinstance(value, int) else isinstance(value, str)
    if not valid or isinstance(value, bool):
        raise ValueError(f"no valid feature_index_in_sae: {value!r}")
    return value


def _object(value: object) -> object:
    return value if isinstance(value, dict) else {}


def _finish(value: object) -> object:
    return value if value in ("length", "stop") else "unknown"


Number = Annotated[float | None, BeforeValidator(_number)]
Boost = Annotated[float | None, BeforeValidator(_threshold)]
Whole = Annotated[int | None, BeforeValidator(_whole)]
Text = Annotated[str, BeforeValidator(lambda value: str(value or ""))]
Flag = Annotated[bool, BeforeValidator(bool)]


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class OwnTrial(_Shape):
    """Fields that our own exports add to a trial."""

    index: Whole = None
    meta_prompt: Annotated[str | None, BeforeValidator(str)] = None
    finish: Annotated[FinishReason, BeforeValidator(_finish)] = "unknown"


class AuthorsTrial(_Shape):
    """One response with its verdict. `score` stays as it is, see `judgement_of`."""

    prompt: Text = ""
    threshold: Boost = None
    seed: Whole = None
    response: Annotated[str | None, BeforeValidator(lambda value: value if isinstance(value, str) else None)] = None
    score: JsonValue = None
    error: JsonValue = None
    steerback: OwnTrial | None = None


class AuthorsFeature(_Shape):
    """One steered latent and its trials."""

    index: Annotated[LatentKey, BeforeValidator(_latent)] = Field(
        None, alias="feature_index_in_sae", validate_default=True
    )
    text: Text = Field("", alias="feature_label")
    threshold: Boost = None
    error: JsonValue = None
    trials: list[AuthorsTrial] | None = None

    @property
    def label(self) -> str | None:
        """The label, or None for the placeholder that the authors' code writes where an SAE has none."""
        return self.text if self.text and self.text != f"feature_{self.index}" else None

    def boost(self, trial: AuthorsTrial) -> float | None:
        """Boost of a trial: its own, or that of the feature if the trial has no such field."""
        return trial.threshold if "threshold" in trial.model_fields_set else self.threshold


class Variant(_Shape):
    """A prompt variant; its template contains {prompt} and {latent_label}."""

    id: Text = Field("", alias="prompt_variant_id")
    template: Text = Field("", alias="prompt_variant_template")


class AuthorsConfig(Variant):
    """Settings of an experiment."""

    model_name: Text = ""
    judge_model_name: Text = ""
    disable_steering: Flag = False
    target_score_normalized: Boost = None
    max_completion_tokens: Whole = None


class ThresholdStatistics(_Shape):
    """Mean and standard deviation of the thresholds, by which a sweep's boosts are normalised."""

    mean: Boost = None
    std: Boost = None


class OwnFile(_Shape):
    """Fields that our own exports add to a file."""

    experiment: Text = ""
    condition: Annotated[str | None, BeforeValidator(str)] = None
    facts: dict[str, JsonValue] | None = None


class AuthorsFile(_Shape):
    """A result file."""

    experiment_config: Annotated[AuthorsConfig, BeforeValidator(_object)] = AuthorsConfig()
    experiment_metadata: Annotated[Variant, BeforeValidator(_object)] = Variant()
    results_by_feature: list[AuthorsFeature]
    ablated_latents: list[Annotated[int, Field(ge=0, le=LARGEST)]] | None = None
    threshold_cache_stats: ThresholdStatistics | None = None
    n_boost_levels: Flag = False
    boost_levels: Flag = False
    steerback: OwnFile | None = None

    @property
    def variant(self) -> Variant:
        """The prompt variant, from the settings or, in older files, from the metadata."""
        new, old = self.experiment_config, self.experiment_metadata
        return Variant(prompt_variant_id=new.id or old.id, prompt_variant_template=new.template or old.template)

    def kind(self) -> tuple[FileKind, str]:
        """Return the kind of experiment and the name of its condition in a ledger."""
        if self.steerback is not None and self.steerback.condition is not None:
            return "ours", self.steerback.condition
        if self.experiment_config.disable_steering:
            return "unsteered", "unsteered"
        if self.ablated_latents:
            return "ablated", "ablated"
        if self.n_boost_levels or self.boost_levels:
            return "sweep", "sweep"
        if self.variant.id and self.variant.template:
            return "variant", self.variant.id.replace("_", "-")
        return "plain", "baseline"


@dataclass(frozen=True)
class Source:
    """A result file that was read. `condition` is its name in a ledger."""

    path: Path
    sha256: str
    file: AuthorsFile
    kind: FileKind
    condition: str

    @property
    def model(self) -> str:
        """Short name of the model, the registry's where it is one of the paper's five."""
        name = _last_part(self.file.experiment_config.model_name or self.path.stem)
        lower = name.lower().removeprefix("meta-")
        merged = "merged" in lower or "masked" in lower  # the authors' fine-tuned models
        return next((known for known in MODELS if lower.startswith(known) and not merged), lower)

    @property
    def judge(self) -> str:
        """Name of the model that judged the responses."""
        return self.file.experiment_config.judge_model_name or "imported"


def _last_part(name: str) -> str:
    return name.strip().rstrip("/").split("/")[-1].strip()


def read_source(path: Path, condition: str | None = None) -> Source:
    """Read and check one file; `condition` replaces the condition that follows from its content."""
    raw = read_bytes(path, "result file")
    body = parse_json(decode(raw, f"result file {path}"), f"result file {path}")
    features = body.get("results_by_feature") if isinstance(body, dict) else None
    if not isinstance(features, list) or not all(isinstance(f, dict) for f in features):
        raise SteerbackError(f"{path} is not a result file of the authors' code: it has no list results_by_feature")
    try:
        file = AuthorsFile.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].partition(" or instance of ")[0].removeprefix("Value error, ")
        raise SteerbackError(f"{path}: {'.'.join(map(str, first['loc']))}: {message}; mend the file") from None
    kind, named = file.kind()
    if not named.strip() or (file.experiment_config.model_name and not _last_part(file.experiment_config.model_name)):
        raise SteerbackError(f"{path}: experiment_config.model_name or the condition is empty; mend the file")
    return Source(path, hashlib.sha256(raw).hexdigest(), file, kind, condition or named)


def split_prompt(prompt: str, template: str | None, label: str | None) -> tuple[str, str]:
    """Return object-level and meta-prompt of a rendered variant; the whole prompt if the template does not fit."""
    if not template or "{prompt}" not in template:
        return prompt, ""
    before, _, after = template.replace("{latent_label}", label or "").partition("{prompt}")
    if before.strip() or not prompt.endswith(after) or not after.strip():
        return prompt, ""
    return prompt[len(before) : len(prompt) - len(after)].strip(), after.strip()


class AuthorsAttempt(_Shape):
    """One attempt of a verdict; `phrase` and `gated` are in our own exports only."""

    score: Number = None
    attempt_text: Text = ""
    phrase: Text = ""
    gated: Flag = True


def judgement_of(score: JsonValue, response: str, judge: str) -> tuple[Judgement, int]:
    """Return the verdict, and the number of attempts whose text does not occur in the response.

    No attempts is the authors' sign of a clarifying question (empty); an error, a missing list or an attempt without
    a score from 0 to 100 is unscored, never 0. The files name no restart phrases, so attempts are not gated.
    """
    raw = json.dumps(score, ensure_ascii=False, sort_keys=True)

    def unscored(reason: str) -> tuple[Judgement, int]:
        return Judgement(judge, RUBRIC, "unscored", reason=reason, raw=raw), 0

    if not isinstance(score, dict):
        return unscored("the file has no score")
    if score.get("error"):
        return unscored(f"judge error: {score['error']}")
    listed = score.get("attempts")
    if not isinstance(listed, list):
        return unscored("the score has no list of attempts")
    if not listed:
        return Judgement(judge, RUBRIC, "empty", raw=raw), 0
    read = [AuthorsAttempt.model_validate(_object(entry)) for entry in listed]
    spans, lost = _spans([a.attempt_text for a in read], response)
    attempts = tuple(
        Attempt(start, end, a.score, a.phrase, a.gated)
        for (start, end), a in zip(spans, read, strict=True)
        if a.score is not None and 0 <= a.score <= 100
    )
    if len(attempts) < len(read):
        return unscored("an attempt has no score from 0 to 100")
    return Judgement(judge, RUBRIC, "scored", attempts, raw=raw), lost


def _spans(texts: Sequence[str], response: str) -> tuple[list[tuple[int, int]], int]:
    """Find each attempt's text after the one before; a text that does not occur starts where that one ended."""
    spans: list[tuple[int, int]] = []
    cursor, lost = 0, 0
    for text in texts:
        start = response.find(text.strip(), cursor) if text.strip() else -1
        if start < 0:
            lost += 1
            spans.append((cursor, cursor))
            continue
        cursor = start + len(text.strip())
        spans.append((start, cursor))
    return spans, lost
