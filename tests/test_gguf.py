"""GGUF files as models: written from a tiny model, de-quantised once, steered like other models."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import tiny
from steerback.api import load_target
from steerback.errors import SteerbackError
from steerback.targets import list_targets, resolve
from steerback.targets.gguf import convert_gguf

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
}


def write(path: Path, model: Any, architecture: str = "qwen2", quantised: bool = False, template: bool = True) -> Path:
    """Write a model and the tiny tokenizer as llama.cpp's converter does."""
    c, tokenizer = model.config, tiny.tokenizer()
    out = gguf.GGUFWriter(path, architecture)
    out.add_file_type(7 if quantised else 0)
    for add, value in (
        (out.add_context_length, c.max_position_embeddings),
        (out.add_embedding_length, c.hidden_size),
        (out.add_block_count, c.num_hidden_layers),
        (out.add_feed_forward_length, c.intermediate_size),
        (out.add_head_count, c.num_attention_heads),
        (out.add_head_count_kv, c.num_key_value_heads),
        (out.add_layer_norm_rms_eps, c.rms_norm_eps),
        (out.add_rope_freq_base, 10000.0),
        (out.add_vocab_size, c.vocab_size),
    ):
        add(value)
    state = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    vocabulary += [f"<extra{n}>" for n in range(len(vocabulary), c.vocab_size)]
    special = set(tokenizer.all_special_tokens)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("qwen2")
    out.add_token_list(vocabulary)
    out.add_token_types([3 if t in special or t.startswith("<extra") else 1 for t in vocabulary])
    out.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in state["merges"]])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    out.add_pad_token_id(2)
    if template:
        out.add_chat_template(tiny.TEMPLATE)
    for name, tensor in model.state_dict().items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        data = tensor.float().numpy()
        if quantised and data.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            out.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
        else:
            out.add_tensor(name, data)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path / "cache"))


def model() -> Any:
    return tiny.model("qwen2", intermediate_size=64)


@torch.no_grad()
def logits(engine: Any, ids: list[int]) -> torch.Tensor:
    return engine.teacher_forced(ids, (), len(ids))


@torch.no_grad()
def test_a_float_file_is_the_model_it_was_made_from(tmp_path: Path) -> None:
    plain = model()
    target = resolve(str(write(tmp_path / "little.gguf", plain)))
    assert (target.name, target.dtype, target.prompt_format) == ("little", "float32", "chat")
    assert (target.steer_layer, target.n_layers, target.d_model) == (2, 4, 32)  # 60 % of the depth
    with load_target(target, "transformers") as loaded:
        ids = list(range(10, 40))
        torch.testing.assert_close(
            logits(loaded.engine, ids), plain(torch.tensor([ids])).logits[0], atol=1e-4, rtol=1e-4
        )
        words = tiny.tokenizer().encode("the cat explains water")
        assert loaded.engine.runner.prompter.tokenizer.encode("the cat explains water") == words
        assert loaded.generate("the cat", max_new_tokens=4).record.prompt_tokens > 2


@torch.no_grad()
def test_a_quantised_file_is_dequantised_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, file = model(), tmp_path / "small.gguf"
    write(file, plain, quantised=True, template=False)
    (tmp_path / "own.toml").write_text('[mine]\nmodel = "small.gguf"\nprompt_format = "plain"\ndtype = "float32"\n')
    target = resolve(str(file))
    assert (target.dtype, target.prompt_format) == ("bfloat16", "plain")
    assert "de-quantising" in capsys.readouterr().err
    moved = file.rename(tmp_path / "moved.gguf")
    assert resolve(str(moved)).model == target.model  # found by the hash of its contents
    assert capsys.readouterr().err == ""
    for tensor in plain.state_dict().values():
        if tensor.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            tensor.copy_(torch.from_numpy(np.array(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind))))
        tensor.copy_(tensor.bfloat16())
    table = {"mine": {"model": str(moved), "prompt_format": "plain", "dtype": "float32"}}
    with load_target(resolve("mine", table), "transformers") as loaded:
        ids = list(range(10, 40))
        theirs = plain(torch.tensor([ids])).logits[0]
        torch.testing.assert_close(logits(loaded.engine, ids), theirs, atol=1e-4, rtol=1e-4)


def test_listing_targets_converts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "small.gguf", model())
    (tmp_path / "own.toml").write_text('[mine]\nmodel = "small.gguf"\n')
    monkeypatch.setenv("STEERBACK_TARGETS", str(tmp_path / "own.toml"))
    assert "mine" in {target.name for target in list_targets()}
    assert not any(path.is_dir() for path in (tmp_path / "cache" / "gguf").iterdir())


def test_files_that_are_no_model_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    with pytest.raises(SteerbackError, match="no such file"):
        resolve(str(file))
    write(file, model(), "mamba2")
    with pytest.raises(SteerbackError, match=r"unknown architecture .* 'mamba2'; choose one of: llama, qwen2"):
        resolve(str(file))
    whole = write(tmp_path / "y.gguf", model()).read_bytes()
    for content in (b"", b"GGUF", b"no model" * 50, whole[:40], whole[: len(whole) // 3], whole[:-200]):
        file.write_bytes(content)
        with pytest.raises(SteerbackError, match=r"not a (readable|complete) GGUF file") as error:
            convert_gguf(str(file))
        assert "\n" not in str(error.value)
    assert not [p for p in (tmp_path / "cache" / "gguf").iterdir() if p.is_dir()]  # nothing half-written


def test_files_next_to_a_gguf_file_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converted folder is named by the file's hash, so nothing else may shape it; and no code runs."""
    file = write(tmp_path / "plain.gguf", model())
    mark = tmp_path / "code-ran"
    (tmp_path / "own.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass OwnTokenizer: pass\n"
    )
    config = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "another"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.123, "do_sample": True}))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))
    folder = convert_gguf(str(file))
    assert not mark.exists()
    assert sys.stdin.read() == "y\ny\n"
    written = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".jinja"))
    assert "0.123" not in written
    assert "another" not in written
