"""Readers of the authors' result files: settings, trials one latent at a time, and numbers that pair the trials."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from steerback.errors import SteerbackError
from steerback.published.schema import AuthorsFeature, AuthorsFile, FileKind
from steerback.readers.streams import stream_object
from steerback.records import LatentKey
from steerback.store.facts import ABLATED, ControlSets

MODELS = ("llama-3.3-70b", "llama-3.1-8b", "gemma-2-2b", "gemma-2-9b", "gemma-2-27b")
M = TypeVar("M", bound=BaseModel)
FEATURES = "results_by_feature"
NO_JUDGE = "imported"
"""Judge name for files that do not name their judge."""
RANDOM = "random"
"""Part of the name of a file with randomly chosen ablated latents. Its content does not mark it as random."""


@dataclass(frozen=True)
class Source:
    """A checked result file with its condition, the labels and thresholds of its latents, and its number of trials.

    The trials themselves are not kept in memory; `features` reads them again.
    """

    path: Path
    sha256: str
    file: AuthorsFile
    kind: FileKind
    condition: str
    labels: Mapping[LatentKey, str | None]
    thresholds: tuple[float, ...]
    trials: int

    @property
    def model(self) -> str:
        """Short name of the model; for the five models of the paper, their name as a target."""
        name = _last_part(self.file.experiment_config.model_name or self.path.name.split(".json")[0])
        lower = name.lower().removeprefix("meta-")
        merged = "merged" in lower or "masked" in lower  # the authors' fine-tuned models
        return next((known for known in MODELS if lower.startswith(known) and not merged), lower)

    @property
    def judge(self) -> str:
        """Name of the model that judged the responses."""
        return self.file.experiment_config.judge_model_name or NO_JUDGE

    @property
    def ablated(self) -> tuple[int, ...]:
        """Latents clamped to zero, in ascending order."""
        return tuple(sorted(set(self.file.ablated_latents or ())))

    def features(self) -> Iterator[AuthorsFeature]:
        """Read the latents with their trials, one at a time."""
        for number, (key, value) in enumerate(_items(self.path)):
            if key == FEATURES:
                yield _checked(AuthorsFeature, value, self.path, f"{FEATURES}.{number}.")


def read_source(path: Path, condition: str | None = None) -> Source:
    """Read and check one file. `condition` replaces the condition derived from its content."""
    head: dict[str, object] = {}
    labels: dict[LatentKey, str | None] = {}
    thresholds: list[float] = []
    has_features, trials, number = False, 0, 0
    for key, value in _items(path):
        if key != FEATURES:
            head[key] = value
            continue
        if not isinstance(value, dict):
            raise _other(path)
        has_features = True
        feature = _checked(AuthorsFeature, value, path, f"{FEATURES}.{number}.")
        labels[feature.index] = feature.label
        thresholds += [feature.threshold] if feature.threshold is not None else []
        trials, number = trials + len(feature.trials or ()), number + 1
    file = _checked(AuthorsFile, head, path, "")
    if not has_features and not file.experiment_config.model_name:
        raise _other(path)
    kind, named = file.kind()
    if not named.strip() or (file.experiment_config.model_name and not _last_part(file.experiment_config.model_name)):
        raise SteerbackError(f"{path}: experiment_config.model_name or the condition is empty; correct the file")
    with path.open("rb") as raw:
        sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
    return Source(path, sha256, file, kind, condition or named, labels, tuple(thresholds), trials)


def _items(path: Path) -> Iterator[tuple[str, object]]:
    return iter(stream_object(path, "result file", FEATURES))


def _other(path: Path) -> SteerbackError:
    return SteerbackError(f"{path} is not a result file of the authors' code: it has no list {FEATURES}")


def _last_part(name: str) -> str:
    return name.strip().rstrip("/").split("/")[-1].strip()


def _checked(model: type[M], value: object, path: Path, place: str) -> M:
    """Return a part of a file as a record. Raises SteerbackError, which names the first invalid field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].partition(" or instance of ")[0].removeprefix("Value error, ")
        raise SteerbackError(
            f"{path}: {place}{'.'.join(map(str, first['loc']))}: {message}; correct the file"
        ) from None


@dataclass(frozen=True)
class Ablations:
    """Ablated sets of one import: the detectors (can be empty) and the random sets in the order of the files."""

    detectors: tuple[int, ...] = ()
    random: tuple[tuple[int, ...], ...] = ()

    def condition(self, ablated: tuple[int, ...]) -> str:
        """Return the name of the condition that clamps a set to zero."""
        return ControlSets.condition(self.random.index(ablated) + 1) if ablated in self.random else ABLATED


