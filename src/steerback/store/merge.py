"""Joining runs of one plan, such as the targets or halves of it that were done on several machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerback.config import RunConfig, differences
from steerback.errors import SteerbackError
from steerback.store.ledger import Ledger
from steerback.store.run import Run, stored_config


@dataclass(frozen=True)
class Merged:
    """What was joined: trials in all, and those that several runs had generated (the first run's are kept)."""

    runs: int
    trials: int
    repeated: int
    differing: int


def merge(folders: Sequence[Path], into: Path) -> Merged:
    """Joins the ledgers of `folders` into the new run `into`.

    The configs may differ in targets, limit and starting run alone. Plans, facts (latents, thresholds, engine) must
    agree where two runs have the same: otherwise nothing is written and the difference is named.
    """
    if len(folders) < 2:
        raise SteerbackError("merge needs at least two runs")
    if into.resolve() in {f.resolve() for f in folders}:
        raise SteerbackError(f"merge writes a new run: give it a --name other than {into.name!r}")
    config = _common([(folder, stored_config(folder)) for folder in folders])
    facts = _facts(folders, config)
    texts: dict[str, str] = {}
    repeated = differing = 0
    with Run.start(into, config) as run:
        for name, target in facts:
            run.ledger.put_json(target, name, facts[name, target])
        for folder in folders:
            with Ledger(folder / "ledger.sqlite", read_only=True) as source:
                again, other = _copy(source, run.ledger, texts)
            repeated, differing = repeated + again, differing + other
        trials = len(run.ledger.rows())
    return Merged(len(folders), trials, repeated, differing)


def _common(configs: Sequence[tuple[Path, RunConfig]]) -> RunConfig:
    targets = tuple(dict.fromkeys(t for _, config in configs for t in config.targets))
    first = configs[0][1]
    limits = [config.limit for _, config in configs]
    limit = None if None in limits else max(x for x in limits if x is not None)
    shared = first.model_copy(update={"targets": targets, "limit": limit})
    for folder, config in configs:
        alike = config.model_copy(update={"targets": targets, "limit": limit, "from_run": first.from_run})
        changed = differences(shared, alike)
        if changed:
            raise SteerbackError(f"{folder} is a run of another plan than {configs[0][0]}: {'; '.join(changed)}")
    return shared


def _facts(folders: Sequence[Path], config: RunConfig) -> dict[tuple[str, str], Any]:
    """(name, target) -> value of all stored facts but the configs; two runs must agree on each."""
    found: dict[tuple[str, str], Any] = {}
    for folder in folders:
        with Ledger(folder / "ledger.sqlite", read_only=True) as source:
            for target, name, value in source.facts():
                if (target, name) == ("", "config"):
                    continue
                if found.setdefault((name, target), value) != value:
                    raise SteerbackError(
                        f"{folder} has other {name} for {target or 'the run'} than the runs before it, so their trials "
                        "do not belong together; start both --from the same run"
                    )
    return found


def _copy(source: Ledger, into: Ledger, texts: dict[str, str]) -> tuple[int, int]:
    """Copies trials, completions and verdicts; `texts` are the responses kept so far, by trial key.

    A response that another run gave first is not replaced, and verdicts on a different text are left behind.
    """
    rows = source.rows(activations=True)
    into.add_trials([row.trial for row in rows])
    engines = source.engines()
    done = {row.trial.key: row.completion for row in rows if row.completion is not None}
    repeated = [key for key in done if key in texts]
    differing = sum(texts[key] != done[key].text for key in repeated)
    fresh = {key: completion for key, completion in done.items() if key not in texts}
    into.add_completions((key, completion, engines[key]) for key, completion in fresh.items())
    texts |= {key: completion.text for key, completion in fresh.items()}
    for judge in source.judges():
        judged = [(r.trial.key, r.judgement) for r in source.rows(judge=judge) if r.judgement is not None]
        into.add_judgements((key, verdict) for key, verdict in judged if texts[key] == done[key].text)
    return len(repeated), differing
