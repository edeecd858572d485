"""Forking one response of a run: where to fork, in which arms, then generating, judging and measuring.

Continuations are trials of stage `fork` in the run's own ledger. Knows runs, targets, engines and judges.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from steerback.analysis.forks import Forked, forked
from steerback.analysis.recovery import rule_of
from steerback.engines.base import finish
from steerback.errors import SteerbackError, unknown
from steerback.jobs.check import Makers, PreparedRun, check
from steerback.jobs.execute import make_ready, note_judge, same_rubric
from steerback.judging import Judge
from steerback.records import Trial
from steerback.store.facts import DETECTOR_SET, FORK, FORKS, DetectorSet, EngineIdentity, Fork, ForkArm
from steerback.store.ledger import Ledger, Row
from steerback.store.progress import Progress, Silent
from steerback.store.run import Run
from steerback.study import forks as plan
from steerback.study.pipeline import Workbench, complete
from steerback.study.study import fact_of, same_weights

if TYPE_CHECKING:
    from steerback.engines.base import Engine
    from steerback.store.cache import Cache
    from steerback.targets import Target

PLACES = ("a number of tokens", "attempt:2", "drift")


@dataclass(frozen=True, slots=True)
class ForkSettings:
    """Where a response is forked, with how many seeds, and in which arms besides steering on and off.

    `at`: number of tokens that are kept, `attempt:N` (before the N-th attempt), or `drift` (before the first sentence
    of the first attempt that the judge scores below the run's `recovery.low`). `ablate`: `detectors`, or latents
    separated by commas; `detectors` names the run whose detectors are meant, if not this one. `boosts`: the trial's
    latent with other boosts. `arms`: texts for `study.forks.parse_arm`. `throughout`: arms also edit the prompt and the
    kept tokens. `judge`: the run's own unless named.
    """

    at: str
    n: int = 32
    ablate: str | None = None
    detectors: Path | None = None
    boosts: Sequence[float] = ()
    arms: Sequence[str] = ()
    throughout: bool = False
    judge: str | None = None

    def __post_init__(self) -> None:
        if self.n < 2:
            raise SteerbackError(f"--n {self.n}: a fork needs at least 2 seeds")


@dataclass(frozen=True, slots=True)
class ForkPlan:
    """A fork before it is begun: everything that can be known without loading the model.

    `character` is the place in the response's own text, None where the number of tokens was given. `stored` is the
    same fork as the run has it.
    """

    job: PreparedRun
    target: Target
    judge: Judge
    row: Row
    arms: Sequence[ForkArm]
    settings: ForkSettings
    character: int | None = None
    stored: Fork | None = field(default=None)

    @property
    def all_arms(self) -> list[ForkArm]:
        """The arms that the fork has already and those that are asked for."""
        named = {arm.name: arm for arm in [*(self.stored.arms if self.stored else ()), *self.arms]}
        return list(named.values())

    def responses(self, ledger: Ledger) -> tuple[int, int]:
        """Return the number of continuations of the fork, and how many of them have yet to be generated."""
        before = self.stored
        total = len(self.all_arms) * max(self.settings.n, before.n if before else 0)
        conditions = [before.condition(arm) for arm in before.arms] if before else []
        rows = [row for c in conditions for row in ledger.rows(self.target.name, FORK, c)]
        return total, total - sum(row.completion is not None for row in rows)


def fork(
    run: str | Path,
    trial: str,
    at: str | int,
    *,
    n: int = 32,
    ablate: str | None = None,
    boosts: Sequence[float] = (),
    arms: Sequence[str] = (),
    throughout: bool = False,
    judge: str | None = None,
) -> Forked:
    """Continue the response of `trial` from one of its tokens in several arms, judge it and return the arms' rates.

    `run` is the folder of the run; the other arguments are those of `ForkSettings`. The same call goes on with a fork
    that was stopped; a larger `n` adds seeds, further arms are added to it.
    """
    chosen = ForkSettings(str(at), n, ablate, None, boosts, arms, throughout, judge)
    return fork_trial(Path(run), trial, chosen)


def fork_trial(
    folder: Path,
    trial: str,
    settings: ForkSettings,
    progress: Progress | None = None,
    cache: Cache | None = None,
    makers: Makers | None = None,
) -> Forked:
    """Fork a trial of a run: keep the plan, complete and judge its continuations, return the results."""
    makers = makers or Makers()
    with Run.reopen(folder) as opened:
        prepared = prepare_fork(opened, trial, settings, makers)
        target = prepared.target
        engine = makers.engine(target, prepared.job.engine)
        try:
            same_weights(folder, target.name, engine)
            planned, trials = _planned(opened, prepared, engine)
            same_rubric(opened, prepared.judge)
            make_ready(opened, prepared.judge, target.name, makers)
            opened.ledger.put(
                target.name, FORKS, (opened.ledger.get(target.name, FORKS) or {}) | {planned.name: planned}
            )
            sampling = opened.config.of(target.name).sampling.record(target.max_new_tokens)
            shown, drop = progress or Silent(), opened.config.drop_unscored
            bench = Workbench(opened.ledger, engine, prepared.judge, sampling, shown, cache, drop)
            try:
                finish(complete(bench, trials, stage=f"{target.name}: fork at token {planned.tokens}"))
            finally:
                note_judge(opened, prepared.judge)
        finally:
            engine.close()
        return forked(opened.ledger, target.name, planned, prepared.judge.name)


def prepare_fork(opened: Run, key: str, settings: ForkSettings, makers: Makers) -> ForkPlan:
    """Check everything that needs no model; SteerbackError says what is wrong and what would be right."""
    judge = makers.judge(settings.judge or opened.config.judge)
    found = opened.ledger.rows(keys=[key], judge=judge.name)
    if not found:
        raise SteerbackError(
            f"no trial {key!r} in run {opened.folder.name!r}; steerback show {opened.folder.name} prints keys"
        )
    (row,) = found
    if not row.valid_receipt:
        raise SteerbackError(f"trial {key} has no valid response to continue")
    if any(edit.positions != "all" for edit in row.trial.interventions):
        raise SteerbackError(
            f"trial {key} is not edited at all positions alike, so its state at a token cannot be taken up again; fork "
            "the response that it continues"
        )
    job = check(opened.config, makers)
    target = next((t for t in job.targets if t.name == row.trial.target), None)
    if target is None:
        raise SteerbackError(f"run {opened.folder.name!r} has not generated {key} itself; fork it in the run that did")
    character = None if settings.at.isdecimal() else place(opened, row, settings.at, judge.name)
    stored = (opened.ledger.get(target.name, FORKS) or {}).values()
    same = [f for f in stored if (f.parent, f.at, f.throughout) == (key, settings.at, settings.throughout)]
    arms = _arms(opened, row, settings)
    return ForkPlan(job, target, judge, row, arms, settings, character, same[0] if same else None)


def place(opened: Run, row: Row, at: str, judge: str) -> int:
    """Return the character of the response's own text before which `at` (`attempt:N` or `drift`) forks it."""
    attempts, lead = row.attempts, len(row.judged_text) - len(row.completion.text if row.completion else "")
    kind, _, number = at.partition(":")
    if kind == "attempt" and number.isdecimal():
        if not 1 <= int(number) <= len(attempts):
            known = ", ".join(f"attempt:{n}" for n in range(1, len(attempts) + 1)) or "none, as it is not scored"
            raise SteerbackError(f"--at {at}: {judge} sees other attempts in {row.trial.key}: {known}")
        start = attempts[int(number) - 1].start
        if int(number) > 1 and start < lead:
            raise SteerbackError(f"--at {at}: that attempt begins before the continuation {row.trial.key}")
        return max(start - lead, 0)
    if at == "drift":
        return max(_drift(opened, row, judge) - lead, 0)
    raise unknown("place to fork at", at, PLACES)


def _drift(opened: Run, row: Row, judge: str) -> int:
    """Return the first character of the first sentence of the first attempt that scores below `recovery.low`."""
    key, low = row.trial.key, rule_of(opened.ledger).low
    windows = opened.ledger.windows(judge, [key]).get(key)
    if windows is None or not windows.scores:
        why = f" ({windows.reason})" if windows is not None and windows.reason else ""
        raise SteerbackError(
            f"--at drift: {judge} has not scored the sentences of {key}{why}; of a measured trial they are scored by: "
            f"steerback judge {opened.folder.name} --judge {judge} --rubric windows"
        )
    end = row.attempts[0].end if row.attempts else len(row.judged_text)
    scored = zip(windows.starts, windows.scores, strict=True)
    start = next((start for start, score in scored if start < end and score < low), None)
    if start is None:
        raise SteerbackError(
            f"--at drift: {key} does not drift: {judge} scores no sentence of its first attempt below {low:g}; fork at "
            "a token"
        )
    return start


def _arms(opened: Run, row: Row, settings: ForkSettings) -> list[ForkArm]:
    trial = row.trial
    arms = [*plan.usual_arms(trial), *(plan.boosted(trial, boost) for boost in settings.boosts)]
    if settings.ablate == "detectors":
        found = _detectors(settings.detectors or opened.folder, trial.target)
        arms.append(plan.clamped(trial, found.latents, plan.CLAMPED))
    elif settings.ablate is not None:
        parts = [part.strip() for part in settings.ablate.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise SteerbackError(f"--ablate {settings.ablate[:80]!r}: give `detectors`, or latents such as 12,40")
        arms.append(plan.clamped(trial, [int(part) for part in parts], f"{', '.join(parts)} clamped"))
    arms += [plan.parse_arm(trial, text) for text in settings.arms]
    kept: dict[str, ForkArm] = {}
    for arm in arms:
        if kept.setdefault(arm.name, arm) != arm:
            raise SteerbackError(f"two arms are called {arm.name!r} and differ; rename one")
    return list(kept.values())


def _detectors(folder: Path, target: str) -> DetectorSet:
    """Return the detectors of a run, or of the runs it starts from."""
    at: str | None = str(folder)
    while at is not None and Path(at, "ledger.sqlite").is_file():
        stored = fact_of(Path(at), target, DETECTOR_SET)
        if stored[0] is not None and stored[0].detectors:
            return stored[0]
        at = stored[1]
    raise SteerbackError(
        f"run {folder.name!r} has no detectors of {target}; search for them with steerback run detectors --from "
        f"{folder.name}, then name that run with --detectors, or give latents: --ablate 12,40"
    )


def _planned(opened: Run, prepared: ForkPlan, engine: Engine) -> tuple[Fork, list[Trial]]:
    """Return the fork as it is to be kept, joined with what the run has of it, and its trials."""
    row, settings, done = prepared.row, prepared.settings, prepared.row.completion
    assert done is not None  # `prepare_fork` takes no others
    ends = engine.token_ends(done, row.trial.prefix)
    tokens = int(settings.at) if prepared.character is None else bisect_right(ends, prepared.character)
    prefix = plan.prefix_of(row, tokens, ends)
    identity = EngineIdentity(fingerprint=engine.fingerprint, engine=dict(engine.describe()))
    now = Fork(
        parent=row.trial.key,
        tokens=tokens,
        at=settings.at,
        throughout=settings.throughout,
        arms=list(prepared.arms),
        n=settings.n,
        engine=identity,
    )
    joined = plan.joined((opened.ledger.get(prepared.target.name, FORKS) or {}).get(now.name), now)
    return joined, plan.trials_of(joined, row.trial, prefix, opened.config.seeds.generation)
