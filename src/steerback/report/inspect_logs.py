"""Export of a run as logs of Inspect AI: one sample per trial, one score per judge."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from steerback.analysis.base import outcomes_of
from steerback.errors import VERSION, SteerbackError
from steerback.metrics import VALID, Summary, outcome_of, summarize
from steerback.metrics.outcomes import STATES
from steerback.readers import read_json_table
from steerback.records import Completion, Judgement, Sampling, Trial, digest, expected_positions
from steerback.store.facts import JUDGES, PROVENANCE
from steerback.store.ledger import Row
from steerback.store.run import Run, plain

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalResults, EvalSample, EvalSpec
    from inspect_ai.model import ChatMessage, GenerateConfig, ModelOutput
    from inspect_ai.scorer import Score

SAMPLES_PER_LOG = 2_000
"""Most samples in one log: Inspect keeps all samples of a log in memory while it writes."""
RATED = ("floor", "measure", "replay", "continuation")
"""Stages with rates as results; the other stages only prepare the measurement."""
STOPS: dict[str, Literal["stop", "max_tokens"]] = {"stop": "stop", "length": "max_tokens"}
PLANTED = "planted: this model was trained to restart, so its rates are no evidence about other models"

Part = tuple[Row, list[Judgement]]


@dataclass(frozen=True)
class _Stage:
    """One stage of one target: the content that its logs share."""

    run: Run
    target: str
    stage: str
    judges: Sequence[str]
    provenance: dict[str, object]
    sampling: Sampling

    def conditions(self) -> list[str]:
        return [condition for target, condition in self.run.ledger.conditions(self.stage) if target == self.target]

    def parts(self) -> Iterator[Part]:
        """Yield each trial with its judgements, in plan order."""
        ledger = self.run.ledger
        for condition in self.conditions():
            keys = [row.trial.key for row in ledger.outlines(self.target, self.stage, condition)]
            columns = [ledger.stream(keys, judge) for judge in self.judges or (None,)]
            for rows in zip(*columns, strict=True):
                yield rows[0], [row.judgement for row in rows if row.judgement is not None]


def require_inspect() -> None:
    """Raise SteerbackError if Inspect AI is not installed."""
    if find_spec("inspect_ai") is None:
        raise SteerbackError("--format inspect needs the extra 'judges': pip install 'steerback[judges]'")


def export_inspect(run: Run, folder: Path, judges: Sequence[str]) -> list[Path]:
    """Write one `.eval` log per target and stage of a run, and several for a stage above SAMPLES_PER_LOG trials.

    An unscored, empty or invalid trial has the value NaN and a reason; Inspect excludes NaN from all metrics.
    """
    require_inspect()
    paths: list[Path] = []
    provenance = run_provenance(run)
    for target, stage in run.ledger.stages():
        shared = _Stage(run, target, stage, judges, provenance, sampling_of(run, provenance, target))
        rates = _rates(shared) if stage in RATED else {}
        samples: list[EvalSample] = []
        finished, part = True, 1
        for row, verdicts in shared.parts():
            if len(samples) == SAMPLES_PER_LOG:
                paths.append(_write(shared, folder, part, samples, rates, finished))
                samples, finished, part = [], True, part + 1
            samples.append(_sample(row, verdicts, shared.sampling))
            finished = finished and row.completion is not None
        paths.append(_write(shared, folder, part, samples, rates, finished))
    return paths


def run_provenance(run: Run) -> dict[str, object]:
    """Return the manifest of a run, or the config of a run without manifest (an imported one)."""
    path = run.folder / "manifest.json"
    return {**read_json_table(path, "manifest")} if path.is_file() else {"config": run.config.model_dump(mode="json")}


def sampling_of(run: Run, provenance: dict[str, object], target: str) -> Sampling:
    """Return the sampling settings of a target: those of the run, with the target's limit of new tokens."""
    place: object = provenance
    for name in ("targets", target, "target", "max_new_tokens"):
        place = place.get(name) if isinstance(place, dict) else None
    return run.config.of(target).sampling.record(place if isinstance(place, int) else None)


def _rates(shared: _Stage) -> dict[tuple[str, str], Summary]:
    """Return the summaries of a stage by judge and condition. There is no bootstrap: its intervals are not exported."""
    rates: dict[tuple[str, str], Summary] = {}
    for condition in shared.conditions():
        for judge in shared.judges:
            rows = [*shared.run.ledger.outlines(shared.target, shared.stage, condition, judge)]
            if any(row.judgement for row in rows):
                rates[judge, condition] = summarize(outcomes_of(rows, shared.run.ledger.includes_degraded), draws=0)
    return rates


