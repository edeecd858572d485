"""The pipeline: it takes planned trials and writes generated and judged rows to the ledger.

This is the only loop over responses in the package; calibration, measurement and every experiment use it. Trials in
the ledger are skipped, responses in the cache are copied, and the engine generates the rest while the judge works in
parallel. To resume a plan is therefore to run it again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from steerback.errors import SteerbackError
from steerback.judging.base import Judge, JudgeItem, References
from steerback.records import Completion, Judgement, LatentKey, Request, Sampling, Trial, digest
from steerback.store.cache import Cache, cache_key
from steerback.store.ledger import Ledger, Row

if TYPE_CHECKING:
    from steerback.engines.base import Arriving, Engine
    from steerback.store.progress import Progress

T = TypeVar("T")

FLUSH_SECONDS = 0.1  # results are saved and passed on this often: a kill loses them, and other trials wait for them
FLUSH_ROWS = 64
QUEUED_BATCHES = 32  # batches of FLUSH_ROWS responses; if the queue is full, the engine waits for the judge
JUDGE_BATCH, JUDGED_TOGETHER = 64, 8  # responses of a batch; batches that are with the judge at the same time


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


Finished = Callable[[Sequence[Row]], None]
Follow = Callable[[Sequence[Row]], Sequence[Trial]]
"""Maps finished rows (judged, or invalid and therefore not judged) to the next trials."""


async def carry_out(
    bench: Workbench,
    trials: Sequence[Trial],
    stage: str = "",
    judged: bool = True,
    follow: Follow | None = None,
    total: int | None = None,
) -> None:
    """Plan, generate and judge `trials`. The rows stay in the ledger, so memory does not grow with their texts.

    `follow` is called with rows as they are finished, and the trials that it returns join those under way; `total` is
    their expected number. Raises SteerbackError for errors that the user can fix (impossible request, full disk);
    committed rows stay.
    """
    if not trials:
        return
    judge = bench.judge if judged else None
    if follow is not None and judge is None:
        raise ValueError("trials can only follow from judged ones")
    flow = Flow(bench, judge, follow)
    done = flow.plan(trials)
    bench.progress.stage(stage or trials[0].stage, total or len(trials), done)
    judging = [_judge_arriving(flow, judge) for _ in range(JUDGED_TOGETHER)] if judge is not None else []
    await all_or_none([_generate(flow), *judging])


async def judge_rows(bench: Workbench, keys: Sequence[str], stage: str = "judging") -> None:
    """Judge the responses of some trials with the bench's judge; only some batches are in memory at a time."""
    judge = bench.judge
    if judge is None:
        raise ValueError("a judge is needed")
    bench.progress.stage(stage, len(keys))
    await in_batches(keys, lambda batch: _judge_batch(bench, judge, list(bench.ledger.stream(batch))))


async def in_batches(items: Sequence[T], work: Callable[[Sequence[T]], Coroutine[object, None, None]]) -> None:
    """Give items to a judge in batches, several at the same time, because each batch waits for its slowest reply."""
    batches = (items[start : start + JUDGE_BATCH] for start in range(0, len(items), JUDGE_BATCH))

    async def take() -> None:
        for batch in batches:
            await work(batch)

    await all_or_none([take() for _ in range(JUDGED_TOGETHER)])


