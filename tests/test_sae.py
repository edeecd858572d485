"""SAE encoder and decoder against loops, the file format, and errors for damaged files."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from reference_llama import encode
from steerback.engines.loading import on_device
from steerback.engines.steering import GROUP, Columns
from steerback.engines.transformers import TransformersEngine
from steerback.errors import SteerbackError
from steerback.records import Intervention, Request, Sampling
from steerback.targets.sae import TENSORS, Sae, save_native
from steerback.targets.sae_files import load_sae

KINDS = ("relu", "jumprelu", "topk")


@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode_equal_a_loop(kind: str) -> None:
    sae = tiny.sae(kind)
    h = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(5))
    z = sae.encode(h)
    by_hand = torch.stack([encode(sae, x.double()) for x in h.view(-1, 32)]).view(2, 3, 64)
    assert torch.allclose(z.double(), by_hand, atol=1e-5)
    assert torch.allclose(sae.decode(z), z @ sae.W_dec + sae.b_dec)
    assert torch.allclose(sae.encode(h, [7, 3, 60]), z[..., [7, 3, 60]], atol=1e-6)
    if kind == "topk":
        assert ((z > 0).sum(-1) <= 6).all()


def test_jumprelu_compares_strictly() -> None:
    eye = torch.eye(3)
    sae = Sae("jumprelu", 0, eye, torch.zeros(3), eye, torch.zeros(3), torch.tensor([1.0, 1.0, 0.0]))
    assert sae.encode(torch.tensor([1.0, 1.5, 0.5])).tolist() == [0.0, 1.5, 0.5]
    assert sae.encode(torch.tensor([1.0, 1.5, 0.0]), [0, 1]).tolist() == [0.0, 1.5]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_through_files(kind: str, tmp_path: Path) -> None:
    sae = tiny.sae(kind)
    save_native(sae, tmp_path / "sae", note="made by a test")
    back = load_sae(tmp_path / "sae")
    assert all(torch.equal(getattr(back, name), getattr(sae, name)) for name in TENSORS)
    assert (back.kind, back.layer, back.k, back.hash) == (sae.kind, sae.layer, sae.k, sae.hash)


def test_half_precision_files_are_computed_in_float32(tmp_path: Path) -> None:
    save_native(tiny.sae(), tmp_path, torch.float16)
    back = load_sae(tmp_path)
    assert back.W_enc.dtype == torch.float32
    assert torch.allclose(back.W_enc, tiny.sae().W_enc, atol=1e-3)


def test_hash_depends_on_everything_that_shapes_a_value() -> None:
    base = tiny.sae("topk")
    others = [
        replace(base, k=5),
        replace(base, layer=1),
        replace(base, kind="relu"),
        *(replace(base, **{name: getattr(base, name) + 1e-3}) for name in TENSORS),
    ]
    assert len({base.hash, *(o.hash for o in others)}) == len(others) + 1
    assert tiny.sae("topk").hash == base.hash


def damage(folder: Path, **changes: object) -> None:
    meta = json.loads((folder / "sae.json").read_text())
    (folder / "sae.json").write_text(json.dumps(meta | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "gated"}, "kind: Input should be 'relu', 'jumprelu' or 'topk', not 'gated'"),
        ({"kind": "topk"}, "needs k between 1 and 64"),
        ({"layer": "2"}, "layer: Input should be a valid integer, not '2'"),
        ({"layer": 2.5}, "layer: Input should be a valid integer"),
        ({"layer": -1}, "layer: .*, not -1"),
        ({"d_model": [32]}, "d_model: Input should be a valid integer"),
        ({"k": "six"}, "k: Input should be a valid integer, not 'six'"),
        ({"boost_prior": {"mean": 1}}, "boost_prior: .*should be {mean, sd, low, high}"),
        ({"d_model": 33}, "says d_model 33, but the weights have 32"),
        ({"n_latents": 1}, "n_latents 1"),
    ],
)
def test_metadata_is_checked(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    save_native(tiny.sae(), tmp_path)
    damage(tmp_path, **changes)
    with pytest.raises(SteerbackError, match=message):
        load_sae(tmp_path)


def test_weights_are_checked(tmp_path: Path) -> None:
    sae = tiny.sae()
    bad = sae.W_dec.clone()
    bad[3, 4] = float("nan")
    save_native(replace(sae, W_dec=bad), tmp_path)
    with pytest.raises(SteerbackError, match="W_dec contains NaN"):
        load_sae(tmp_path)
    save_native(replace(sae, b_enc=sae.b_enc[:-1]), tmp_path)
    with pytest.raises(SteerbackError, match=r"b_enc has shape \(63,\), expected \(64,\)"):
        load_sae(tmp_path)
    with pytest.raises(SteerbackError, match=r"unknown SAE format 'goodfyre'; did you mean goodfire\?"):
        load_sae(tmp_path, "goodfyre")
    with pytest.raises(SteerbackError, match="neither an existing folder or file"):
        load_sae(tmp_path / "absent")
    with pytest.raises(SteerbackError, match="the model has width 48"):
        sae.check("here", 48)
    with pytest.raises(SteerbackError, match=r"layer 2 is outside the model's layers 0\.\.1"):
        sae.check("here", 32, 2)


def test_truncated_and_scrambled_files_give_one_clear_error(tmp_path: Path) -> None:
    save_native(tiny.sae(), tmp_path)
    good = {name: (tmp_path / name).read_bytes() for name in ("sae.safetensors", "sae.json")}
    draw = random.Random(0)
    said: list[str] = []
    for n in range(40):
        name = draw.choice(sorted(good))
        raw = bytearray(good[name])
        if n % 2:
            raw = raw[: draw.randrange(len(raw))]
        else:  # hit the header, where every byte has a meaning
            for _ in range(8):
                raw[draw.randrange(min(len(raw), 300))] = draw.randrange(256)
        (tmp_path / name).write_bytes(raw)
        try:
            load_sae(tmp_path)
        except SteerbackError as error:
            said.append(str(error))
        (tmp_path / name).write_bytes(good[name])
    assert len(said) >= 35
    assert all(str(tmp_path) in line and "\n" not in line for line in said)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_used_goes_to_the_device(kind: str) -> None:
    """Asked of PyTorch's meta device, which has sizes and no memory."""
    device = torch.device("meta")
    sae = on_device(tiny.sae(kind), device)
    assert sae.W_enc.device.type == ("meta" if kind == "topk" else "cpu")
    if kind == "topk":
        return
    columns = Columns(sae, 2, device)
    columns.set(1, [3, 9, 40], [0.0, 0.0, 0.0])
    (group,) = columns.groups
    assert {tensor.device.type for tensor in group.values()} == {"meta"}
    assert group["encoder"].shape == (2, 32, GROUP)  # of the 64 latents, the group of 8 that is in use
    assert group["decoder"].shape == (2, GROUP, 32)
    encoder = sae.encoder_to(device)
    assert (encoder.W_enc.device.type, encoder.W_dec.device.type) == ("meta", "cpu")


def test_a_latent_without_direction_cannot_be_steered_with() -> None:
    sae = tiny.sae()
    silent = replace(sae, W_dec=sae.W_dec.index_fill(0, torch.tensor([5]), 0.0))
    loaded = tiny.assemble(tiny.target(), tiny.model(), tiny.tokenizer(), silent)
    engine = TransformersEngine(loaded, 4)
    for edit in (Intervention("add", 5, 4.0), Intervention("clamp", 5, 0.0)):
        request = Request("a", "the cat", 1, Sampling(max_new_tokens=2), (edit,))
        with pytest.raises(
            SteerbackError, match=r"request 'a': interventions\[0\]\.latent 5 has a decoder row of zero"
        ):
            tiny.collect(engine, [request])
    other = Request("a", "the cat", 1, Sampling(max_new_tokens=2), (Intervention("add", 6, 4.0),))
    assert tiny.collect(engine, [other])["a"].receipt.positions > 0
