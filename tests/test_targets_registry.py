"""Registry of targets against its sources, user files, `steerback targets`, memory checks, stored definitions."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

import tiny
from steerback.api import load_target
from steerback.cli import main
from steerback.config import build_config
from steerback.errors import SteerbackError
from steerback.jobs.check import check
from steerback.targets import BoostPrior, SaeSource, Target, builtin_targets, fit, list_targets, read_targets, resolve
from steerback.targets.fit import Machine, check_ready, verdict
from steerback.targets.registry import REGISTRY
from steerback.targets.sae import save_native

# model, SAE's layer, depth in percent: the specification's table of models and SAEs
SPECIFIED = {
    "llama-3.3-70b": ("meta-llama/Llama-3.3-70B-Instruct", 50, 62.5),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", 19, 59.4),
    "gemma-2-27b": ("google/gemma-2-27b-it", 22, 47.8),
    "gemma-2-9b": ("google/gemma-2-9b-it", 25, 59.5),
    "gemma-2-2b": ("google/gemma-2-2b-it", 16, 61.5),
}
PRIORS = {
    "llama-3.3-70b": (7, 5, 0, 100),
    "llama-3.1-8b": (10, 10, 0, 50),
    "gemma-2-2b": (150, 75, 0, 300),
    "gemma-2-9b": (280, 280, 0, 560),
    "gemma-2-27b": (1500, 1500, 0, 5000),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small target on disk, its SAE apart from its model."""
    path = tmp_path_factory.mktemp("own")
    tiny.model().save_pretrained(path / "model")
    tiny.tokenizer().save_pretrained(path / "model")
    save_native(tiny.sae(), path / "sae")
    (path / "sae" / "labels.csv").write_text("index,label\n3,cats\n5,boiling water\n")
    (path / "targets.toml").write_text(OWN)
    return path


OWN = """
["little.1"]
model = "model"
sae = { location = "sae" }
labels = "sae"
boost_prior = { mean = 6, sd = 3, low = 0, high = 30 }
provenance = { boost_prior = "measured: by hand" }

["little.1".variants.early]
steer_layer = 1
clamp_layer = 0
"""


def test_the_papers_models_have_the_specified_layers() -> None:
    for name, (model, layer, depth) in SPECIFIED.items():
        target = resolve(name)
        assert (target.model, target.sae_layer) == (model, layer)
        assert target.steer_layer == target.read_layer == layer
        assert target.n_layers is not None
        assert round(100 * layer / target.n_layers, 1) == depth
        assert target.boost_prior == BoostPrior(*PRIORS[name])
        assert target.prompt_format == "chat"


def test_the_authors_variants_differ_where_the_authors_did() -> None:
    big, small, nine = (resolve(f"{name}@authors") for name in ("llama-3.3-70b", "llama-3.1-8b", "gemma-2-9b"))
    assert (big.steer_layer, big.clamp_layer, big.read_layer, big.sae_layer) == (33, 33, 50, 50)
    assert (small.steer_layer, small.clamp_layer, small.read_layer, small.sae_layer) == (12, 12, 19, 19)
    assert (nine.steer_layer, nine.sae_layer) == (26, 26)
    assert nine.sae is not None
    assert nine.sae.layer == 26
    assert str(nine.sae.file).startswith("layer_26/")
    assert {t.prompt_format for t in (big, small)} == {"authors"}
    assert resolve("gemma-2-2b").label_source is None
    assert resolve("gemma-2-2b@authors").label_source is not None
    for preset, names in (("authors", ["llama-3.3-70b@authors", "organism"]), ("specification", None)):
        config = build_config("esr", ("llama-3.3-70b", "organism"), preset)
        assert list(config.targets) == (names or ["llama-3.3-70b", "organism"])


def test_every_value_of_a_real_target_says_where_it_comes_from() -> None:
    kinds = {"specification", "authors", "measured", "derived", "published", "assumed", "chosen here", "deviation"}
    for name, entry in tomllib.loads(REGISTRY.read_text("utf-8")).items():
        provenance = dict(entry["provenance"])
        assert {said.split(":")[0] for said in provenance.values()} <= kinds
        if entry["model"] != "builtin":
            silent = set(entry) - {"summary", "variants", "provenance"} - set(provenance)
            assert not silent, f"{name}: {silent}"
            for variant in entry.get("variants", {}).values():
                assert not set(variant) - {"summary", "provenance"} - set(variant["provenance"]) - set(provenance)


