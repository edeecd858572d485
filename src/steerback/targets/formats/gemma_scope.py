"""Gemma Scope's archives `params.npz`: W_enc (d, n), b_enc (n,), W_dec (n, d), b_dec (d,), threshold (n,).

JumpReLU on the raw residual: an activation has to be above its threshold, strictly; no input bias is subtracted and
nothing is normalised (Lieberum et al. 2024). Read without pickle code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from steerback.errors import SteerbackError
from steerback.targets.formats import Place, with_layer
from steerback.targets.sae import TENSORS, Sae, stored

if TYPE_CHECKING:
    from steerback.targets.target import SaeSource


def read(place: Place, source: SaeSource) -> Sae:
    """The SAE of an archive."""
    path = place.weights
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        names = {name.lower(): name for name in archive.files}  # some archives say w_enc
        absent = [name for name in TENSORS if name.lower() not in names]
        if absent:
            raise SteerbackError(f"{path}: {', '.join(absent)} missing; found {', '.join(archive.files) or 'nothing'}")
        scale = archive[names["scaling_factor"]] if "scaling_factor" in names else np.ones(1)
        if not np.allclose(scale, 1):
            raise SteerbackError(f"{path}: has a scaling_factor that is not 1, which is not known how to apply")
        tensors = {name: stored(torch.from_numpy(archive[names[name.lower()]])) for name in TENSORS}
    return with_layer(jumprelu(tensors), source, path)


def jumprelu(tensors: dict[str, torch.Tensor]) -> Sae:
    """A JumpReLU SAE, layer not set. Its activations are ReLU's above the threshold, so one below 0 acts as 0."""
    w_enc, b_enc, w_dec, b_dec, threshold = (tensors[name] for name in TENSORS)
    return Sae("jumprelu", 0, w_enc, b_enc, w_dec, b_dec, threshold.clamp(min=0))
