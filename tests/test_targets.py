"""Targets from the registry and from folders, labels and liveness, and messages about missing parts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny
from steerback.api import LoadedTarget, load_target
from steerback.engines import check_engine, default_engine, make_engine
from steerback.engines.scripted import ScriptedEngine
from steerback.errors import SteerbackError
from steerback.finetuning.adapters import load_base
from steerback.records import Intervention, Request, Sampling
from steerback.targets import BoostPrior, builtin_targets, from_folder, resolve
from steerback.targets.sae import save_native


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete target on disk, in the layout of the built-in ones."""
    path = tmp_path_factory.mktemp("targets") / "little"
    tiny.model().half().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    save_native(tiny.sae("jumprelu"), path, boost_prior=[6, 3, 0, 30])
    (path / "labels.csv").write_text("index,label\n3,cats\n5,boiling water\n7, \n")
    (path / "latents.csv").write_text(
        "index,label,density,max_activation,kind\n3,cats,0.1,4,topic\n9,,0,0,\n11,,0.0,0,\n"
    )
    (path / "contexts.json").write_text(json.dumps({"3": ["the cat", "a cat"]}))
    return path


@pytest.fixture(scope="module")
def little(folder: Path) -> LoadedTarget:
    return load_target(str(folder))


def test_a_folder_is_a_target(folder: Path) -> None:
    target = resolve(str(folder))
    assert (target.steer_layer, target.sae_layer, target.read_layer, target.n_latents) == (2, 2, 2, 64)
    assert target.boost_prior == BoostPrior(6, 3, 0, 30)
    assert target.labels() == {3: "cats", 5: "boiling water"}
    assert target.dead_latents() == {9, 11}
    assert target.contexts() == {3: ("the cat", "a cat")}
    assert json.dumps(target.describe())
    assert from_folder(folder, steer_layer=1, dtype="bfloat16").steer_layer == 1


def test_builtin_targets_are_listed_and_unknown_names_list_the_choices() -> None:
    names = [t.name for t in builtin_targets()]
    assert names[:4] == ["organism-s", "organism", "organism-l", "organism-control"]
    assert all(t.summary for t in builtin_targets())
    with pytest.raises(
        SteerbackError, match=r"unknown target 'organsim'; did you mean organism\? choose one of: organism-s, organism"
    ):
        resolve("organsim")


def test_entries_are_checked(folder: Path) -> None:
    with pytest.raises(SteerbackError, match="target 'little': unknown setting 'stear_layer'"):
        from_folder(folder, stear_layer=1)
    with pytest.raises(SteerbackError, match="'little': dtype: Input should be 'float32' or 'bfloat16', not 'float8'"):
        from_folder(folder, dtype="float8")
    with pytest.raises(SteerbackError, match="must have sd > 0"):
        BoostPrior(1, 0, 0, 2)
    with pytest.raises(SteerbackError, match=r"steer_layer 9 is outside 0\.\.3"):
        load_target(from_folder(folder, steer_layer=9))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("latents.csv", "index,label\n1,x\n", "needs the columns index and density"),
        ("latents.csv", "index,density\n1,x\n", "density 'x' of latent 1 is not a number"),
        ("labels.csv", "index,label\none,x\n", "line 2: 'one' is not the index"),
        ("contexts.json", "[1]", "must contain an object"),
        ("contexts.json", "{", "is not valid JSON"),
        ("contexts.json", '{"3": "text"}', "expected"),
    ],
)
def test_damaged_tables_are_named(folder: Path, tmp_path: Path, name: str, text: str, message: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).unlink()
    (tmp_path / name).write_text(text)
    target = resolve(str(tmp_path))
    with pytest.raises(SteerbackError, match=message):
        (target.labels(), target.dead_latents(), target.contexts())


def test_generate_one_response(little: LoadedTarget) -> None:
    plain = little.generate("the cat", temperature=0, max_new_tokens=10)
    steered = little.generate("the cat", latent="Boiling Water", boost=8.0, temperature=0, max_new_tokens=10)
    by_index = little.generate("the cat", latent=5, boost=8.0, temperature=0, max_new_tokens=10)
    assert steered == by_index != plain
    assert steered.request.interventions == (Intervention("add", 5, 8.0),)
    assert steered.steered_as_planned
    assert plain.receipt.positions == 0
    recorded = little.generate("the cat", record=[1, 2], max_new_tokens=4)
    assert recorded.record.activations.shape == (recorded.record.prompt_tokens + len(recorded.tokens) - 1, 2)
    assert recorded.activations.shape == (2, len(recorded.tokens) - 1)
    with pytest.raises(SteerbackError, match="set latent and boost together"):
        little.generate("the cat", latent=5)
    with pytest.raises(SteerbackError, match="latent: 'dogs' is not an index, a label or a direction"):
        little.generate("the cat", latent="dogs", boost=1)
    with pytest.raises(SteerbackError, match=r"did you mean 3 \(cats\) or 5"):
        little.generate("the cat", latent="at", boost=1)


def test_several_responses_are_those_of_their_seeds(little: LoadedTarget) -> None:
    sampling = Sampling(1.0, max_new_tokens=8)
    several = little.responses(3, "hello", 2, 1.5, seed=7, sampling=sampling, record=[1])
    alone = [little.generate("hello", 2, 1.5, seed=7 + i, temperature=1.0, max_new_tokens=8) for i in range(3)]
    assert [r.record for r in several] == [r.record for r in alone]
    assert len({r.record.token_ids for r in several}) > 1
    assert all(r.activations is not None and r.receipt.positions > 0 for r in several)
    with pytest.raises(SteerbackError, match="n 0: must be at least 1"):
        little.responses(0, "hello")


