"""Typed settings of a run and their presets.

A config contains the names of targets, judge and engine. It loads nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from steerback import readers
from steerback.errors import SteerbackError, unknown
from steerback.readers.settings import Settings as Settings
from steerback.readers.settings import assignment, drop, flatten, merge, nested
from steerback.readers.settings import parse as parse
from steerback.records import LEAST_TEMPERATURE, BoostPrior, LatentKey, Sampling, is_temperature


class SamplingConfig(Settings):
    """Sampling of tokens."""

    temperature: float = 0.6
    """Sampling temperature; 0: greedy decoding."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling: draw from the most likely tokens with this total probability; 1: off."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Repetition penalty over prompt and generated tokens; 1: off."""
    max_new_tokens: int = Field(512, ge=1)
    """Largest number of tokens per response; a target can set a lower limit, as the organism does."""

    @field_validator("temperature")
    @classmethod
    def _can_be_drawn_at(cls, value: float) -> float:
        if not is_temperature(value):
            raise ValueError(f"{value:g} must be 0 (greedy) or at least {LEAST_TEMPERATURE:g}")
        return value

    def record(self, cap: int | None = None) -> Sampling:
        tokens = self.max_new_tokens if cap is None else min(self.max_new_tokens, cap)
        return Sampling(self.temperature, self.top_p, self.repetition_penalty, tokens)


class CalibrationConfig(Settings):
    """Search for the threshold boost of each latent. Scores and tolerances are in points (0 to 100)."""

    target_score: float = Field(50, gt=0, lt=100)
    """Mean score of the first attempt that defines the threshold boost, in points."""
    tolerance: float = Field(5, gt=0)
    """Largest distance from the target score at which a latent counts as calibrated, in points."""
    max_iterations: int = Field(15, ge=1)
    """Largest number of rounds per latent. A round without any score counts, so a failing judge ends the search."""
    trials_per_iteration: int = Field(10, ge=1)
    """Responses per latent and round, all at the same boost."""
    verify_trials: int = Field(10, ge=0)
    """Additional responses per latent at the threshold boost, with new seeds, that verify it; 0: no verification."""
    stop: Literal["none", "tolerance"] = "none"
    """`none`: use all rounds; `tolerance` (specification): stop when the mean score of a round is within tolerance."""
    estimate: Literal["fit", "posterior"] = "fit"
    """`fit`: crossing of a fitted curve; `posterior` (authors): median of the bisection's posterior."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Token limit for responses of the rounds (authors: 256); None: `sampling.max_new_tokens`."""
    weight: float | None = Field(None, gt=0)
    """Pseudo-counts that a round adds to the Beta distribution (authors: 5); None: its number of scored trials."""
    low: float | None = Field(None, ge=0)
    """Smallest boost of the search, in the target's boost units; None: lower end of the target's prior."""
    high: float | None = Field(None, gt=0)
    """Largest boost of the search; None: upper end of the target's prior. Increase it if thresholds end "at bound"."""

    @model_validator(mode="after")
    def _low_is_below_high(self) -> CalibrationConfig:
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"calibration.low ({self.low:g}) must be below calibration.high ({self.high:g})")
        return self

    def prior(self, usual: BoostPrior) -> BoostPrior:
        """Return the target's prior `usual`, restricted to the range from `low` to `high`.

        If the range does not contain the mean of the target's prior, the new mean is the centre of the range and the
        standard deviation a quarter of its width. Raises SteerbackError if the range is empty.
        """
        low, high = usual.low if self.low is None else self.low, usual.high if self.high is None else self.high
        if low >= high:
            raise SteerbackError(
                f"the range of the calibration is empty: {low:g} to {high:g} (default of the target: "
                f"{usual.low:g} to {usual.high:g}); set both calibration.low and calibration.high"
            )
        if low <= usual.mean <= high:
            return replace(usual, low=low, high=high)
        return BoostPrior((low + high) / 2, (high - low) / 4, low, high)


