"""Experiment 4, fine-tuning on self-corrections (specification section "Experiment 4", Fig. 6).

Base and adapters are steered with the base run's latents, prompts and seeds, each at thresholds of its own, and answer
unsteered as well, on the run's prompts and on held-out ones: the specification trains on the prompts it evaluates.
Adapters are targets of their own in the ledger; in the analysis they are conditions of their base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from steerback.config import RunConfig, Settings
from steerback.errors import SteerbackError
from steerback.experiments.base import Analysis, Experiment, Key, Measured, outcomes_of, paired, planted, settings
from steerback.experiments.held_out import held_out_prompts
from steerback.figures.tables import Table, number
from steerback.metrics import VALID, Outcomes, Trend, trend
from steerback.store.ledger import Ledger, Row
from steerback.study.study import Cell, Study, read_threshold
from steerback.targets import Target

STEERED, UNSTEERED, HELD_OUT, HELD_OUT_UNSTEERED = "steered", "unsteered", "held-out", "held-out unsteered"
CONDITIONS = (STEERED, UNSTEERED, HELD_OUT, HELD_OUT_UNSTEERED)
BASE = "base"
SHOWN = ("mean_attempts", "multi_attempt_rate", "improvement_rate", "esr_rate", "msi", "mean_first")
TRENDS = {STEERED: SHOWN, HELD_OUT: SHOWN, UNSTEERED: SHOWN[:2], HELD_OUT_UNSTEERED: SHOWN[:2]}


class Options(Settings):
    """What is compared with the base, and where else than on the run's prompts."""

    adapters: (
        Annotated[list[str], BeforeValidator(lambda given: [given] if isinstance(given, str) else given)] | None
    ) = None
    """Folders of adapters, listed or separated by commas."""
    prompts: str = "auto"
    """Held-out prompts, as in experiment held-out."""


class Finetuning(Experiment):
    """Whether training on corrections makes a model correct itself, and whether that helps."""

    name = "finetuning"
    title = "Fine-tuning on self-corrections (experiment 4)"
    options = Options

    def conditions(self, config: RunConfig) -> int:
        if config.from_run is None:
            raise SteerbackError("finetuning takes its latents and prompts from a run: give --from, an esr run say")
        if len(config.targets) != 1:
            raise SteerbackError("finetuning is about one base and its adapters: give one --target")
        if settings(self, config)["adapters"] is None:
            raise SteerbackError(
                "finetuning needs trained adapters: --set options.adapters=FOLDER (made with: steerback finetune train)"
            )
        return len(CONDITIONS)

    def further(self, config: RunConfig) -> dict[str, int]:
        latents = len(config.latents) if config.latents is not None else config.n_latents
        cal = config.calibration
        return {
            "reference to held-out prompts": 20 * config.reference_responses,
            "calibration": latents * cal.max_iterations * cal.trials_per_iteration,
            "verification": latents * cal.verify_trials,
        }

    def own_targets(self, config: RunConfig, targets: Sequence[Target]) -> tuple[Target, ...]:
        """The base, then the base with each adapter, fewest corrections first."""
        from steerback.finetuning.adapters import find_adapters

        base = targets[0]
        found = find_adapters(settings(self, config)["adapters"])
        return (base, *(base.with_adapter(adapter.folder.resolve()) for adapter in found))

    async def run(self, study: Study) -> None:
        """Thresholds, then the four conditions; the held-out ones last, so that thresholds do not depend on them."""
        if study.target.adapter is not None:
            self._adopt(study)
        further = held_out_prompts(study, settings(self, study.config)["prompts"])
        steered, every = await self._grids(study)
        await self._measure(study, steered, every, (STEERED, UNSTEERED))
        await study.prepare(further)
        steered, every = (
            [replace(cell, prompt=further[cell.index % len(further)]) for cell in cells] for cells in (steered, every)
        )
        await self._measure(study, steered, every, (HELD_OUT, HELD_OUT_UNSTEERED))

    async def _measure(
        self, study: Study, steered: Sequence[Cell], every: Sequence[Cell], names: tuple[str, str]
    ) -> None:
        await study.measure(names[0], [study.at(cell, names[0]) for cell in steered])
        await study.measure(names[1], [study.at(cell, names[1], boost=0.0, interventions=()) for cell in every])

    def _adopt(self, study: Study) -> None:
        """The base's latents, and what the analysis has to know of the adapter."""
        from steerback.finetuning.adapters import CARD, percent_of

        ledger, folder = study.run.ledger, Path(study.target.adapter or "")
        ledger.set_fact(study.name, "latents", ledger.fact(study.target.base, "latents"))
        fact = {"base": study.target.base, "adapter": folder.name, "percent": percent_of(folder)}
        fact["card"] = (folder / CARD).read_text("utf-8") if (folder / CARD).is_file() else None
        ledger.set_fact(study.name, "adapter", fact)

    async def _grids(self, study: Study) -> tuple[list[Cell], list[Cell]]:
        """Cells to be steered and cells for unsteered responses: the base's grid, at this adapter's own thresholds.

        Latents without a usable threshold of this adapter are not steered.
        """
        if study.target.adapter is None:
            cells = await study.cells()
            return cells, cells
        stored = study.run.ledger.fact(study.target.base, "thresholds")
        usable = {key for key, t in map(read_threshold, stored) if t.usable}
        latents = [x for x in await study.latents() if x.key in usable]
        own = {key: t.boost for key, t in (await study.thresholds()).items() if t.usable}
        return study.grid(latents, own), study.grid(latents, dict.fromkeys(usable, 0.0))

    def analyse(self, ledger: Ledger, judge: str, draws: int) -> Analysis:
        """Every adapter against the base, paired by cell; trends over the mixes; Figure 6."""
        from steerback.figures import finetuning as figure

        facts = adapters_of(ledger)
        found = by_mix(ledger, judge, draws, facts)
        findings = {target: mix_findings(found, target, facts) for target in found.targets}
        trends = {target: found for target, (_, found) in findings.items()}
        ends = {name: endings(ledger.rows(name, "measure", STEERED, judge)) for name in facts}
        return Analysis(
            summary=found.to_json(
                self.name,
                {
                    target: {
                        "finetune": finding
                        | {"trends": {k: t.to_json() for k, t in trends[target].items()}}
                        | {"endings": {f["adapter"]: ends[name] for name, f in facts.items() if f["base"] == target}}
                    }
                    for target, (finding, _) in findings.items()
                },
            ),
            tables={
                **steered_comparisons(found).tables(),
                **({"trends": trend_table(trends, judge)} if any(trends.values()) else {}),
            },
            figures={"figure6": partial(figure.draw, found, facts, note=planted(found.targets))},
            lines=[
                *(line for target in found.targets for line in restart_lines(found, target, facts)),
                *(line for name in facts for line in ending_lines(name, ends[name])),
            ],
        )


