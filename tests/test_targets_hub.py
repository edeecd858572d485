"""A target on a model hub, read from a local server with the hub's protocol."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sae_files
import tiny
from hub_server import COMMIT, Site, serve
from steerback.api import load_target
from steerback.cli import main
from steerback.engines.base import EngineRecord
from steerback.targets import resolve
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


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a token and with an empty cache; the folder holds the file of targets."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "targets.toml").write_text(TARGETS)
    return tmp_path


def read() -> EngineRecord:
    """Load the target, steer one response, and return the engine's record."""
    with load_target(resolve("far"), "transformers") as loaded:
        done = loaded.generate("the cat", latent=5, boost=4.0, max_new_tokens=4)
        assert done.receipt.positions > 0
        return loaded.engine.describe()


def test_model_and_sae_come_from_the_hub_once(hub: Site, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, hf_api
    from transformers.utils import hub as hub_of_transformers

    for place, name in ((hf_api.api, "endpoint"), (constants, "ENDPOINT")):  # read when the library was imported
        monkeypatch.setattr(place, name, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hub_of_transformers, "_hf_api", None)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("STEERBACK_TARGETS", str(here / "targets.toml"))
    facts: Any = read()
    assert facts["commit"] == COMMIT
    assert facts["revision"] is None
    assert facts["sae"] == tiny.sae("relu").hash
    assert facts["sae_source"]["commit"] == COMMIT
    assert len(facts["sae_source"]["sha256"]) == len(facts["tokenizer"]) == 64
    assert {"model.safetensors", "tokenizer.json"} <= set(facts["files"])
    bodies = len(hub.requests("GET"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read() == facts
    assert len(hub.requests("GET")) == bodies


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