class SelectionConfig(Settings):
    """Filters of the latents before sampling."""

    relevance: Literal["top-100", "zero", "off"] = "top-100"
    """Relevance filter. `top-100`: drop the 100 most active latents of each prompt; `zero` (authors): keep only latents
    that are inactive on all prompts; `off`: no filter."""
    template: bool = False
    """Apply the relevance filter to special and template tokens, too (authors: true)."""
    unlabelled: Literal["drop", "keep"] = "drop"
    """Drop or keep latents without a label. If an SAE has no labels at all, its latents are kept."""
    concreteness: Literal["median", "threshold", "off"] = "median"
    """Concreteness filter. `median`: keep labels with a rating above the median; `threshold` (authors): above
    `concreteness_threshold`; `off`: no filter."""
    concreteness_threshold: float = Field(65, ge=0, le=100)
    """Rating (0 to 100) above which `concreteness=threshold` keeps a label."""
    rater: str = "auto"
    """Rater of the concreteness of labels: a judge model or `offline`. `auto`: the judge of the run if it is a language
    model, else `offline`."""
    rated: int | None = Field(None, ge=1)
    """Number of labels that a language model rates, sampled after the other filters; None: 10 x n_latents, at least
    500."""


class RecoveryConfig(Settings):
    """Definition of a recovery with or without a restart phrase. Windows are sentences, scored from 0 to 100."""

    judge: bool | None = None
    """Let the judge score windows. An LLM judge needs one more call per response. None: only if the judge is free."""
    low: float = Field(30, ge=0, le=100)
    """Largest score of an off-topic window, in points."""
    high: float = Field(70, ge=0, le=100)
    """Smallest score of an on-topic window, in points."""
    early: float = Field(0.67, gt=0, lt=1)
    """Share of early windows in a response. In a recovery an early window is off topic and all later ones on topic."""
    least_windows: int = Field(4, ge=2)
    """Smallest number of windows; shorter responses are left out."""

    @model_validator(mode="after")
    def _low_is_below_high(self) -> RecoveryConfig:
        if self.low >= self.high:
            raise ValueError(f"recovery.low ({self.low:g}) must be below recovery.high ({self.high:g})")
        return self


Degraded = Literal["include", "exclude"]
"""Treatment of responses with five or more identical words in a row: counted (specification) or left out."""
Seed = Annotated[int, Field(ge=0, le=2**61)]
"""Seed below 2**61: trial i uses seed + i, and SQLite stores integers below 2**63."""


class SeedConfig(Settings):
    """Random seeds."""

    latents: Seed = 42
    """Seed for sampling latents."""
    generation: Seed = 44
    """Seed of the first trial of each condition. Trial i uses this seed + i, so that conditions are paired."""

    @model_validator(mode="before")
    @classmethod
    def _no_boosts(cls, values: object) -> object:
        """Drop the unused seed `boosts`, which runs of version 0.1 contain."""
        if isinstance(values, Mapping) and values.get("boosts") == 43:
            return {key: value for key, value in values.items() if key != "boosts"}
        return values