async def all_or_none(work: Sequence[Coroutine[object, None, None]]) -> None:
    """Wait for all work; at the first failure or cancellation, cancel the rest and wait until each has saved."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


class Flow:
    """Queues of trials between ledger, engine and judge. Everything in a queue is also in the ledger."""

    def __init__(self, bench: Workbench, judge: Judge | None, follow: Follow | None) -> None:
        self.bench, self.judge, self.follow = bench, judge, follow
        self.to_generate: asyncio.Queue[list[Trial] | None] = asyncio.Queue()
        self.to_judge: asyncio.Queue[list[Row] | None] = asyncio.Queue(QUEUED_BATCHES)
        self.unjudged: list[Row] = []  # responses that an earlier process generated
        self._open = 0

    def plan(self, trials: Sequence[Trial]) -> int:
        """Add trials, and the next trials of finished ones, to ledger and queues; return how many had responses."""
        had, todo = 0, list(trials)
        while todo:
            if len({t.key for t in todo}) != len(todo):
                raise ValueError("two trials share a key")
            ledger = self.bench.ledger
            ledger.add_trials(todo)
            self._open += len(todo)
            open_keys = ledger.without_response(t.key for t in todo)
            had += len(todo) - len(open_keys)
            if waiting := [t for t in todo if t.key in open_keys]:
                self.to_generate.put_nowait(waiting)
            todo = self._take_up([t.key for t in todo if t.key not in open_keys])
        if not self._open or self.follow is None:
            self.to_generate.put_nowait(None)
        return had

    def _take_up(self, keys: Sequence[str]) -> list[Trial]:
        """Split existing responses into judged and unjudged ones; return the next trials of the judged ones."""
        if self.judge is None or not keys:
            return []
        ledger, name = self.bench.ledger, self.judge.name
        waiting = ledger.without_verdict(name, keys)
        fresh = list(ledger.stream([key for key in keys if key in waiting]))
        self.unjudged += [r for r in fresh if r.valid_receipt]
        if self.follow is None:
            return []
        finished = [*ledger.stream([key for key in keys if key not in waiting], name)]
        return self._finish([*finished, *(r for r in fresh if not r.valid_receipt)])

    def finished(self, rows: Sequence[Row]) -> None:
        """Remove finished rows from the flow and plan their next trials."""
        if self.follow is None or not rows:
            return
        had = self.plan(self._finish(rows))
        self.bench.progress.update(generated=had)

    def _finish(self, rows: Sequence[Row]) -> list[Trial]:
        self._open -= len(rows)
        return list(self.follow(rows)) if self.follow is not None and rows else []


async def _generate(flow: Flow) -> None:
    """Write completions in batches and pass each batch to the judge; None marks the end of the queue."""
    bench, engine = flow.bench, flow.bench.engine
    if engine is None:
        raise ValueError("an engine is needed to generate")
    trials: dict[str, Trial] = {}
    hashes: dict[str, str] = {}
    buffer: dict[str, Completion] = {}

    def cached_under(key: str) -> str:
        # read the fingerprint each time: it changes if the engine has to shrink its batch
        return cache_key("completion", engine.fingerprint, hashes[key])

    def commit(to_cache: bool = True) -> list[Row]:
        if not buffer:
            return []
        bench.ledger.add_completions((key, c, engine.fingerprint) for key, c in buffer.items())
        if to_cache and bench.cache is not None:
            bench.cache.put_completions({cached_under(key): c for key, c in buffer.items() if c.finish != "error"})
        rows = [Row(trials.pop(key), c, None) for key, c in buffer.items()]
        bench.progress.update(generated=len(rows), invalid=sum(not r.valid_receipt for r in rows))
        buffer.clear()
        return rows

    async def pass_on(rows: list[Row]) -> None:
        if rows and flow.judge is not None:
            await flow.to_judge.put(rows)

    async def arriving() -> list[Request] | None:
        """Return requests of planned trials whose responses are not in the cache; None if no trial can follow."""
        while (planned := await flow.to_generate.get()) is not None:
            requests = {t.key: t.request(bench.sampling) for t in planned}
            trials.update((t.key, t) for t in planned)
            hashes.update((key, r.content_hash()) for key, r in requests.items())
            if bench.cache is not None:
                asked = {key: cached_under(key) for key in requests}  # two trials may ask for the same response
                known = bench.cache.completions(list(set(asked.values())))
                rows = commit()
                buffer.update({key: known[asked[key]] for key in asked if asked[key] in known})
                requests = {key: r for key, r in requests.items() if key not in buffer}
                await pass_on(rows + commit(to_cache=False))
            if requests:
                return list(requests.values())
        return None

    async def receive() -> None:
        async with contextlib.aclosing(_stream(engine, arriving, flow.follow is not None)) as stream:
            async for key, completion in stream:
                buffer[key] = completion
                if len(buffer) >= FLUSH_ROWS or len(buffer) == len(trials):  # or the engine has nothing left
                    await pass_on(commit())

    try:
        await _flushed(receive(), lambda: pass_on(commit()))
    finally:
        rows = commit()  # also after a cancellation, so that no finished response is lost
    await pass_on(rows)
    if flow.judge is not None:
        await flow.to_judge.put(None)


async def _stream(engine: Engine, arriving: Arriving, more: bool) -> AsyncGenerator[tuple[str, Completion]]:
    """Yield the engine's stream and check that each request is answered exactly once."""
    wanted: set[str] = set()

    async def noted() -> Sequence[Request] | None:
        requests = await arriving()
        wanted.update(r.key for r in requests or ())
        return requests

    first = await noted()
    if first is None:
        return
    async for key, completion in engine.generate(first, noted) if more else engine.generate(first):
        if key not in wanted:
            raise RuntimeError(f"the engine answered {key!r}, which was not requested or was already answered")
        wanted.remove(key)
        yield key, completion
    if wanted:
        raise RuntimeError(f"the engine left {len(wanted)} requests unanswered, e.g. {sorted(wanted)[0]!r}")


