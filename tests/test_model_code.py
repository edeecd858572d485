"""Code in a model's folder never runs, there is no prompt to run it, and the error is one line."""

from __future__ import annotations

import ast
import io
import json
import re
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import steerback
import tiny
from steerback.api import load_target
from steerback.cli import main
from steerback.errors import SteerbackError
from steerback.targets import from_folder
from steerback.targets.fit import check_weights
from steerback.targets.sae import save_native

BOMB = """
from pathlib import Path
Path({mark!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""

READS_FOLDERS = re.compile(r"^(Auto|Generation|Peft|SAE)\w*\.from_\w+$|\.from_pretrained$|^\w*EngineArgs$")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "little"
    tiny.model().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    save_native(tiny.sae(), path, boost_prior=[6, 3, 0, 30])
    return path


def put_code(folder: Path, part: str) -> Path:
    """Let a folder's model or tokenizer need code of its own, which would make the file that is returned."""
    mark = folder.parent / "code-ran"
    (folder / "own.py").write_text(BOMB.format(mark=str(mark)))
    name = "config.json" if part == "model" else "tokenizer_config.json"
    config = json.loads((folder / name).read_text())
    if part == "model":
        config |= {"model_type": "own", "architectures": ["OwnModel"]}
        config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    else:
        config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / name).write_text(json.dumps(config))
    return mark


@pytest.mark.parametrize("part", ["model", "tokenizer"])
@pytest.mark.parametrize("verb", ["try", "finetune"])
def test_code_in_a_models_folder_is_refused_without_a_question(
    folder: Path, part: str, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = put_code(folder, part)
    row = {"segments": [{"label": True, "text": "the cat"}]}
    (folder.parent / "train.jsonl").write_text("\n".join([json.dumps(row)] * 4))
    words = {
        "try": ["try", str(folder), "the cat", "--latent", "5", "--boost", "4"],
        "finetune": ["finetune", "train", "train.jsonl", "-t", str(folder), "--out", "adapters"],
    }[verb]
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\ny\n"))
    with pytest.raises(SystemExit) as ended:
        main(words)
    out, err = capsys.readouterr()
    assert not mark.exists()
    assert ended.value.code == 2, err
    said = err.strip().splitlines()[-1]  # the library may have warned about the architecture before
    assert said.startswith("steerback: error: ")
    assert "needs Python code from the model's folder, which steerback never runs" in said
    assert "[y/N]" not in out
    assert sys.stdin.read().startswith("y\ny\ny\n")  # nothing was asked


def test_a_model_with_more_layers_than_its_config_says_is_refused(folder: Path) -> None:
    check_weights(from_folder(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(SteerbackError, match="says 3 layers, but its weights have 4") as caught:
        check_weights(from_folder(folder))
    assert "\n" not in str(caught.value)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10_000_000}))
    with pytest.raises(SteerbackError, match="says 10000000 layers, but its weights have 4"):
        load_target(str(folder))  # it would build ten million layers first
    weights = load_file(folder / "model.safetensors")
    other = {name.replace("model.layers", "vision_tower.vision_model.layers"): w for name, w in weights.items()}
    save_file(other, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    check_weights(from_folder(folder))  # the layers of a vision tower are others


def test_every_call_that_loads_from_a_models_folder_refuses_its_code() -> None:
    """Includes engines that these tests do not start. A name that is spread comes from `hub_arguments`."""
    without_code = ("PeftConfig.", "SAE.")  # these read JSON and safetensors, and have no such argument
    calls = {}
    for path in sorted(Path(steerback.__file__).parent.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and READS_FOLDERS.search(ast.unparse(call.func)):
                calls[f"{path.name}:{call.lineno}"] = ast.unparse(call)
    for where, call in calls.items():
        refuses = re.search(r"trust_remote_code=False|\*\*(origin|hub_arguments\(target\))\W", call)
        assert refuses or call.startswith(without_code), f"{where}: {call}"
    assert len(calls) >= 11