class RunConfig(Settings):
    """Settings of a run: one experiment on one or several targets."""

    experiment: str
    """Name of the experiment: `steerback run EXPERIMENT`."""
    targets: tuple[str, ...] = Field(min_length=1)
    """Names of the targets (models to steer): `--target`."""
    preset: str = "specification"
    """Preset of the default values: `specification`, `authors` or `quick`."""
    engine: str = "auto"
    """Engine that generates responses, e.g. `vllm` or `transformers`. `auto`: vLLM if it can run here, else
    transformers."""
    judge: str = "auto"
    """Name of the judge (see `steerback judges`). `auto`: `offline`, for the built-in organisms only."""
    rubrics: dict[str, str] = Field(default_factory=dict)
    """Texts of user-defined rubrics by name. Judge NAME+RUBRIC is the model NAME with the rubric RUBRIC."""
    prompts: str = "evaluation"
    """Name of a built-in list of prompts, or path of a text file. `authors`: the authors' prompts, which `steerback
    fetch-paper-data` downloads."""
    n_latents: int = Field(50, ge=1)
    """Number of latents, sampled at random after the filters."""
    latents: tuple[LatentKey, ...] | None = None
    """List of latents (indices) or directions (names) to steer with; None: sample latents. A list disables filters."""
    trials_per_latent: int = Field(10, ge=1)
    """Measured responses per latent and condition."""
    reference_responses: int = Field(4, ge=1)
    """Unsteered responses per prompt, for the relevance filter and the offline judge."""
    floor_responses: int = Field(150, ge=0)
    """Smallest number of judged unsteered responses per target, which measure the judge's floor; 0: no floor."""
    limit: int | None = Field(None, ge=1)
    """Largest number of measured trials per condition and target; None: no limit."""
    batch_size: int | None = Field(None, ge=1)
    """Responses per batch; None: as many as fit into memory."""
    engine_options: dict[str, object] = Field(default_factory=dict)
    """Options of the engine (vllm: replicas, tensor_parallel, columns, ...), checked before the engine starts."""
    from_run: str | None = None
    """Folder of a base run, whose latents, thresholds, prompts and seeds are used again: comparisons are paired."""
    degraded: Degraded = "include"
    """Include or exclude degraded responses (five or more identical words in a row) in calibration, verification and
    headline. Tables also show the other choice."""
    unscored_attempts: Literal["trial", "drop"] = "trial"
    """Attempts without a score. `trial`: the trial is unscored; `drop` (authors): only the attempt is left out."""
    draws: int = Field(2000, ge=100)
    """Number of bootstrap draws for confidence intervals."""
    sampling: SamplingConfig = SamplingConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    selection: SelectionConfig = SelectionConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    seeds: SeedConfig = SeedConfig()
    options: dict[str, object] = Field(default_factory=dict)
    """Options of the experiment (`steerback settings EXPERIMENT`)."""
    definitions: dict[str, dict[str, object]] = Field(default_factory=dict)
    """Copies of the definitions of user-defined targets. The run does not need the user's TOML file afterwards."""
    by_target: dict[str, dict[str, object]] = Field(default_factory=dict)
    """Settings for single targets, by the target's name; preset `authors` uses them. A value that the user sets for the
    whole run replaces them."""

    @model_validator(mode="after")
    def _targets_differ_and_their_rows_are_settings(self) -> RunConfig:
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("a target is named twice")
        for name, row in self.by_target.items():
            for key in row:
                if key not in BY_TARGET:
                    raise unknown(f"setting of target {name}", key, BY_TARGET)
            self.of(name)
        return self

    @property
    def drop_unscored(self) -> bool:
        """True if attempts without a score are left out."""
        return self.unscored_attempts == "drop"

    def of(self, target: str) -> RunConfig:
        """Return the settings of one target. An adapter NAME+FOLDER has the settings of its base model."""
        row = self.by_target.get(target) or self.by_target.get(target.rpartition("+")[0])
        if not row:
            return self.model_copy(update={"by_target": {}}) if self.by_target else self
        values = self.model_dump(mode="json") | {"by_target": {}}
        merge(values, row)
        return parse_config(values, f"settings of target {target}")


BY_TARGET = ("n_latents", "trials_per_latent", "sampling", "calibration", "selection")
"""Settings that can differ between the targets of a run."""


def specification(experiment: str, targets: tuple[str, ...]) -> RunConfig:
    """Return the values of the specification (system description, "Key parameters")."""
    return RunConfig(experiment=experiment, targets=targets)


def _sized(penalty: float, latents: int = 500, prompts_a_step: int = 1) -> dict[str, object]:
    return {
        "n_latents": latents,
        "sampling": {"repetition_penalty": penalty},
        "calibration": {"trials_per_iteration": prompts_a_step},
    }


AUTHORS_MODELS: Mapping[str, dict[str, object]] = {
    "llama-3.3-70b": _sized(1.2, 50, 5),
    "llama-3.1-8b": _sized(1.15),
    "gemma-2-2b": _sized(1.1),
    "gemma-2-9b": _sized(1.1),
    "gemma-2-27b": _sized(1.1),
}
"""The paper's models with the settings of the authors' code. The code samples only 10 latents for the
70B model (a quick test), so the number of the specification is used instead."""
OTHER_MODEL = _sized(1.1, 50)
"""Settings of preset `authors` for models that are not in the paper."""


