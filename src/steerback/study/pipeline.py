"""The pipeline: it takes planned trials and writes generated and judged rows to the ledger.

This is the only loop over responses in the package; calibration, measurement and every experiment use it. Trials in
the ledger are skipped, responses in the cache are copied, and the engine generates the rest while the judge works in
parallel. To resume a plan is therefore to run it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from steerback.errors import SteerbackError
from steerback.judging.base import Judge, JudgeItem
from steerback.records import Completion, Judgement, Sampling, Trial, digest
from steerback.store.cache import Cache, cache_key
from steerback.store.ledger import Ledger, Row

if TYPE_CHECKING:
    from steerback.engines.base import Engine
    from steerback.store.progress import Progress

FLUSH_SECONDS = 1.0  # a kill loses at most this much work
FLUSH_ROWS = 64
JUDGE_BATCH = 512  # large, because an LLM judge keeps many requests in flight and each batch waits for its slowest


@dataclass(slots=True)
class Workbench:
    """Ledger, engine, judge, sampling and cache for trials. Without engine or judge, that step is skipped."""

    ledger: Ledger
    engine: Engine | None
    judge: Judge | None
    sampling: Sampling
    progress: Progress
    cache: Cache | None = None
    drop_unscored: bool = False  # as in JudgeItem


async def complete(bench: Workbench, trials: Sequence[Trial], stage: str = "", judged: bool = True) -> list[Row]:
    """Run `carry_out` and return the rows of the trials in the same order."""
    await carry_out(bench, trials, stage, judged)
    judge = bench.judge.name if judged and bench.judge is not None else None
    return list(bench.ledger.stream([t.key for t in trials], judge))


async def carry_out(bench: Workbench, trials: Sequence[Trial], stage: str = "", judged: bool = True) -> None:
    """Plan, generate and judge `trials`. The rows stay in the ledger, so memory does not grow with their texts.

    Raises SteerbackError for errors that the user can fix (impossible request, full disk); committed rows stay.
    """
    if not trials:
        return
    if len({t.key for t in trials}) != len(trials):
        raise ValueError("two trials share a key")
    bench.ledger.add_trials(trials)
    judge = bench.judge if judged else None
    done = bench.ledger.completed(t.key for t in trials)
    waiting = [t for t in trials if t.key not in done]
    bench.progress.stage(stage or trials[0].stage, len(trials), len(trials) - len(waiting))
    queue: asyncio.Queue[list[Row] | None] = asyncio.Queue()
    if judge is not None:  # an interrupted run may have left responses without a verdict
        known = bench.ledger.judged(judge.name, done)
        if unjudged := [t.key for t in trials if t.key in done and t.key not in known]:
            queue.put_nowait(list(bench.ledger.stream(unjudged)))
    tasks = [asyncio.create_task(_generate(bench, waiting, queue))]
    if judge is not None:
        tasks.append(asyncio.create_task(_judge(bench, judge, queue)))
    await _all_or_none(tasks)


async def judge_rows(bench: Workbench, rows: Sequence[Row], stage: str = "judging") -> None:
    """Judge existing responses with the bench's judge; no response is judged twice."""
    if bench.judge is None:
        raise ValueError("a judge is needed")
    queue: asyncio.Queue[list[Row] | None] = asyncio.Queue()
    todo = [r for r in rows if r.completion is not None]
    bench.progress.stage(stage, len(todo))
    queue.put_nowait(todo)
    queue.put_nowait(None)
    await _judge(bench, bench.judge, queue)