def _write(
    shared: _Stage,
    folder: Path,
    part: int,
    samples: list[EvalSample],
    rates: dict[tuple[str, str], Summary],
    finished: bool,
) -> Path:
    from inspect_ai.log import EvalLog, EvalPlan, EvalPlanStep, EvalStats, write_eval_log

    spec = _spec(shared, part, samples)
    steps = [EvalPlanStep(solver="steerback", params={"stage": shared.stage})]
    log: EvalLog = EvalLog(
        status="success" if finished else "cancelled",
        eval=spec,
        plan=EvalPlan(steps=steps, config=spec.model_generate_config),
        results=_results(shared.judges, samples, rates),
        stats=EvalStats(started_at=spec.created, completed_at=spec.created),
        samples=samples,
    )
    path = folder / f"{_file_name(shared.target)}-{_file_name(shared.stage)}{'' if part == 1 else f'-{part}'}.eval"
    try:
        write_eval_log(log, path, format="eval")
    except OSError as error:
        raise SteerbackError(f"{path} cannot be written: {error.strerror or error}; choose another --out") from None
    return path


def _file_name(text: str) -> str:
    return text if plain(text) == text else f"{plain(text)}-{digest(text)[:6]}"


def _spec(shared: _Stage, part: int, samples: Sequence[EvalSample]) -> EvalSpec:
    from inspect_ai.log import EvalConfig, EvalDataset, EvalSpec

    ledger, config = shared.run.ledger, shared.run.config
    written = shared.provenance.get("written")
    origin = ledger.get(shared.target, PROVENANCE)
    planted = origin is not None and origin.planted
    identity = digest([shared.run.folder.name, written, shared.target, shared.stage])
    return EvalSpec(
        created=written if isinstance(written, str) else datetime.now(UTC).isoformat(timespec="seconds"),
        eval_id=f"{identity[:20]}{part:02d}",
        run_id=digest([shared.run.folder.name, written])[:22],
        task=f"steerback_{config.experiment.replace('-', '_')}_{shared.stage}",
        task_id=identity[20:42],
        task_version=VERSION,
        task_args={"experiment": config.experiment, "stage": shared.stage, "preset": config.preset},
        tags=["steerback", *(["planted"] if planted else [])],
        dataset=EvalDataset(
            name=f"{shared.run.folder.name}/{shared.stage}", samples=len(samples), sample_ids=[s.id for s in samples]
        ),
        model=shared.target,
        model_generate_config=_generate_config(shared.sampling, config.seeds.generation),
        config=EvalConfig(epochs=1),
        packages={"steerback": VERSION},
        metadata={
            "run": shared.run.folder.name,
            "part": part,
            "repetition_penalty": shared.sampling.repetition_penalty,
            **({"note": PLANTED} if planted else {}),
            "judges": {judge: (ledger.get("", JUDGES) or {}).get(judge, {}) for judge in shared.judges},
            "manifest": shared.provenance,
        },
    )


def _generate_config(sampling: Sampling, seed: int) -> GenerateConfig:
    from inspect_ai.model import GenerateConfig

    return GenerateConfig(
        temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_new_tokens, seed=seed
    )


def _results(
    judges: Sequence[str], samples: Sequence[EvalSample], rates: dict[tuple[str, str], Summary]
) -> EvalResults:
    """Return the headline metrics of each judge and condition, and the sample counts of this log."""
    from inspect_ai.log import EvalMetric, EvalResults, EvalScore

    scores = []
    for judge in judges:
        values = [s.scores[judge].value for s in samples if s.scores and judge in s.scores]
        metrics = {
            f"{condition}: {name}": EvalMetric(
                name=name,
                group=condition,
                value=estimate.value,
                metadata={"low": estimate.low, "high": estimate.high, "n": estimate.n, "method": estimate.method},
            )
            for (rated_by, condition), summary in rates.items()
            if rated_by == judge
            for name, estimate in summary.headline.items()
            if estimate.value is not None
        }
        scored = sum(isinstance(value, dict) for value in values)
        if values:
            scores.append(
                EvalScore(
                    name=judge,
                    scorer=judge,
                    scored_samples=scored,
                    unscored_samples=len(values) - scored,
                    metrics=metrics,
                )
            )
    done = sum(s.error is None for s in samples)
    return EvalResults(total_samples=len(samples), completed_samples=done, scores=scores)


