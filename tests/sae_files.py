"""SAE files of every format with known weights, and their float64 results by the definition of each architecture."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

D, N, LAYER = 12, 20, 3


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights in SAELens' layout: W_enc (D, N), b_enc, W_dec (N, D), b_dec, threshold."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,), "threshold": (N,)}
    made = {name: torch.randn(shape, generator=draw) * 0.7 for name, shape in shapes.items()}
    made["threshold"] = made["threshold"].abs()
    made["threshold"][0] = -0.4  # ReLU still holds below 0
    return made


def inputs(seed: int = 1) -> torch.Tensor:
    return torch.randn(17, D, generator=torch.Generator().manual_seed(seed)) * 2


@dataclass(frozen=True)
class Reference:
    """Encode and decode in float64 loops over latents, straight from the definition of each convention."""

    w: dict[str, torch.Tensor]
    kind: str
    subtract: bool = False
    scale: float = 1.0
    k: int = 0
    by_norm: bool = False

    def encode(self, h: torch.Tensor) -> np.ndarray[Any, Any]:
        x = h.double().numpy() * self.scale
        w = {name: tensor.double().numpy() for name, tensor in self.w.items()}
        if self.subtract:
            x = x - w["b_dec"]
        norms = np.sqrt((w["W_dec"] ** 2).sum(axis=1))
        z = np.zeros((len(x), N))
        for row in range(len(x)):
            pre = np.array([x[row] @ w["W_enc"][:, n] + w["b_enc"][n] for n in range(N)])
            if self.by_norm:
                pre = pre * norms
            kept = sorted(range(N), key=lambda n: -pre[n])[: self.k] if self.kind == "topk" else range(N)
            for n in kept:
                above = pre[n] > (w["threshold"][n] if self.kind == "jumprelu" else 0)
                z[row, n] = max(pre[n], 0) if above else 0
        return z

    def decode(self, z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        w = {name: tensor.double().numpy() for name, tensor in self.w.items()}
        if self.by_norm:
            z = z / np.sqrt((w["W_dec"] ** 2).sum(axis=1))
        return (z @ w["W_dec"] + w["b_dec"]) / self.scale


def goodfire(path: Path, w: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32, zipped: bool = True) -> Path:
    """A state dict of two linear layers; their weights lie the other way round."""
    state = {
        "encoder_linear.weight": w["W_enc"].T.contiguous().to(dtype),
        "encoder_linear.bias": w["b_enc"].to(dtype),
        "decoder_linear.weight": w["W_dec"].T.contiguous().to(dtype),
        "decoder_linear.bias": w["b_dec"].to(dtype),
    }
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    return path


def gemma_scope(folder: Path, w: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in w.items()})
    return folder


def gemma_scope_2(folder: Path, w: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name.lower(): tensor for name, tensor in w.items()}, folder / "params.safetensors")
    said = {"architecture": "jump_relu", "hf_hook_point_in": f"model.layers.{LAYER}.output"} | config
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def saelens(folder: Path, w: dict[str, torch.Tensor], architecture: str, **config: object) -> Path:
    """A folder of SAELens 6; `config` changes or adds settings."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in w if name != "threshold" or architecture == "jumprelu"]
    save_file({name: w[name].contiguous() for name in names}, folder / "sae_weights.safetensors")
    said = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": N,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": f"blocks.{LAYER}.hook_resid_post", "sae_lens_version": "6.54.12"},
    }
    (folder / "cfg.json").write_text(json.dumps(said | config))
    return folder
