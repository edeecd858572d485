"""Sparse autoencoders: one frozen class for ReLU, JumpReLU and TopK from all file formats, and steerback's format.

Convention: pre = h @ W_enc + b_enc (no input-bias subtraction, no normalisation), z = pre * (pre > threshold),
reconstruction = z @ W_dec + b_dec. Loaders (`targets.sae_files`) convert other conventions to this one, or refuse.
Weights may be views of a file on disk, so the functions avoid copies of whole matrices unless their docstring says so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from steerback.errors import SteerbackError, unknown
from steerback.store.files import make_folder, write_atomic
from steerback.targets.target import Kind

TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
BLOCK = 1 << 24
"""Elements of a matrix that are read or converted at a time: 64 MB as float32."""
LARGEST = 1e15
"""Upper limit of a valid weight; the norm of a row of larger numbers would be infinite in float32."""
TILE = 1024
"""Side of the squares in which matrices are hashed, which is fast for row-major and column-major storage."""


@dataclass(frozen=True, eq=False)
class Sae:
    """A sparse autoencoder of the residual stream after block `layer`; d = model width, n = number of latents.

    W_enc (d, n), b_enc (n,), W_dec (n, d), b_dec (d,), threshold (n,) (zeros for ReLU and TopK). JumpReLU compares
    strictly: an activation equal to its threshold is 0. TopK keeps the k largest pre-activations above threshold.
    Weights are float32 or bfloat16; arithmetic is in the wider of the weights' and the residual's type.
    """

    kind: Kind
    layer: int
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor
    k: int | None = None

    @property
    def d_model(self) -> int:
        return self.W_enc.shape[0]

    @property
    def n_latents(self) -> int:
        return self.W_enc.shape[1]

    def encode(self, h: Tensor, latents: Sequence[int] | None = None) -> Tensor:
        """Return the activations (..., n) of h (..., d), or (..., len(latents)) of some latents.

        ReLU and JumpReLU compute only the columns of `latents`; TopK has to encode all to determine the k largest.
        """
        h = h.to(torch.promote_types(h.dtype, self.W_enc.dtype))
        if self.kind == "topk" or latents is None:
            z = self.activate(self._pre(h), self.threshold.to(h))
            return z if latents is None else z[..., list(latents)]
        columns = list(latents)
        pre = h @ self.W_enc[:, columns].to(h) + self.b_enc[columns].to(h)
        return self.activate(pre, self.threshold[columns].to(h))

    def _pre(self, h: Tensor) -> Tensor:
        """Return pre-activations (..., n) of all latents; weights of another type or device are converted in blocks."""
        if self.W_enc.dtype == h.dtype and self.W_enc.device == h.device:
            return h @ self.W_enc + self.b_enc
        pre = h.new_empty(*h.shape[:-1], self.n_latents)
        for part in self._latent_blocks():
            pre[..., part] = h @ self.W_enc[:, part].to(h) + self.b_enc[part].to(h)
        return pre

    def _latent_blocks(self) -> Iterator[slice]:
        step = max(BLOCK // self.d_model, 1)
        return (slice(first, first + step) for first in range(0, self.n_latents, step))

    def activate(self, pre: Tensor, threshold: Tensor) -> Tensor:
        """Return activations from pre-activations; TopK needs all latents in the last dimension."""
        z = pre * (pre > threshold) + 0.0  # so that inactive latents are 0.0 and not -0.0
        if self.kind != "topk":
            return z
        assert self.k is not None  # `check` refuses TopK without k
        top = z.topk(min(self.k, z.shape[-1]), dim=-1)
        return torch.zeros_like(z).scatter_(-1, top.indices, top.values)

    def decode(self, z: Tensor) -> Tensor:
        """Return the reconstruction (..., d) of activations (..., n)."""
        if self.W_dec.dtype == z.dtype and self.W_dec.device == z.device:
            return z @ self.W_dec + self.b_dec
        total = self.b_dec.to(z).expand(*z.shape[:-1], -1).clone()
        for part in self._latent_blocks():
            total += z[..., part] @ self.W_dec[part].to(z)
        return total

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Sae:
        """Return the SAE on another device or in another float type."""
        return replace(self, **{name: getattr(self, name).to(device, dtype) for name in TENSORS})

    def encoder_to(self, device: torch.device | str) -> Sae:
        """Return the SAE with its encoder on another device; the decoder stays where it is."""
        return replace(self, **{name: getattr(self, name).to(device) for name in ("W_enc", "b_enc", "threshold")})

    @cached_property
    def hash(self) -> str:
        """SHA-256 of kind, layer, k and all weights (as float32, tile by tile); part of every cache key."""
        state = hashlib.sha256(json.dumps([self.kind, self.layer, self.k]).encode())
        for name in TENSORS:
            tensor = getattr(self, name).detach()
            state.update(f"{name}{tuple(tensor.shape)}".encode())
            with ThreadPoolExecutor() as pool:  # hashing and copying let other threads run
                for part in pool.map(partial(_hash_rows, tensor), range(0, tensor.shape[0], TILE)):
                    state.update(part)
        return state.hexdigest()

    @cached_property
    def decoder_norms(self) -> Tensor:
        """L2 norm of each latent's decoder direction, (n,) float32 on the CPU."""
        weights = self.W_dec.detach()
        squares = torch.zeros(self.n_latents, dtype=torch.float64)
        if weights.stride(0) >= weights.stride(1):
            return torch.cat([part.float().norm(dim=1).cpu() for part in _blocks(weights)])
        for part in _blocks(weights):  # a transposed view: add up in storage order, which is faster
            squares += part.float().square().sum(dim=1).cpu()
        return squares.sqrt().float()

    def norms(self) -> dict[str, float]:
        """Return a summary of the decoder norms. Supported formats have unit norms."""
        norms = self.decoder_norms
        low, middle, high = torch.quantile(norms[:: max(len(norms) // 1_000_000, 1)], torch.tensor([0.05, 0.5, 0.95]))
        return {
            "min": float(norms.min()),
            "5 %": float(low),
            "median": float(middle),
            "95 %": float(high),
            "max": float(norms.max()),
            "zero": int((norms == 0).sum()),
        }

    @cached_property
    def _damaged(self) -> str | None:
        """Name of the first tensor with an invalid number, or None; cached, because it reads all weights."""
        for name in TENSORS:
            if not all(
                bool((torch.stack(part.aminmax()).abs() < LARGEST).all()) for part in _blocks(getattr(self, name))
            ):
                return name
        return None

    def check(self, where: str, d_model: int | None = None, n_layers: int | None = None) -> Sae:
        """Return the SAE itself. Raises SteerbackError for a wrong shape, value or layer; `where` names the file."""
        if self.kind not in get_args(Kind):
            raise unknown(f"SAE kind in {where}", self.kind, get_args(Kind))
        if self.W_enc.ndim != 2:
            raise SteerbackError(f"{where}: W_enc has shape {tuple(self.W_enc.shape)}, expected (d_model, n_latents)")
        d, n = self.W_enc.shape
        if not d * n:
            raise SteerbackError(f"{where}: W_enc has shape ({d}, {n}); it has no latents")
        shapes = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,), "threshold": (n,)}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape:
                raise SteerbackError(f"{where}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if self._damaged is not None:
            raise SteerbackError(
                f"{where}: {self._damaged} contains NaN, infinity or numbers above {LARGEST:g}; the file is damaged"
            )
        if self.kind == "topk" and not (self.k is not None and 1 <= self.k <= n):
            raise SteerbackError(f"{where}: a topk SAE needs k between 1 and {n}, not {self.k!r}")
        if d_model is not None and d != d_model:
            raise SteerbackError(
                f"{where}: the SAE reads width {d}, but the model has width {d_model}; it belongs to another model"
            )
        if self.layer < 0 or (n_layers is not None and self.layer >= n_layers):
            raise SteerbackError(f"{where}: layer {self.layer} is outside the model's layers 0..{(n_layers or 1) - 1}")
        return self


def _hash_rows(tensor: Tensor, first: int) -> bytes:
    """Return the SHA-256 of TILE rows of a matrix (or entries of a vector), in squares from left to right."""
    state, rows = hashlib.sha256(), tensor[first : first + TILE]
    for tile in rows[None] if tensor.ndim == 1 else rows.split(TILE, dim=1):  # type: ignore[no-untyped-call]
        state.update(tile.to("cpu", torch.float32).contiguous().numpy().data)
    return state.digest()


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield parts of about BLOCK elements of a tensor, in storage order."""
    if tensor.ndim == 1:
        yield tensor
        return
    along = max(range(tensor.ndim), key=tensor.stride)
    step = max(BLOCK * tensor.shape[along] // max(tensor.numel(), 1), 1)
    for first in range(0, tensor.shape[along], step):
        yield tensor.narrow(along, first, min(step, tensor.shape[along] - first))


def stored(tensor: Tensor, where: str) -> Tensor:
    """Convert a tensor to a type of `Sae`: bfloat16 stays, other floats become float32. Refuses other types."""
    kind = "" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "no" if tensor.is_meta else "sparse"
    elif tensor.untyped_storage().nbytes() < tensor.nbytes:
        kind = "repeated"
    if kind:
        raise SteerbackError(f"{where} has {kind} numbers; an SAE needs dense weights in a floating-point type")
    return tensor if tensor.dtype == torch.bfloat16 else tensor.to(torch.float32)


def save_native(sae: Sae, folder: Path, dtype: torch.dtype = torch.float32, **extra: object) -> None:
    """Write an SAE in steerback's format; `extra` adds keys to sae.json."""
    from safetensors.torch import save

    make_folder(folder)
    weights = {n: getattr(sae, n).detach().to("cpu", dtype).contiguous() for n in TENSORS}
    write_atomic(folder / "sae.safetensors", save(weights))
    meta = {"kind": sae.kind, "layer": sae.layer, "d_model": sae.d_model, "n_latents": sae.n_latents, **extra}
    meta |= {} if sae.k is None else {"k": sae.k}
    write_atomic(folder / "sae.json", (json.dumps(meta, indent=1) + "\n").encode("utf-8"))