def test_parameters_are_those_of_the_architecture() -> None:
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

    def llama(d: int, layers: int, hidden: int, heads: int) -> int:
        config = LlamaConfig(
            vocab_size=128256, hidden_size=d, num_hidden_layers=layers, intermediate_size=hidden,
            num_attention_heads=heads, num_key_value_heads=8, tie_word_embeddings=False,
        )  # fmt: skip
        with torch.device("meta"):
            return int(sum(p.numel() for p in LlamaForCausalLM(config).parameters()))

    def gemma(d: int, layers: int, hidden: int, heads: int, groups: int, head: int) -> int:
        config = Gemma2Config(
            vocab_size=256000, hidden_size=d, num_hidden_layers=layers, intermediate_size=hidden, head_dim=head,
            num_attention_heads=heads, num_key_value_heads=groups,
        )  # fmt: skip
        with torch.device("meta"):
            return int(sum(p.numel() for p in Gemma2ForCausalLM(config).parameters()))

    counted = {
        "llama-3.3-70b": llama(8192, 80, 28672, 64),
        "llama-3.1-8b": llama(4096, 32, 14336, 32),
        "gemma-2-2b": gemma(2304, 26, 9216, 8, 4, 256),
        "gemma-2-9b": gemma(3584, 42, 14336, 16, 8, 256),
        "gemma-2-27b": gemma(4608, 46, 36864, 32, 16, 128),
    }
    assert {name: resolve(name).parameters() for name in counted} == counted
    assert [resolve(name).d_model for name in counted] == [8192, 4096, 2304, 3584, 4608]


def test_a_file_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = read_targets(folder / "targets.toml")
    assert set(tables) == {"little.1", "little.1@early"}
    target, early = (resolve(name, tables) for name in tables)
    assert (target.steer_layer, target.n_latents, target.n_layers, target.d_model) == (2, 64, 4, 32)
    assert (early.steer_layer, early.clamp_layer, early.read_layer) == (1, 0, 2)
    assert target.labels() == {3: "cats", 5: "boiling water"}
    assert dict(early.provenance) == {"boost_prior": "measured: by hand"}
    monkeypatch.chdir("/")  # its paths do not depend on where one stands
    with load_target(early) as loaded:
        layers = loaded.engine.describe()["layers"]
        assert layers == {"steer": 1, "sae": 0, "read": 2}
        assert loaded.generate("the cat", latent="cats", boost=4.0, max_new_tokens=4).receipt.positions > 0
    with pytest.raises(SteerbackError, match=r"unknown target 'little'; .*choose one of: organism-s.*little.1@early"):
        resolve("little", tables)
    monkeypatch.setenv("STEERBACK_TARGETS", str(folder / "targets.toml"))
    assert resolve("little.1") == target
    assert [t.name for t in list_targets()][-2:] == ["little.1", "little.1@early"]