def test_generate_works_inside_a_running_loop(little: LoadedTarget) -> None:
    import asyncio

    async def notebook() -> str:
        return little.generate("the cat", max_new_tokens=4).text

    assert asyncio.run(notebook()) == little.generate("the cat", max_new_tokens=4).text


def test_what_was_loaded_is_described(little: LoadedTarget, folder: Path) -> None:
    facts = little.engine.describe()
    assert json.dumps(facts)
    files = facts["files"]
    assert isinstance(files, dict)
    assert {"model.safetensors", "sae.safetensors", "tokenizer.json", "config.json"} <= set(files)
    assert str(folder) not in json.dumps(facts)
    with load_target(str(folder), batch_size=4) as other:
        assert other.engine.fingerprint != little.engine.fingerprint
    with load_target(from_folder(folder, steer_layer=1)) as other:
        assert other.engine.fingerprint != little.engine.fingerprint
    with load_target(str(folder)) as other:
        assert other.engine.fingerprint == little.engine.fingerprint


def test_missing_weights_are_one_line(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(SteerbackError, match="cannot load") as caught:
        load_target(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_attention_heads", "head_dim", "intermediate_size"])
def test_a_config_of_another_shape_is_one_line(
    folder: Path, tmp_path: Path, key: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for file in folder.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: config[key] // 2}))
    for load in (load_target, lambda name: load_base(resolve(name))):
        with pytest.raises(
            SteerbackError, match=r"weights of another shape than its config.json|d_model is 16, its SAE has 32"
        ):
            load(str(tmp_path))
    assert "".join(capfd.readouterr()) == ""


def test_a_config_without_attention_heads_says_so(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | {"num_attention_heads": 0}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "head_dim"}))
    with pytest.raises(SteerbackError, match=r"a number in config.json is 0, for example"):
        load_target(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b'\xef\xbb\xbf{"eos_token_id": 5}', "a byte-order mark"), (b'{"eos_token_id": 5', "is not valid JSON")],
)
def test_generation_settings_that_transformers_would_ignore_are_refused(
    folder: Path, tmp_path: Path, content: bytes, reason: str
) -> None:
    for other in folder.iterdir():
        if other.name != "generation_config.json":
            (tmp_path / other.name).symlink_to(other)
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(SteerbackError, match=f"generation_config.json.*{reason}"):
        load_target(str(tmp_path))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_number_of_too_many_digits_is_named(folder: Path, tmp_path: Path, file: str) -> None:
    for other in folder.iterdir():
        (tmp_path / other.name).symlink_to(other)
    (tmp_path / file).unlink()
    (tmp_path / file).write_text(f'{{"x": {"9" * 5000}, {(folder / file).read_text().partition("{")[2]}')
    with pytest.raises(SteerbackError, match=r"(cannot load|generation settings) .*: an integer has too many digits$"):
        load_target(str(tmp_path))


def test_damaged_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).symlink_to(file)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SteerbackError, match=r"lacks 1 weights .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load_target(str(tmp_path))
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SteerbackError, match="cannot load") as caught:
        load_target(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_make_engine_by_name(folder: Path) -> None:
    target = resolve(str(folder))
    assert default_engine() == "transformers"
    assert isinstance(make_engine(target, check_engine("scripted", {"batch_size": None})), ScriptedEngine)
    with pytest.raises(
        SteerbackError,
        match=r"engine_options of 'vllm': unknown setting 'batchsize'; did you mean batch_size\? choose one of: a",
    ):
        check_engine("vllm", {"batchsize": 3})
    with pytest.raises(
        SteerbackError,
        match=r"unknown engine 'vlm'; did you mean vllm\? choose one of: auto, transformers, vllm, scripted",
    ):
        check_engine("vlm", {})


def test_weights_in_half_precision_are_computed_in_float32(little: LoadedTarget) -> None:
    assert little.engine.describe()["dtype"] == "float32"
    short = Sampling(max_new_tokens=3)
    done = little.complete([Request("a", "water", 1, short), Request("b", "stone falls down every day", 2, short)])
    assert done[0].prompt_tokens < done[1].prompt_tokens


def test_targets_load_no_heavy_library() -> None:
    code = "import sys, steerback.targets as t; t.builtin_targets(); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


def test_built_in_models_say_that_their_behaviour_is_planted(folder: Path) -> None:
    planted = {target.name for target in builtin_targets() if target.planted}
    assert planted == {"organism-s", "organism", "organism-l", "organism-control"}
    assert resolve("organism").with_adapter(folder).planted
    assert not resolve(str(folder)).planted


def test_activations_are_labelled_by_latent_and_token(little: LoadedTarget) -> None:
    done = little.generate("the cat", record=["boiling water", 2], max_new_tokens=4)
    assert "".join(done.tokens) == done.text
    assert list(done.activations.index) == ["boiling water", "2"]
    assert list(done.activations.columns.get_level_values("token")) == list(done.tokens[:-1])
    raw = done.record.activations[done.record.prompt_tokens :]
    assert np.array_equal(done.activations.to_numpy(), raw.T)
    assert not np.signbit(done.activations.to_numpy()).any()
    along = little.activations("the cat", ["boiling water"])
    assert along.shape[0] == 1
    assert "".join(along.columns.get_level_values("token")) == "the cat"
    for names, message in ((["dogs"], "'dogs' is not an index, a label"), (["at"], "did you mean"), ("cats", "a list")):
        with pytest.raises(SteerbackError, match=message):
            little.activations("the cat", names)
    assert "\n" not in repr(done) + repr(little)
