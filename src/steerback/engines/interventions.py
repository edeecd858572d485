"""Arithmetic of steering: the reference definition that every engine is tested against.

h' = h + sum_clamp (v_k - z_k(h)) W_dec[k] + sum_scale (s_k - 1) z_k(h) W_dec[k] + sum_add b d

z_k(h) is computed from the residual at the end of the block, before any edit, so all clamps of a layer use the same h.
Scaling clamps each token to a share of its own z. Additions come after clamps, so a latent with both a clamp and an
addition ends at v + b. The reconstruction error of the SAE is left unchanged (the authors' `dec(f) + err`, rearranged).
Pure tensor arithmetic on (..., d); this module does not know about models, batches or caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from steerback.errors import SteerbackError, unknown
from steerback.records import Intervention, LatentKey, Recording

if TYPE_CHECKING:
    from torch import Tensor

    from steerback.engines.base import ReadAt
    from steerback.targets.sae import Sae

ARITHMETIC_VERSION = "1"
"""Version of the arithmetic, part of every cache key. Raise it whenever a change below alters a model's output."""

Phase = Literal["prompt", "generated"]


class Clamp(NamedTuple):
    """Effect of a clamp on a latent's activation z: z becomes value + (1 - removed) z."""

    latent: int
    value: float = 0.0
    removed: float = 1.0


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """Edits of one layer in one phase: clamps first, then additions (latent, boost)."""

    add: tuple[tuple[LatentKey, float], ...] = ()
    clamp: tuple[Clamp, ...] = ()


@dataclass(frozen=True, slots=True)
class Site:
    """Layers of a target for editing and reading, with its latents and directions. `n_latents` is 0 without an SAE.

    `sae_layer` is the layer of clamps: the SAE's layer unless the target sets another one.
    """

    n_layers: int
    d_model: int
    steer_layer: int
    sae_layer: int
    read_layer: int
    n_latents: int
    directions: tuple[str, ...] = ()
    undirected: tuple[int, ...] = ()
    """Latents with a zero decoder row; steering with one would change nothing."""

    def layer_of(self, intervention: Intervention) -> int:
        """Return the layer of an edit; default: steer layer for an addition, SAE layer for other edits."""
        if intervention.layer is not None:
            return intervention.layer
        return self.steer_layer if intervention.mode == "add" else self.sae_layer

    def layer_named(self, at: ReadAt) -> int:
        """Return the number of the read layer or of the clamp layer."""
        return self.read_layer if at == "read" else self.sae_layer

    def record_layer(self, record: Recording | None) -> int | None:
        """Return the layer of a recording: the layer that it names, else the read layer."""
        if record is None:
            return None
        return self.read_layer if record.layer is None else record.layer


def plan_layers(interventions: Sequence[Intervention], phase: Phase, site: Site) -> dict[int, LayerPlan]:
    """Return the edits of `phase` by layer; layers without edits are absent."""
    adds: dict[int, list[tuple[LatentKey, float]]] = {}
    clamps: dict[int, list[Clamp]] = {}
    for item in interventions:
        if item.positions not in ("all", phase):
            continue
        layer = site.layer_of(item)
        if item.mode == "add":
            adds.setdefault(layer, []).append((item.latent, item.value))
        elif isinstance(item.latent, int):  # `check` refuses clamps of named directions
            exact = item.mode == "clamp"
            clamp = Clamp(item.latent, item.value) if exact else Clamp(item.latent, removed=1 - item.value)
            clamps.setdefault(layer, []).append(clamp)
    return {
        layer: LayerPlan(tuple(adds.get(layer, ())), tuple(clamps.get(layer, ())))
        for layer in sorted(adds.keys() | clamps.keys())
    }


def clamp_delta(z: Tensor, values: Tensor, removed: Tensor, decoder: Tensor) -> Tensor:
    """Return the change by clamps: z, values and removed shares (..., k), decoder rows (..., k, d) -> (..., d)."""
    return (values - removed * z) @ decoder


