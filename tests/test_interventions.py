"""Arithmetic of steering against explicit sums in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from steerback.engines.interventions import Clamp, LayerPlan, Site, check, edit, plan_layers, steer
from steerback.errors import SteerbackError
from steerback.records import Intervention, Recording

SITE = Site(n_layers=8, d_model=32, steer_layer=3, sae_layer=5, read_layer=5, n_latents=64, directions=("north",))
latents = st.integers(0, 63)
values = st.floats(-8, 8, allow_nan=False)


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(["relu", "jumprelu", "topk"]),
    clamps=st.dictionaries(latents, values, max_size=12),
    scales=st.dictionaries(latents, values, max_size=12),
    adds=st.lists(st.tuples(latents, values), max_size=6),
    seed=st.integers(0, 1000),
)
def test_edit_is_the_formula(
    kind: str, clamps: dict[int, float], scales: dict[int, float], adds: list[tuple[int, float]], seed: int
) -> None:
    sae = tiny.sae(kind)
    h = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(seed))
    items = [Intervention("clamp", k, v) for k, v in clamps.items()]
    items += [Intervention("scale", k, s) for k, s in scales.items() if k not in clamps]
    items += [Intervention("add", k, b, layer=5) for k, b in adds]
    plan = plan_layers(items, "prompt", SITE).get(5, LayerPlan())
    z, rows = sae.encode(h.double()), sae.W_dec.double()
    wanted = h.double()
    for k, v in clamps.items():
        wanted = wanted + (v - z[..., k : k + 1]) * rows[k]
    for k in scales.keys() - clamps.keys():
        wanted = wanted - z[..., k : k + 1] * rows[k] + scales[k] * z[..., k : k + 1] * rows[k]
    for k, b in adds:
        wanted = wanted + b * rows[k]
    assert torch.allclose(edit(h, plan, sae).double(), wanted, atol=1e-4)
    assert torch.allclose(edit(h.double(), plan, sae), wanted, atol=1e-5)  # weights are float32


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_equals_the_authors_form(kind: str) -> None:
    """f[k] = v, then additions, output dec(f) + (h - dec(enc(h))): the same thing, and the error term is kept."""
    sae = tiny.sae(kind)
    h = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    f = sae.encode(h)
    error = h - sae.decode(f)
    f[:, 4], f[:, 9] = 0.0, 2.0
    f[:, 4] += 3.0
    f[:, 11] += 5.0
    plan = LayerPlan(add=((4, 3.0), (11, 5.0)), clamp=(Clamp(4), Clamp(9, 2.0)))
    assert torch.allclose(edit(h, plan, sae), sae.decode(f) + error, atol=1e-5)


def test_clamping_to_the_present_value_changes_nothing() -> None:
    sae = tiny.sae()
    h = torch.randn(32)
    z = sae.encode(h)
    plan = LayerPlan(clamp=tuple(Clamp(k, float(z[k])) for k in range(10)))
    assert torch.allclose(edit(h, plan, sae), h, atol=1e-6)


def test_dtype_is_kept_and_the_sum_is_made_in_float32() -> None:
    sae = tiny.sae()
    h = torch.randn(4, 32)
    plan = LayerPlan(add=((1, 0.7),), clamp=(Clamp(2, 0.3),))
    half = edit(h.bfloat16(), plan, sae)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, edit(h.bfloat16().float(), plan, sae).bfloat16())


def test_positions_and_layers() -> None:
    items = (
        Intervention("add", 1, 2.0),
        Intervention("add", 2, 3.0, "generated", layer=0),
        Intervention("clamp", 4, 0.0, "prompt"),
        Intervention("clamp", 5, 1.0, layer=3),
        Intervention("scale", 6, 0.25, "prompt"),
    )
    assert plan_layers(items, "prompt", SITE) == {
        3: LayerPlan(((1, 2.0),), (Clamp(5, 1.0),)),
        5: LayerPlan((), (Clamp(4), Clamp(6, removed=0.75))),
    }
    assert plan_layers(items, "generated", SITE) == {
        0: LayerPlan(((2, 3.0),)),
        3: LayerPlan(((1, 2.0),), (Clamp(5, 1.0),)),
    }
    assert plan_layers((), "prompt", SITE) == {}


def test_steer_splits_at_the_prompt() -> None:
    sae, h = tiny.sae(), torch.randn(6, 32)
    items = (Intervention("add", 1, 2.0, "prompt"), Intervention("add", 1, 5.0, "generated"))
    out = steer(h, items, 3, 4, SITE, sae)
    assert torch.allclose(out[:4], h[:4] + 2 * sae.W_dec[1])
    assert torch.allclose(out[4:], h[4:] + 5 * sae.W_dec[1])
    assert torch.equal(steer(h, items, 2, 4, SITE, sae), h)
    north = {"north": torch.ones(32)}
    assert torch.allclose(steer(h, (Intervention("add", "north", 2.0),), 3, 6, SITE, None, north), h + 2)


@pytest.mark.parametrize(
    ("items", "record", "message"),
    [
        ((Intervention("add", 64, 1.0),), None, r"trial 7: interventions\[0\].latent 64 is outside 0\.\.63"),
        ((Intervention("add", -1, 1.0),), None, "latent -1"),
        ((Intervention("add", "south", 1.0),), None, "choose one of: north"),
        ((Intervention("clamp", "north", 1.0),), None, "only SAE latents"),
        ((Intervention("add", 1, 1.0, layer=8),), None, r"layer 8 is outside 0\.\.7"),
        ((Intervention("clamp", 1, 1.0), Intervention("clamp", 1, 2.0, "prompt")), None, "twice at layer 5"),
        ((Intervention("clamp", 1, 1.0), Intervention("scale", 1, 0.5)), None, "clamped or scaled twice at layer 5"),
        ((Intervention("scale", "north", 0.5),), None, "only SAE latents"),
        ((), Recording((3, 70)), "record.latents 70"),
        ((), Recording((3,), layer=-1), "record.layer -1"),
    ],
)
def test_check_names_the_field(items: tuple[Intervention, ...], record: Recording | None, message: str) -> None:
    with pytest.raises(SteerbackError, match=message):
        check("trial 7", items, record, SITE)


def test_check_allows_what_is_possible() -> None:
    items = (
        Intervention("clamp", 1, 1.0, "prompt"),
        Intervention("clamp", 1, 2.0, "generated"),
        Intervention("clamp", 1, 2.0, layer=2),
        Intervention("add", 1, 2.0),
        Intervention("add", 1, 2.0),
        Intervention("add", "north", 2.0),
    )
    check("trial", items, Recording((0, 63), layer=7), SITE)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_have_to_be_finite(value: float) -> None:
    with pytest.raises(SteerbackError, match="not finite"):
        Intervention("add", 1, value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39, -1e300])
def test_a_value_that_no_engine_can_hold_is_refused(value: float) -> None:
    with pytest.raises(SteerbackError, match="latent 3 is not finite"):
        Intervention("add", 3, value)
    assert Intervention("add", 3, 3.4e38).value == 3.4e38
