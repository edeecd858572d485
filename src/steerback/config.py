"""What a run is made of, typed and checked; presets are functions that return a `RunConfig`.

A config names things (target, judge, engine); it does not load them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from steerback import readers
from steerback.errors import SteerbackError, did_you_mean, one_line, unknown
from steerback.records import LEAST_TEMPERATURE, BoostPrior, LatentKey, Sampling, is_temperature


class Settings(BaseModel):
    """Typed and checked settings: nothing unknown, no infinite number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SamplingConfig(Settings):
    temperature: float = 0.6
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Tokens are drawn from the most likely ones that make up this share; 1: from all."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Over prompt and generated tokens; 1 is off (the specification's default)."""
    max_new_tokens: int = Field(512, ge=1)
    """Upper bound; a target may set a lower one (the organism's context is short)."""

    @field_validator("temperature")
    @classmethod
    def _can_be_drawn_at(cls, value: float) -> float:
        if not is_temperature(value):
            raise ValueError(f"{value:g} has to be 0 (greedy) or at least {LEAST_TEMPERATURE:g}")
        return value

    def record(self, cap: int | None = None) -> Sampling:
        tokens = self.max_new_tokens if cap is None else min(self.max_new_tokens, cap)
        return Sampling(self.temperature, self.top_p, self.repetition_penalty, tokens)


class CalibrationConfig(Settings):
    """How the threshold boost of a latent is searched for. Scores and tolerances are in points (0-100)."""

    target_score: float = Field(50, gt=0, lt=100)
    """Mean first-attempt score that defines the threshold boost."""
    tolerance: float = Field(5, gt=0)
    """Distance from the target score within which a latent counts as calibrated."""
    max_iterations: int = Field(15, ge=1)
    """Rounds; a round without any score counts, so that a broken judge cannot loop for ever."""
    trials_per_iteration: int = Field(10, ge=1)
    """Responses of each latent in a round, all at one boost."""
    verify_trials: int = Field(10, ge=0)
    """Fresh trials per latent at the threshold, with seeds used nowhere else."""
    stop: Literal["none", "tolerance"] = "none"
    """`tolerance` is the specification's rule: stop a latent once a round's mean is within tolerance."""
    estimate: Literal["fit", "posterior"] = "fit"
    """`posterior` (authors): the median of the bisection's posterior instead of the fitted curve's crossing."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Upper bound for responses in rounds (authors: 256); None: that of all responses."""
    weight: float | None = Field(None, gt=0)
    """Pseudo-counts a round adds to the Beta distribution; None: its number of scored trials (authors: always 5)."""
    low: float | None = Field(None, ge=0)
    """Lowest boost that is searched; None: that of the target's prior."""
    high: float | None = Field(None, gt=0)
    """Highest boost that is searched; None: that of the target's prior. Raise it where thresholds end "at bound"."""

    @model_validator(mode="after")
    def _low_is_below_high(self) -> CalibrationConfig:
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"calibration.low ({self.low:g}) has to be below calibration.high ({self.high:g})")
        return self

    def prior(self, usual: BoostPrior) -> BoostPrior:
        """Return the prior of a search: the target's, on the range that is set here.

        A range that leaves the target's usual threshold out is searched from its middle, with a quarter of it as sd.
        Raises SteerbackError where one end is set and the target's other end is not on its far side.
        """
        low, high = usual.low if self.low is None else self.low, usual.high if self.high is None else self.high
        if low >= high:
            raise SteerbackError(
                f"calibration searches from {low:g} to {high:g}, which is no range; the target's own is "
                f"{usual.low:g} to {usual.high:g}: set both calibration.low and calibration.high"
            )
        if low <= usual.mean <= high:
            return replace(usual, low=low, high=high)
        return BoostPrior((low + high) / 2, (high - low) / 4, low, high)


