"""Plan of several experiments: the paper's experiments and the base run of each. Nothing is run here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from steerback.config import RunConfig, build_config
from steerback.errors import SteerbackError, unknown
from steerback.experiments.detectors import with_search_of
from steerback.store.run import stored_config

# Each experiment with its base, which supplies latents, thresholds, prompts and seeds (and detectors), in order of
# dependency.
STEPS: tuple[tuple[str, str | None], ...] = (
    ("esr", None),
    ("no-steering", "esr"),
    ("boost-sweep", "esr"),
    ("meta-prompts", "esr"),
    ("held-out", "esr"),
    ("prefill-control", "esr"),
    ("matched-prefix", "esr"),
    ("detectors", "esr"),
    ("detector-ablation", "detectors"),
    ("random-ablation", "detectors"),
    ("detector-statistics", "detectors"),
    ("traces", "detectors"),
    ("episode-statistics", "detectors"),
    ("cross-judge", "esr"),
)
OFFLINE = ("offline", "offline-bayes")
SPECIFIED = ("sonnet-4.5", "gpt-5-mini", "qwen3-32b", "haiku-4.5", "gemini-2.5-flash")


@dataclass(frozen=True)
class Step:
    """One run of the plan: its folder, its config, and the step that must precede it."""

    folder: Path
    config: RunConfig
    after: Path | None


def plan(
    first: RunConfig,
    root: Path,
    prefix: str,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    options: Mapping[str, Sequence[str]] | None = None,
) -> list[Step]:
    """Return every experiment as a run `<prefix>-<experiment>` under `root`, in order of dependency.

    `first` is the config of the first step (esr). The other steps copy it and add their `options` (`key=value` texts
    per experiment). `only` keeps the named experiments and their bases; `skip` drops the named experiments and those
    that build on them.
    """
    names = [name for name, _ in STEPS]
    for name in (*only, *skip):
        if name not in names:
            raise unknown("experiment of the paper", name, names)
    origin = dict(STEPS)
    kept = {member for name in only for member in _chain(name, origin.get)}
    wanted = {n for n in names if not only or n in kept}
    wanted -= {n for n in names if _chain(n, origin.get) & set(skip)}
    if "esr" not in wanted:
        raise SteerbackError("the paper starts with esr; it cannot be skipped")

    def config_of(name: str, base: Base | None) -> RunConfig:
        if base is None:
            return first
        own = tuple(f"options.{text}" for text in (options or {}).get(name, ()))
        given: dict[str, object] = {}
        if name == "cross-judge":  # the run's judge and others of its kind
            others = OFFLINE if first.judge in (*OFFLINE, "scripted") else SPECIFIED
            judges = list(dict.fromkeys((first.judge, *others)))
            given["options"] = {"sources": [str(root / f"{prefix}-esr")], "judges": judges}
        return build_config(name, first.targets, overrides=given, base=base, assignments=own)

    return in_order([*wanted], config_of, lambda config: root / f"{prefix}-{config.experiment}")


Base = tuple[str, RunConfig]
"""Folder and config of the base run of another run."""


def in_order(
    names: Sequence[str],
    config_of: Callable[[str, Base | None], RunConfig],
    folder_of: Callable[[RunConfig], Path],
    base: Base | None = None,
) -> list[Step]:
    """Return the runs of several experiments in order of dependency.

    The base of each is the nearest named experiment that it builds on, else `base`, else the first.
    """
    order, origin = [name for name, _ in STEPS], dict(STEPS)
    steps: dict[str, Step] = {}
    for name in sorted(dict.fromkeys(names), key=lambda n: order.index(n) if n in order else len(order)):
        before = origin.get(name)
        while before is not None and before not in steps:
            before = origin.get(before)
        if before is None and base is None:
            before = next(iter(steps), None)
        step = None if before is None else steps[before]
        start = base if step is None else (str(step.folder), step.config)
        config = with_search_of(config_of(name, start), None if start is None else start[1])
        steps[name] = Step(folder_of(config), config, None if step is None else step.folder)
    return [*steps.values()]


def stored_steps(folders: Sequence[Path]) -> list[Step]:
    """Return existing runs as steps, in an order in which each run comes after its base run."""
    configs = {folder.resolve(): (folder, stored_config(folder)) for folder in folders}
    steps: dict[Path, Step] = {}
    while len(steps) < len(configs):
        for place, (folder, config) in configs.items():
            base = Path(config.from_run).resolve() if config.from_run is not None else None
            if place not in steps and (base not in configs or base in steps):
                steps[place] = Step(folder, config, steps[base].folder if base in steps else None)
    return [*steps.values()]


def own_options(settings: Sequence[str], more: Sequence[str] = ()) -> tuple[list[str], dict[str, list[str]]]:
    """Split `key=value` texts into (settings of all steps, options per step), e.g. `boost-sweep.high=6`.

    `more` are experiments besides those of the paper.
    """
    names = {name for name, _ in STEPS} | {*more}
    common: list[str] = []
    options: dict[str, list[str]] = {}
    for text in settings:
        step, dot, rest = text.partition(".")
        if dot and step in names:
            options.setdefault(step, []).append(rest)
        else:
            common.append(text)
    return common, options


def _chain(name: str, origin: Callable[[str], str | None]) -> set[str]:
    """Return a step and all its bases."""
    chain = {name}
    while (before := origin(name)) is not None:
        chain.add(before)
        name = before
    return chain
