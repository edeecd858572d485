"""What an experiment is, and what its analysis gives. It knows the ledger's rows, never an engine or a judge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from steerback.config import RunConfig, Settings, parse
from steerback.data import paper_files as paper_data
from steerback.metrics import Comparison, Outcomes, Summary, compare, correct, summarize
from steerback.records import LatentKey, Trial
from steerback.store.ledger import Ledger, Row
from steerback.study.study import BASELINE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from steerback.figures.tables import Table
    from steerback.store.run import Run
    from steerback.study.study import Study
    from steerback.targets import Target

Key = tuple[str, str]  # (target, condition)


@dataclass(frozen=True, slots=True)
class Analysis:
    """What an analysis gives: `summary` goes to summary.json, tables and figures into files of their names.

    `data` goes into JSON files of their names. `lines` are printed at the end of a run, under the tables.
    """

    summary: Mapping[str, Any]
    tables: Mapping[str, Table] = field(default_factory=dict)
    figures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict)
    lines: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


class Experiment(ABC):
    """A plan and an analysis. `options` are the settings (types, defaults, bounds) that only this experiment knows.

    `authors` are their values under the preset of that name. An experiment that does not calibrate needs no
    thresholds; one that does not generate collects rows of finished runs instead. `needs_sae`: it reads or clamps
    SAE latents, so a target with directions alone will not do.
    """

    name: str
    title: str
    options: type[Settings] = Settings
    authors: Mapping[str, Any] = {}
    calibrates = True
    generates = True
    needs_sae = False

    @abstractmethod
    def conditions(self, config: RunConfig) -> int:
        """How many conditions it measures, for the estimate before a run."""

    def further(self, config: RunConfig) -> dict[str, int]:
        """Responses per target beyond the usual stages, by stage, for the estimate before a run."""
        return {}

    def judges(self, config: RunConfig) -> tuple[str, ...]:
        """Whose verdicts it needs."""
        return (config.judge,)

    def own_targets(self, config: RunConfig, targets: Sequence[Target]) -> tuple[Target, ...]:
        """The targets that are measured, in order: those of the config unless the experiment has more."""
        return tuple(targets)

    async def run(self, study: Study) -> None:
        """Plans the trials of one target's conditions and completes them, for one that generates."""
        raise NotImplementedError(f"{self.name} generates nothing")

    def collect(self, run: Run) -> None:
        """In place of `run` for one that does not generate: fills the ledger with rows to be judged."""
        raise NotImplementedError(f"{self.name} generates")

    @abstractmethod
    def analyse(self, ledger: Ledger, judge: str, draws: int) -> Analysis:
        """Everything the experiment reports, from the ledger alone."""


def outcomes_of(rows: Sequence[Row], cluster: Callable[[Trial], LatentKey | None] = lambda t: t.latent) -> Outcomes:
    """The statistics' input: one entry per planned trial, whatever became of it, clustered by latent (or `cluster`)."""
    table = [
        (
            cluster(r.trial),
            r.trial.index,
            r.valid_receipt,
            r.judgement,
            r.completion.text if r.completion else "",
        )
        for r in rows
    ]
    cut = {"length": 1.0, "unknown": float("nan")}
    return Outcomes.from_rows(table, [cut.get(r.completion.finish, 0.0) if r.completion else 0.0 for r in rows])


