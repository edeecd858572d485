"""Fork one response of a run: find the token, plan the arms, then generate, judge and compare continuations.

Continuations are trials of stage `fork` in the ledger of the same run.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from steerback.analysis.floor import rule_of
from steerback.analysis.forks import Forked, forked
from steerback.engines.base import finish
from steerback.errors import SteerbackError, unknown
from steerback.jobs.check import Makers, PreparedRun, check
from steerback.jobs.judging import make_ready, note_judge, same_rubric
from steerback.judging import Judge
from steerback.records import Trial
from steerback.store.facts import DETECTOR_SET, FORK, FORKS, DetectorSet, EngineIdentity, Fork, ForkArm
from steerback.store.ledger import Ledger, Row
from steerback.store.progress import Progress, Silent
from steerback.store.run import Run, fact_of
from steerback.study import forks as plan
from steerback.study.pipeline import Workbench, complete
from steerback.study.study import same_weights

if TYPE_CHECKING:
    from steerback.engines.base import Engine
    from steerback.store.cache import Cache
    from steerback.targets import Target

PLACES = ("a number of tokens", "attempt:2", "drift")


@dataclass(frozen=True, slots=True)
class ForkSettings:
    """Settings of a fork: its position, the number of seeds, and arms besides steering on and off.

    `at`: number of tokens to keep, `attempt:N` (before the N-th attempt), or `drift` (before the first sentence of
    the first attempt with a score below the run's `recovery.low`).
    `ablate`: `detectors`, or latents separated by commas. `detectors`: run to take the detectors from; default: this
    run. `boosts`: further boosts of the trial's latent. `arms`: texts for `study.forks.parse_arm`.
    `throughout`: arms also edit the prompt and the kept tokens. `judge`: default: the judge of the run.
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
    """Plan of a fork, made without loading the model.

    `character` is the position in the generated text; None if `at` is a number of tokens. `stored` is the same fork
    in the ledger, if it exists already.
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
        """Return the stored arms of the fork and the requested ones."""
        named = {arm.name: arm for arm in [*(self.stored.arms if self.stored else ()), *self.arms]}
        return list(named.values())

    def responses(self, ledger: Ledger) -> tuple[int, int]:
        """Return the number of continuations of the fork, and the number of those that are not generated yet."""
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
    """Continue the response of `trial` from one token in several arms, judge the results and return rates per arm.

    `run` is the folder of the run. The other arguments are those of `ForkSettings`. The same call resumes an
    interrupted fork. A larger `n` adds seeds, and new arms are added to the stored ones.
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
    """Fork a trial of a run: store the plan, generate and judge the continuations, return the results."""
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
    """Return the plan of a fork. Raises SteerbackError for every mistake that is visible without the model."""
    judge = makers.judge(settings.judge or opened.config.judge)
    rows = opened.ledger.rows(keys=[key], judge=judge.name)
    if not rows:
        raise SteerbackError(
            f"no trial {key!r} in run {opened.folder.name!r}; steerback show {opened.folder.name} prints keys"
        )
    (row,) = rows
    if not row.valid_receipt:
        raise SteerbackError(f"trial {key} has no valid response to continue")
    if any(edit.positions != "all" for edit in row.trial.interventions):
        raise SteerbackError(
            f"trial {key} is a continuation whose edits differ between positions, so it cannot be forked; fork the "
            "response that it continues"
        )
    job = check(opened.config, makers)
    target = next((t for t in job.targets if t.name == row.trial.target), None)
    if target is None:
        raise SteerbackError(f"{key} was not generated in run {opened.folder.name!r}; fork it in its original run")
    character = None if settings.at.isdecimal() else place(opened, row, settings.at, judge.name)
    stored = (opened.ledger.get(target.name, FORKS) or {}).values()
    same = [f for f in stored if (f.parent, f.at, f.throughout) == (key, settings.at, settings.throughout)]
    arms = _arms(opened, row, settings)
    return ForkPlan(job, target, judge, row, arms, settings, character, same[0] if same else None)


def place(opened: Run, row: Row, at: str, judge: str) -> int:
    """Return the character position in the generated text of `at` (`attempt:N` or `drift`)."""
    attempts, lead = row.attempts, len(row.judged_text) - len(row.completion.text if row.completion else "")
    kind, _, number = at.partition(":")
    if kind == "attempt" and number.isdecimal():
        if not 1 <= int(number) <= len(attempts):
            known = ", ".join(f"attempt:{n}" for n in range(1, len(attempts) + 1)) or "none, as it is not scored"
            raise SteerbackError(f"--at {at}: the attempts of {row.trial.key} by judge {judge} are: {known}")
        start = attempts[int(number) - 1].start
        if int(number) > 1 and start < lead:
            raise SteerbackError(f"--at {at}: this attempt begins before the start of continuation {row.trial.key}")
        return max(start - lead, 0)
    if at == "drift":
        return max(_drift(opened, row, judge) - lead, 0)
    raise unknown("place to fork at", at, PLACES)


def _drift(opened: Run, row: Row, judge: str) -> int:
    """Return the start of the first sentence in the first attempt with a score below `recovery.low`."""
    key, low = row.trial.key, rule_of(opened.ledger).low
    windows = opened.ledger.windows(judge, [key]).get(key)
    if windows is None or not windows.scores:
        why = f" ({windows.reason})" if windows is not None and windows.reason else ""
        raise SteerbackError(
            f"--at drift: {judge} has not scored the sentences of {key}{why}; score those of all measured trials with: "
            f"steerback judge {opened.folder.name} --judge {judge} --rubric windows"
        )
    end = row.attempts[0].end if row.attempts else len(row.judged_text)
    scored = zip(windows.starts, windows.scores, strict=True)
    start = next((start for start, score in scored if start < end and score < low), None)
    if start is None:
        raise SteerbackError(
            f"--at drift: {judge} scores no sentence in the first attempt of {key} below {low:g}; set --at to a number "
            "of tokens"
        )
    return start


def _arms(opened: Run, row: Row, settings: ForkSettings) -> list[ForkArm]:
    trial = row.trial
    arms = [*plan.usual_arms(trial), *(plan.boosted(trial, boost) for boost in settings.boosts)]
    if settings.ablate == "detectors":
        detectors = _detectors(settings.detectors or opened.folder, trial.target)
        arms.append(plan.clamped(trial, detectors.latents, plan.CLAMPED))
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
    """Return the detectors of a run, or of its base runs."""
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
    """Return the fork, merged with its stored part, and its trials."""
    row, settings, done = prepared.row, prepared.settings, prepared.row.completion
    assert done is not None  # `prepare_fork` requires a response
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