def authors(experiment: str, targets: tuple[str, ...]) -> RunConfig:
    """Return the values of the authors' code: target score 30, 10 bisection steps, their filters and penalties.

    Each model of the paper is replaced by its variant NAME@authors (layers, clamps at the steer layer, prompt format)
    with its sizes and repetition penalty. The config contains the values of the first target, and `by_target` those
    that differ. Prompts are the authors' prompts, which the user must download. Organisms use the built-in prompts,
    because their corpus contains no others.
    """
    targets = tuple(f"{name}@authors" if name in AUTHORS_MODELS else name for name in targets)
    prompts = "evaluation" if all(name.startswith("organism") for name in targets) else "authors"
    base = RunConfig(experiment=experiment, targets=targets, preset="authors", prompts=prompts)
    values: dict[str, object] = base.model_dump(mode="json")
    shared: dict[str, object] = {
        "trials_per_latent": 5,
        "calibration": {
            "target_score": 30,
            "max_iterations": 10,
            "verify_trials": 0,
            "estimate": "posterior",
            "max_new_tokens": 256,
            "weight": 5,
        },
        "selection": {"relevance": "zero", "template": True, "concreteness": "threshold"},
        "unscored_attempts": "drop",
    }
    rows = {name: AUTHORS_MODELS.get(name.partition("@")[0], OTHER_MODEL) for name in targets}
    first = rows[targets[0]]
    for layer in (shared, first, {"by_target": {name: row for name, row in rows.items() if row != first}}):
        merge(values, layer)
    return parse_config(values)


def quick(experiment: str, targets: tuple[str, ...]) -> RunConfig:
    """Return small sizes for a laptop. A run of the organism takes minutes on two cores."""
    return RunConfig(
        experiment=experiment,
        targets=targets,
        preset="quick",
        n_latents=12,
        trials_per_latent=20,
        reference_responses=3,
        # 12 x 5 responses per round fit into one batch of 64 rows
        calibration=CalibrationConfig(max_iterations=10, trials_per_iteration=5, verify_trials=5),
    )


PRESETS: Mapping[str, Callable[[str, tuple[str, ...]], RunConfig]] = {
    "specification": specification,
    "authors": authors,
    "quick": quick,
}


def build_config(
    experiment: str,
    targets: tuple[str, ...],
    preset: str | None = None,
    file: Path | None = None,
    overrides: Mapping[str, object] | None = None,
    assignments: tuple[str, ...] = (),
    base: tuple[str, RunConfig] | None = None,
) -> RunConfig:
    """Return the config of a run from its layers: preset, YAML file, options, `--set key=value`. Later layers win.

    `base` is (folder, config) of the run in `--from`. Its config replaces the preset, so that latents, thresholds,
    prompts and seeds are equal and comparisons are paired. Raises SteerbackError for unknown or invalid settings.
    """
    layers: list[Mapping[str, object]] = []
    if file is not None:
        layers.append(readers.read_yaml(file, "config file"))
    layers.append({k: v for k, v in (overrides or {}).items() if v is not None})
    layers.extend(nested(*assignment(text)) for text in assignments)
    usual = base[1].preset if base else "specification"
    chosen = (
        preset if preset is not None else next((str(layer["preset"]) for layer in layers if "preset" in layer), usual)
    )
    if chosen not in PRESETS:
        raise unknown("preset", chosen, PRESETS)
    if base is not None and chosen != usual:
        raise SteerbackError(
            f"preset {chosen}: --from uses the settings of run {base[0]} (preset {usual}); leave --preset out and "
            "change single settings with --set"
        )
    if base is None:
        merged = PRESETS[chosen](experiment, targets).model_dump(mode="json")
    else:
        folder, config = base
        if missing := sorted(set(targets) - set(config.targets)):
            raise SteerbackError(f"run {folder} has no target {missing[0]!r}; it has: {', '.join(config.targets)}")
        own = {"experiment": experiment, "targets": targets or config.targets, "from_run": folder, "options": {}}
        merged = config.model_dump(mode="json") | own
    for layer in layers:
        rows = merged.get("by_target")
        for row in rows.values() if isinstance(rows, dict) else ():
            if isinstance(row, dict):
                drop(row, layer)
        merge(merged, layer)
    merged["preset"] = chosen
    for name, meant in (("experiment", experiment), ("from_run", base and base[0])):
        if merged.get(name) != meant:
            how = "steerback run EXPERIMENT" if name == "experiment" else "--from RUN"
            raise SteerbackError(f"config: {name} {merged.get(name)!r} contradicts the command ({meant}); use {how}")
    return parse_config(merged, where=f"config {file}" if file else "config")


def parse_config(values: Mapping[str, object], where: str = "config") -> RunConfig:
    """Return a checked config. Raises SteerbackError, which names the first invalid field."""
    return parse(RunConfig, values, where)


def differences(before: RunConfig, after: RunConfig) -> list[str]:
    """Return `setting: old -> new` for each setting that differs."""
    old, new = flatten(before.model_dump(mode="json")), flatten(after.model_dump(mode="json"))
    return [
        f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