def test_a_target_may_be_an_object(folder: Path) -> None:
    target = Target(
        name="mine",
        model=str(folder / "model"),
        steer_layer=1,
        read_layer=2,
        boost_prior=BoostPrior(6, 3, 0, 30),
        sae=SaeSource(str(folder / "sae")),
        n_latents=64,
    )
    with load_target(target) as loaded:
        assert loaded.generate("the cat", latent=5, boost=4.0, max_new_tokens=4).receipt.positions > 0
        facts = loaded.engine.describe()
    assert facts["commit"] is None
    assert len(str(facts["tokenizer"])) == 64
    norms = facts["decoder_norms"]
    assert isinstance(norms, dict)
    assert norms["max"] == pytest.approx(float(tiny.sae().W_dec.norm(dim=1).max()))
    assert json.dumps(facts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("['../../../x']\nmodel = 'x'", r"target name '\.\./\.\./\.\./x' is invalid"),
        ("['.']\nmodel = 'x'", "target name '.' is invalid"),
        (f"[{'n' * 300}]\nmodel = 'x'", "at most 100 letters"),
        ("[a]\nmodel = 'builtin'", "'builtin' is for organism-s, organism"),
        ("[a]\nmodel = 'x'\nresponses_per_second = 0", "responses_per_second: .*greater than 0, not 0"),
        ("[a]\nmodel = 'x'\nsteer_layer = -2", "steer_layer: .*greater than or equal to 0, not -2"),
        ("[a]\nmodel = 'x'\ndtype = 'fp8'", "dtype: Input should be 'float32' or 'bfloat16', not 'fp8'"),
        ("[a]\nmodel = 'x'\nboost_prior = [1, 0, 0, 2]", "targets.toml: target 'a': boost_prior: .*must have sd > 0"),
        ("[a]\nmodel = 'x'\nboost_prior = [nan, 1, 0, 2]", "should be {mean, sd, low, high}"),
        ("[a]\nmodel = 'x'\nn_layers = 4\nsteer_layer = 99999", r"steer_layer 99999 is outside 0\.\.3"),
        ("[a", "file of targets .*targets.toml"),
        ("a = 1", "'a' is not a table; write each target as a table"),
        ("[a]\nsummary = 'x'", "target 'a' has no model"),
        ("[llama-3.3]\nmodel = 'x'", r'a name with a dot must be quoted, \["llama-3.3"\]'),
        ("[organism]\nmodel = 'x'", "'organism' is a built-in target; choose another name, or remove `model`"),
        (
            "[a]\nmodel = 'x'\nstear_layer = 1\nboost_prior = [1, 1, 0, 2]",
            "target 'a': unknown setting 'stear_layer'; did you mean steer_layer",
        ),
        (
            "[a]\nmodel = 'x'\nsae = {location = 'y', fmt = 'z'}",
            "unknown setting 'sae.fmt'; .*choose one of: dtype, file",
        ),
        ("[a]\nmodel = 'x'\nsae = {format = 'z'}", "sae.location: Field required"),
        ("[a]\nmodel = 'x'\nboost_prior = 3", "boost_prior: 3 should be"),
        ("[a]\nmodel = 'x'\nboost_prior = 'many'", "boost_prior: 'many' should be"),
        ("[a]\nmodel = 3", "targets.toml: target 'a': model: .*string, not 3"),
        ("[a]\nmodel = 'x'\nsteer_layer = 'x'", "targets.toml: target 'a': steer_layer: .*integer, not 'x'"),
        ("[a]\nmodel = 'x'\nlabels = [1]", "targets.toml: target 'a': labels: .*string"),
        (
            "[a]\nmodel = 'x'\ndirections = 3",
            "targets.toml: target 'a': directions: 3 should be a string, a list of strings",
        ),
        ("[a]\nmodel = 'x'\nprovenance = 3", "targets.toml: target 'a': provenance: .*dictionary, not 3"),
        ("[a]\nmodel = 'x'\nsae = 3", "targets.toml: target 'a': sae: .*dictionary"),
        ("[a]\nmodel = 'x'\nsae = {location = 3}", "targets.toml: target 'a': sae.location: .*string, not 3"),
        ("[a]\nmodel = 'x'\nvariants = 7", "targets.toml: target 'a': variants must be tables"),
        ("[a]\nmodel = 'x'\nvariants = {b = 7}", "targets.toml: target 'a': variants must be tables"),
        ("[a]\nmodel = 'x'\n[a.variants.b]\nmodel = 3", "targets.toml: target 'a@b': model: .*string, not 3"),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "targets.toml").write_text(text)
    with pytest.raises(SteerbackError, match=message) as caught:
        read_targets(tmp_path / "targets.toml")
    assert "\n" not in str(caught.value)


def test_a_foreign_format_needs_layer_and_size(tmp_path: Path) -> None:
    entry = {"model": "a/b", "boost_prior": [1, 1, 0, 2], "sae": {"location": "a/c", "format": "saelens"}}
    with pytest.raises(SteerbackError, match="with an SAE of format 'saelens', the table must set sae_layer"):
        resolve("x", {"x": entry})
    with pytest.raises(SteerbackError, match="the table must set n_latents"):
        resolve("x", {"x": entry | {"sae_layer": 3}})
    with pytest.raises(SteerbackError, match=r"file of targets .* does not exist"):
        read_targets(tmp_path / "absent.toml")


def test_a_place_longer_than_a_file_name_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(OWN.replace('"sae" }', f'"{"x" * 300}" }}'))
    with pytest.raises(SteerbackError, match="cannot be a path or a name: File name too long"):
        read_targets(file)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("steer_layer = 99999", "steer_layer 99999 is outside 0..3, the layers of its model"),
        ("n_latents = 65", "n_latents is 65, its SAE has 64; correct it"),
        ("d_model = 31", "d_model is 31, its SAE has 32; correct it"),
    ],
)
def test_a_number_that_does_not_fit_the_files_is_refused_by_a_dry_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, reason: str
) -> None:
    (folder / "deep.toml").write_text(OWN.replace("steer_layer = 1", line))
    monkeypatch.chdir(folder)
    words = ["run", "esr", "-t", "little.1@early", "--judge", "offline", "--dry-run", "--targets", "deep.toml"]
    with pytest.raises(SystemExit) as done:
        main(words)
    said = capsys.readouterr().err.strip()
    assert (done.value.code, said.count("\n")) == (2, 0)
    assert f"target 'little.1@early': {reason}" in said
    assert not (folder / "runs").exists()


def test_a_run_keeps_its_targets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERBACK_TARGETS", str(folder / "targets.toml"))
    job = check(build_config("esr", ("little.1@early", "organism"), overrides={"judge": "offline"}))
    assert set(job.config.definitions) == {"little.1@early"}
    monkeypatch.delenv("STEERBACK_TARGETS")
    stored = type(job.config).model_validate(json.loads(job.config.model_dump_json()))
    again = check(stored)  # what `resume` does
    assert again.targets == job.targets
    assert again.config == job.config


