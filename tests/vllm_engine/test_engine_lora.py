"""LoRA adapters beside a Gemma 2 with a TopK SAE, steered: as the merged weights are in the reference engine.

The adapters are of the form that fine-tuning makes: every linear layer, alpha 16, of rank 32 unless noted.
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
from test_engine import CASES, check_all_edits, check_sampled, random_request, tokens

from steerback.targets import from_folder

RANK, ALPHA = 32, 16
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(model: Path, adapter: Path, merged: Path, seed: int = 3, rank: int = RANK) -> None:
    """A random adapter in peft's form, and the model with it in its weights."""
    draw = torch.Generator().manual_seed(seed)
    weights, parts = load_file(model / "model.safetensors"), {}
    for name in [n for n in weights if n.removesuffix(".weight").endswith(LINEAR)]:
        rows, columns = weights[name].shape
        a, b = torch.randn(rank, columns, generator=draw) * 0.1, torch.randn(rows, rank, generator=draw) * 0.05
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        parts |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        weights[name] = weights[name] + ALPHA / rank * b @ a
    for folder in (adapter, merged):
        folder.mkdir()
    save_file(parts, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "lora_dropout": 0.05, "bias": "none"} | {
        "target_modules": list(LINEAR),
        "task_type": "CAUSAL_LM",
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in model.iterdir():
        if path.name != "model.safetensors":
            (merged / path.name).symlink_to(path)
    save_file(weights, merged / "model.safetensors", {"format": "pt"})


@pytest.mark.skipif(small.GPU, reason="vLLM's LoRA kernels for GPUs take no float32")
def test_adapters_of_one_engine_are_steered_like_merged_weights(tmp_path: Path) -> None:
    """One engine serves two adapters and the model alone, in turn."""
    target = small.write(tmp_path / "model", "topk", model="gemma2")
    references = {}
    for name, seed, rank in (("one", 3, RANK), ("two", 4, 8)):
        write_adapter(tmp_path / "model", tmp_path / name, tmp_path / f"merged-{name}", seed, rank)
        references[name] = from_folder(tmp_path / f"merged-{name}", steer_layer=1, read_layer=2)
    one, two = (target.with_adapter(tmp_path / name) for name in references)
    pair = Pair(one, references["one"], adapters=(str(tmp_path / "two"),), enforce_eager=True)
    try:
        check_all_edits(pair)
        engines = [("one", pair.vllm, pair.reference)]
        for name, other, reference in (("two", two, references["two"]), ("alone", target, target)):
            engines.append((name, pair.vllm.serving(other), small.reference_engine(reference)))
        ids, edits = tokens(9, 30), CASES["add and clamp"]
        requests = [random_request(n) for n in range(8)]
        for name, engine, reference in [*engines, engines[0]]:
            small.near(
                name, engine.teacher_forced(ids, edits, 12), reference.teacher_forced(ids, edits, 12).log_softmax(-1)
            )
            pair.vllm, pair.reference = engine, reference
            check_sampled(pair, requests)
        texts = [reference.teacher_forced(ids, edits, 12).log_softmax(-1) for _, _, reference in engines]
        assert all((texts[a] - texts[b]).abs().max() > EFFECT / 4 for a, b in ((0, 1), (0, 2), (1, 2)))
        records = [engine.describe() for _, engine, _ in engines]
        assert [bool(record.get("lora")) for record in records] == [True, True, False]
        assert len({engine.fingerprint for _, engine, _ in engines}) == 3
        assert {record["model"] for record in records} == {target.name}
        assert pair.vllm.serving(replace(target, steer_layer=0)) is None
        assert pair.vllm.serving(target.with_adapter(tmp_path / "merged-one")) is None
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