@dataclass(frozen=True, slots=True)
class Measured:
    """The measured conditions of a ledger, and how each compares with the one it is paired with.

    `comparisons[target, condition]` is that condition minus `against[target, condition]`, Holm-corrected over all
    comparisons of the experiment, within each metric.
    """

    judge: str
    outcomes: Mapping[Key, Outcomes]
    summaries: Mapping[Key, Summary]
    comparisons: Mapping[Key, Comparison]
    against: Mapping[Key, str]

    @property
    def targets(self) -> list[str]:
        return list(dict.fromkeys(target for target, _ in self.summaries))

    def conditions(self, target: str) -> list[str]:
        """Conditions of a target in the order in which they were planned."""
        return [condition for t, condition in self.summaries if t == target]

    def of(self, target: str) -> dict[str, Summary]:
        """Summaries of a target's conditions."""
        return {condition: self.summaries[target, condition] for condition in self.conditions(target)}

    def to_json(
        self, experiment: str, per_target: Mapping[str, Mapping[str, Any]] | None = None, **further: Any
    ) -> dict[str, Any]:
        """The form of every summary.json: per target `conditions` (all metrics), `comparisons` (all tests).

        `per_target` adds an experiment's own findings to a target, `further` to the whole.
        """
        targets = {
            target: {
                "conditions": {name: s.to_json() for name, s in self.of(target).items()},
                "comparisons": {
                    name: {"against": self.against[t, name], **c.to_json()}
                    for (t, name), c in self.comparisons.items()
                    if t == target
                },
                **(per_target or {}).get(target, {}),
            }
            for target in self.targets
        }
        return {"experiment": experiment, "judge": self.judge, "targets": targets, **further}

    def tables(self) -> dict[str, Table]:
        """`table`: every condition; `comparisons`: every paired test, if there are any."""
        from steerback.figures.tables import comparison_table, summary_table

        named = len({condition for _, condition in self.summaries}) > 1
        tables = {
            "table": summary_table(self.summaries, judge=self.judge)
            if named
            else summary_table({target: s for (target, _), s in self.summaries.items()}, judge=self.judge)
        }
        if self.comparisons:
            pairs = {f"{t}: {c} − {self.against[t, c]}": x for (t, c), x in self.comparisons.items()}
            tables["comparisons"] = comparison_table(pairs, judge=self.judge)
        return tables


def to_baseline(condition: str) -> str | None:
    """Every condition but the baseline is compared with the baseline."""
    return None if condition == BASELINE else BASELINE


def measured(
    ledger: Ledger,
    judge: str,
    draws: int,
    against: Callable[[str], str | None] = to_baseline,
    stage: str = "measure",
    prepare: Callable[[Sequence[Row]], Sequence[Row]] = lambda rows: rows,
) -> Measured:
    """Summaries of every condition of `stage`, each compared with the condition that `against` names (None: none).

    `prepare` may drop or change a condition's rows before they are counted.
    """
    outcomes = {
        (target, condition): outcomes_of(prepare(ledger.rows(target, stage, condition, judge)))
        for target, condition in ledger.conditions(stage)
    }
    pairs = {
        (target, condition): other
        for target, condition in outcomes
        if (other := against(condition)) is not None and (target, other) in outcomes
    }
    return paired(judge, outcomes, pairs, draws)


def paired(judge: str, outcomes: Mapping[Key, Outcomes], against: Mapping[Key, str], draws: int) -> Measured:
    """Summaries of the outcomes, and each one's tests against the condition of its target that `against` names."""
    tests = correct({f"{t}\n{c}": compare(outcomes[t, other], outcomes[t, c]) for (t, c), other in against.items()})
    return Measured(
        judge=judge,
        outcomes=outcomes,
        summaries={key: summarize(x, draws) for key, x in outcomes.items()},
        comparisons={(t, c): tests[f"{t}\n{c}"] for t, c in against},
        against=against,
    )


def settings(experiment: Experiment, config: RunConfig) -> dict[str, Any]:
    """The experiment's options: its defaults, the authors' values under their preset, then what the user set; checked.

    Raises SteerbackError naming the option that is wrong.
    """
    theirs = _authors_detectors(experiment, config) if config.preset == "authors" else {}
    authors = {**experiment.authors, **theirs} if config.preset == "authors" else {}
    return parse(experiment.options, {**authors, **config.options}, f"{experiment.name} options").model_dump()


def _authors_detectors(experiment: Experiment, config: RunConfig) -> dict[str, Any]:
    """The authors' list, where their model is measured and the experiment is not itself the search for detectors."""
    if set(config.targets) != {"llama-3.3-70b@authors"} or "detectors" not in experiment.options.model_fields:
        return {}
    if experiment.name == "detectors" or config.options.get("detectors") is not None:
        return {}
    return {"detectors": str(paper_data.folder() / paper_data.DETECTORS)}  # that it is there is checked before a run


PLANTED = "Built-in organisms restart because their training text does (planted): no evidence about other models."


def organisms(targets: Iterable[str]) -> list[str]:
    """Those of the targets that are built-in organisms, whose numbers are planted."""
    return [name for name in targets if name.startswith("organism")]


def planted(targets: Iterable[str]) -> str:
    """What a caption has to say where one of the targets is a built-in organism."""
    return PLANTED if organisms(targets) else ""