def test_the_option_may_stand_anywhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(folder / "targets.toml")
    for words in (["targets", "--targets", file], ["--targets", file, "targets"], ["targets", f"--targets={file}"]):
        with pytest.raises(SystemExit) as done:
            main(words)
        assert done.value.code == 0
        said = capsys.readouterr().out
        assert "little.1@early" in said
        assert "N(6, 3) on [0, 30]" in said
    with pytest.raises(SystemExit):
        main(["targets", "show", "little.1"])  # and is forgotten afterwards
    assert "unknown target 'little.1'" in capsys.readouterr().err
    for before, after in ((["labels"], ["show", "little.1"]), (["targets", "show"], ["little.1"])):
        for words in ([*before, "--targets", file, *after], [*before, *after, "--targets", file]):
            with pytest.raises(SystemExit) as done:
                main(words)
            assert done.value.code == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("sae", "layer", "words"),
    [
        ("location = 'sae', format = 'gooseberry'", 2, "unknown SAE format 'gooseberry'"),
        ("location = 'sae'", 1, "an SAE of layer 2, but the target's sae_layer is 1"),
    ],
)
def test_show_checks_the_sae_as_loading_does(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sae: str,
    layer: int,
    words: str,
) -> None:
    file = folder / "wrong.toml"
    values = f"sae_layer = {layer}\nn_latents = 64\nboost_prior = [6, 3, 0, 30]"
    file.write_text(f"[wrong]\nmodel = 'model'\nsae = {{ {sae} }}\n{values}\n")
    monkeypatch.setenv("STEERBACK_TARGETS", str(file))
    with pytest.raises(SystemExit) as done:
        main(["targets", "show", "wrong"])
    assert done.value.code == 2
    assert words in capsys.readouterr().err


def test_targets_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        with pytest.raises(SystemExit) as done:
            main(list(words))
        assert done.value.code == 0
        return capsys.readouterr().out

    listed = said("targets")
    assert all(target.name in listed for target in builtin_targets())
    row = next(line for line in listed.splitlines() if line.startswith("llama-3.3-70b "))
    assert row.split() == ["llama-3.3-70b", "65536", "to", "be", "fetched", "N(7,", "5)", "on", "[0,", "100]"]
    assert "Not shown here: SAE; steer; bf16; read; model; fp8; depth." in " ".join(listed.split())
    shown = said("targets", "show", "llama-3.3-70b@authors")
    line = next(line for line in shown.splitlines() if line.startswith("steer_layer"))
    assert line.split(maxsplit=2) == ["steer_layer", "33", "authors: their code and fork"]
    assert "this machine: " in said("targets", "--fit")


H100 = ("H100", 85_000_000_000)


@pytest.mark.parametrize(
    ("name", "machine", "expected"),
    [
        (
            "llama-3.3-70b",
            Machine((H100, H100), 10**12, 10**12),
            "yes: bfloat16 on 2 GPUs with vLLM (--set engine_options.tensor_parallel=2)",
        ),
        ("llama-3.3-70b", Machine((H100,), 10**11, 10**12), "yes: fp8 on one GPU with vLLM (--set"),
        ("llama-3.3-70b", Machine((), 10**12, 10**12), "yes: bfloat16 in memory, on the CPU"),
        ("gemma-2-27b", Machine((H100,), 10**11, 10**12), "yes: bfloat16 on one GPU"),
        ("gemma-2-9b", Machine((("small", 8 * 10**9),), 10**10, 10**9), "no: fp8 needs 11.2 GB of GPU memory"),
        ("gemma-2-2b", Machine((H100,), 10**11, 10**9), "yes: bfloat16 on one GPU but 5.5 GB of disk needed"),
        ("organism", Machine((), 10**9, 0), "yes: float32 in memory, on the CPU"),
    ],
)
def test_what_fits(name: str, machine: Machine, expected: str) -> None:
    assert verdict(resolve(name), machine).startswith(expected)


def test_too_little_memory_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from steerback.engines import loading

    monkeypatch.setattr(loading, "available_memory", lambda: 10**10)
    with pytest.raises(SteerbackError) as caught:
        load_target("llama-3.3-70b", engine="transformers", device="cpu")
    assert str(caught.value) == (
        "target 'llama-3.3-70b' needs about 149.7 GB of memory as bfloat16, but 10.0 GB are free; "
        "steerback targets --fit lists the targets that fit this machine"
    )
    with pytest.raises(SteerbackError, match=r"75\.6 GB of GPU memory as fp8, but 24\.0 GB are free"):
        check_ready(resolve("llama-3.3-70b"), "GPU memory", 24 * 10**9, "fp8")


def test_the_driver_is_asked_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA A10, 23028'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert fit.gpus() == (("NVIDIA H100 80GB HBM3", 81559 << 20), ("NVIDIA A10", 23028 << 20))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert fit.gpus() == (("NVIDIA A10", 23028 << 20),)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert fit.gpus() == ()
