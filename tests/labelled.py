"""Small runs with known verdicts, for the tests of human labels."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from steerback.config import RunConfig
from steerback.records import Attempt, Completion, Judgement, Receipt, Trial
from steerback.store.run import Run

FIRST = "Penguins waddle over the ice. They huddle when it is cold."
RESTART = "Wait, that is not what you asked."
SECOND = "Fold the sheet in half. Tuck one corner into the other."


def text_of(several: bool) -> str:
    """A response with or without a restart."""
    return f"{FIRST} {RESTART} {SECOND}" if several else FIRST


def verdict(judge: str, several: bool, gain: float = 40.0, text: str | None = None) -> Judgement:
    """A judge's verdict: one attempt, or two of which the second scores `gain` points more."""
    body = text_of(several) if text is None else text
    cut = len(FIRST) + 1
    attempts: tuple[Attempt, ...] = (Attempt(0, len(body), 30.0),)
    if several:
        attempts = (Attempt(0, cut - 1, 30.0), Attempt(cut, len(body), 30.0 + gain, "Wait, that is not"))
    return Judgement(judge, "test-1", "scored", attempts)


def make_run(
    folder: Path,
    verdicts: Mapping[str, Sequence[Sequence[bool]]],
    truth: Mapping[str, Sequence[Sequence[bool]]] | None = None,
    texts: Sequence[str] = (),
    experiment: str = "imported",
) -> Path:
    """A finished run: by condition and latent, whether the judge `machine` sees several attempts in each trial.

    `truth` says the same of the text (default: as the judge sees it); `texts` replaces the first responses.
    """
    config = RunConfig(experiment=experiment, targets=("model",), judge="machine", engine="scripted")
    with Run.start(folder, config) as run:
        for condition, latents in verdicts.items():
            real = (truth or verdicts)[condition]
            flat = [(k, seen, r) for k, row in enumerate(latents) for seen, r in zip(row, real[k], strict=True)]
            trials = [
                Trial(
                    f"model/measure/{condition}/{i}",
                    "model",
                    "measure",
                    condition,
                    i,
                    f"How do you fold a sheet? ({i})",
                    i,
                    k,
                    "penguins",
                )
                for i, (k, _, _) in enumerate(flat)
            ]
            bodies = [texts[i] if i < len(texts) else text_of(r) for i, (_, _, r) in enumerate(flat)]
            run.ledger.add_trials(trials)
            run.ledger.add_completions(
                (t.key, Completion(body, (1, 2), 3, "stop", Receipt()), "engine")
                for t, body in zip(trials, bodies, strict=True)
            )
            run.ledger.add_judgements(
                (t.key, verdict("machine", seen, text=body))
                for t, (_, seen, _), body in zip(trials, flat, bodies, strict=True)
            )
    return folder


def scattered(latents: int, trials: int, share: float, seed: int = 0) -> list[list[bool]]:
    """Verdicts at random with this share of true ones."""
    rng = random.Random(seed)
    return [[rng.random() < share for _ in range(trials)] for _ in range(latents)]
