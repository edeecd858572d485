"""The judge's floor: how often a judge reports restarts in unsteered responses, where none is expected."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from steerback.config import RunConfig, parse_config
from steerback.records import Trial
from steerback.store.facts import CONFIG, FLOOR, LATENTS, UNSTEERED
from steerback.store.ledger import Ledger
from steerback.study.pipeline import Workbench, carry_out
from steerback.study.study import Study


async def floor_trials(study: Study) -> list[Trial]:
    """Return the unsteered trials of the floor; none if `floor_responses` is 0.

    They are disjoint from the judge's reference responses, so that no response is compared with itself. The judge sees
    the labels of the run's latents in turn, as it does for steered responses. A run that starts from another run
    reuses its floor.
    """
    prompts = floor_prompts(study.prompts, study.config.floor_responses)
    if not prompts or study.bench.judge is None:
        return []
    base = study.run.ledger.get(study.target.base, LATENTS) if study.target.adapter is not None else None
    latents = base.chosen if base is not None else await study.latents()
    trials = [
        study.trial(FLOOR, UNSTEERED, i, prompt=prompt, latent=latent.key, label=latent.label)
        for i, (prompt, latent) in enumerate(zip(prompts, cycle(latents), strict=False))
    ]
    _take_over(study, trials)
    return trials


async def measure_floor(bench: Workbench, trials: Sequence[Trial], target: str) -> None:
    """Generate and judge the floor's trials."""
    await carry_out(bench, trials, stage=f"{target}: judge's floor")


def floor_prompts(prompts: Sequence[str], responses: int) -> list[str]:
    """Return the prompts of at least `responses` trials, each prompt equally often.

    If there are more prompts than `responses`, evenly spaced prompts are chosen.
    """
    if responses <= len(prompts):
        return [prompts[i * len(prompts) // responses] for i in range(responses)]
    return [*prompts] * -(-responses // len(prompts))


def has_floor(folder: Path, config: RunConfig, target: str) -> bool:
    """Return whether the run in `folder` has a floor of `target` that a run with `config` can reuse."""
    if not (folder / "ledger.sqlite").is_file():
        return False
    with Ledger(folder / "ledger.sqlite", read_only=True) as other:
        before = other.get("", CONFIG) or {}
        measured = (target, UNSTEERED) in other.conditions(FLOOR)
    return measured and parse_config(before).of(target).sampling == config.of(target).sampling


def _take_over(study: Study, trials: Sequence[Trial]) -> None:
    """Copy those of `trials` that the base run completed, with this judge's verdicts, into the study's ledger."""
    judge, folder = study.bench.judge, Path(study.config.from_run or "")
    if judge is None or study.config.from_run is None or not has_floor(folder, study.config, study.name):
        return
    with Ledger(folder / "ledger.sqlite", read_only=True) as other:
        stored, engines = other.rows(study.name, FLOOR, judge=judge.name), other.engines()
    planned = set(trials)  # equal trials have equal prompts and seeds, so their responses can be reused
    rows = [r for r in stored if r.trial in planned and r.valid_receipt]
    ledger = study.run.ledger
    ledger.add_trials([r.trial for r in rows])
    ledger.add_completions((r.trial.key, r.completion, engines[r.trial.key]) for r in rows if r.completion)
    ledger.add_judgements(
        (r.trial.key, r.judgement) for r in rows if r.judgement is not None and r.judgement.rubric == judge.rubric
    )