async def _flushed(work: Coroutine[object, None, None], flush: Callable[[], Coroutine[object, None, None]]) -> None:
    """Wait for `work`, and call `flush` every `FLUSH_SECONDS` meanwhile; if one fails, the other ends."""
    task = asyncio.create_task(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=FLUSH_SECONDS)
            await flush()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    task.result()


async def _judge_arriving(flow: Flow, judge: Judge) -> None:
    """Judge rows as they arrive, all waiting rows up to a batch, until None arrives."""
    ended = False
    while flow.unjudged or not ended:
        waiting = flow.unjudged[:JUDGE_BATCH]
        del flow.unjudged[:JUDGE_BATCH]
        while not ended and (not waiting or (len(waiting) < JUDGE_BATCH and not flow.to_judge.empty())):
            batch = await flow.to_judge.get()
            waiting.extend(batch or [])
            if batch is None:
                ended = True
                flow.to_judge.put_nowait(None)  # for the others that judge
        # a response that was not steered as planned is counted as invalid and not judged
        flow.finished([r for r in waiting if not r.valid_receipt])
        valid = [r for r in waiting if r.valid_receipt]
        await _judge_batch(flow.bench, judge, valid, flow.finished if flow.follow is not None else None)


async def _judge_batch(bench: Workbench, judge: Judge, rows: Sequence[Row], finished: Finished | None = None) -> None:
    """Judge rows, commit verdicts every `FLUSH_SECONDS`, and pass on the judged rows."""
    items = {r.trial.key: judge_item(r, bench.drop_unscored) for r in rows}
    keys = {key: judgement_key(judge, item) for key, item in items.items()}
    known = bench.cache.judgements(list(keys.values())) if bench.cache is not None else {}
    waiting = {key: item for key, item in items.items() if keys[key] not in known}
    fresh: dict[str, Judgement] = {}
    refused: dict[str, Judgement] = {}

    async def receive() -> None:
        async for key, judgement in judge.judge(list(waiting.values())):
            (refused if judgement.over_budget else fresh)[key] = judgement
            del waiting[key]
        if waiting:
            raise RuntimeError(f"judge {judge.name} lost {len(waiting)} responses, e.g. {next(iter(waiting))!r}")

    async def commit() -> None:
        verdicts = dict(fresh)
        fresh.clear()
        if bench.cache is not None:
            bench.cache.put_judgements({keys[key]: j for key, j in verdicts.items()})
        _commit_verdicts(bench, judge, verdicts, finished)

    _commit_verdicts(bench, judge, {key: known[keys[key]] for key in items if keys[key] in known}, finished)
    if not waiting:
        return
    try:
        await _flushed(receive(), commit)
    finally:
        await commit()
    if refused:  # stop here: thresholds computed from a part of the verdicts would be kept and reused
        reason = next(iter(refused.values())).reason
        raise SteerbackError(f"judge {judge.name}: {reason}; verdicts so far are kept: resume with a larger budget")


def _commit_verdicts(
    bench: Workbench, judge: Judge, verdicts: Mapping[str, Judgement], finished: Finished | None
) -> None:
    if not verdicts:
        return
    bench.ledger.add_judgements(verdicts.items())
    bench.progress.update(judged=len(verdicts), unscored=sum(j.status == "unscored" for j in verdicts.values()))
    if finished is not None:
        finished(list(bench.ledger.stream(list(verdicts), judge.name)))


def judge_item(row: Row, drop_unscored: bool = False) -> JudgeItem:
    """Return the item that the judge sees of a trial, without the meta-prompt."""
    if row.completion is None:
        raise SteerbackError(f"trial {row.trial.key} has no response yet; resume the run first")
    trial = row.trial
    return JudgeItem(trial.key, trial.prompt, row.judged_text, trial.label, trial.latent, drop_unscored)


def references(rows: Sequence[Row], contexts: Mapping[LatentKey, Sequence[str]]) -> References:
    """Return the references of an offline judge: the unsteered responses among `rows`, and the latents' contexts."""
    responses: dict[str, list[str]] = {}
    for row in rows:
        if row.trial.stage == "reference" and row.completion is not None:
            responses.setdefault(row.trial.prompt, []).append(row.completion.text)
    return References(responses, contexts)


def judgement_key(judge: Judge, item: JudgeItem) -> str:
    """Return the cache key of a verdict: judge, rubric, response, prompt, label, and latent (whose contexts count)."""
    body = [item.prompt, item.response, item.label, item.latent, *(["drop"] if item.drop_unscored else [])]
    return cache_key("judgement", judge.fingerprint, digest(body))
