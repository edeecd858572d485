"""A target that lives on a hub, run in a process of its own against a local server that speaks the hub's protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sae_files
import tiny
from hub_server import COMMIT, Site, serve
from steerback.cli import main
from steerback.targets.sae import TENSORS

MODEL, SAE = "owner/model", "owner/sae"
TARGETS = f"""
[far]
model = "{MODEL}"
sae = {{ format = "goodfire", location = "{SAE}", file = "sae.pt", revision = "{COMMIT}" }}
sae_layer = 2
n_latents = 64
boost_prior = [6, 3, 0, 30]
"""
READ = (
    "import json; from steerback.targets import resolve; from steerback.api import load_target\n"
    "with load_target(resolve('far'), 'transformers') as loaded:\n"
    "    done = loaded.generate('the cat', latent=5, boost=4.0, max_new_tokens=4)\n"
    "    print(json.dumps({'steered': done.receipt.positions, **loaded.engine.describe()}))"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("hub")
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    weights = {name: getattr(tiny.sae("relu"), name) for name in TENSORS}
    sae_files.goodfire(folder / "sae.pt", weights, torch.float32)
    return {
        MODEL: {p.name: p.read_bytes() for p in (folder / "model").iterdir()},
        SAE: {"sae.pt": (folder / "sae.pt").read_bytes()},
    }


@pytest.fixture
def hub(files: dict[str, dict[str, bytes]]) -> Iterator[Site]:
    site = Site()
    for repo, contents in files.items():
        for name, data in contents.items():
            site.put(repo, name, data)
    with serve(site) as running:
        yield running


def python(code: str, hub: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    home.mkdir(exist_ok=True)
    (home / "targets.toml").write_text(TARGETS)
    places = {"HF_ENDPOINT": hub, "HF_HOME": str(home / "hf"), "STEERBACK_TARGETS": str(home / "targets.toml")}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "STEERBACK", "TRANSFORMERS"))}
    variables = clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)} | places | environment
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)


def test_model_and_sae_come_from_the_hub_once(hub: Site, tmp_path: Path) -> None:
    first = python(READ, hub.url, tmp_path)
    assert first.returncode == 0, first.stderr
    facts = json.loads(first.stdout)
    assert facts["steered"] > 0
    assert facts["commit"] == COMMIT
    assert facts["revision"] is None
    assert facts["sae"] == tiny.sae("relu").hash
    assert facts["sae_source"]["commit"] == COMMIT
    assert len(facts["sae_source"]["sha256"]) == len(facts["tokenizer"]) == 64
    assert {"model.safetensors", "tokenizer.json"} <= set(facts["files"])
    bodies = len(hub.requests("GET"))
    offline = python(READ, "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert json.loads(offline.stdout)["commit"] == COMMIT
    assert len(hub.requests("GET")) == bodies


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a token and with an empty cache; the folder holds the file of targets."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "targets.toml").write_text(TARGETS)
    return tmp_path


def test_what_is_missing_is_one_line_before_any_weight_is_fetched(
    hub: Site, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> str:
        words = ["try", "far", "the cat", "--latent", "5", "--boost", "4", "--targets", str(here / "targets.toml")]
        with pytest.raises(SystemExit) as done:
            main(words)
        assert done.value.code == 2
        line = capsys.readouterr().err.strip()
        assert "\n" not in line
        return line

    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    usage = shutil.disk_usage(here)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert f"target 'far': the rest of {MODEL} needs" in said()
    hub.gated = {path for path in hub.files if path.startswith(f"/{MODEL}/")}
    wanted = f"steerback: error: {MODEL}: gated; accept its terms at {hub.url}/{MODEL} and set HF_TOKEN to a token"
    assert said().startswith(wanted)
    monkeypatch.setenv("HF_TOKEN", "bad")
    assert "the token in HF_TOKEN may not read it" in said()
    assert not [path for method, path, _ in hub.seen if method == "GET" and path.endswith((".safetensors", ".pt"))]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert f"{MODEL}: config.json is not in the cache and http://127.0.0.1:9 cannot be reached" in said()
    (here / "targets.toml").write_text(TARGETS.replace(MODEL, "owner/none"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    assert "owner/none: no such repository" in said()
