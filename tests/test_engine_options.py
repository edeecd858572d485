"""Options of each engine: validation in one line, and the fingerprint that decides about resuming a run."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

import tiny
from steerback.api import load_target
from steerback.engines import check_engine, make_engine
from steerback.engines.loading import load
from steerback.engines.options import RayOptions, ScriptedOptions, TransformersOptions, VllmOptions, parse_options
from steerback.engines.scripted import PlantedModel, ScriptedEngine
from steerback.engines.transformers import TransformersEngine
from steerback.errors import SteerbackError
from steerback.records import Request
from steerback.targets.sae import save_native


def test_options_of_a_run_become_typed_and_keep_their_defaults() -> None:
    assert parse_options("transformers", {"device": None}, 8) == TransformersOptions(batch_size=8)
    assert parse_options("transformers", {"batch_size": 4}, 8) == TransformersOptions(batch_size=4)
    asked = parse_options("vllm", {"layers": [3, 5], "options": {"quantization": "fp8", "seed": 1}, "replicas": 2})
    assert asked == VllmOptions(layers=(3, 5), options={"quantization": "fp8", "seed": 1}, replicas=2)
    assert isinstance(asked, VllmOptions)
    assert (asked.tensor_parallel, asked.columns, asked.record_latents, asked.poolers) == (1, 128, 32, 128)
    assert parse_options("scripted", {}, 16) == ScriptedOptions(batch_size=16)


def test_workers_of_a_cluster_may_share_a_gpu() -> None:
    half = parse_options("ray", {"engine": "vllm", "gpus_per_worker": 0.5, "options": {"columns": 8}})
    assert isinstance(half, RayOptions)
    assert half.gpus == 0.5
    assert half.inner == VllmOptions(columns=8, options={"gpu_memory_utilization": 0.45})
    with pytest.raises(SteerbackError, match=r"gpus_per_worker.*whole number, or a fraction below 1"):
        parse_options("ray", {"engine": "vllm", "gpus_per_worker": 1.5})


@pytest.mark.parametrize(
    ("engine", "options", "words"),
    [
        ("transformers", {"foo": 1}, "unknown setting 'foo'; choose one of: batch_size, device, workers"),
        ("transformers", {"batch_size": 0}, "batch_size: Input should be greater than or equal to 1"),
        ("transformers", {"batch_size": -1}, "batch_size: Input should be greater than or equal to 1"),
        ("transformers", {"workers": "many"}, "workers: Input should be a valid integer"),
        ("transformers", {"device": 3}, "device: Input should be a valid string"),
        ("vllm", {"batchsize": 3}, "unknown setting 'batchsize'; did you mean batch_size?"),
        ("vllm", {"columns": -1}, "columns: Input should be greater than or equal to 0"),
        ("vllm", {"layers": "all"}, "layers: Input should be a valid tuple"),
        ("vllm", {"options": {"speculative_config": {}}}, "options: speculative_config is refused"),
        ("scripted", {"script": "model"}, "script: Input should be callable"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_engine_and_field(
    engine: str, options: dict[str, object], words: str
) -> None:
    with pytest.raises(SteerbackError) as caught:
        parse_options(engine, options)
    assert str(caught.value).startswith(f"engine_options of {engine!r}: {words}")
    assert "\n" not in str(caught.value)


def test_a_script_of_the_users_own_reaches_the_engine() -> None:
    engine = make_engine(tiny.target(), check_engine("scripted", {"script": lambda request: f"said {request.seed}"}))
    assert tiny.collect(engine, [Request("a", "p", 3)])["a"].text == "said 3"


def hashed(record: object) -> str:
    """SHA-256 of JSON with sorted keys and no spaces, written out here so that `digest` cannot drift unnoticed."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def test_record_and_fingerprint_of_the_transformers_engine_stay_those_of_stored_runs() -> None:
    """A key that is renamed or added would leave every run unable to resume, and every cached response unused."""
    engine = tiny.engine(rows=4)
    record = {
        "engine": "transformers",
        "arithmetic": "1",
        "steerback": "0.1.0",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": f"cpu {torch.backends.cpu.get_cpu_capability()}",
        "threads": 1,
        "dtype": "float32",
        "batch": {"rows": 4, "prefill_rows": 8, "page": 64},
        "workers": 1,
        "halved_on_out_of_memory": [],
        "layers": {"steer": 2, "sae": 2, "read": 2},
        "prompt_format": "chat",
        "sae": "349d72f3ed311d6c1ca9bb2a103c44d1e0b37560094a804e54de770dcbcec62b",
        "directions": {},
        "target": "tiny",
    }
    assert engine.describe() == record
    del record["workers"], record["halved_on_out_of_memory"]
    assert engine.fingerprint == hashed(record)


def test_provenance_of_a_loaded_target_is_in_its_record() -> None:
    with load_target("organism-s", "transformers") as loaded:
        record = dict(loaded.engine.describe())
    assert record["files"]["model.safetensors"]  # type: ignore[index]
    keys = {"model", "revision", "commit", "files", "tokenizer", "sae_source", "decoder_norms"}
    assert keys <= record.keys()
    assert json.loads(json.dumps(record)) == record


def test_fingerprints_of_the_scripted_engine_stay_those_of_stored_runs() -> None:
    wanted = (
        (None, "bc0357051858ed25915c501685f18f7753468ebe3c91aa51aa60efeaacc54d14"),
        (PlantedModel(thresholds={3: 4.0}), "5053827693a6427417c4ce5be6484302c33ed31556ccfead19a4d52cc163020c"),
        (str, "2f61c3cf2e64345be39c507ed60ed13c501cfb6cf755ebbd34418108094ee3a4"),
    )
    for script, fingerprint in wanted:
        assert ScriptedEngine(script, target="t", n_latents=7).fingerprint == fingerprint


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A model whose classes are in a Python file of its own folder, which leaves a mark where it is run."""
    tiny.model().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    save_native(tiny.sae(), tmp_path, boost_prior=[5, 5, 0, 20])
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import LlamaConfig\nclass C(LlamaConfig): pass\n"
    (tmp_path / "mine.py").write_text(code, "utf-8")
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.C"}}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    return tmp_path


def test_code_in_a_models_folder_is_never_run_nor_asked_about(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(_: object = "") -> str:
        raise AssertionError("a question waits for an answer")

    monkeypatch.setattr("builtins.input", asked)
    with pytest.raises(
        SteerbackError, match="needs Python code from the model's folder, which steerback never runs"
    ) as caught:
        load_target(str(foreign), "transformers")
    assert "\n" not in str(caught.value)
    assert not (foreign / "ran").exists()


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(SteerbackError, match=r"unknown device 'tpu';.* choose one of: "):
        load(tiny.target(), "tpu")


def test_batch_size_of_the_options_is_the_engines() -> None:
    engine = make_engine(load_target("organism-s", "scripted").target, TransformersOptions(batch_size=3, workers=1))
    assert isinstance(engine, TransformersEngine)
    assert (engine.shape.rows, engine.workers) == (3, 1)
    engine.close()


def test_what_an_engine_and_its_processes_print_goes_into_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from steerback.engines.vllm.loading import output_to

    log = tmp_path / "engine.log"
    print("before")
    with pytest.raises(RuntimeError), output_to(log):
        subprocess.run(["sh", "-c", "echo worker; echo noise >&2"], check=True)
        raise RuntimeError
    print("after", flush=True)
    assert sorted(log.read_text().split()) == ["noise", "worker"]
    assert capfd.readouterr() == ("before\nafter\n", "")