def _sample(row: Row, verdicts: Sequence[Judgement], sampling: Sampling) -> EvalSample:
    from inspect_ai.log import EvalError, EvalSample

    trial, done = row.trial, row.completion
    asked = _messages(trial, sampling)
    output = _output(trial, done)
    failed = done is not None and done.finish == "error"
    return EvalSample(
        id=trial.key,
        epoch=1,
        input=asked,
        target="",
        messages=[*asked, *(choice.message for choice in output.choices)],
        output=output,
        scores={v.judge: _score(row, v) for v in verdicts},
        metadata=_trial_metadata(row),
        model_usage={} if output.usage is None else {trial.target: output.usage},
        error=EvalError(message="the engine gave no response", traceback="", traceback_ansi="") if failed else None,
    )


def _messages(trial: Trial, sampling: Sampling) -> list[ChatMessage]:
    """Return the messages that the model saw: system prompt, user message with meta-prompt, and prefill, as far as they
    exist.
    """
    from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser

    request = trial.request(sampling)
    messages: list[ChatMessage] = []
    if request.system is not None:
        messages.append(ChatMessageSystem(content=request.system, source="input"))
    messages.append(ChatMessageUser(content=request.prompt, source="input"))
    if trial.lead:
        messages.append(ChatMessageAssistant(content=trial.lead, source="input", metadata={"prefill": True}))
    return messages


def _output(trial: Trial, done: Completion | None) -> ModelOutput:
    from inspect_ai.model import ChatCompletionChoice, ChatMessageAssistant, ModelOutput, ModelUsage

    if done is None:
        return ModelOutput(model=trial.target)
    message = ChatMessageAssistant(content=done.text, source="generate", model=trial.target)
    tokens = len(done.token_ids)
    return ModelOutput(
        model=trial.target,
        choices=[ChatCompletionChoice(message=message, stop_reason=STOPS.get(done.finish, "unknown"))],
        usage=ModelUsage(
            input_tokens=done.prompt_tokens, output_tokens=tokens, total_tokens=done.prompt_tokens + tokens
        ),
    )


def _trial_metadata(row: Row) -> dict[str, object]:
    trial, done = row.trial, row.completion
    metadata: dict[str, object] = {
        **{name: getattr(trial, name) for name in ("stage", "condition", "index", "latent", "label", "boost", "seed")},
        **{name: getattr(trial, name) for name in ("target", "prompt", "meta_prompt", "prefill")},
        "interventions": [asdict(i) for i in trial.interventions],
        "record": None if trial.record is None else asdict(trial.record),
        "valid_receipt": row.valid_receipt if done else None,
    }
    if done is not None:
        continued = trial.prefix is not None
        wanted = expected_positions(trial.interventions, done.prompt_tokens, len(done.token_ids), continued)
        expected = dict(zip(("prompt_positions", "generated_positions"), wanted, strict=True))
        metadata |= {"finish": done.finish, "receipt": {**asdict(done.receipt), "expected": expected}}
        metadata["degraded"] = row.degraded
    return metadata


def _score(row: Row, judged: Judgement) -> Score:
    """Return a judge's score of a trial, computed from the gated attempts."""
    from inspect_ai.scorer import Score

    outcome = outcome_of(row.valid_receipt, judged, row.degraded)
    text = row.judged_text
    metadata: dict[str, object] = {
        "status": judged.status,
        "rubric": judged.rubric,
        "reason": judged.reason,
        "attempts": [{**asdict(a), "text": text[a.start : a.end]} for a in judged.attempts],
        "gated_attempts": [asdict(a) for a in judged.gated_attempts()],
        "raw": judged.raw,
    }
    if outcome.state != VALID:
        state = STATES[outcome.state]
        return Score.unscored(reason=state, explanation=_why_unscored(state, judged), metadata=metadata)
    several = outcome.attempts >= 2
    return Score(
        value={
            "attempts": outcome.attempts,
            "first": outcome.first,
            "last": outcome.last,
            "gain": outcome.last - outcome.first,
            "multi_attempt": several,
            "esr": several and outcome.last > outcome.first,
        },
        explanation=_explanation(judged),
        metadata=metadata,
    )


def _why_unscored(state: str, judged: Judgement) -> str:
    if state == "invalid":
        return "Invalid: the receipt does not match the plan, or there is no response. The verdict does not count."
    return f"{state.capitalize()}: {judged.reason}" if judged.reason else f"{state.capitalize()}."


def _explanation(judged: Judgement) -> str:
    """Return one line per gated attempt; characters count from the start of prefill and response."""
    lines = []
    for number, attempt in enumerate(judged.gated_attempts(), 1):
        opened = f", opened by {json.dumps(attempt.phrase, ensure_ascii=False)}" if attempt.phrase else ""
        place = f"characters {attempt.start} to {attempt.end}"
        lines.append(f"Attempt {number}: {attempt.score:g} of 100 ({place}{opened}).")
    return "\n\n".join([*lines, judged.reason] if judged.reason else lines)
