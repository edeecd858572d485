"""Base class of the experiments: a plan of trials with typed options.

An experiment uses the study that it plans for. Its results are computed in `analysis` and drawn in `figures`, under the
experiment's name.
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
"""Options of a detector search; they have no effect if the option `detectors` is set."""


class NoOptions(Settings):
    """An experiment without options."""


class Experiment(ABC, Generic[OptionsType]):
    """A plan of trials. `options` are the experiment's settings (types, defaults, bounds).

    `authors` are the option values of the preset `authors`. An experiment that does not calibrate needs no thresholds.
    An experiment that does not generate collects rows of finished runs instead. `needs_sae`: reads or clamps SAE
    latents, so a target with directions only is refused. `reports_rates`: the judge's floor is measured.
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
        """Number of measured conditions, for the estimate before a run."""

    def further(self, config: RunConfig) -> dict[str, int]:
        """Number of additional responses per target and stage, for the estimate before a run."""
        return {}

    def judges(self, config: RunConfig) -> tuple[str, ...]:
        """Names of the judges whose verdicts the experiment needs."""
        return (config.judge,)

    def measured_targets(self, config: RunConfig, targets: Sequence[Target]) -> tuple[Target, ...]:
        """Measured targets in order; by default the targets of the config."""
        return tuple(targets)

    def own_detectors(self) -> str | None:
        """File or folder of the detectors if the options name one, else None."""
        source = getattr(self.options, "detectors", None)
        return source if isinstance(source, str) else None

    async def run(self, study: Study) -> None:
        """Plan and complete the trials of one target's conditions; for experiments that generate."""
        raise NotImplementedError(f"{self.name} generates nothing")

    def collect(self, run: Run) -> None:
        """Fill the ledger with existing rows for judging; for experiments that do not generate."""
        raise NotImplementedError(f"{self.name} generates")


def parse_options(kind: type[Experiment[OptionsType]], config: RunConfig) -> Settings:
    """Return the checked options: defaults, then the authors' values under their preset, then the user's values.

    Raises SteerbackError with the name of an invalid option.
    """
    useless = sorted(SEARCHING & config.options.keys()) if config.options.get("detectors") is not None else []
    if useless and "detectors" in kind.options_type.model_fields:
        raise SteerbackError(
            f"{kind.name} options: detectors sets the latents, so these have no effect: {', '.join(useless)}; "
            "remove either detectors or these"
        )
    authors: dict[str, object] = {}
    if config.preset == "authors":
        authors = {**kind.authors, **_authors_detectors(kind, config)}
    return parse(kind.options_type, {**authors, **config.options}, f"{kind.name} options")


def _authors_detectors(kind: type[Experiment[OptionsType]], config: RunConfig) -> dict[str, object]:
    """Return the authors' list of detectors for their model, except for the detector search."""
    if set(config.targets) != {"llama-3.3-70b@authors"} or "detectors" not in kind.options_type.model_fields:
        return {}
    if kind.name == "detectors" or config.options.get("detectors") is not None or SEARCHING & config.options.keys():
        return {}
    return {"detectors": str(paper_files.folder() / paper_files.DETECTORS)}  # a run checks that the file exists
