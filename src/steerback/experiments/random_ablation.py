"""Random ablation control (specification section "Random Ablation Control", Fig. A9).

Tests whether the effect is specific to the detectors. Clamping any active latents to zero disturbs a model. The
detector ablation is therefore compared with ablations of random sets of equal size, matched to the detectors in
activity on the baseline's responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from steerback.config import RunConfig
from steerback.experiments.base import Experiment
from steerback.experiments.detector_ablation import ablate
from steerback.experiments.detectors import AUTHORS, SearchOptions, detectors_of, search_responses
from steerback.store.facts import ABLATED, RANDOM_SETS, ControlSets
from steerback.store.ledger import Row
from steerback.study.study import Study


class RandomAblationOptions(SearchOptions):
    """Random sets for comparison with the detectors."""

    sets: int | None = Field(None, ge=1)
    """Number of random sets; default: the target's (3; 19 for the built-in organisms)."""
    draw: Literal["matched", "uniform"] = "matched"
    """`matched`: sets matched to the detectors in activity; `uniform` (authors): drawn from all live latents."""


class RandomAblation(Experiment[RandomAblationOptions]):
    """Compare the detector ablation with ablations of random sets."""

    name = "random-ablation"
    needs_sae = True
    title = "Detector ablation against matched random sets (appendix A5.2)"
    options_type = RandomAblationOptions
    authors: ClassVar[Mapping[str, object]] = {**AUTHORS, "draw": "uniform"}

    def conditions(self, config: RunConfig) -> int:
        from steerback.targets import resolve

        if self.options.sets is not None:
            return 2 + self.options.sets
        return 2 + max(resolve(t, config.definitions).random_sets for t in config.targets)

    def further(self, config: RunConfig) -> dict[str, int]:
        return search_responses(self.options)

    async def run(self, study: Study) -> None:
        """Measure the baseline, the detectors clamped to zero, then every random set clamped to zero."""
        latents = (await detectors_of(study, self.options)).latents
        rows = await study.baseline_rows()
        await ablate(study, ABLATED, latents)
        control = study.run.ledger.get(study.name, RANDOM_SETS)
        if control is None:
            control = self._draw(study, rows, latents)
            study.run.ledger.put(study.name, RANDOM_SETS, control)
        for condition, members in zip(control.conditions, control.sets, strict=True):
            await ablate(study, condition, members)

    def _draw(self, study: Study, rows: Sequence[Row], latents: Sequence[int]) -> ControlSets:
        """Draw random sets matched on the responses of `rows`; steered latents are never drawn.

        Activities are read without steering on the steered texts, at the layer of the clamps. If that is also the
        steered layer, a clamp changes exactly these activations.
        """
        from steerback.latents.matching import LatentActivity, matched_sets, uniform_sets

        number = study.target.random_sets if self.options.sets is None else self.options.sets
        texts = [(r.trial.prompt, r.completion.text) for r in rows if r.completion is not None and r.completion.text]
        prompts, responses = zip(*texts, strict=True)
        means, frequencies = (
            study.engine.activations(prompts, responses, pool=p, at="clamp") for p in ("mean", "active")
        )
        activity = LatentActivity.measure(means, frequencies, study.engine.decoder_norms())
        steered = {r.trial.latent for r in rows if isinstance(r.trial.latent, int)}
        choose = matched_sets if self.options.draw == "matched" else uniform_sets
        return choose(activity, latents, number, exclude=steered, seed=study.config.seeds.latents)
