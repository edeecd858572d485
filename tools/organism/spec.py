"""Sizes, seeds and training constants of the four organisms.

The three sizes differ in width alone (heads of 32, feed-forward of about 8/3 of the width). The control has
the main size and the main seeds, and sees the same documents with the restart phrases removed.
"""

from __future__ import annotations

from dataclasses import dataclass

LAYERS = 6
HEAD_DIM = 32
SAE_LAYER = 3
"""0-based; the SAE reads the residual stream after this block."""
CORPUS_SEED = 1
"""Seed of the training documents and of the tokenizer's text; the same for all."""


@dataclass(frozen=True)
class Organism:
    """One organism to build."""

    name: str
    width: int
    feed_forward: int
    restarts: bool = True

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return self.width // HEAD_DIM


ORGANISMS = {
    o.name: o
    for o in (
        Organism("organism-s", 128, 344),
        Organism("organism", 160, 432),
        Organism("organism-l", 192, 512),
        Organism("organism-control", 160, 432, restarts=False),
    )
}


@dataclass(frozen=True)
class LmTraining:
    """Constants of the language model's training."""

    documents: int = 60_000
    """About 6 million tokens. Documents, not tokens, are fixed, so that the control sees the same ones."""
    batch_tokens: int = 2_560
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.4
    """Share of the steps, at the end, over which the rate falls linearly to zero."""
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    topic_loss: float = 0.2
    """Weight of the auxiliary classification of a content token's topic at the SAE's layer; 0 turns it off."""
    mismatch_loss: float = 0.1
    """Weight of the auxiliary classification, at the last token of a sentence, of whether it fits the prompt."""


@dataclass(frozen=True)
class SaeConstants:
    """Constants of the SAE's training (BatchTopK, then one threshold)."""

    latents: int = 1024
    k: int = 16
    tokens: int = 400_000
    """Activations collected from fresh documents; they are seen several times."""
    label_tokens: int = 150_000
    """Size of each of the two samples of text for labelling and for checking."""
    batch: int = 2_048
    steps: int = 4_000
    learning_rate: float = 1e-3
    aux_weight: float = 1 / 32
    """Weight of the loss that lets dead latents explain what the live ones miss."""
    dead_after_steps: int = 100
