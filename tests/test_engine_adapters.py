"""Adapters in the transformers engine: equal to merged weights; an adapter that does not fit is an error."""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from steerback.engines.adapters import check_fits, with_adapter
from steerback.engines.loading import assemble, hash_adapter
from steerback.engines.transformers import TransformersEngine
from steerback.errors import SteerbackError
from steerback.records import Intervention
from steerback.targets import resolve


def saved(folder: Path, kind: str = "llama", seed: int = 1, **options: Any) -> Path:
    """A folder with an adapter of random weights on all linear layers of the tiny model."""
    from peft import LoraConfig, get_peft_model

    model = tiny.model(kind)  # sets the seed
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"target_modules": "all-linear", "init_lora_weights": False} | options
    config = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", **settings)
    get_peft_model(model, config).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_an_adapter_beside_the_weights_is_as_merged_into_them_under_steering_too(tmp_path: Path, kind: str) -> None:
    from dataclasses import replace

    from peft import PeftModel

    saved(tmp_path / "adapter", kind)
    target = tiny.target().with_adapter(tmp_path / "adapter")
    assert (target.name, target.base) == ("tiny+adapter", "tiny")
    beside = with_adapter(target, tiny.model(kind))
    assert any("lora_A" in name for name, _ in beside.named_parameters())  # not merged
    merged = PeftModel.from_pretrained(tiny.model(kind), str(tmp_path / "adapter")).merge_and_unload()
    assert not any("lora_A" in name for name, _ in merged.named_parameters())
    logits = {}
    ids = torch.randint(10, 300, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    edits: dict[str, tuple[Intervention, ...]] = {
        "none": (),
        "add": (Intervention("add", 3, 4.0),),
        "add and clamp": (Intervention("add", 3, 4.0), Intervention("clamp", 7, 0.5), Intervention("clamp", 9, 0.0)),
    }
    for name, model in (("beside", beside), ("merged", merged), ("without", tiny.model(kind))):
        made = TransformersEngine(assemble(target, model, tiny.tokenizer(), tiny.sae()), 4)
        with contextlib.closing(made):
            logits[name] = {e: made.teacher_forced(ids, edit, 10) for e, edit in edits.items()}
    for e in edits:
        torch.testing.assert_close(logits["beside"][e], logits["merged"][e], atol=2e-4, rtol=1e-4)
        assert (logits["beside"][e] - logits["without"][e]).abs().max() > 0.5
    assert (logits["beside"]["add"] - logits["beside"]["none"]).abs().max() > 0.5
    broken = replace(target, adapter=str(tmp_path / "none"))
    with pytest.raises(SteerbackError, match=r"target 'tiny\+adapter': cannot use adapter"):
        with_adapter(broken, copy.deepcopy(tiny.model(kind)))


def renamed(change: Callable[[str], str | None], folder: Path) -> None:
    """Rename the weights of an adapter; those for which `change` gives None are dropped."""
    path = folder / "adapter_model.safetensors"
    weights = {new: tensor for name, tensor in load_file(path).items() if (new := change(name)) is not None}
    save_file(weights, path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda name: name.replace("base_model.model.", "base_model.model.other."),
            r"has weights of other\.model\.layers.*, which the model lacks",
        ),
        (
            lambda name: name.replace("layers.3.", "layers.7."),
            r"has weights of model\.layers\.7\..*, which the model lacks",
        ),
        (lambda name: name if "lora_A" in name else None, "has one of the two matrices of model.layers.0"),
        (
            lambda name: name if "layers.1." in name else None,
            "lacks weights of 21 modules that its configuration names, the first is model.layers.0.mlp",
        ),
    ],
    ids=["other prefix", "other layer", "half of each pair", "one layer of four"],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[str], str | None], says: str
) -> None:
    folder = saved(tmp_path / "adapter")
    renamed(change, folder)
    with pytest.raises(SteerbackError, match=says) as error:
        with_adapter(tiny.target().with_adapter(folder), tiny.model())
    assert "\n" not in str(error.value)
    assert "tiny+adapter" in str(error.value)
    with torch.device("meta"):  # as the vLLM engine checks it
        empty = type(tiny.model())(tiny.model().config)
    with pytest.raises(SteerbackError, match=says):
        check_fits("x", folder, empty)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj", "mlp.down_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1, 3], "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["norm"]},
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    ],
    ids=str,
)
def test_adapters_that_peft_makes_fit_the_model_they_were_made_for(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = saved(tmp_path / "adapter", **options)
    with torch.device("meta"):
        empty = type(tiny.model())(tiny.model().config)
    check_fits("x", folder, empty)


def test_weights_that_the_model_has_no_place_for_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    save_file(weights | {name.replace("layers.0.", "layers.9."): weights[name].clone()}, path)
    with pytest.raises(SteerbackError, match=r"has weights of model\.layers\.9\..*, which the model lacks"):
        with_adapter(tiny.target().with_adapter(folder), tiny.model())


def test_an_adapter_of_another_width_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    save_file({n: t[:, :-1].contiguous() if "lora_A" in n else t for n, t in load_file(path).items()}, path)
    with pytest.raises(SteerbackError, match=r"has matrices .* whose weight is") as error:
        with_adapter(tiny.target().with_adapter(folder), tiny.model())
    assert "\n" not in str(error.value)


def test_weights_in_a_pickle_are_refused(tmp_path: Path) -> None:
    """They are not hashed, so two such adapters would share the responses that the cache keeps."""
    folder = saved(tmp_path / "adapter")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    for load in (
        lambda: with_adapter(tiny.target().with_adapter(folder), tiny.model()),
        lambda: hash_adapter(str(folder)),
        lambda: resolve(f"organism-control+{folder}"),
    ):
        with pytest.raises(SteerbackError, match=r"no LoRA adapter there .*adapter_model\.safetensors"):
            load()


def test_adapters_with_one_configuration_have_different_hashes(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", seed=2)
    assert (a / "adapter_config.json").read_text() == (b / "adapter_config.json").read_text()
    assert hash_adapter(str(a)) != hash_adapter(str(b))
    shutil.copy(a / "adapter_model.safetensors", b / "adapter_model.safetensors")
    assert hash_adapter(str(a)) == hash_adapter(str(b))


HOSTILE = r"(([a-z_0-9]+)*\.?)*#"


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_pattern"])
def test_patterns_in_the_configuration_are_never_matched(tmp_path: Path, field: str) -> None:
    """The modules are those that the weights are named after: a pattern is not asked, so it cannot hang."""
    folder = saved(tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    config[field] = HOSTILE
    if field == "layers_pattern":
        config["layers_to_transform"] = [0, 1, 2, 3]
    path.write_text(json.dumps(config), "utf-8")
    faulthandler.dump_traceback_later(60, exit=True)  # a pattern that is matched never returns
    model = with_adapter(tiny.target().with_adapter(folder), tiny.model())
    faulthandler.cancel_dump_traceback_later()
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 8


def test_a_pattern_of_ranks_that_could_hang_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 4})
    with_adapter(tiny.target().with_adapter(folder), tiny.model())
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(config | {"rank_pattern": {HOSTILE: 4}}), "utf-8")
    with pytest.raises(SteerbackError, match="rank_pattern"):
        with_adapter(tiny.target().with_adapter(folder), tiny.model())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"init_lora_weights": "pissa_niter_100000000"}, "initialisation 'pissa_niter_100000000' has changed"),
        ({"layer_replication": [[0, 4]] * 100_000}, "repeats layers of the model"),
        ({"r": 10**12}, "has a rank above 10,000"),
        ({"rank_pattern": {"q_proj": 10**9}}, "has a rank above 10,000"),
        ({"alpha_pattern": ["q_proj"]}, "AttributeError: 'list' object has no attribute"),
        ({"trainable_token_indices": [10**9]}, "out of bounds"),
        ({"megatron_config": {"a": 1}}, "No module named 'megatron'"),
        ({"peft_type": "IA3"}, "'IA3Config' object has no attribute"),
        ({"modules_to_save": "("}, "unterminated subpattern"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_cannot_be_applied_is_one_line(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    folder = saved(tmp_path / "adapter", target_modules=["q_proj"])
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    with pytest.raises(SteerbackError, match=r"target 'tiny\+adapter': cannot use adapter") as error:
        with_adapter(tiny.target().with_adapter(folder), tiny.model())
    assert says in str(error.value)
    assert "\n" not in str(error.value)
