"""A Llama forward pass with steering, written in float64 without libraries, as a reference for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steerback.records import Intervention
from steerback.targets.sae import Sae


def encode(sae: Sae, h: Tensor) -> Tensor:
    """SAE code of one residual vector."""
    pre = (h @ sae.W_enc.double() + sae.b_enc.double()).tolist()
    z = [p if p > t else 0.0 for p, t in zip(pre, sae.threshold.tolist(), strict=True)]
    if sae.kind == "topk":
        winners = sorted(range(len(z)), key=lambda k: -z[k])[: sae.k]
        z = [v if k in winners else 0.0 for k, v in enumerate(z)]
    return torch.tensor(z, dtype=torch.float64)


def edit(h: Tensor, items: Sequence[Intervention], layer: int, in_prompt: bool, sae: Sae, steer: int) -> Tensor:
    """One residual vector after the interventions of `layer`: clamps and scales from the arriving h, then additions."""
    here = [
        i
        for i in items
        if i.positions in ("all", "prompt" if in_prompt else "generated")
        and (i.layer if i.layer is not None else (steer if i.mode == "add" else sae.layer)) == layer
    ]
    z = encode(sae, h) if any(i.mode != "add" for i in here) else torch.zeros(0)
    out = h.clone()
    for i in here:
        k = int(i.latent)
        changes = {"add": lambda v, _: v, "clamp": lambda v, k: v - z[k], "scale": lambda v, k: v * z[k] - z[k]}
        out += changes[i.mode](i.value, k) * sae.W_dec[k].double()
    return out


def forward(
    model: Any, ids: Sequence[int], items: Sequence[Intervention], prompt: int, sae: Sae, steer: int
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits (T, V) and the residual (T, d) arriving at the end of each block, before its edits."""
    config = model.config
    w = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    heads, groups, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def rotate(x: Tensor, position: int) -> Tensor:  # x (heads, dim)
        angle = position * frequency
        a, b = x[:, : dim // 2], x[:, dim // 2 :]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=1)

    x = w["model.embed_tokens.weight"][list(ids)]
    arriving = {}
    for layer in range(config.num_hidden_layers):
        p = f"model.layers.{layer}."
        normed = norm(x, w[p + "input_layernorm.weight"])
        q, k, v = ((normed @ w[f"{p}self_attn.{n}_proj.weight"].T).view(len(ids), -1, dim) for n in "qkv")
        attended = torch.zeros(len(ids), heads * dim, dtype=torch.float64)
        keys = torch.stack([rotate(k[t], t) for t in range(len(ids))])
        for t in range(len(ids)):
            query = rotate(q[t], t)
            for h in range(heads):
                g = h // (heads // groups)
                weights = torch.softmax(keys[: t + 1, g] @ query[h] / dim**0.5, dim=0)
                attended[t, h * dim : (h + 1) * dim] = weights @ v[: t + 1, g]
        x = x + attended @ w[p + "self_attn.o_proj.weight"].T
        normed = norm(x, w[p + "post_attention_layernorm.weight"])
        gate = normed @ w[p + "mlp.gate_proj.weight"].T
        x = (
            x
            + (gate * torch.sigmoid(gate) * (normed @ w[p + "mlp.up_proj.weight"].T)) @ w[p + "mlp.down_proj.weight"].T
        )
        arriving[layer] = x
        x = torch.stack([edit(x[t], items, layer, t < prompt, sae, steer) for t in range(len(ids))])
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T, arriving