class SelectionConfig(Settings):
    relevance: Literal["top-100", "zero", "off"] = "top-100"
    """`top-100`: drop each prompt's 100 most active latents; `zero` (authors): keep what is 0 on all prompts."""
    template: bool = False
    """Whether special and template tokens count as well (authors)."""
    unlabelled: Literal["drop", "keep"] = "drop"
    """Latents without a label, of an SAE that has labels. An SAE without any label keeps all its latents."""
    concreteness: Literal["median", "threshold", "off"] = "median"
    """Keep the labels rated above the median, or above `concreteness_threshold`, or all."""
    concreteness_threshold: float = Field(65, ge=0, le=100)
    """Used with `threshold` (the authors' rule)."""
    rater: str = "auto"
    """Rates how concrete labels are. `auto`: the run's judge where it is a language model, else `offline`."""
    rated: int | None = Field(None, ge=1)
    """Labels that a language model rates, drawn after the other filters; None: 10 x n_latents, at least 500."""


class RecoveryConfig(Settings):
    """When a response counts as recovered, restart phrase or not. Windows are sentences, scored in points (0-100)."""

    judge: bool | None = None
    """Whether the judge scores windows; default: if that costs nothing. An LLM judge takes one more call a response."""
    low: float = Field(30, ge=0, le=100)
    """A window off the prompt scores at most this."""
    high: float = Field(70, ge=0, le=100)
    """A window on the prompt scores at least this."""
    early: float = Field(0.67, gt=0, lt=1)
    """Share of a response's windows that are early: one of these has to be low, and all later ones high."""
    least_windows: int = Field(4, ge=2)
    """Responses with fewer windows are left out."""

    @model_validator(mode="after")
    def _low_is_below_high(self) -> RecoveryConfig:
        if self.low >= self.high:
            raise ValueError(f"recovery.low ({self.low:g}) has to be below recovery.high ({self.high:g})")
        return self


Degraded = Literal["include", "exclude"]
"""Responses with five or more identical consecutive words: counted (the specification) or left out."""
Seed = Annotated[int, Field(ge=0, le=2**61)]
"""Trials count up from a seed, and a ledger holds numbers below 2**63."""


class SeedConfig(Settings):
    latents: Seed = 42
    """Of the sample of latents."""
    generation: Seed = 44
    """Seed of the first trial of a condition; trial i has this + i, the same in every condition compared."""

    @model_validator(mode="before")
    @classmethod
    def _no_boosts(cls, values: object) -> object:
        """Runs of 0.1 hold a seed of boosts, which nothing ever drew from."""
        if isinstance(values, Mapping) and values.get("boosts") == 43:
            return {key: value for key, value in values.items() if key != "boosts"}
        return values


class RunConfig(Settings):
    """One run: an experiment on one or several targets."""

    experiment: str
    """Named by the command: `steerback run EXPERIMENT`."""
    targets: tuple[str, ...] = Field(min_length=1)
    """Models to steer: `--target`."""
    preset: str = "specification"
    """Where the other values come from: `specification`, `authors` or `quick`."""
    engine: str = "auto"
    """`auto`: vLLM where it can run, else transformers."""
    judge: str = "auto"
    """`auto`: the offline judge for the built-in organisms; any other target needs one named."""
    rubrics: dict[str, str] = Field(default_factory=dict)
    """Texts of the user's own rubrics by name: judge NAME+RUBRIC is the model NAME, asked by one of them."""
    prompts: str = "evaluation"
    """Name of a built-in list or path of a text file; `authors`: theirs, see `steerback fetch-paper-data`."""
    n_latents: int = Field(50, ge=1)
    """Latents that are drawn at random after the filters."""
    latents: tuple[LatentKey, ...] | None = None
    """An own list; filters and sampling are skipped."""
    trials_per_latent: int = Field(10, ge=1)
    """Measured responses of each latent in each condition."""
    reference_responses: int = Field(4, ge=1)
    """Unsteered responses per prompt, for the relevance filter and the offline judge."""
    floor_responses: int = Field(150, ge=0)
    """At least this many unsteered responses per target go through the judge: its floor. 0 switches it off."""
    limit: int | None = Field(None, ge=1)
    """At most this many measured trials per condition and target."""
    batch_size: int | None = Field(None, ge=1)
    """Responses that are generated together; None: what fits into memory."""
    engine_options: dict[str, object] = Field(default_factory=dict)
    """What only this engine knows (vllm: replicas, tensor_parallel, columns, ...); checked when the engine is made."""
    from_run: str | None = None
    """Folder of a run whose latents, thresholds, prompts and seeds are reused, so that comparisons are paired."""
    degraded: Degraded = "include"
    """Whether degraded responses count, in calibration, verification and headline alike; the other reading of the
    headline stands beside it."""
    unscored_attempts: Literal["trial", "drop"] = "trial"
    """An attempt that the judge gives no score: the trial is unscored, or (authors) the attempt is left out."""
    draws: int = Field(2000, ge=100)
    """Bootstrap draws."""
    sampling: SamplingConfig = SamplingConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    selection: SelectionConfig = SelectionConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    seeds: SeedConfig = SeedConfig()
    options: dict[str, object] = Field(default_factory=dict)
    """What only this experiment knows; checked by the experiment."""
    definitions: dict[str, dict[str, object]] = Field(default_factory=dict)
    """The user's own targets among `targets`, as their TOML file had them: with these a run needs no file."""
    by_target: dict[str, dict[str, object]] = Field(default_factory=dict)
    """Settings that differ for single targets, by the target's name; the preset `authors` fills it. A value that the
    user gives for all targets replaces them."""

    @model_validator(mode="after")
    def _no_target_twice(self) -> RunConfig:
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("a target is named twice")
        return self

    @model_validator(mode="after")
    def _rows_are_settings(self) -> RunConfig:
        for name, row in self.by_target.items():
            for key in row:
                if key not in BY_TARGET:
                    raise unknown(f"setting of target {name}", key, BY_TARGET)
            self.of(name)
        return self

    @property
    def drop_unscored(self) -> bool:
        """Whether an attempt without score is left out."""
        return self.unscored_attempts == "drop"

    def of(self, target: str) -> RunConfig:
        """Return the settings of one target (an adapter has those of its base): what a study of it goes by."""
        row = self.by_target.get(target) or self.by_target.get(target.rpartition("+")[0])
        if not row:
            return self.model_copy(update={"by_target": {}}) if self.by_target else self
        values = self.model_dump(mode="json") | {"by_target": {}}
        _merge(values, row)
        return parse_config(values, f"settings of target {target}")


