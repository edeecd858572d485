"""Trainings of full size: the judges' weights, and SAEs beside the organism's own (`make test-training`)."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from passages import passages
from steerback.api import load_target
from steerback.judging.restarts import classifier
from steerback.targets import resolve
from steerback.targets.sae_files import load_sae
from steerback.targets.sae_training import SaeTrainer, SaeTraining, sae_quality
from tools.judge.__main__ import examples, fit


def test_the_shipped_weights_of_the_judges_follow_from_their_data() -> None:
    found = examples()
    assert sum(e.restart for e in found) > 5000
    assert sum(not e.restart for e in found) > 15000
    for judge in ("offline", "offline-bayes"):
        fresh, shipped = fit(found, judge), classifier(judge)
        assert fresh.constant == pytest.approx(shipped.constant, abs=0.05)
        names = fresh.weights.keys() | shipped.weights.keys()
        assert max(abs(fresh.weights.get(n, 0.0) - shipped.weights.get(n, 0.0)) for n in names) < 0.05


@pytest.fixture(scope="module")
def residuals() -> tuple[torch.Tensor, torch.Tensor]:
    """Residuals of organism-s at its SAE's layer, in random order: held out, and for training."""
    texts = passages(1000, 1)
    with load_target("organism-s", "transformers") as loaded:
        found = loaded.engine.residuals([""] * len(texts), texts, (3,))  # type: ignore[attr-defined]
        x = torch.cat([states[3] for _, _, states in found])
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x[:3000], x[3000:]


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_an_sae_explains_as_much_as_the_organisms_own(
    residuals: tuple[torch.Tensor, torch.Tensor], kind: Literal["jumprelu", "topk"]
) -> None:
    """Same shape, same held-out texts, 4 % of the positions: the learning rate is higher, because steps are few."""
    held, x = residuals
    source = resolve("organism-s").sae
    assert source is not None
    shipped = load_sae(source)
    options = SaeTraining(kind=kind, latents=shipped.n_latents, k=16, batch=512, learning_rate=3e-3)
    trainer = SaeTrainer(x[:4096], 3, options, steps=600)
    for step in range(trainer.steps):
        trainer.step(x[torch.randint(len(x), (options.batch,), generator=torch.Generator().manual_seed(step))])
    theirs, ours = sae_quality(shipped, [held]), sae_quality(trainer.sae(), [held])
    assert ours.explained > theirs.explained - 0.03
    assert ours.l0 < theirs.l0
    assert ours.dead < 0.02