def adapters_of(ledger: Ledger) -> dict[str, dict[str, Any]]:
    """What is known of each adapted target of a ledger, by its name."""
    return {target: value for target, name, value in ledger.facts() if name == "adapter"}


def condition_name(adapter: str, condition: str) -> str:
    """`mix-50` steered on the run's prompts, `mix-50 unsteered`, `mix-50 held-out`, ..."""
    return adapter if condition == STEERED else f"{adapter} {condition}"


def by_mix(ledger: Ledger, judge: str, draws: int, facts: Mapping[str, Mapping[str, Any]]) -> Measured:
    """All conditions as conditions of the base; each adapter's is compared with the base's of the same kind."""
    outcomes: dict[Key, Outcomes] = {}
    against: dict[Key, str] = {}
    for target, condition in ledger.conditions():
        fact = facts.get(target)
        base = target if fact is None else str(fact["base"])
        key = (base, condition_name(BASE if fact is None else fact["adapter"], condition))
        outcomes[key] = outcomes_of(ledger.rows(target, "measure", condition, judge))
        if fact is not None:
            against[key] = condition_name(BASE, condition)
    against = {key: other for key, other in against.items() if (key[0], other) in outcomes}
    return paired(judge, outcomes, against, draws)


def steered_comparisons(found: Measured) -> Measured:
    """The same with the comparisons of steered responses on the run's prompts alone, for tables that can be read."""
    shown = {key: test for key, test in found.comparisons.items() if found.against[key] == BASE}
    return replace(found, comparisons=shown)


def levels(
    found: Measured, target: str, facts: Mapping[str, Mapping[str, Any]], condition: str
) -> list[tuple[float, str]]:
    """(percent of self-corrections, name of the condition) of the adapters whose percent is known, ascending."""
    named = [
        (float(fact["percent"]), condition_name(fact["adapter"], condition))
        for fact in facts.values()
        if fact["base"] == target and fact["percent"] is not None
    ]
    return sorted((percent, name) for percent, name in named if (target, name) in found.summaries)


