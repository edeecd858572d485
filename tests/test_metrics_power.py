"""Simulated power against the package's tests on simulated trials, and the command `steerback plan`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

from steerback.cli import main
from steerback.metrics import Outcomes, compare
from steerback.metrics.between import above
from steerback.metrics.paired import swap_test
from steerback.metrics.power import (
    Design,
    Effect,
    beta_binomial,
    exchange_p,
    power_of_drop,
    power_of_rate,
    sign_flip_p,
    smallest_drop,
    smallest_size,
)


def outcomes(multi: np.ndarray, cluster: np.ndarray) -> Outcomes:
    attempts, zeros, scores = np.where(multi, 2, 1), np.zeros(len(multi), int), np.full(len(multi), 50.0)
    return Outcomes(cluster, np.arange(len(multi)), zeros, attempts, scores, scores, attempts, scores, scores, zeros)


def test_fast_paired_p_is_that_of_the_packages_test() -> None:
    rng = np.random.default_rng(0)
    for clusters, rate in ((6, 0.3), (11, 0.2), (40, 0.1), (80, 0.03)):
        counts = rng.binomial(10, rng.beta(1, 1 / rate - 1, (2, clusters)))
        a, b = (np.stack([c, np.full(clusters, 10)], axis=1).astype(float) for c in counts)
        real = swap_test(a, b, draws=20_000)[0]
        assert sign_flip_p(counts[1] - counts[0]) == pytest.approx(real, abs=0.012), clusters
    assert sign_flip_p(np.zeros(5, int)) == 1.0
    assert sign_flip_p(np.array([2, 1, 1, 0])) == 2 / 8


def test_fast_exchange_p_counts_deals_of_whole_clusters() -> None:
    rng = np.random.default_rng(1)
    steered, unsteered = np.array([0, 3, 2, 0, 4, 1]), np.array([0, 1, 0, 0])
    together = np.concatenate([steered, unsteered])
    dealt = np.array([rng.permutation(together)[:4].sum() for _ in range(20_000)])
    expected = float(np.mean(dealt <= unsteered.sum()))
    assert exchange_p(steered, unsteered, rng, draws=20_000) == pytest.approx(expected, abs=0.012)


def test_fast_exchange_p_is_that_of_the_floors_test() -> None:
    rng = np.random.default_rng(6)
    for latents, rate in ((20, 0.15), (40, 0.05)):
        steered, unsteered = rng.binomial(10, rng.beta(1, 1 / rate - 1, latents)), rng.binomial(10, 0.01, 15)
        tables = [np.stack([c, np.full(len(c), 10)], axis=1).astype(float) for c in (steered, unsteered)]
        assert exchange_p(steered, unsteered, rng, draws=20_000) == pytest.approx(above(*tables), abs=0.015)


def test_power_of_a_drop_is_the_rejection_rate_of_the_packages_paired_test() -> None:
    design, effect = Design(30, 20), Effect(0.15, drop=0.5, icc=0.1)
    rng, scale, rejected = np.random.default_rng(2), 9.0, []
    cluster = np.repeat(np.arange(30), 20)
    for _ in range(200):
        rates = rng.beta(effect.rate * scale, (1 - effect.rate) * scale, 30)
        before = outcomes(rng.random(600) < rates[cluster], cluster)
        after = outcomes(rng.random(600) < rates[cluster] / 2, cluster)
        p = compare(before, after, ("multi_attempt_rate",), draws=1000)["multi_attempt_rate"].p
        rejected.append(p is not None and p <= 0.05)
    power = power_of_drop(design, effect)
    assert 0.4 < power < 0.999
    assert power == pytest.approx(np.mean(rejected), abs=3 * np.sqrt(power * (1 - power) / 200) + 0.02)


def test_without_an_effect_the_tests_reject_in_five_per_cent() -> None:
    assert 0.03 <= power_of_drop(Design(60, 20), Effect(0.2, drop=0.0)) <= 0.07
    same = Effect(0.1, floor=0.1, icc=0.001)
    assert 0.03 <= power_of_rate(Design(40, 10, 400), same) <= 0.07


def test_power_depends_on_clusters_and_not_on_trials_alone() -> None:
    few, many = Design(10, 50, 500), Design(50, 10, 500)
    assert power_of_rate(many, Effect(0.05, icc=0.3)) > power_of_rate(few, Effect(0.05, icc=0.3)) + 0.1
    assert power_of_drop(many, Effect(0.1, icc=0.1)) > power_of_drop(many, Effect(0.1, drop=0.2, icc=0.1))


def test_search_returns_the_first_size_that_is_enough() -> None:
    effect = Effect(0.05, drop=0.6)
    found = smallest_size(power_of_drop, effect, 20, 0.8, simulations=300)
    assert found is not None
    design, power = found
    assert power >= 0.8
    assert power_of_drop(Design(design.latents // 2, 20), effect, 300) < 0.8
    assert smallest_size(power_of_drop, Effect(0.001, drop=0.05), 10, 0.8, simulations=50) is None
    drop = smallest_drop(design, effect, 0.8, simulations=300)
    assert drop is not None
    assert drop <= 0.6


def test_variance_between_latents_is_read_off_counts() -> None:
    rng, trials = np.random.default_rng(3), np.full(300, 20)
    for icc in (0.03, 0.3):
        scale = (1 - icc) / icc
        mean, found, known = beta_binomial(rng.binomial(20, rng.beta(0.1 * scale, 0.9 * scale, 300)), trials)
        assert known
        assert mean == pytest.approx(0.1, abs=0.03)
        assert found == pytest.approx(icc, rel=0.35)
    alike = binom.rvs(20, 0.1, size=300, random_state=4)
    assert beta_binomial(alike, trials)[1] < 0.01
    assert beta_binomial(np.array([1, 0, 2]), np.full(3, 20))[1:] == (0.1, False)


# --- the verb ---------------------------------------------------------------------------------------------------------


def steerback(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


FEW = ("--simulations", "40")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder without keys."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path / "cache"))
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("quick")
def test_plan_and_dry_run_need_no_key(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("inspect_ai")
    plan = [
        "plan",
        "--target",
        "llama-3.1-8b",
        "--judge",
        "sonnet-4.5",
        "--rate",
        "5",
        "--drop",
        "60",
        "--power",
        "0.7",
    ]
    assert steerback(*plan, *FEW, "--out", "made") == 0
    said = capsys.readouterr().out
    assert "multi-attempt rate 5.00% (stated)" in said
    assert "GPU-hours on 1 x H200" in said
    assert "benchmarks/results/vllm_8b.json" in said
    assert "no key; set ANTHROPIC_API_KEY" in said
    for name in ("plan.json", "plan.csv", "power.csv", "power.png", "power.pdf"):
        assert Path("made", name).stat().st_size > 100
    needs = json.loads(Path("made/plan.json").read_text("utf-8"))["needs"]
    assert {need["question"] for need in needs} == {"rate above the floor", "drop, paired"}
    assert all(need["judging"]["calls"] > need["design"]["latents"] * need["trials"] for need in needs)
    assert all(need["judging"]["cost"] > 0 for need in needs)
    assert steerback("run", "esr", "--target", "llama-3.1-8b", "--judge", "sonnet-4.5", "--dry-run") == 0
    assert "note: judge anthropic/" in capsys.readouterr().out
    assert steerback("run", "esr", "--target", "llama-3.1-8b", "--judge", "sonnet-4.5") == 2
    assert "no key; set ANTHROPIC_API_KEY" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_plan_takes_rate_and_variance_from_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    small = [
        *("--preset", "quick", "--engine", "scripted", "--judge", "scripted", "--set", "n_latents=4"),
        *("--set", "trials_per_latent=6", "--set", "draws=100", "--set", "calibration.max_iterations=4"),
        *("--set", "calibration.verify_trials=0"),
    ]
    assert steerback("run", "esr", "--target", "organism", "--name", "a", *small) == 0
    capsys.readouterr()
    assert steerback("plan", "--from", "a", "--floor", "0.1", *FEW) == 0
    said = capsys.readouterr().out
    assert "plan for organism, judge offline" in said
    assert "(run a, organism, steered: " in said
    assert "hours of two CPU cores" in said
    assert steerback("plan", "--from", "a", "--target", "organism-l") == 2
    assert "no measured responses of organism-l; it has: organism" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "say what to steer with --target"),
        (["--target", "organism", "--rate", "0.2"], "must be above the judge's floor"),
        (["--target", "organism", "--rate", "200"], "--rate and --drop must be between 0 and 100 %"),
        (["--target", "organism", "--power", "80"], "--power between 0 and 1"),
        (["--target", "organism", "--judge", "nobody"], "unknown judge 'nobody'"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert steerback("plan", *options) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
