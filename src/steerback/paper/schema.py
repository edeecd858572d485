"""Reading the authors' result files: what is where, and what may be missing. It writes nothing.

A file is `{experiment_config, results_by_feature: [{feature_index_in_sae, feature_label, threshold, error, trials:
[{prompt, threshold, seed, response, score: {attempts: [{attempt_text, score}]} | {error}, error}]}]}`, with further
keys by experiment. Thresholds are numbers, or in older files objects with a `threshold`; labels of SAEs without labels
are `feature_<index>`. Response texts are untrusted and stay text.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from steerback.errors import SteerbackError
from steerback.records import Attempt, Judgement

RUBRIC = "imported"
MODELS = {
    "llama-3.3-70b": "llama-3.3-70b",
    "llama-3.1-8b": "llama-3.1-8b",
    "gemma-2-2b": "gemma-2-2b",
    "gemma-2-9b": "gemma-2-9b",
    "gemma-2-27b": "gemma-2-27b",
}


LARGEST = 2**63 - 1
"""The largest whole number that a ledger holds."""


def _storable(value: Any) -> Any:
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"a whole number beyond {LARGEST}")
    return value


Storable = Annotated[Any, AfterValidator(_storable)]


class _Shape(BaseModel):
    """What is relied on where it is there at all; everything else is looked at when it is read."""

    model_config = ConfigDict(strict=True)


class _OwnTrial(_Shape):
    index: Storable = None


class _TrialShape(_Shape):
    seed: Storable = None
    steerback: _OwnTrial | None = None


class _FeatureShape(_Shape):
    trials: list[_TrialShape] | None = None


class _Own(_Shape):
    facts: dict[str, Any] | None = None


class _FileShape(_Shape):
    results_by_feature: list[_FeatureShape]
    ablated_latents: list[Annotated[int, Field(ge=0, le=LARGEST)]] | None = None
    threshold_cache_stats: dict[str, Any] | None = None
    steerback: _Own | None = None


@dataclass(frozen=True)
class Source:
    """One result file. `kind` is plain, variant, ablated, unsteered or sweep; `condition` its name in a ledger."""

    path: Path
    sha256: str
    config: Mapping[str, Any]
    features: Sequence[Mapping[str, Any]]
    body: Mapping[str, Any]
    kind: str
    condition: str

    @property
    def model(self) -> str:
        """Short name of the model, the registry's where it is one of the paper's five."""
        name = str(self.config.get("model_name") or self.path.stem).rstrip("/").split("/")[-1]
        lower = name.lower().removeprefix("meta-")
        merged = "merged" in lower or "masked" in lower  # the authors' fine-tuned models
        return next((own for part, own in MODELS.items() if lower.startswith(part) and not merged), lower)

    @property
    def judge(self) -> str:
        return str(self.config.get("judge_model_name") or "imported")

    @property
    def template(self) -> str | None:
        """The meta-prompt's template with {prompt} and {latent_label}, for variants."""
        return _of_variant(self.config, self.body, "template")


def read_source(path: Path, condition: str | None = None) -> Source:
    """Reads and checks one file; `condition` overrides the one that its content says."""
    try:
        raw = path.read_bytes()
        body = json.loads(raw)
    except FileNotFoundError:
        raise SteerbackError(f"result file {path} does not exist") from None
    except OSError as error:
        raise SteerbackError(f"result file {path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SteerbackError(f"result file {path} is not valid JSON: {error}") from None
    features = body.get("results_by_feature") if isinstance(body, dict) else None
    if not isinstance(features, list) or not all(isinstance(f, dict) for f in features):
        raise SteerbackError(f"{path} is not a result file of the authors' code: it has no list results_by_feature")
    try:
        _FileShape.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].partition(" or instance of ")[0].removeprefix("Value error, ")
        raise SteerbackError(f"{path}: {'.'.join(map(str, first['loc']))}: {message}; mend the file") from None
    config = body.get("experiment_config")
    config = config if isinstance(config, dict) else {}
    kind, named = _kind(config, body)
    return Source(path, hashlib.sha256(raw).hexdigest(), config, features, body, kind, condition or named)


