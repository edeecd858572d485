"""Base of the experiments: a plan of trials, with typed options.

An experiment knows the study it plans for; how its rows become results lies in `analysis`, how these are drawn in
`figures`, each under the experiment's name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from steerback.config import RunConfig, Settings, parse
from steerback.data import paper_files
from steerback.errors import SteerbackError

if TYPE_CHECKING:
    from steerback.store.run import Run
    from steerback.study.study import Study
    from steerback.targets import Target

OptionsType = TypeVar("OptionsType", bound=Settings, covariant=True)


SEARCHING = frozenset({"discovery_prompts", "responses", "rule", "auc", "limit"})
"""Options of a search for detectors, which do nothing where the detectors are named."""


class NoOptions(Settings):
    """An experiment without options."""


class Experiment(ABC, Generic[OptionsType]):
    """A plan. `options` are the settings (types, defaults, bounds) that only this experiment knows.

    `authors` are their values under the preset of that name. An experiment that does not calibrate needs no
    thresholds; one that does not generate collects rows of finished runs instead. `needs_sae`: it reads or clamps
    SAE latents, so a target that has directions only will not do. `reports_rates`: the judge's floor is measured.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    options_type: ClassVar[type[Settings]] = NoOptions
    authors: ClassVar[Mapping[str, object]] = {}
    calibrates: ClassVar[bool] = True
    generates: ClassVar[bool] = True
    needs_sae: ClassVar[bool] = False
    reports_rates: ClassVar[bool] = True

    def __init__(self, options: OptionsType) -> None:
        self.options = options

    @abstractmethod
    def conditions(self, config: RunConfig) -> int:
        """Number of conditions that are measured, for the estimate before a run."""

    def further(self, config: RunConfig) -> dict[str, int]:
        """Responses per target beyond the usual stages, by stage, for the estimate before a run."""
        return {}

    def judges(self, config: RunConfig) -> tuple[str, ...]:
        """Names of the judges whose verdicts are needed."""
        return (config.judge,)

    def measured_targets(self, config: RunConfig, targets: Sequence[Target]) -> tuple[Target, ...]:
        """The targets that are measured, in order: those of the config unless the experiment has more."""
        return tuple(targets)

    def own_detectors(self) -> str | None:
        """File that the options name as the source of the detectors, if there is one."""
        source = getattr(self.options, "detectors", None)
        return source if isinstance(source, str) else None

    async def run(self, study: Study) -> None:
        """Plan the trials of one target's conditions and complete them, for an experiment that generates."""
        raise NotImplementedError(f"{self.name} generates nothing")

    def collect(self, run: Run) -> None:
        """In place of `run` for one that does not generate: fill the ledger with rows to be judged."""
        raise NotImplementedError(f"{self.name} generates")


def parse_options(kind: type[Experiment[OptionsType]], config: RunConfig) -> Settings:
    """The experiment's options: its defaults, the authors' values under their preset, then the user's; checked.

    Raises SteerbackError naming the option that is wrong.
    """
    useless = sorted(SEARCHING & config.options.keys()) if config.options.get("detectors") is not None else []
    if useless and "detectors" in kind.options_type.model_fields:
        raise SteerbackError(
            f"{kind.name} options: detectors says which they are, so these would do nothing: {', '.join(useless)}; "
            "leave out either"
        )
    authors: dict[str, object] = {}
    if config.preset == "authors":
        authors = {**kind.authors, **_authors_detectors(kind, config)}
    return parse(kind.options_type, {**authors, **config.options}, f"{kind.name} options")


def _authors_detectors(kind: type[Experiment[OptionsType]], config: RunConfig) -> dict[str, object]:
    """The authors' list, where their model is measured and the experiment is not itself the search for detectors."""
    if set(config.targets) != {"llama-3.3-70b@authors"} or "detectors" not in kind.options_type.model_fields:
        return {}
    if kind.name == "detectors" or config.options.get("detectors") is not None or SEARCHING & config.options.keys():
        return {}
    return {"detectors": str(paper_files.folder() / paper_files.DETECTORS)}  # its presence is checked before a run