BY_TARGET = ("n_latents", "trials_per_latent", "sampling", "calibration", "selection")
"""Settings that can differ between the targets of a run."""


def specification(experiment: str, targets: tuple[str, ...]) -> RunConfig:
    """The specification's values (system description, "Key parameters")."""
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
"""The paper's models, with what the authors' code sets for each. Its number of latents of the 70B (10, a quick test) is
not taken over: the specification's stays."""
OTHER_MODEL = _sized(1.1, 50)
"""Settings of a model that is not the paper's under the preset `authors`."""


def authors(experiment: str, targets: tuple[str, ...]) -> RunConfig:
    """The authors' code where it differs: target score 30, 10 bisection steps, their filters and penalties.

    The paper's models become their variants NAME@authors (layers, clamps at the steer layer, prompt format), each with
    its own sizes and penalty: the first target's stand in the config, those that differ in `by_target`. Prompts are the
    authors' own, which the user has to have fetched; an organism keeps those that its corpus knows.
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
        _merge(values, layer)
    return parse_config(values)


def quick(experiment: str, targets: tuple[str, ...]) -> RunConfig:
    """Small sizes for a laptop: minutes on two cores with the organism."""
    return RunConfig(
        experiment=experiment,
        targets=targets,
        preset="quick",
        n_latents=12,
        trials_per_latent=20,
        reference_responses=3,
        # 12 x 5 responses a round fill one batch of 64 rows
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
    """Return the config of a run: preset, YAML file, the command line's options, `--set key=value`; later ones win.

    `base` is (folder, config) of the run given with `--from`: it takes the preset's place, so that latents,
    thresholds, prompts and seeds are the same and comparisons are paired.
    """
    layers: list[Mapping[str, object]] = []
    if file is not None:
        layers.append(readers.read_yaml(file, "config file"))
    layers.append({k: v for k, v in (overrides or {}).items() if v is not None})
    layers.extend(_nested(*assignment(text)) for text in assignments)
    usual = base[1].preset if base else "specification"
    chosen = preset or next((str(layer["preset"]) for layer in layers if "preset" in layer), usual)
    if chosen not in PRESETS:
        raise unknown("preset", chosen, PRESETS)
    if base is not None and chosen != usual:
        raise SteerbackError(
            f"preset {chosen}: with --from the settings are those of run {base[0]} (preset {usual}); leave it out and "
            "change single values with --set"
        )
    if base is None:
        merged = PRESETS[chosen](experiment, targets).model_dump(mode="json")
    else:
        merged = _like(base, experiment, targets)
    for layer in layers:
        for row in _rows(merged):
            _drop(row, layer)
        _merge(merged, layer)
    merged["preset"] = chosen
    for name, meant in (("experiment", experiment), ("from_run", base and base[0])):
        if merged.get(name) != meant:
            how = "steerback run EXPERIMENT" if name == "experiment" else "--from RUN"
            raise SteerbackError(
                f"config: {name} {merged.get(name)!r} is not what the command says ({meant}); use {how}"
            )
    return parse_config(merged, where=f"config {file}" if file else "config")


def _like(base: tuple[str, RunConfig], experiment: str, targets: tuple[str, ...]) -> dict[str, object]:
    folder, config = base
    missing = sorted(set(targets) - set(config.targets))
    if missing:
        raise SteerbackError(f"run {folder} has no target {missing[0]!r}; it has: {', '.join(config.targets)}")
    own = {"experiment": experiment, "targets": targets or config.targets, "from_run": folder, "options": {}}
    return config.model_dump(mode="json") | own


def parse_config(values: Mapping[str, object], where: str = "config") -> RunConfig:
    """Return a checked config, or raise one line that names the first wrong field."""
    return parse(RunConfig, values, where)


S = TypeVar("S", bound=Settings)


def parse(model: type[S], values: Mapping[str, object], where: str) -> S:
    """Return checked settings, or raise one line that names the first wrong field."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = f"{where}: {one_line(field) or 'values'}: {first['msg'].removeprefix('Value error, ')}"
        if first["msg"].startswith("Input should") and isinstance(first["input"], str | int | float):
            message += f", not {repr(first['input'])[:80]}"
        if first["type"] == "extra_forbidden":
            known = _choices(model, first["loc"])
            choices = f"choose one of: {', '.join(known)}" if known else "there are none"
            message = f"{where}: unknown setting {field!r};{_similar(model, field)} {choices}"
        raise SteerbackError(message) from None


