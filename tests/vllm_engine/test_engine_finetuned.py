"""An adapter as fine-tuning makes it (every linear layer, rank 32) served by vLLM beside the weights, and steered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import small
import torch
from safetensors.torch import load_file, save_file
from test_engine import CASES, tokens

from steerback.targets import from_folder

RANK, ALPHA = 32, 16
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write(model: Path, adapter: Path, merged: Path) -> None:
    """A random adapter in peft's form, and the model with it in its weights."""
    draw = torch.Generator().manual_seed(5)
    weights, parts = load_file(model / "model.safetensors"), {}
    for name in [n for n in weights if n.removesuffix(".weight").endswith(LINEAR)]:
        rows, columns = weights[name].shape
        a, b = torch.randn(RANK, columns, generator=draw) * 0.1, torch.randn(rows, RANK, generator=draw) * 0.05
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        parts |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        weights[name] = weights[name] + ALPHA / RANK * b @ a
    adapter.mkdir()
    merged.mkdir()
    save_file(parts, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05, "bias": "none"}
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": list(LINEAR), "task_type": "CAUSAL_LM"}), encoding="utf-8"
    )
    for path in model.iterdir():
        if path.name != "model.safetensors":
            (merged / path.name).symlink_to(path)
    save_file(weights, merged / "model.safetensors", {"format": "pt"})


def test_a_finetuned_target_is_steered_like_merged_weights(tmp_path: Path) -> None:
    from steerback.engines.transformers import TransformersEngine
    from steerback.engines.vllm.engine import VllmEngine

    target = small.write(tmp_path / "model")
    write(tmp_path / "model", tmp_path / "adapter", tmp_path / "merged")
    merged = TransformersEngine(from_folder(tmp_path / "merged", steer_layer=1, read_layer=2), batch_size=2)
    plain = TransformersEngine(target, batch_size=2)
    adapted = target.with_adapter(tmp_path / "adapter")
    engine = VllmEngine(adapted, batch_size=4, options={**small.OPTIONS, "enforce_eager": True, "max_logprobs": -1})
    try:
        ids = tokens(9, 30)
        for name, edits in (("adapter, steered", CASES["add and clamp"]), ("adapter", ())):
            got = engine.teacher_forced(ids, edits, 12)
            want = merged.teacher_forced(ids, edits, 12).log_softmax(-1).numpy()
            small.near(name, got, want)
            without = plain.teacher_forced(ids, edits, 12).log_softmax(-1).numpy()
            assert np.abs(want - without).max() > small.EFFECT / 4
        assert engine.describe()["lora"]
        assert engine.describe()["model"] == target.name
    finally:
        engine.close()