def added_vector(plan: LayerPlan, sae: Sae | None, directions: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Return the sum of a layer's additions, (d,) in float32 on the device of `like`."""
    import torch

    total = torch.zeros(like.shape[-1], dtype=torch.float32, device=like.device)
    for key, boost in plan.add:
        total += boost * direction(key, sae, directions).to(like.device, torch.float32)
    return total


def direction(key: LatentKey, sae: Sae | None, directions: Mapping[str, Tensor]) -> Tensor:
    """Return the vector (d,) that a boost of 1 adds: the latent's raw decoder row, or a named direction."""
    if isinstance(key, str):
        if key not in directions:
            raise unknown("direction", key, sorted(directions) or ["(this target has none)"])
        return directions[key]
    if sae is None:
        raise SteerbackError(f"latent {key} needs an SAE, but this target has none; name a direction instead")
    return sae.W_dec[key]


def edit(h: Tensor, plan: LayerPlan, sae: Sae | None, directions: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return the residual (..., d) after the clamps and additions of one layer, computed in float32 or wider."""
    import torch

    x = h if h.dtype == torch.float64 else h.float()
    out = x
    if plan.clamp and sae is not None:
        latents = [c.latent for c in plan.clamp]
        values, removed = torch.tensor([c[1:] for c in plan.clamp], dtype=x.dtype, device=x.device).T
        rows = sae.W_dec[latents].to(x.device, x.dtype)
        out = out + clamp_delta(sae.encode(x, latents), values, removed, rows)
    if plan.add:
        out = out + added_vector(plan, sae, directions or {}, x).to(x.dtype)
    return out.to(h.dtype)


def steer(
    h: Tensor,
    interventions: Sequence[Intervention],
    layer: int,
    prompt: int,
    site: Site,
    sae: Sae | None,
    directions: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return the steered residual (T, d) of one sequence after `layer`; the first `prompt` positions are the prompt."""
    import torch

    parts = []
    phases: tuple[tuple[Phase, Tensor], ...] = (("prompt", h[:prompt]), ("generated", h[prompt:]))
    for phase, part in phases:
        plan = plan_layers(interventions, phase, site).get(layer)
        parts.append(part if plan is None else edit(part, plan, sae, directions))
    return torch.cat(parts)


def check(where: str, interventions: Sequence[Intervention], record: Recording | None, site: Site) -> None:
    """Raise SteerbackError if `interventions` or `record` are impossible at `site`; the message names the field."""
    seen: set[tuple[int, LatentKey, Phase]] = set()
    phases: tuple[Phase, ...] = ("prompt", "generated")
    for n, item in enumerate(interventions):
        field = f"{where}: interventions[{n}]"
        check_layer(f"{field}.layer", item.layer, site)
        _check_latent(f"{field}.latent", item.latent, site)
        if item.latent in site.undirected:
            raise SteerbackError(
                f"{field}.latent {item.latent} has a decoder row of zeros, so steering with it changes nothing"
            )
        if item.mode == "add":
            continue
        if isinstance(item.latent, str):
            raise SteerbackError(
                f"{field}.latent {item.latent!r} is a named direction; only SAE latents can be clamped or scaled"
            )
        for phase in phases:
            slot = (site.layer_of(item), item.latent, phase)
            if item.positions in ("all", phase) and slot in seen:
                raise SteerbackError(
                    f"{field}.latent {item.latent} is clamped or scaled twice at layer {slot[0]}; keep one value"
                )
            if item.positions in ("all", phase):
                seen.add(slot)
    if record is not None:
        check_layer(f"{where}: record.layer", record.layer, site)
        for latent in record.latents:
            _check_latent(f"{where}: record.latents", latent, site)


def check_layer(field: str, layer: int | None, site: Site) -> None:
    """Raise SteerbackError if the model does not have this layer."""
    if layer is not None and not 0 <= layer < site.n_layers:
        raise SteerbackError(f"{field} {layer} is outside 0..{site.n_layers - 1}, the layers of this model")


def _check_latent(field: str, latent: LatentKey, site: Site) -> None:
    if isinstance(latent, str):
        if latent not in site.directions:
            names = ", ".join(site.directions) or "none for this target"
            raise SteerbackError(f"{field} {latent!r} is not a known direction; choose one of: {names}")
    elif site.n_latents == 0:
        raise SteerbackError(f"{field} {latent} needs an SAE, but this target has none; name a direction instead")
    elif not 0 <= latent < site.n_latents:
        raise SteerbackError(f"{field} {latent} is outside 0..{site.n_latents - 1}, the latents of this SAE")


def check_directions(directions: Mapping[str, Tensor], d_model: int) -> None:
    """Raise SteerbackError if a named direction has the wrong width or is not finite."""
    for name, vector in directions.items():
        if tuple(vector.shape) != (d_model,):
            raise SteerbackError(f"direction {name!r} has shape {tuple(vector.shape)}; this model needs ({d_model},)")
        if not bool(vector.isfinite().all()):
            raise SteerbackError(f"direction {name!r} contains NaN or infinity")
