"""Typed records of the authors' result files. All texts in them are untrusted.

A file is `{experiment_config, results_by_feature: [{feature_index_in_sae, feature_label, threshold, error, trials:
[{prompt, threshold, seed, response, score: {attempts: [{attempt_text, score}]} | {error}, error}]}]}`, with further
keys by experiment. Thresholds are numbers, or in older files objects with a `threshold`. Latents without a label have
the label `feature_<index>`. A field of an unexpected type counts as missing; an error is raised only if the run needs
it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from steerback.records import Attempt, FinishReason, Judgement, LatentKey

RUBRIC = "imported"
LARGEST = 2**63 - 1
"""Largest integer that SQLite can store."""

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
        raise ValueError(f"integer above {LARGEST}")
    return int(value)


def _latent(value: object) -> object:
    valid = 0 <= value <= LARGEST if isinstance(value, int) else isinstance(value, str)
    if not valid or isinstance(value, bool):
        raise ValueError(f"invalid feature_index_in_sae: {value!r}")
    return value


def object_or_empty(value: object) -> object:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str:
    if isinstance(value, list | dict):
        raise ValueError("should be a text")
    return str(value or "")


def _finish(value: object) -> object:
    return value if value in ("length", "stop", "error") else "unknown"


Number = Annotated[float | None, BeforeValidator(_number)]
Boost = Annotated[float | None, BeforeValidator(_threshold)]
Whole = Annotated[int | None, BeforeValidator(_whole)]
Text = Annotated[str, BeforeValidator(_text)]
Flag = Annotated[bool, BeforeValidator(bool)]


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class OwnTrial(_Shape):
    """Fields that exports of steerback add to a trial."""

    index: Whole = None
    meta_prompt: Annotated[str | None, BeforeValidator(str)] = None
    finish: Annotated[FinishReason, BeforeValidator(_finish)] = "unknown"
    trial: JsonValue = None
    completion: JsonValue = None
    judgements: dict[str, JsonValue] = {}
    windows: list[JsonValue] = []


class AuthorsTrial(_Shape):
    """One response with its verdict. `score` is not parsed here, see `judgement_of`."""

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
        """Label of the latent; None for the placeholder `feature_<index>` of the authors' code."""
        return self.text if self.text and self.text != f"feature_{self.index}" else None

    def boost(self, trial: AuthorsTrial) -> float | None:
        """Return the boost of a trial, or that of the feature if the trial has no field `threshold`."""
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
    prompts_file: Text = ""
    target_score_normalized: Boost = None
    threshold_n_trials: Whole = None
    threshold_samples_per_trial: Whole = None
    max_completion_tokens: Whole = None
    n_trials_per_feature: Whole = None
    min_feature_concreteness: Boost = None


class ThresholdStatistics(_Shape):
    """Mean and standard deviation of the thresholds, which normalise the boosts of a sweep."""

    mean: Boost = None
    std: Boost = None


class OwnFile(_Shape):
    """Fields that exports of steerback add to a file."""

    experiment: Text = ""
    condition: Annotated[str | None, BeforeValidator(str)] = None
    facts: dict[str, JsonValue] | None = None
    config: JsonValue = None
    files: Whole = None


class AuthorsFile(_Shape):
    """A result file without its list `results_by_feature`."""

    experiment_config: Annotated[AuthorsConfig, BeforeValidator(object_or_empty)] = AuthorsConfig()
    experiment_metadata: Annotated[Variant, BeforeValidator(object_or_empty)] = Variant()
    ablated_latents: list[Annotated[int, Field(ge=0, le=LARGEST)]] | None = None
    threshold_cache_stats: ThresholdStatistics | None = None
    n_boost_levels: Flag = False
    boost_levels: Flag = False
    steerback: OwnFile | None = None

    @property
    def variant(self) -> Variant:
        """Prompt variant from the settings, or in older files from the metadata."""
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


def split_prompt(prompt: str, template: str | None, label: str | None) -> tuple[str, str]:
    """Return object-level prompt and meta-prompt of a variant; (prompt, "") if the template does not match."""
    if not template or "{prompt}" not in template:
        return prompt, ""
    before, _, after = template.replace("{latent_label}", label or "").partition("{prompt}")
    if before.strip() or not prompt.endswith(after) or not after.strip():
        return prompt, ""
    return prompt[len(before) : len(prompt) - len(after)].strip(), after.strip()


class AuthorsAttempt(_Shape):
    """One attempt of a verdict. Only exports of steerback contain `phrase` and `gated`."""

    score: Number = None
    attempt_text: Text = ""
    phrase: Text = ""
    gated: Flag = True
    start: Whole = None
    end: Whole = None


def judgement_of(score: JsonValue, response: str, judge: str) -> tuple[Judgement, int]:
    """Return the verdict, and the number of attempts whose text does not occur in the response.

    An empty list of attempts means a clarifying question (status `empty`). An attempt without a score is dropped, as
    in the authors' plots. A verdict with an error, without a list, without any score or with a score outside 0 to 100
    is `unscored`; it never counts as 0. The authors' files contain no restart phrases, so gating does not apply.
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
    read = [AuthorsAttempt.model_validate(object_or_empty(entry)) for entry in listed]
    spans, lost = _spans(read, response)
    attempts = tuple(
        Attempt(start, end, a.score, a.phrase, a.gated)
        for (start, end), a in zip(spans, read, strict=True)
        if a.score is not None
    )
    if not attempts or not all(0 <= a.score <= 100 for a in attempts):
        return unscored("no attempt has a score" if not attempts else "an attempt has a score outside 0 to 100")
    return Judgement(judge, RUBRIC, "scored", attempts, raw=raw), lost


def _spans(attempts: Sequence[AuthorsAttempt], response: str) -> tuple[list[tuple[int, int]], int]:
    """Return the span of each attempt, and the number of attempts whose text does not occur in the response.

    Without a valid stored span, the text is searched after the previous attempt. A text that does not occur gets an
    empty span at the end of the previous attempt.
    """
    spans: list[tuple[int, int]] = []
    cursor, lost = 0, 0
    for attempt in attempts:
        text, own = attempt.attempt_text, (attempt.start, attempt.end)
        if own[0] is not None and own[1] is not None and own[0] >= 0 and response[own[0] : own[1]] == text:
            spans.append((own[0], own[1]))
            cursor = own[1]
            continue
        start = response.find(text.strip(), cursor) if text.strip() else -1
        if start < 0:
            lost += 1
            spans.append((cursor, cursor))
            continue
        cursor = start + len(text.strip())
        spans.append((start, cursor))
    return spans, lost
