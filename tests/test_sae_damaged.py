"""Damaged, hostile or mistyped SAE files: one clear error, and no code from the file runs."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import sae_files
from sae_files import LAYER, D, N, weights
from steerback.errors import SteerbackError
from steerback.targets import SaeSource
from steerback.targets.sae import TENSORS, Sae, save_native
from steerback.targets.sae_files import load_sae

W = weights()


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("zipped", [True, False, None])
def test_a_pickle_with_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool | None) -> None:
    mark, path = tmp_path / "ran", tmp_path / "sae.pt"
    state = {"encoder_linear.weight": torch.zeros(2, 2), "x": Bomb(mark)}
    if zipped is None:
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(SteerbackError, match="refused, because loading it would run code from it"):
        load_sae(SaeSource(str(path), "goodfire", layer=0))
    assert not mark.exists()
    archive = tmp_path / "params.npz"
    np.savez(archive, **{name: np.array([Bomb(mark)], dtype=object) for name in TENSORS})
    with pytest.raises(SteerbackError, match="Object arrays cannot be loaded"):
        load_sae(SaeSource(str(archive), "gemma-scope", layer=0))
    assert not mark.exists()


MAKERS: dict[str, Callable[[Path], Path]] = {
    "goodfire": lambda folder: sae_files.goodfire(folder / "sae.pt", W),
    "gemma-scope": lambda folder: sae_files.gemma_scope(folder, W) / "params.npz",
    "gemma-scope-2": lambda folder: sae_files.gemma_scope_2(folder, W) / "params.safetensors",
    "saelens": lambda folder: sae_files.saelens(folder, W, "jumprelu") / "sae_weights.safetensors",
}


@pytest.mark.parametrize("form", MAKERS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_fuzzed_and_truncated_files_give_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, form: str, data: st.DataObject
) -> None:
    path = MAKERS[form](tmp_path_factory.mktemp("fuzz"))
    good = path.read_bytes()
    if data.draw(st.booleans()):
        raw = good[: data.draw(st.integers(0, len(good) - 1))]
    else:
        changed = bytearray(good)
        for at in data.draw(st.lists(st.integers(0, len(good) - 1), min_size=1, max_size=12)):
            changed[at] = data.draw(st.integers(0, 255))
        raw = bytes(changed)
    path.write_bytes(raw)
    said, sae = "", None
    try:
        sae = load_sae(SaeSource(str(path), form, layer=LAYER))
    except SteerbackError as error:
        said = str(error)
    if sae is None:
        assert str(path.parent) in said
        assert "\n" not in said
    else:
        assert len(raw) == len(good)  # a changed number may go unseen, a missing one never
        assert (sae.d_model, sae.n_latents) == (D, N)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_enc": W["W_enc"].to(torch.complex64)}, "W_enc has complex64 numbers"),
        ({"W_dec": W["W_dec"].to(torch.int32)}, "W_dec has int32 numbers"),
        ({"b_dec": W["b_dec"] > 0}, "b_dec has bool numbers"),
        ({"W_dec": W["W_dec"] * 1e30}, "W_dec contains NaN, infinity or numbers above 1e\\+15"),
    ],
)
def test_weights_that_are_no_weights_are_refused(
    tmp_path: Path, changes: dict[str, torch.Tensor], message: str
) -> None:
    w = W | changes
    save_native(Sae("jumprelu", LAYER, **{name: W[name] for name in TENSORS}, k=None), tmp_path / "own")
    save_file({name: w[name].contiguous() for name in TENSORS}, tmp_path / "own" / "sae.safetensors")
    folder = sae_files.saelens(tmp_path / "lens", w, "jumprelu")
    for source in (SaeSource(str(tmp_path / "own")), SaeSource(str(folder), "saelens")):
        with pytest.raises(SteerbackError, match=message) as caught:
            load_sae(source)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (torch.Tensor.to_sparse, "sparse"),
        (torch.Tensor.to_sparse_csr, "sparse"),
        (lambda weight: weight.to("meta"), "no"),
        (lambda weight: weight.to(torch.complex64), "complex64"),
        (lambda weight: weight[:1, :1].clone().expand(weight.shape), "repeated"),
    ],
    ids=["sparse", "CSR", "meta", "complex", "repeated"],
)
def test_weights_in_a_pickle_that_are_no_matrix_of_numbers_are_refused(
    tmp_path: Path, change: Callable[[Tensor], Tensor], kind: str
) -> None:
    path = sae_files.goodfire(tmp_path / "sae.pt", W)
    state = torch.load(path, weights_only=True)
    torch.save(state | {"encoder_linear.weight": change(state["encoder_linear.weight"])}, path)
    with pytest.raises(SteerbackError, match=rf"encoder_linear\.weight has {kind} numbers"):
        load_sae(SaeSource(str(path), "goodfire", layer=LAYER))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("normalize_activations", ["layer_norm"]),
        ("activation_fn", 3),
        ("metadata", "none"),
        ("activation_fn_kwargs", {"k": "4"}),
        ("apply_b_dec_to_input", "no"),
        ("k", 2.5),
    ],
)
def test_wrong_types_in_a_saelens_config_are_named(tmp_path: Path, setting: str, value: object) -> None:
    folder = sae_files.saelens(tmp_path, W, "standard", **{setting: value})
    with pytest.raises(SteerbackError, match=rf"sae_weights.safetensors: {setting}.*: Input should be") as caught:
        load_sae(SaeSource(str(folder), "saelens"))
    assert "\n" not in str(caught.value)
