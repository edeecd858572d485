"""Estimates before a run starts: responses, tokens, judge calls, memory and time. No model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from steerback.config import RecoveryConfig, RunConfig
from steerback.errors import SteerbackError, docs_page
from steerback.judging.base import Judge, JudgeItem, estimate_in_batches, estimated
from steerback.judging.graders import LLMRater
from steerback.judging.llm import lacking
from steerback.judging.windows import window_scorer
from steerback.latents.concreteness import make_rater
from steerback.latents.selection import rating_model, rating_sample
from steerback.records import Spend
from steerback.store.facts import FLOOR, JUDGE_SPEND
from steerback.store.run import Run
from steerback.study.floor import floor_prompts, has_floor
from steerback.study.pipeline import judge_item
from steerback.study.study import UNJUDGED
from steerback.study.windows import STAGES, without_windows
from steerback.targets.download import gigabytes
from steerback.targets.fit import this_machine, verdict

if TYPE_CHECKING:
    from steerback.jobs.check import PreparedRun
    from steerback.jobs.judging import Judging
    from steerback.targets import Target


def responses(config: RunConfig, prompts: int, conditions: int = 1) -> dict[str, int]:
    """Return upper bounds for the responses per target, by stage. Latents can stop early or prove unusable."""
    latents = len(config.latents) if config.latents is not None else config.n_latents
    cal, searched = config.calibration, config.from_run is None
    measured = latents * config.trials_per_latent
    if config.limit is not None:
        measured = min(measured, config.limit)
    return {
        "reference": prompts * config.reference_responses,
        "calibration": latents * cal.max_iterations * cal.trials_per_iteration * searched,
        "verification": latents * cal.verify_trials * searched,
        "measure": measured * conditions,
    }


def of_experiment(job: PreparedRun, target: str) -> dict[str, int]:
    """Return upper bounds for a target's responses by stage, with the stages that the experiment adds or skips."""
    config, experiment = job.config.of(target), job.experiment
    if not experiment.generates:
        return experiment.further(config)
    counts = responses(config, len(job.prompts), experiment.conditions(config))
    if not experiment.calibrates:
        counts |= {"calibration": 0, "verification": 0}
    if experiment.reports_rates and not _takes_over_floor(job):
        counts[FLOOR] = len(floor_prompts(job.prompts, config.floor_responses))
    return counts | experiment.further(config)


def _takes_over_floor(job: PreparedRun) -> bool:
    """Return True if the base run has the floor of its targets, or will have it when it is finished."""
    if job.config.from_run is None:
        return False
    base = Path(job.config.from_run)
    taken = all(has_floor(base, job.config, target.name) for target in job.targets)
    return taken or not (base / "ledger.sqlite").is_file()


def plan_lines(job: PreparedRun, folder: Path) -> list[str]:
    """Return the lines of `--dry-run`: the choices, the memory check and upper bounds for the work."""
    config = job.config
    chosen = f"preset {config.preset}, engine {config.engine}, judge {config.judge}"
    lines = [f"{job.experiment.title}: {chosen}, folder {folder}"]
    if config.judge.startswith("offline"):
        lines.append(f"  the offline judge's scores are not comparable with the paper's: {docs_page('judging')}")
    for target in job.targets:
        counts = of_experiment(job, target.name)
        total = sum(counts.values())
        detail = " + ".join(f"{n} {stage}" for stage, n in counts.items() if n)
        cap = response_tokens(config, target)
        verdicts = sum(n for stage, n in counts.items() if stage not in UNJUDGED)
        asked = judge_estimate(job.makers.judge(config.judge), verdicts, cap)
        lines.append(
            f"  {target.name}: at most {total} responses ({detail}), {total * cap:,} tokens, {_time(target, total)}"
        )
        needed, there = target.memory(), this_machine()
        known = "" if needed is None else f"about {gigabytes(needed)} as {target.dtype}; "
        fits = f"does it fit this machine ({there.describe()})? {verdict(target, there)}"
        lines.append(f"  {target.name}: {known}{fits}")
        lines += [] if asked is None else [f"  {target.name}: judge {config.judge}: at most {asked}"]
        windows = window_spend(job, target)
        lines += [] if windows is None else [f"  {target.name}: sentences scored by {config.judge}: at most {windows}"]
        lines += _rating(job, target)
    if not job.experiment.generates:
        lines += _collecting(job)
    return lines + [line for name in job.experiment.judges(config) for line in lacking(job.makers.judge(name))]