async def _all_or_none(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait for all tasks; at the first failure or cancellation, cancel the others and wait until each has saved."""
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _generate(bench: Workbench, trials: Sequence[Trial], queue: asyncio.Queue[list[Row] | None]) -> None:
    """Write completions in batches and pass each batch to the judge; None marks the end of the queue."""
    engine = bench.engine
    if engine is None:
        raise ValueError("an engine is needed to generate")
    by_key = {t.key: t for t in trials}
    requests = {t.key: t.request(bench.sampling) for t in trials}
    hashes = {key: r.content_hash() for key, r in requests.items()}
    buffer: dict[str, Completion] = {}
    last_flush = time.monotonic()

    def cached_under(key: str) -> str:
        # read the fingerprint each time: it changes if the engine has to shrink its batch
        return cache_key("completion", engine.fingerprint, hashes[key])

    def flush(to_cache: bool = True) -> None:
        nonlocal last_flush
        last_flush = time.monotonic()
        if not buffer:
            return
        bench.ledger.add_completions((key, c, engine.fingerprint) for key, c in buffer.items())
        if to_cache and bench.cache is not None:
            bench.cache.put_completions({cached_under(key): c for key, c in buffer.items() if c.finish != "error"})
        rows = [Row(by_key[key], c, None) for key, c in buffer.items()]
        bench.progress.update(generated=len(rows), invalid=sum(not r.valid_receipt for r in rows))
        buffer.clear()
        queue.put_nowait(rows)

    if bench.cache is not None:
        asked = {key: cached_under(key) for key in requests}  # two trials may ask for the same response
        known = bench.cache.completions(list(set(asked.values())))
        buffer.update({key: known[asked[key]] for key in asked if asked[key] in known})
        for key in buffer:
            del requests[key]
        flush(to_cache=False)
    if requests:
        try:
            async with contextlib.aclosing(_stream(engine, list(requests.values()))) as stream:
                async for key, completion in stream:
                    buffer[key] = completion
                    if len(buffer) >= FLUSH_ROWS or time.monotonic() - last_flush > FLUSH_SECONDS:
                        flush()
        finally:
            flush()  # also after a cancellation, so that no finished response is lost
    queue.put_nowait(None)


async def _stream(engine: Engine, requests: Sequence[Any]) -> AsyncGenerator[tuple[str, Completion]]:
    """Yield the engine's stream and check that each request is answered exactly once."""
    wanted = {r.key for r in requests}
    async for key, completion in engine.generate(requests):
        if key not in wanted:
            raise RuntimeError(f"the engine answered {key!r}, which was not requested or was already answered")
        wanted.remove(key)
        yield key, completion
    if wanted:
        raise RuntimeError(f"the engine left {len(wanted)} requests unanswered, e.g. {sorted(wanted)[0]!r}")


async def _judge(bench: Workbench, judge: Judge, queue: asyncio.Queue[list[Row] | None]) -> None:
    """Judge rows as they arrive, all waiting rows as one batch, until None arrives."""
    ended = False
    while not ended:
        batch = await queue.get()
        ended = batch is None
        waiting = list(batch or [])
        while not queue.empty() and not ended:
            more = queue.get_nowait()
            ended = more is None
            waiting.extend(more or [])
        # a response that was not steered as planned is counted as invalid and not judged
        valid = [r for r in waiting if r.valid_receipt]
        for start in range(0, len(valid), JUDGE_BATCH):
            await _judge_batch(bench, judge, valid[start : start + JUDGE_BATCH])


async def _judge_batch(bench: Workbench, judge: Judge, rows: Sequence[Row]) -> None:
    items = {r.trial.key: judge_item(r, bench.drop_unscored) for r in rows}
    keys = {key: judgement_key(judge, item) for key, item in items.items()}
    known = bench.cache.judgements(list(keys.values())) if bench.cache is not None else {}
    verdicts = {key: known[keys[key]] for key in items if keys[key] in known}
    fresh: dict[str, Judgement] = {}
    refused: dict[str, Judgement] = {}
    try:
        asked = [item for key, item in items.items() if key not in verdicts]
        if asked:
            async for key, judgement in judge.judge(asked):
                (refused if judgement.over_budget else fresh)[key] = judgement
            missing = [item.key for item in asked if item.key not in fresh and item.key not in refused]
            if missing:
                raise RuntimeError(f"judge {judge.name} lost {len(missing)} responses, e.g. {missing[0]!r}")
    finally:
        verdicts |= fresh
        if verdicts:
            bench.ledger.add_judgements(verdicts.items())
        if bench.cache is not None and fresh:
            bench.cache.put_judgements({keys[key]: j for key, j in fresh.items()})
    unscored = sum(j.status == "unscored" for j in verdicts.values())
    bench.progress.update(judged=len(verdicts), unscored=unscored)
    if refused:  # stop here: thresholds computed from a part of the verdicts would be kept and reused
        reason = next(iter(refused.values())).reason
        raise SteerbackError(f"judge {judge.name}: {reason}; verdicts so far are kept: resume with a larger budget")


def judge_item(row: Row, drop_unscored: bool = False) -> JudgeItem:
    """Return the item that the judge sees of a trial, without the meta-prompt."""
    if row.completion is None:
        raise SteerbackError(f"trial {row.trial.key} has no response yet; resume the run first")
    trial = row.trial
    return JudgeItem(trial.key, trial.prompt, row.judged_text, trial.label, trial.latent, drop_unscored)


def judgement_key(judge: Judge, item: JudgeItem) -> str:
    """Return the cache key of a verdict: judge, rubric, response, prompt, label, and latent (whose contexts count)."""
    body = [item.prompt, item.response, item.label, item.latent, *(["drop"] if item.drop_unscored else [])]
    return cache_key("judgement", judge.fingerprint, digest(body))