def _kind(config: Mapping[str, Any], body: Mapping[str, Any]) -> tuple[str, str]:
    ours = body.get("steerback")
    if isinstance(ours, dict) and "condition" in ours:
        return "ours", str(ours["condition"])
    if config.get("disable_steering"):
        return "unsteered", "unsteered"
    if body.get("ablated_latents"):
        return "ablated", "ablated"
    if body.get("n_boost_levels") or body.get("boost_levels"):
        return "sweep", "sweep"
    variant = _of_variant(config, body, "id")
    if variant and _of_variant(config, body, "template"):
        return "variant", variant.replace("_", "-")
    return "plain", "baseline"


def _of_variant(config: Mapping[str, Any], body: Mapping[str, Any], field: str) -> str | None:
    for place in (config, body.get("experiment_metadata") or {}):
        value = place.get(f"prompt_variant_{field}") if isinstance(place, dict) else None
        if value:
            return str(value)
    return None


def threshold_of(value: Any) -> float | None:
    """A threshold in either of its forms; None where there is none (calibration failed)."""
    if isinstance(value, Mapping):
        value = value.get("threshold")
    number = _number(value)
    return number if number is not None and math.isfinite(number) else None


def label_of(feature: Mapping[str, Any], index: int) -> str | None:
    """The label, or None for the placeholder that the authors' code writes where an SAE has none."""
    label = feature.get("feature_label")
    return str(label) if label and label != f"feature_{index}" else None


def split_prompt(prompt: str, template: str | None, label: str | None) -> tuple[str, str]:
    """(object-level prompt, meta-prompt) of a rendered variant; the whole prompt where the template does not fit."""
    if not template or "{prompt}" not in template:
        return prompt, ""
    before, _, after = template.replace("{latent_label}", label or "").partition("{prompt}")
    if before.strip() or not prompt.endswith(after) or not after.strip():
        return prompt, ""
    return prompt[len(before) : len(prompt) - len(after)].strip(), after.strip()


def judgement_of(score: Any, response: str, judge: str) -> tuple[Judgement, int]:
    """(verdict, attempts whose text does not occur in the response).

    No attempts is the authors' sign of a clarifying question (empty); an error, a missing list or an attempt without
    a score from 0 to 100 is unscored, never 0. The files name no restart phrases, so attempts are not gated.
    """
    raw = json.dumps(score, ensure_ascii=False, sort_keys=True)

    def unscored(reason: str) -> tuple[Judgement, int]:
        return Judgement(judge, RUBRIC, "unscored", reason=reason, raw=raw), 0

    if not isinstance(score, Mapping):
        return unscored("the file has no score")
    if score.get("error"):
        return unscored(f"judge error: {score['error']}")
    found = score.get("attempts")
    if not isinstance(found, list):
        return unscored("the score has no list of attempts")
    if not found:
        return Judgement(judge, RUBRIC, "empty", raw=raw), 0
    values = [_number(a.get("score")) if isinstance(a, Mapping) else None for a in found]
    if not all(v is not None and 0 <= v <= 100 for v in values):
        return unscored("an attempt has no score from 0 to 100")
    spans, lost = _spans([str(a.get("attempt_text") or "") for a in found], response)
    attempts = tuple(
        Attempt(start, end, float(v or 0.0), str(a.get("phrase") or ""), bool(a.get("gated", True)))
        for (start, end), v, a in zip(spans, values, found, strict=True)
    )
    return Judgement(judge, RUBRIC, "scored", attempts, raw=raw), lost


def _spans(texts: Sequence[str], response: str) -> tuple[list[tuple[int, int]], int]:
    """Where each attempt's text occurs, after the one before; one that does not occur starts where that one ended."""
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


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
