"""Gemma Scope 2 (Gemma 3): `params.safetensors` with w_enc (d, n), b_enc, w_dec (n, d), b_dec, threshold.

JumpReLU as in Gemma Scope. `config.json` beside it, where there is one, says where it reads; SAEs of anything but the
residual stream after a block are refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from steerback.errors import SteerbackError
from steerback.targets.formats import Place, with_layer
from steerback.targets.formats.gemma_scope import jumprelu
from steerback.targets.sae import TENSORS, Sae, stored

if TYPE_CHECKING:
    from steerback.targets.target import SaeSource


def read(place: Place, source: SaeSource) -> Sae:
    """The SAE of a file."""
    path = place.weights
    found = load_file(path)
    if "affine_skip_connection" in found:
        raise SteerbackError(f"{path}: a transcoder; steering needs an SAE of the residual stream (resid_post)")
    absent = [name.lower() for name in TENSORS if name.lower() not in found]
    if absent:
        raise SteerbackError(f"{path}: {', '.join(absent)} missing; found {', '.join(sorted(found)) or 'nothing'}")
    sae = jumprelu({name: stored(found[name.lower()]) for name in TENSORS})
    if place.config is None:
        return with_layer(sae, source, path)
    config = json.loads(place.config.read_text(encoding="utf-8"))
    if config.get("architecture") != "jump_relu":
        raise SteerbackError(f"{place.config}: architecture {config.get('architecture')!r}, expected 'jump_relu'")
    hook = str(config.get("hf_hook_point_in"))
    layer = re.fullmatch(r"(?:\w+\.)*layers\.(\d+)\.output", hook)
    if layer is None:
        raise SteerbackError(f"{place.config}: reads {hook!r}; steering needs an SAE of a block's output")
    return replace(sae, layer=int(layer[1]))