def mix_findings(
    found: Measured, target: str, facts: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[str, Trend]]:
    """Where MSI peaks, attempts of the base and at the mix of most corrections; trends over the mixes by metric."""
    trends: dict[str, Trend] = {}
    for condition, metrics in TRENDS.items():
        along = levels(found, target, facts, condition)
        if len({percent for percent, _ in along}) > 1:
            for metric in metrics:
                outcomes = [found.outcomes[target, name] for _, name in along]
                trends[condition_name(metric, condition)] = trend([p for p, _ in along], outcomes, metric)
    steered = levels(found, target, facts, STEERED)
    summaries = [(percent, found.summaries[target, name]) for percent, name in steered]
    scored = [(percent, s["msi"]) for percent, s in summaries if s["msi"].value is not None]
    peak = max(scored, key=lambda entry: entry[1].value or 0.0, default=None)
    base = found.summaries.get((target, BASE))
    return {
        "percents": [percent for percent, _ in steered],
        "attempts_base": None if base is None else asdict(base["mean_attempts"]),
        "attempts_last": asdict(summaries[-1][1]["mean_attempts"]) if summaries else None,
        "msi_peak": None if peak is None else asdict(peak[1]),
        "msi_peak_at": None if peak is None else {"value": peak[0] / 100, "n": peak[1].n},
    }, trends


def trend_table(trends: Mapping[str, Mapping[str, Trend]], judge: str) -> Table:
    """One row per metric and condition: its slope per ten percent more corrections."""
    rows, records = [], []
    for target, found in trends.items():
        for name, t in found.items():
            ends = [None if x is None else 10 * x for x in (t.slope, t.low, t.high)]
            rate = name.split()[0].endswith("rate")
            p = "-" if t.p is None else f"{t.p:.4f}"
            rows.append((target, name, *(number(x, rate=rate) for x in ends), p))
            records.append({"target": target, "condition": name, "judge": judge, **t.to_json()})
    return Table(
        ("target", "metric", "per 10 %", "low", "high", "p"),
        rows,
        "Trend over the mixes: least-squares slope per ten percent more self-corrections (rates in percent), 95 % "
        f"interval clustered by latent, p from permuting the mixes within latents. Judge: {judge}.",
        records,
    )


def restart_lines(found: Measured, target: str, facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Whether restarts also appear without a reason: one line per mix and kind of prompts that shows any."""
    lines: list[str] = []
    for condition in (UNSTEERED, HELD_OUT_UNSTEERED):
        along = levels(found, target, facts, condition)
        rates = {name: found.summaries[target, name]["multi_attempt_rate"] for _, name in along}
        for name, rate in rates.items():
            if rate.events and rate.value is not None:
                ends = "" if rate.low is None or rate.high is None else f" [{rate.low:.1%}, {rate.high:.1%}]"
                lines.append(f"{target}: {name} restarts in {rate.value:.1%}{ends} of {rate.n} responses")
        highs = [rate.high for rate in rates.values() if rate.high is not None]
        if rates and not any(rate.events for rate in rates.values()):
            bound = f" (95 % upper bound of a mix at most {max(highs):.1%})" if highs else ""
            lines.append(f"{target}: no {condition} restart at any mix{bound}")
    return lines


def endings(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Multi-attempt responses by how they ended: `n`, and `gain`, the mean of last minus first score in points.

    Those `cut` at the length limit had no time to finish their last attempt, which counts against MSI.
    """
    outcomes = outcomes_of(rows)
    multi = (outcomes.state == VALID) & ~outcomes.degraded & (outcomes.attempts > 1)
    gain = outcomes.last - outcomes.first
    parts = {"ended": multi & (outcomes.cut == 0), "cut": multi & (outcomes.cut == 1)}
    return {
        name: {"n": int(part.sum()), "gain": float(gain[part].mean())} for name, part in parts.items() if part.any()
    }


def ending_lines(name: str, found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One line where responses were cut at the length limit in the middle of correcting themselves."""
    if "cut" not in found:
        return []
    ended = f", {found['ended']['gain']:+.1f} in the {found['ended']['n']} others" if "ended" in found else ""
    return [
        f"{name}: {found['cut']['n']} multi-attempt responses were cut at the length limit: last minus first attempt "
        f"{found['cut']['gain']:+.1f} points there{ended}"
    ]
