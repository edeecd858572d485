"""Goodfire's checkpoints: a PyTorch state dict with the two linear layers of a ReLU SAE.

    encoder_linear.weight (n, d), encoder_linear.bias (n,), decoder_linear.weight (d, n), decoder_linear.bias (d,)

No input bias is subtracted and nothing is normalised. The file is a pickle, so it is read with `weights_only`: whatever
is in it but tensors is refused before it runs. It is mapped into memory; its matrices are used transposed, in place.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from typing import TYPE_CHECKING

import torch

from steerback.errors import SteerbackError
from steerback.targets.formats import Place, with_layer
from steerback.targets.sae import Sae, stored

if TYPE_CHECKING:
    from steerback.targets.target import SaeSource

KEYS = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")


def read(place: Place, source: SaeSource) -> Sae:
    """The SAE of a checkpoint."""
    path = place.weights
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols; what matters is raised
            # only the zip form of a checkpoint can be mapped; the older form is read whole
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise SteerbackError(
            f"{path}: a pickle with more in it than tensors; it was refused, as loading it would run its code"
        ) from error
    absent = [key for key in KEYS if not (isinstance(state, dict) and isinstance(state.get(key), torch.Tensor))]
    if absent:
        raise SteerbackError(f"{path}: {', '.join(absent)} missing; not a Goodfire checkpoint")
    w_enc, b_enc, w_dec, b_dec = (stored(state[key]) for key in KEYS)
    if w_enc.ndim != 2 or w_dec.ndim != 2:
        raise SteerbackError(f"{path}: its weights have {w_enc.ndim} and {w_dec.ndim} dimensions, expected 2")
    sae = Sae("relu", 0, w_enc.T, b_enc, w_dec.T, b_dec, torch.zeros_like(b_enc))
    return with_layer(sae, source, path)