def ablations(sources: Sequence[Source], detectors: Sequence[int] | None = None) -> Ablations:
    """Separate the ablated sets into detectors and random sets.

    The detectors are the set `detectors`, or else the sets of files whose names do not contain `random`. Several sets
    of detectors are pooled, as in the authors' plots, if they share at least half of their latents. Raises
    SteerbackError if the choice is ambiguous.
    """
    ablated = [s for s in sources if s.kind == "ablated"]
    sets = list(dict.fromkeys(s.ablated for s in ablated))
    if detectors is not None:
        own = tuple(sorted(set(detectors)))
        if own not in sets:
            raise SteerbackError("--detectors: no file ablates this set of latents; choose the set of one of the files")
        return Ablations(own, tuple(x for x in sets if x != own))
    random = [x for x in sets if all(RANDOM in s.path.name.lower() for s in ablated if s.ablated == x)]
    others = [x for x in sets if x not in random]
    apart = [x for x in others if 2 * len(set(x) & set(others[0])) < len(x)]
    if apart:
        files = ", ".join(s.path.name for s in ablated)
        raise SteerbackError(
            f"the files {files} ablate {len(sets)} different sets of latents; choose the set of detectors with "
            "--detectors FILE, a JSON list of latents"
        )
    return Ablations(tuple(sorted({k for x in others for k in x})), tuple(random))


def named(sources: Sequence[Source], sets: Ablations) -> list[Source]:
    """Return the sources with the conditions of their ablated sets. Sources without ablation come first."""
    renamed = [replace(s, condition=sets.condition(s.ablated)) if s.kind == "ablated" else s for s in sources]
    return sorted(renamed, key=lambda s: s.kind == "ablated")


Entry = tuple[str, str, int | None, int | None]
"""Condition, prompt, seed, and the number of the trial in an export of steerback (else None)."""


class TrialNumbers:
    """Numbers trials so that trials of different conditions can be paired.

    A trial gets the number of the trial with the same latent, prompt and seed in an earlier condition. If the seeds
    differ (the authors' meta-prompt runs draw new ones), trials of the same latent and prompt are paired in order.
    """

    def __init__(self) -> None:
        self._next = 0
        self._prompts: dict[str, int] = {}
        self._places: dict[tuple[str, LatentKey, int], list[tuple[int, int | None]]] = {}
        self._used: dict[tuple[str, str], set[int]] = {}

    def numbers(self, target: str, latent: LatentKey, entries: Sequence[Entry], where: str) -> list[int]:
        """Return the numbers of a latent's trials in one file. Raises SteerbackError if an exported number is taken."""
        numbers: list[int | None] = [None] * len(entries)
        for i, (condition, prompt, seed, given) in enumerate(entries):
            used = self._used.setdefault((target, condition), set())
            if given is not None:
                if given in used:
                    raise SteerbackError(
                        f"{where}: trial {given} of {target}, {condition} has a different content in an earlier file; "
                        "import the files of one run at a time, or set a --condition for each"
                    )
                numbers[i] = given
                self._next = max(self._next, given + 1)
            elif seed is not None:
                known = self._places.get(self._place(target, latent, prompt), [])
                numbers[i] = next((n for n, s in known if s == seed and n not in used), None)
            if (number := numbers[i]) is not None:
                used.add(number)
        for i, (condition, prompt, seed, _) in enumerate(entries):
            if numbers[i] is None:
                numbers[i] = self._in_order(target, latent, condition, prompt, seed)
        return [n for n in numbers if n is not None]

    def _in_order(self, target: str, latent: LatentKey, condition: str, prompt: str, seed: int | None) -> int:
        """Return the first number of this latent and prompt that is unused in the condition, or a new number."""
        used = self._used.setdefault((target, condition), set())
        known = self._places.setdefault(self._place(target, latent, prompt), [])
        number = next((n for n, _ in known if n not in used), None)
        if number is None:
            number, self._next = self._next, self._next + 1
            known.append((number, seed))
        used.add(number)
        return number

    def _place(self, target: str, latent: LatentKey, prompt: str) -> tuple[str, LatentKey, int]:
        return target, latent, self._prompts.setdefault(prompt, len(self._prompts))
