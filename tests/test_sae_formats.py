"""SAE files of every format against float64 references, and errors for damaged and unknown files."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sae_files
from hub_server import COMMIT, Site, serve
from sae_files import LAYER, D, N, Reference, inputs, weights
from steerback.errors import SteerbackError
from steerback.targets import SaeSource
from steerback.targets.sae import TENSORS, Sae, save_native
from steerback.targets.sae_files import describe, load_sae

W = weights()


def same(sae: Sae, reference: Reference, h: torch.Tensor, tolerance: float = 2e-5) -> None:
    """Encode and decode of an SAE are those of a reference."""
    wanted = reference.encode(h)
    z = sae.encode(h)
    assert np.abs(z.double().numpy() - wanted).max() < tolerance
    assert ((z > 0).numpy() == (wanted > 0)).all()
    assert 0 < (wanted > 0).mean() < 1
    assert np.abs(sae.decode(z).double().numpy() - reference.decode(wanted)).max() < tolerance * 10


@pytest.mark.parametrize("zipped", [True, False])
def test_goodfire_checkpoints(tmp_path: Path, zipped: bool) -> None:
    path = sae_files.goodfire(tmp_path / "sae.pt", W, zipped=zipped)
    sae = load_sae(SaeSource(str(path), "goodfire", layer=LAYER))
    same(sae, Reference(W, "relu"), inputs())
    assert (sae.kind, sae.layer, sae.n_latents, sae.d_model) == ("relu", LAYER, N, D)
    assert load_sae(SaeSource(str(tmp_path), "goodfire", layer=LAYER)).hash == sae.hash


def test_gemma_scope_archives(tmp_path: Path) -> None:
    sae_files.gemma_scope(tmp_path / "layer_3" / "width_20" / "average_l0_5", W)
    for file in ("layer_3/width_20/average_l0_5/params.npz", "layer_3/width_20/average_l0_5"):
        sae = load_sae(SaeSource(str(tmp_path), "gemma-scope", file, layer=LAYER))
        same(sae, Reference(W, "jumprelu"), inputs())


def test_gemma_scope_2_files(tmp_path: Path) -> None:
    folder = sae_files.gemma_scope_2(tmp_path / "resid_post", W)
    same(sae := load_sae(SaeSource(str(folder), "gemma-scope-2")), Reference(W, "jumprelu"), inputs())
    assert sae.layer == LAYER  # from its config
    (folder / "config.json").unlink()
    assert load_sae(SaeSource(str(folder), "gemma-scope-2", layer=5)).layer == 5


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
def test_saelens_folders(tmp_path: Path, architecture: str, subtract: bool) -> None:
    extra = {"k": 4} if architecture == "topk" else {}
    folder = sae_files.saelens(tmp_path, W, architecture, apply_b_dec_to_input=subtract, **extra)
    kind = {"standard": "relu"}.get(architecture, architecture)
    same(load_sae(SaeSource(str(folder), "saelens")), Reference(W, kind, subtract, k=4), inputs())


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("standard", {}),
        ("jumprelu", {}),
        ("topk", {"k": 4}),
        ("topk", {"k": 4, "rescale_acts_by_decoder_norm": True}),
    ],
)
def test_saelens_itself_agrees(tmp_path: Path, architecture: str, extra: dict[str, Any], subtract: bool) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    folder = sae_files.saelens(tmp_path, W, architecture, apply_b_dec_to_input=subtract, **extra)
    theirs, ours = sae_lens.SAE.load_from_disk(folder), load_sae(SaeSource(str(folder), "saelens"))
    with torch.no_grad():
        wanted = theirs.encode(inputs())
        assert torch.allclose(ours.encode(inputs()), wanted, atol=1e-5)
        assert ((ours.encode(inputs()) > 0) == (wanted > 0)).all()
        assert torch.allclose(ours.decode(wanted), theirs.decode(wanted), atol=1e-5)


def test_saelens_reads_the_other_files_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    monkeypatch.setattr(loaders, "hf_hub_download", lambda repo_id, filename, subfolder="", **_: tmp_path / filename)
    sae_files.goodfire(tmp_path / "Llama-3.1-8B-Instruct-SAE-l19.pth", W)
    sae_files.gemma_scope(tmp_path, W)
    for theirs, ours in (
        (
            loaders.get_goodfire_huggingface_loader(
                "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth"
            ),
            SaeSource(str(tmp_path), "goodfire", layer=LAYER),
        ),
        (
            loaders.gemma_2_sae_huggingface_loader("google/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_5"),
            SaeSource(str(tmp_path), "gemma-scope", layer=LAYER),
        ),
    ):
        config, tensors, _ = theirs
        assert not config["apply_b_dec_to_input"]
        assert all(torch.equal(getattr(load_sae(ours), name), tensors[name]) for name in TENSORS[:4])


def test_saelens_scaling_is_folded(tmp_path: Path) -> None:
    folder = sae_files.saelens(
        tmp_path / "a", W, "jumprelu", normalize_activations="expected_average_only_in", apply_b_dec_to_input=True
    )
    with pytest.raises(SteerbackError, match=r"constant that is not in the file; set it as sae = \{input_scale\}"):
        load_sae(SaeSource(str(folder), "saelens"))
    sae = load_sae(SaeSource(str(folder), "saelens", input_scale=0.37))
    same(sae, Reference(W, "jumprelu", subtract=True, scale=0.37), inputs(), 5e-5)
    folder = sae_files.saelens(tmp_path / "b", W, "topk", k=4, rescale_acts_by_decoder_norm=True)
    same(load_sae(SaeSource(str(folder), "saelens")), Reference(W, "topk", k=4, by_norm=True), inputs(), 5e-5)


def test_configs_of_older_saelens(tmp_path: Path) -> None:
    folder = sae_files.saelens(tmp_path, W, "standard")
    old = {"hook_point": "blocks.4.hook_resid_pre", "d_in": D, "d_sae": N, "activation_fn_str": "topk"}
    (folder / "cfg.json").write_text(json.dumps(old | {"activation_fn_kwargs": {"k": 4}}))
    sae = load_sae(SaeSource(str(folder), "saelens"))
    assert sae.layer == 3  # what enters block 4 is what leaves block 3
    same(sae, Reference(W, "topk", subtract=True, k=4), inputs())  # the bias was subtracted unless the config said no


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gated"}, r"unknown SAE architecture .* 'gated'; choose one of: standard, jumprelu, topk"),
        ({"normalize_activations": "layer_norm"}, "standardises each input by itself, which cannot be folded"),
        ({"normalize_activations": "constant_norm_rescale"}, "rescales each input to one norm"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"activation_fn": "tanh-relu"}, "activation function 'tanh-relu'"),
        ({"metadata": {"hook_name": "blocks.3.hook_mlp_out"}}, "reads 'blocks.3.hook_mlp_out'; steering needs"),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "steering needs an SAE of the residual stream"),
        ({"normalize_activations": "mystery"}, "unknown normalize_activations 'mystery'"),
    ],
)
def test_what_cannot_be_folded_is_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = sae_files.saelens(tmp_path, W, **{"architecture": "standard"} | changes)
    with pytest.raises(SteerbackError, match=message):
        load_sae(SaeSource(str(folder), "saelens"))


def test_weights_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    folder = sae_files.saelens(tmp_path, W, "standard")
    tensors = load_file(folder / "sae_weights.safetensors")
    save_file(tensors | {"scaling_factor": torch.ones(N)}, folder / "sae_weights.safetensors")
    same(load_sae(SaeSource(str(folder), "saelens")), Reference(W, "relu"), inputs())
    for extra, message in (
        ({"scaling_factor": torch.full((N,), 2.0)}, "scaling_factor is not 1"),
        ({"r_mag": torch.zeros(N)}, "unknown weights r_mag"),
    ):
        save_file(tensors | extra, folder / "sae_weights.safetensors")
        with pytest.raises(SteerbackError, match=message):
            load_sae(SaeSource(str(folder), "saelens"))


def test_thresholds_compare_strictly(tmp_path: Path) -> None:
    w = {name: torch.zeros_like(tensor) for name, tensor in W.items()}
    w["W_enc"][0, :4] = 1
    w["W_dec"][:, 0] = 1
    w["threshold"][:4] = torch.tensor([2.0, 1.9999, 0.0, -5.0])
    h = torch.zeros(2, D)
    h[0, 0], h[1, 0] = 2.0, -1.0
    wanted = [[0.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]]
    for source in (
        SaeSource(str(sae_files.gemma_scope(tmp_path / "g", w)), "gemma-scope", layer=0),
        SaeSource(str(sae_files.gemma_scope_2(tmp_path / "g2", w)), "gemma-scope-2"),
        SaeSource(str(sae_files.saelens(tmp_path / "s", w, "jumprelu")), "saelens"),
    ):
        assert load_sae(source).encode(h)[:, :4].tolist() == wanted
        assert load_sae(source).encode(h, [0, 1, 2, 3]).tolist() == wanted


def test_bfloat16_stays_unless_asked_otherwise(tmp_path: Path) -> None:
    path = sae_files.goodfire(tmp_path / "sae.pt", W, torch.bfloat16)
    source = SaeSource(str(path), "goodfire", layer=LAYER)
    sae, wide = load_sae(source), load_sae(replace(source, dtype="float32"))
    assert (sae.W_enc.dtype, wide.W_enc.dtype) == (torch.bfloat16, torch.float32)
    assert sae.hash == wide.hash  # the same numbers
    rounded = {name: tensor.bfloat16().float() for name, tensor in W.items()}
    same(sae, Reference(rounded, "relu"), inputs())
    same(wide, Reference(rounded, "relu"), inputs())
    assert torch.equal(sae.encode(inputs(), [3, 1]), wide.encode(inputs(), [3, 1]))
    assert load_sae(replace(source, dtype="bfloat16")).W_dec.dtype == torch.bfloat16


def test_large_matrices_go_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sae_files.goodfire(tmp_path / "sae.pt", W, torch.bfloat16)
    source = SaeSource(str(path), "goodfire", layer=LAYER)
    whole = load_sae(source)
    values = whole.hash, whole.encode(inputs()), whole.decode(whole.encode(inputs())), whole.norms()
    monkeypatch.setattr("steerback.targets.sae.BLOCK", 40)
    parts = load_sae(source)
    assert parts.hash == values[0]
    assert torch.allclose(parts.encode(inputs()), values[1], atol=1e-6)
    assert torch.allclose(parts.decode(parts.encode(inputs())), values[2], atol=1e-5)
    assert parts.norms() == pytest.approx(values[3])


def test_norms_are_summed_up() -> None:
    w = weights()
    w["W_dec"][4] = 0
    sae = Sae("relu", 0, w["W_enc"], w["b_enc"], w["W_dec"], w["b_dec"], torch.zeros(N))
    norms = w["W_dec"].double().norm(dim=1)
    assert torch.allclose(sae.decoder_norms.double(), norms)
    said = sae.norms()
    assert said["max"] == pytest.approx(float(norms.max()))
    assert said["median"] == pytest.approx(float(norms.quantile(0.5)))
    assert (said["min"], said["zero"]) == (0, 1)


def test_a_saelens_folder_is_read_without_the_library(tmp_path: Path) -> None:
    """Importing SAELens takes up to minutes on a busy machine; a folder on this machine does not need it."""
    folder = sae_files.saelens(tmp_path, W, "standard")
    code = (
        "import sys; from steerback.targets import SaeSource; from steerback.targets.sae_files import load_sae\n"
        f"load_sae(SaeSource({str(folder)!r}, 'saelens'))\n"
        "print({'sae_lens', 'transformer_lens', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "set()"


def test_an_sae_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"model": torch.zeros(2)}, tmp_path / "other.pt")
    np.savez(tmp_path / "other.npz", a=np.zeros(2))
    save_file({"a": torch.zeros(2)}, tmp_path / "params.safetensors")

    def said(file: str, form: str, **more: Any) -> str:
        with pytest.raises(SteerbackError) as caught:
            load_sae(SaeSource(str(tmp_path / file), form, **more))
        return str(caught.value)

    assert "encoder_linear.weight, encoder_linear.bias" in said("other.pt", "goodfire", layer=0)
    assert "lacks w_enc, b_enc, w_dec, b_dec, threshold; the file has a" in said("other.npz", "gemma-scope", layer=0)
    assert "w_enc, b_enc" in said("params.safetensors", "gemma-scope-2", layer=0)
    assert "unknown SAE format 'gemmascope'; did you mean gemma-scope?" in said(".", "gemmascope")
    assert "neither an existing folder or file nor the name of a repository" in said("nowhere", "goodfire")
    good = sae_files.goodfire(tmp_path / "good.pt", W)
    assert "set sae_layer" in said("good.pt", "goodfire")
    assert "got good.pt, other.pt; name one" in said(".", "goodfire")
    folder = sae_files.gemma_scope_2(tmp_path / "two", W, hf_hook_point_in="model.layers.3.self_attn.o_proj.input")
    assert "steering needs an SAE of a block's output" in said("two", "gemma-scope-2")
    sae_files.gemma_scope_2(folder, W)
    assert "an SAE of layer 3, but the target's sae_layer is 4" in said("two", "gemma-scope-2", layer=4)
    bad = {name: tensor.clone() for name, tensor in W.items()}
    bad["W_enc"][2, 2] = float("nan")
    sae_files.goodfire(good, bad)
    assert "W_enc contains NaN" in said("good.pt", "goodfire", layer=0)


def test_from_a_hub_with_a_pinned_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    made = {
        "goodfire/sae": {"sae.pt": sae_files.goodfire(tmp_path / "sae.pt", W)},
        "google/scope": {"layer_3/params.npz": sae_files.gemma_scope(tmp_path / "npz", W) / "params.npz"},
        "lens/sae": {f"blocks.3/{n}": sae_files.saelens(tmp_path / "l", W, "standard") / n for n in
                     ("cfg.json", "sae_weights.safetensors")},
        "google/scope-2": {"resid/params.safetensors": sae_files.gemma_scope_2(tmp_path / "g2", W) /
                           "params.safetensors"},
    }  # fmt: skip
    save_native(load_sae(SaeSource(str(tmp_path / "sae.pt"), "goodfire", layer=LAYER)), tmp_path / "own")
    made["own/sae"] = {n: tmp_path / "own" / n for n in ("sae.json", "sae.safetensors")}
    sources = {
        "goodfire/sae": ("goodfire", "sae.pt"),
        "google/scope": ("gemma-scope", "layer_3"),
        "lens/sae": ("saelens", "blocks.3"),
        "google/scope-2": ("gemma-scope-2", "resid"),  # without config.json, which is not an error
        "own/sae": ("steerback", None),
    }
    with serve(Site()) as site:
        monkeypatch.setenv("HF_ENDPOINT", site.url)
        for repo, files in made.items():
            for name, path in files.items():
                site.put(repo, name, path.read_bytes())
        for repo, (form, file) in sources.items():
            source = SaeSource(repo, form, file, COMMIT, layer=LAYER)
            kind = "jumprelu" if "scope" in repo else "relu"
            same(load_sae(source), Reference(W, kind), inputs())
            asked = len(site.requests())
            assert describe(source)["commit"] == COMMIT
            assert len(str(describe(source)["sha256"])) == 64
            if repo != "google/scope-2":
                assert len(site.requests()) == asked  # what is in the cache is not fetched again
        with pytest.raises(SteerbackError, match="name the file of the repository"):
            load_sae(SaeSource("goodfire/sae", "goodfire", layer=LAYER))


def test_a_release_through_saelens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    from huggingface_hub.errors import EntryNotFoundError

    def local(repo_id: str, filename: str, **_: object) -> str:
        if not (tmp_path / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    sae_files.saelens(tmp_path / "blocks.3", W, "jumprelu", apply_b_dec_to_input=True)
    sae = load_sae(SaeSource("owner/some-release", "sae-lens", "blocks.3", layer=LAYER))
    same(sae, Reference(W, "jumprelu", subtract=True), inputs())
    assert describe(SaeSource("owner/some-release", "sae-lens", "blocks.3"))["location"] == "owner/some-release"


def test_saelens_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(SteerbackError, match=r"install it with: pip install 'steerback\[sae-lens\]'"):
        load_sae(SaeSource("release", "sae-lens", "id"))
