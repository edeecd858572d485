"""The stages before a measurement, for one target: references, latent selection, thresholds, the grid of trials.

Each stage is computed once and stored in the ledger; later calls read it from there. Experiments use `Study` and add
conditions; they contain no loop over responses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from steerback.calibration import Calibrator, Threshold, verified
from steerback.calibration.thresholds import THRESHOLDS, LatentThreshold
from steerback.errors import SteerbackError, docs_page
from steerback.judging import Maker, make_judge
from steerback.judging.base import drain
from steerback.latents import selection as choose
from steerback.latents.concreteness import make_rater
from steerback.latents.sampling import check_latents
from steerback.records import Intervention, Latent, LatentKey, Trial
from steerback.store.facts import BASELINE, ENGINE, LATENTS, MEASURED, Fact, Selection
from steerback.store.ledger import Row
from steerback.store.processes import collector_paused
from steerback.store.run import Run, fact_of
from steerback.study.pipeline import Workbench, carry_out, complete, references
from steerback.study.seeds import seed_offset
from steerback.targets import Target

if TYPE_CHECKING:
    from steerback.engines.base import Engine, Over

T = TypeVar("T")

FURTHER = "unsteered, further prompts"
UNJUDGED = ("reference", "discovery")  # stages of unsteered responses that serve for comparison only


@lru_cache(4096, typed=True)  # trials of one latent share it
def _added(latent: LatentKey, boost: float) -> tuple[Intervention, ...]:
    """Return the addition of a latent's direction."""
    return (Intervention("add", latent, boost),)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the grid that all conditions share: latent, threshold boost, prompt and seed."""

    index: int
    latent: Latent
    boost: float
    prompt: str
    seed: int


class Study:
    """One target of a run, with the workbench for its trials."""

    def __init__(
        self, run: Run, target: Target, bench: Workbench, prompts: Sequence[str], judges: Maker = make_judge
    ) -> None:
        """Build the study; `judges` makes the rater of labels if that is a language model."""
        self.run, self.target, self.bench, self.prompts = run, target, bench, tuple(prompts)
        self._judges = judges
        if bench.engine is None:
            raise ValueError("a study needs an engine")
        self.name, self.config, self.engine = target.name, run.config.of(target.name), bench.engine

    def trial(self, stage: str, condition: str, index: int, **fields: Any) -> Trial:
        """Return a trial of this target with its key. Stage and index give its seed, unless it is among `fields`."""
        key = f"{self.name}/{stage}/{condition}/{index}"
        if "seed" not in fields:
            fields["seed"] = self.seed(stage, index)
        return Trial(key=key, target=self.name, stage=stage, condition=condition, index=index, **fields)

    def seed(self, stage: str, index: int) -> int:
        return self.config.seeds.generation + seed_offset(stage, index)

    def fact(self, fact: Fact[T]) -> T | None:
        """Return a fact of this run, or of the runs it starts from; that is copied, so that the ledger is complete.

        None if it is not computed yet: the earlier runs are finished and did not need it.
        """
        stored = self.run.ledger.get(self.name, fact)
        folder = None if stored is not None else self.config.from_run
        while folder is not None:
            kept = fact_of(Path(folder), self.name, fact)
            if kept[0] is not None:
                self.run.ledger.put(self.name, fact, kept[0])
                return kept[0]
            if not (Path(folder) / "summary.json").is_file() and not fact_of(Path(folder), self.name, MEASURED)[0]:
                raise SteerbackError(
                    f"run {folder} has no {fact.name} for {self.name} yet; finish it first: "
                    f"steerback resume {Path(folder).name}"
                )
            folder = kept[1]
        return stored

    async def prepare(self, more: Sequence[str] = (), expected: int = 0) -> None:
        """Generate unsteered responses to every prompt and pass them to the judge as references.

        `more` lists prompts beyond those of the run that will also be measured, `expected` is the largest number of
        responses to judge, as far as it is known.
        """
        rows: list[Row] = []
        if self.target.adapter is not None:  # its base's references, if that is in this run: the same for all adapters
            stored = self.run.ledger.rows(target=self.target.base, stage="reference")
            rows = [r for r in stored if more or r.trial.condition != FURTHER]
        if not rows:
            rows = await self.references()
            if more:
                rows = rows + await self.references(more, FURTHER)
        if self.bench.judge is not None:
            known = references(rows, self.target.contexts())
            self.bench.judge.prepare(replace(known, expected=expected))

    async def references(self, prompts: Sequence[str] | None = None, condition: str = "unsteered") -> list[Row]:
        """Generate `reference_responses` unsteered responses per prompt (default: the run's prompts)."""
        count = self.config.reference_responses
        trials = [
            self.trial("reference", condition, i, prompt=prompt)
            for i, prompt in enumerate(p for p in (prompts or self.prompts) for _ in range(count))
        ]
        return await complete(self.bench, trials, stage=f"{self.name}: unsteered references", judged=False)

    async def latents(self) -> list[Latent]:
        """Return the latents to steer with, in order; chosen once and stored."""
        stored = self.fact(LATENTS)
        if stored is None:
            stored = await self._select()
            self.run.ledger.put(self.name, LATENTS, stored)
        return list(stored.chosen)

    async def _select(self) -> Selection:
        labels = self.target.labels()
        if self.config.latents is None and not self.target.has_sae:
            keys: list[LatentKey] = [*self.target.directions()]
            counts: Mapping[str, Any] = {"directions of the target": len(keys)}
        elif self.config.latents is not None:
            keys = check_latents(self.config.latents, labels, self.target.n_latents, self.target.directions())
            counts = {"own list": len(keys)}
        else:
            peaks = await self._peaks() if self.config.selection.relevance != "off" else None
            rates = self.config.selection.concreteness != "off"
            rater = make_rater(choose.rater_of(self.config), self._judges) if rates else None
            sampled = choose.rating_model(self.config) is not None
            try:
                chosen = choose.select(
                    n_latents=self.target.n_latents,
                    n=self.config.n_latents,
                    labels=labels,
                    dead=self.target.dead_latents() | set(np.flatnonzero(self.engine.decoder_norms() == 0).tolist()),
                    peaks=peaks,
                    settings=self.config.selection,
                    seed=self.config.seeds.latents,
                    rater=rater,
                    rate_at_most=choose.rating_sample(self.config) if sampled else None,
                    # if the target has labels, the judge needs the label of every steered latent
                    labelled_only=bool(labels) and self.config.selection.unlabelled == "drop",
                )
            finally:
                if rater is not None and (spent := drain(rater)) is not None:
                    self.run.add_spend(rater.name, spent)
            keys, counts = list(chosen.chosen), chosen.counts
        return Selection(chosen=[Latent(k, self.label(k)) for k in keys], counts=dict(counts))

    def label(self, key: LatentKey) -> str | None:
        """Return the latent's label, None if it has none; the label of a named direction is its name."""
        return key if isinstance(key, str) else self.target.labels().get(key)

    async def _peaks(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Return the peak activation over the tokens of each prompt's unsteered responses, (n prompts, n latents)."""
        rows = [r for r in await self.references() if r.completion is not None]
        settings = self.config.selection
        alone = settings.relevance == "zero"  # the authors read the prompt alone
        over: Over = "all" if settings.template else "words" if alone else "response"
        peaks = self.engine.activations(
            [r.trial.prompt for r in rows],
            ["" if alone else r.completion.text for r in rows if r.completion],
            over=over,
        )
        return np.stack(
            [peaks[[i for i, r in enumerate(rows) if r.trial.prompt == p]].max(axis=0) for p in self.prompts]
        )

    async def thresholds(self) -> dict[LatentKey, Threshold]:
        """Return the threshold boost per latent; latents are calibrated independently and verified on fresh trials."""
        stored = self.fact(THRESHOLDS)
        if stored is None:
            thresholds = await self._verify(await self._calibrate())
            stored = [LatentThreshold.of(key, t) for key, t in thresholds.items()]
            self.run.ledger.put(self.name, THRESHOLDS, stored)
        return {entry.latent: entry.threshold for entry in stored}

    async def _calibrate(self) -> dict[LatentKey, Threshold]:
        latents = await self.latents()
        settings = self.config.calibration
        calibrators = {x.key: Calibrator(settings.prior(self.target.prior_of(x.key)), settings) for x in latents}
        per_round = settings.trials_per_iteration
        places = {latent.key: position for position, latent in enumerate(latents)}
        waiting: dict[LatentKey, list[Row]] = {x.key: [] for x in latents}  # finished rows of each latent's round
        fits: dict[LatentKey, Threshold] = {}

        def next_round(key: LatentKey) -> list[Trial]:
            boost = calibrators[key].next_boost()
            place, first = places[key], per_round * len(calibrators[key].rounds)
            rounds = range(first, first + per_round) if boost is not None else ()
            return [self._at_boost("calibration", place, latents[place], boost or 0.0, i) for i in rounds]

        def follow(rows: Sequence[Row]) -> list[Trial]:
            advanced: list[Trial] = []
            for row in rows:
                assert row.trial.latent is not None
                batch = waiting[row.trial.latent]
                batch.append(row)
                if len(batch) == per_round:
                    batch.sort(key=lambda r: r.trial.index)  # in planned order, whichever row finished first
                    calibrator = calibrators[row.trial.latent]
                    calibrator.update(row.trial.interventions[0].value, [*map(self._first, batch)])
                    batch.clear()
                    advanced += next_round(row.trial.latent)
                    if calibrator.done:
                        fits[row.trial.latent] = calibrator.finish()  # while the engine answers for other latents
            return advanced

        bench = self.bench
        if settings.max_new_tokens is not None:
            tokens = min(settings.max_new_tokens, bench.sampling.max_new_tokens)
            bench = replace(bench, sampling=replace(bench.sampling, max_new_tokens=tokens))
        first = [trial for latent in latents for trial in next_round(latent.key)]
        most = len(latents) * settings.max_iterations * per_round
        await carry_out(bench, first, stage=f"{self.name}: calibration", follow=follow, total=most)
        return {latent.key: fits[latent.key] for latent in latents}

    async def _verify(self, thresholds: dict[LatentKey, Threshold]) -> dict[LatentKey, Threshold]:
        latents, fresh = await self.latents(), self.config.calibration.verify_trials
        boosts = {key: t.boost for key, t in thresholds.items() if t.usable}
        if not fresh or not boosts:
            return thresholds
        trials = [
            self._at_boost("verification", place, latent, boosts[latent.key], i)
            for place, latent in enumerate(latents)
            if latent.key in boosts
            for i in range(fresh)
        ]
        scores: dict[LatentKey, list[float | None]] = {key: [] for key in boosts}
        for row in await complete(self.bench, trials, stage=f"{self.name}: verification"):
            assert row.trial.latent is not None
            scores[row.trial.latent].append(self._first(row))
        return {key: verified(t, scores[key]) if key in scores else t for key, t in thresholds.items()}

    def _at_boost(self, stage: str, place: int, latent: Latent, boost: float, i: int) -> Trial:
        """Return the i-th trial of a latent (the one at `place`) in calibration or verification."""
        settings = self.config.calibration
        # each latent has its own range of indices, so that no two latents share a seed
        room = max(10_000, settings.max_iterations * settings.trials_per_iteration, settings.verify_trials)
        return self.steered(stage, "threshold", latent, boost, place * room + i, self.prompt(place, i))

    def _first(self, row: Row) -> float | None:
        """Return the first attempt's score; None if the trial is unscored, invalid, or degraded while these are
        excluded."""
        counts = row.attempts and (self.config.degraded == "include" or not row.degraded)
        return row.attempts[0].score if counts else None

    def steered(self, stage: str, condition: str, latent: Latent, boost: float, index: int, prompt: str) -> Trial:
        """Return a trial that adds `boost` times the latent's decoder direction at every position."""
        added = _added(latent.key, boost)
        return self.trial(
            stage, condition, index, prompt=prompt, latent=latent.key, label=latent.label, interventions=added
        )

    def prompt(self, position: int, i: int) -> str:
        """Return the prompt of trial `i` of the latent at `position`.

        Prompts are used in turn, and each latent starts at another prompt, so that all occur equally often.
        """
        return self.prompts[(position * self.config.trials_per_latent + i) % len(self.prompts)]

    async def cells(self, calibrated: bool = True) -> list[Cell]:
        """Return the grid that all conditions share: latents with a usable threshold x trials per latent.

        With `calibrated` false: all chosen latents, at boost 0. Raises SteerbackError if no latent has a threshold.
        """
        latents = await self.latents()
        boosts = {x.key: 0.0 for x in latents}
        if calibrated:
            thresholds = await self.thresholds()
            boosts = {key: t.boost for key, t in thresholds.items() if t.usable}
            latents = [x for x in latents if x.key in boosts]
            if not latents:
                states = ", ".join(sorted({f"{t.status} ({t.reason})" for t in thresholds.values()}))
                raise SteerbackError(
                    f"{self.name}: no latent reached target score {self.config.calibration.target_score:g}: {states}; "
                    + self._advice()
                )
        return self.grid(latents, boosts)

    def _advice(self) -> str:
        """Return what to do if no latent has a usable threshold."""
        name = self.bench.judge.name if self.bench.judge is not None else ""
        verdicts = [row.judgement for row in self.run.ledger.outlines(self.name, "calibration", judge=name)]
        reasons = Counter(judged.reason for judged in verdicts if judged is not None and judged.status == "unscored")
        if reasons and reasons.total() == len(verdicts):
            return f"judge {name} scored no response, most often because: {reasons.most_common(1)[0][0]}"
        return (
            "widen the search with calibration.low and calibration.high, choose other latents or raise "
            f"calibration.max_iterations ({docs_page('concepts', 'calibration')})"
        )

    @collector_paused()
    def grid(self, latents: Sequence[Latent], boosts: Mapping[LatentKey, float]) -> list[Cell]:
        """Return the cells of the latents that have a boost; prompts and seeds depend on the position in `latents`."""
        per_latent = self.config.trials_per_latent
        grid = [
            Cell(i, latent, boosts[latent.key], self.prompt(n, t), self.seed("measure", i))
            for n, latent in enumerate(latents)
            for t, i in enumerate(range(n * per_latent, (n + 1) * per_latent))
            if latent.key in boosts
        ]
        if self.config.limit is None:
            return grid
        by_turn = sorted(grid, key=lambda cell: (cell.index % per_latent, cell.index))  # so that no latent is left out
        return sorted(by_turn[: self.config.limit], key=lambda cell: cell.index)

    def at(
        self,
        cell: Cell,
        condition: str,
        *,
        boost: float | None = None,
        prompt: str | None = None,
        meta_prompt: str = "",
        prefill: str = "",
        clamps: Sequence[Intervention] = (),
    ) -> Trial:
        """Return the cell's trial in a condition, at its threshold boost or at `boost` (0: not steered)."""
        value = cell.boost if boost is None else boost
        added = _added(cell.latent.key, value) if boost != 0 else ()
        return self.trial(
            "measure",
            condition,
            cell.index,
            seed=cell.seed,
            prompt=prompt or cell.prompt,
            latent=cell.latent.key,
            label=cell.latent.label,
            meta_prompt=meta_prompt,
            prefill=prefill,
            interventions=(*added, *clamps) if clamps else added,
        )

    async def baseline(self, condition: str = BASELINE) -> list[Trial]:
        """Measure every cell at its threshold without other changes, as the reference for other conditions.

        In a run that starts from another run, these are the trials of that run, so they come from the cache.
        """
        cells = await self.cells()
        with collector_paused():
            trials = [self.at(cell, condition) for cell in cells]
        await self.measure(condition, trials)
        return trials

    async def baseline_rows(self) -> list[Row]:
        """Measure the baseline and return its rows."""
        trials, judge = await self.baseline(), self.bench.judge
        return list(self.run.ledger.stream([t.key for t in trials], None if judge is None else judge.name))

    async def measure(self, condition: str, trials: Iterable[Trial]) -> None:
        """Complete the trials of one condition."""
        with collector_paused():
            planned = list(trials)
        await carry_out(self.bench, planned, stage=f"{self.name}: {condition}")


IDENTITY = ("model", "revision", "files", "sae", "layers", "lora")  # keys of a model and SAE, equal in all engines


def same_weights(folder: Path, target: str, engine: Engine) -> None:
    """Raise SteerbackError unless a run used the same model and SAE as `engine`."""
    stored = fact_of(folder, target, ENGINE)[0]
    now: Mapping[str, object] = engine.describe()
    if stored is None and now.get("lora"):  # the run may have used the base model without this adapter
        stored = fact_of(folder, target.rpartition("+")[0], ENGINE)[0]
        now = {key: value for key, value in now.items() if key != "lora"}
    before: Mapping[str, object] = stored.engine if stored is not None else {}
    changed = [key for key in IDENTITY if key in before and key in now and before[key] != now[key]]
    if changed:
        raise SteerbackError(
            f"run {folder} used another {target}: {', '.join(changed)} differ, so its results do not apply; "
            f"calibrate again: steerback run esr --target {target}"
        )