def differences(before: RunConfig, after: RunConfig) -> list[str]:
    """Return `setting: old -> new` for each setting that differs."""
    old, new = _flatten(before.model_dump(mode="json")), _flatten(after.model_dump(mode="json"))
    return [
        f"{key}: {json.dumps(old.get(key))} -> {json.dumps(new.get(key))}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def assignment(text: str) -> tuple[str, readers.Json]:
    """Return key and value of a `key=value` text, the value as in YAML."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise SteerbackError(f"--set {text!r} is not of the form key=value, e.g. --set sampling.temperature=0.8")
    return key.strip(), readers.parse_yaml(value, f"--set {text!r}: the value")


def _nested(key: str, value: readers.Json) -> dict[str, object]:
    """Return `a.b.c` and a value as nested tables."""
    first, dot, rest = key.partition(".")
    return {first: _nested(rest, value) if dot else value}


def _merge(into: dict[str, object], layer: Mapping[str, object]) -> None:
    for key, value in layer.items():
        inner = into.get(key)
        if isinstance(value, Mapping) and isinstance(inner, dict):
            _merge(inner, value)
        else:
            into[key] = value


def _rows(values: Mapping[str, object]) -> list[dict[str, object]]:
    rows = values.get("by_target")
    return [row for row in rows.values() if isinstance(row, dict)] if isinstance(rows, dict) else []


def _drop(row: dict[str, object], layer: Mapping[str, object]) -> None:
    """Remove from a target's row what a later layer sets for all targets."""
    for key, value in layer.items():
        inner = row.get(key)
        if isinstance(value, Mapping) and isinstance(inner, dict):
            _drop(inner, value)
        else:
            row.pop(key, None)


def _choices(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        for inner in (annotation, *get_args(annotation)):  # the model itself, or the model or None
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                model = inner
    return sorted(model.model_fields)


def _similar(model: type[BaseModel], key: str) -> str:
    """Return ` did you mean KEY?` for a misspelt setting, also for one written without its table."""
    keys = list(_keys(model))
    same_end = [known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]]
    return did_you_mean(same_end[0] if same_end else key, keys)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _keys(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
