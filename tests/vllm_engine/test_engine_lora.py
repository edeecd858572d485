"""A LoRA adapter beside a Gemma 2 with a TopK SAE, steered: as the merged weights are in the reference engine.

The adapter is of the form that fine-tuning makes: every linear layer, rank 32, alpha 16.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file, save_file
from small import EFFECT, Pair
from test_engine import CASES, check_all_edits, tokens

from steerback.targets import from_folder

RANK, ALPHA = 32, 16
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(model: Path, adapter: Path, merged: Path) -> None:
    """A random adapter in peft's form, and the model with it in its weights."""
    draw = torch.Generator().manual_seed(3)
    weights, parts = load_file(model / "model.safetensors"), {}
    for name in [n for n in weights if n.removesuffix(".weight").endswith(LINEAR)]:
        rows, columns = weights[name].shape
        a, b = torch.randn(RANK, columns, generator=draw) * 0.1, torch.randn(rows, RANK, generator=draw) * 0.05
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        parts |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        weights[name] = weights[name] + ALPHA / RANK * b @ a
    for folder in (adapter, merged):
        folder.mkdir()
    save_file(parts, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05, "bias": "none"} | {
        "target_modules": list(LINEAR),
        "task_type": "CAUSAL_LM",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in model.iterdir():
        if path.name != "model.safetensors":
            (merged / path.name).symlink_to(path)
    save_file(weights, merged / "model.safetensors", {"format": "pt"})


@pytest.mark.skipif(small.GPU, reason="vLLM's LoRA kernels for GPUs take no float32")
def test_adapter_is_steered_like_merged_weights(tmp_path: Path) -> None:
    target = small.write(tmp_path / "model", "topk", model="gemma2")
    write_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    merged = from_folder(tmp_path / "merged", steer_layer=1, read_layer=2)
    pair = Pair(target.with_adapter(tmp_path / "adapter"), merged, enforce_eager=True)
    try:
        plain = small.reference_engine(target)
        check_all_edits(pair)
        ids, edits = tokens(9, 30), CASES["add and clamp"]
        with_adapter, without = (e.teacher_forced(ids, edits, 12).log_softmax(-1) for e in (pair.reference, plain))
        assert (with_adapter - without).abs().max() > EFFECT / 4
        assert pair.vllm.describe()["lora"]
        assert pair.vllm.describe()["model"] == target.name
    finally:
        pair.vllm.close()


BFLOAT16 = 0.4
"""On log-probabilities of a model in bfloat16 against one in float32; the edits move them by more than EFFECT."""


@pytest.mark.skipif(not small.GPU, reason="the form in which GPUs serve adapters; elsewhere float32 is stricter")
def test_adapter_in_bfloat16_is_steered_like_merged_weights(tmp_path: Path) -> None:
    target = replace(small.write(tmp_path / "model"), dtype="bfloat16")
    write_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    merged = from_folder(tmp_path / "merged", steer_layer=1, read_layer=2)
    pair = Pair(target.with_adapter(tmp_path / "adapter"), merged)
    try:
        plain, ids = small.reference_engine(replace(target, dtype="float32")), tokens(9, 30)
        for name in ("add", "clamp", "add and clamp"):
            got = pair.vllm.teacher_forced(ids, CASES[name], 12)
            want, without = (e.teacher_forced(ids, CASES[name], 12).log_softmax(-1) for e in (pair.reference, plain))
            small.near(f"log-probabilities in bfloat16, {name}", got, want.numpy(), BFLOAT16)
            assert (want - without).abs().max() > EFFECT
    finally:
        pair.vllm.close()
