"""Differences between models: confidence interval and test with the latents of both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import permutation_test

from steerback.analysis.esr import between_models
from steerback.cli import main
from steerback.metrics import METRICS, Outcomes, between, view
from steerback.metrics.between import cluster_table, exchange_test
from steerback.metrics.paired import holm


def model(rng: np.random.Generator, latents: int, trials: int, rate: float, icc: float = 0.1) -> Outcomes:
    """Trials whose restart rates are Beta over latents with mean `rate`; a restart gains 15 points on average."""
    scale = (1 - icc) / icc
    rates = rng.beta(rate * scale, (1 - rate) * scale, latents) if rate else np.zeros(latents)
    cluster = np.repeat(np.arange(latents), trials)
    n, zeros = len(cluster), np.zeros(latents * trials, int)
    multi = rng.random(n) < rates[cluster]
    first = rng.normal(50, 20, n)
    last = np.where(multi, first + rng.normal(15, 13, latents)[cluster] + rng.normal(0, 27, n), first)
    attempts = np.where(multi, 2, 1)
    return Outcomes(cluster, np.arange(n), zeros, attempts, first, last, attempts, first, last, zeros)


def test_a_clear_difference_is_found_and_no_difference_is_none() -> None:
    rng = np.random.default_rng(0)
    tests = between(model(rng, 12, 20, 0.02), model(rng, 15, 20, 0.4))
    rate = tests["multi_attempt_rate"]
    assert rate.difference is not None
    assert rate.low is not None
    assert rate.low > 0.1
    assert rate.p is not None
    assert rate.p < 0.002
    one = model(rng, 12, 20, 0.3)
    same = between(one, one)
    assert {t.difference for t in same.values()} == {0.0}
    assert all(t.p == 1.0 for t in same.values())


def test_a_model_without_events_has_an_interval_that_is_no_point() -> None:
    rng = np.random.default_rng(1)
    found = between(model(rng, 12, 20, 0.0), model(rng, 12, 20, 0.45))["multi_attempt_rate"]
    assert found.a == 0
    assert found.low is not None
    assert found.high is not None
    assert 0 < found.low < found.difference < found.high  # type: ignore[operator]
    none = between(model(rng, 12, 20, 0.0), model(rng, 12, 20, 0.0))["multi_attempt_rate"]
    assert none.p == 1.0
    assert none.low is not None
    assert none.high is not None
    assert none.low < -0.005
    assert none.high > 0.005


def test_one_latent_or_none_gives_no_test() -> None:
    rng = np.random.default_rng(2)
    single = between(model(rng, 1, 20, 0.3), model(rng, 9, 20, 0.3))["esr_rate"]
    assert single.p is None
    assert single.low is None
    nothing = between(Outcomes.from_rows([]), model(rng, 9, 20, 0.3))["esr_rate"]
    assert nothing.a is None
    assert nothing.difference is None


def test_p_is_that_of_scipys_permutation_of_latents() -> None:
    """Same clusters, same statistic, computed one deal at a time."""
    rng = np.random.default_rng(3)
    metric = METRICS["multi_attempt_rate"]
    a, b = (cluster_table(metric, view(model(rng, latents, 20, rate))) for latents, rate in ((10, 0.2), (14, 0.45)))

    def statistic(x: np.ndarray, y: np.ndarray) -> float:
        both = np.concatenate([x, y])
        pooled = both[:, 0].sum() / both[:, 1].sum()
        ratios, variance = [], 0.0
        for s in (x, y):
            n, events, k = s[:, 1].sum(), s[:, 0].sum(), len(s)
            clustered = k / (k - 1) * np.sum(((s[:, 0] - events / n * s[:, 1]) / n) ** 2)
            assumed = pooled * (1 - pooled) / n * (1 + (20 - 1) * 0.1)
            variance += (events * clustered + 5 * assumed) / (events + 5)
            ratios.append(events / n)
        return abs(ratios[1] - ratios[0]) / np.sqrt(variance)

    rows = np.concatenate([a, b])
    found = permutation_test(
        (np.arange(10), np.arange(10, 24)),
        lambda i, j: statistic(rows[i], rows[j]),
        n_resamples=2000,
        alternative="greater",
        rng=np.random.default_rng(0),
    )
    assert exchange_test(a, b, draws=4000) == pytest.approx(float(found.pvalue), abs=0.015)


def test_size_is_five_per_cent_whatever_the_numbers_of_latents_and_trials() -> None:
    rng = np.random.default_rng(4)
    metric = METRICS["multi_attempt_rate"]
    for latents, trials in (((12, 12), (20, 20)), ((12, 40), (20, 10))):
        rejected = []
        for _ in range(300):
            tables = [cluster_table(metric, view(model(rng, n, t, 0.3))) for n, t in zip(latents, trials, strict=True)]
            rejected.append(exchange_test(*tables, draws=200) <= 0.05)
        assert 0.015 <= np.mean(rejected) <= 0.085, (latents, trials)  # 0.05 and 2.8 standard errors


def test_every_pair_of_targets_is_compared_and_corrected_after_holm() -> None:
    rng = np.random.default_rng(5)
    found = between_models({name: model(rng, 10, 10, rate) for name, rate in (("x", 0.1), ("y", 0.3), ("z", 0.6))})
    assert list(found) == [("x", "y"), ("x", "z"), ("y", "z")]
    for metric in ("multi_attempt_rate", "esr_rate", "msi"):
        assert [t[metric].p_holm for t in found.values()] == holm(t[metric].p for t in found.values())
    assert between_models({"x": model(rng, 10, 10, 0.1)}) == {}


def test_a_run_over_several_targets_shows_their_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path / "cache"))
    small = [
        *("--preset", "quick", "--engine", "scripted", "--judge", "scripted", "--set", "n_latents=3"),
        *("--set", "trials_per_latent=4", "--set", "draws=100", "--set", "calibration.max_iterations=4"),
        *("--set", "calibration.verify_trials=0"),
    ]
    for targets in (["organism", "organism-s"], ["organism"]):
        names = [word for target in targets for word in ("--target", target)]
        with pytest.raises(SystemExit) as ended:
            main(["run", "esr", *names, "--name", f"run{len(targets)}", *small])
        assert ended.value.code == 0
        several = len(targets) > 1
        assert ("Models compared" in capsys.readouterr().out) == several
        summary = json.loads(Path(f"runs/run{len(targets)}/summary.json").read_text("utf-8"))
        for suffix in ("txt", "csv", "tex"):
            assert Path(f"runs/run{len(targets)}/between_models.{suffix}").is_file() == several
        if several:
            (pair,) = summary["between_models"]
            assert (pair["a"], pair["b"]) == ("organism", "organism-s")
            rates = [
                summary["targets"][t]["conditions"]["steered"]["headline"]["multi_attempt_rate"]["value"]
                for t in ("organism", "organism-s")
            ]
            assert pair["tests"]["multi_attempt_rate"]["difference"] == pytest.approx(rates[1] - rates[0])
        else:
            assert "between_models" not in summary