def window_spend(job: PreparedRun, target: Target) -> Spend | None:
    """Return an upper bound for the cost of scoring windows of a target's responses; None if it is free."""
    judge, tokens = job.makers.judge(job.config.judge), response_tokens(job.config, target)
    scorer = window_scorer(judge, job.config.recovery) if job.experiment.reports_rates else None
    one = None if scorer is None else scorer.window_estimate([_longest(tokens)])
    counts = of_experiment(job, target.name)
    return None if one is None else one * sum(counts.get(stage, 0) for stage in STAGES)


def _longest(tokens: int) -> JudgeItem:
    """Return a made-up response of `tokens` words with five characters each, about one token per word."""
    return JudgeItem("", "a prompt of about ten words that asks for something", "word " * tokens, "a label")


def _rating(job: PreparedRun, target: Target) -> list[str]:
    """Return a line with the cost of rating a target's labels for concreteness, if a language model rates them."""
    name = rating_model(job.config)
    if name is None or not target.has_sae:
        return []
    rater = make_rater(name, job.makers.judge)
    assert isinstance(rater, LLMRater)
    longest = sorted(set(target.labels().values()), key=len, reverse=True)[: rating_sample(job.config.of(target.name))]
    return [f"  {target.name}: rater {name}: at most {rater.estimate(longest)}"]


def _collecting(job: PreparedRun) -> list[str]:
    """Return the source runs of an experiment that generates nothing, and the cost of its judges, as lines."""
    config = job.config
    chosen = job.experiment.options.model_dump()
    lines = [f"  {key}: {', '.join(map(str, v)) if isinstance(v, list) else v}" for key, v in chosen.items()]
    count = sum(of_experiment(job, config.targets[0]).values())
    for name in job.experiment.judges(config):
        asked = judge_estimate(job.makers.judge(name), count, config.sampling.max_new_tokens)
        lines += [] if asked is None else [f"  judge {name}: at most {asked}"]
    return lines


def response_tokens(config: RunConfig, target: Target) -> int:
    """Return the token limit of a target's responses."""
    config = config.of(target.name)
    return min(config.sampling.max_new_tokens, target.max_new_tokens or config.sampling.max_new_tokens)


def judge_estimate(judge: Judge, verdicts: int, tokens: int) -> Spend | None:
    """Return the cost of `verdicts` verdicts on responses of `tokens` tokens; None for a free judge."""
    one = estimated(judge, [_longest(tokens)])
    return None if one is None else one * verdicts


def judging_line(work: Judging) -> str:
    """Return a line with the number of responses to be judged and the estimated cost."""
    taken = "" if work.estimate is None else f": about {work.estimate}"
    return f"{work.count} responses to be judged by {work.judge.name}{taken}; what is cached is not asked again"


def windows_line(opened: Run, judge: Judge, retry: bool) -> str:
    """Return a line with the estimated cost of scoring the windows of a finished run.

    Raises SteerbackError if the judge cannot score windows.
    """
    scorer = window_scorer(judge, RecoveryConfig(judge=True))
    if scorer is None:
        raise SteerbackError(f"judge {judge.name} cannot score windows; choose another (see steerback judges)")
    keys = [key for _, key in without_windows(opened.ledger, judge.name, retry=retry)]
    asked = estimate_in_batches(scorer.window_estimate, map(judge_item, opened.ledger.stream(keys)))
    return (
        f"{len(keys)} responses whose sentences {judge.name} is to score{'' if asked is None else f': about {asked}'}"
    )


def unscored_lines(judge: str, reasons: Sequence[str]) -> list[str]:
    """Return a line with the number of unscored responses. `reasons` has one entry per response, "" if scored."""
    counts = Counter(filter(None, reasons))
    if not counts:
        return []
    reason = counts.most_common(1)[0][0]
    return [f"{counts.total()} of {len(reasons)} responses stay unscored by {judge}, most often because: {reason}"]


def spent_lines(folder: Path) -> list[str]:
    """Return one line for each judge of a run with the calls, tokens and money spent."""
    with Run.read(folder) as opened:
        paid = opened.ledger.get("", JUDGE_SPEND) or {}
    return [f"spent on judge {name}: {spend}" for name, spend in paid.items()]


def _time(target: Target, total: int) -> str:
    """Return the time for `total` responses at the target's measured speed, or a text that it is unknown."""
    if target.responses_per_second is None:
        return "time unknown until the first responses"
    seconds = total / target.responses_per_second
    return f"about {max(seconds / 60, 0.1):.1f} min at {target.responses_per_second:g} responses/s (2 CPU cores)"
