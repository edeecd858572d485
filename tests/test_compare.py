"""Comparison with published numbers: verdicts, intervals, and settings that deviate."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from steerback.config import RunConfig, authors, quick, specification
from steerback.errors import SteerbackError
from steerback.experiments import REGISTRY
from steerback.published.comparison import (
    Ours,
    Published,
    compare_published,
    comparison,
    deviations,
    interval_of,
    our_number,
    table_of_numbers,
    verdict,
)
from steerback.store.facts import CONFIG
from steerback.store.ledger import Ledger
from steerback.store.run import write_json


def finished(folder: Path, config: RunConfig, targets: dict[str, Any]) -> Path:
    """A run's folder with a summary made by hand."""
    folder.mkdir(parents=True)
    with Ledger(folder / "ledger.sqlite") as ledger:
        ledger.put("", CONFIG, config.model_dump(mode="json"))
    write_json(folder / "summary.json", {"experiment": config.experiment, "targets": targets})
    return folder


def rates(**values: tuple[float, float, float]) -> dict[str, Any]:
    found = {name: dict(zip(("value", "low", "high"), v, strict=True)) | {"n": 5000} for name, v in values.items()}
    return {"conditions": {"steered": {"headline": found}}}


SEVENTY = rates(multi_attempt_rate=(0.07, 0.05, 0.09), msi=(0.5, 0.1, 0.9), esr_rate=(0.01, 0.005, 0.02))


def by_quantity(lines: Any, run: str) -> dict[tuple[str, str], Any]:
    return {(x.row.quantity, x.source): x for x in lines if x.run == run}


def test_a_real_model_gets_verdicts(tmp_path: Path) -> None:
    config = authors("esr", ("llama-3.3-70b",)).model_copy(update={"judge": "claude-haiku-4-5-20251001"})
    lines = compare_published([finished(tmp_path / "big", config, {"llama-3.3-70b": SEVENTY})])
    found = by_quantity(lines, "big")
    assert found["multi-attempt rate at threshold", "paper"].verdict == "agrees"
    assert found["multi-attempt rate at threshold", "specification"].verdict == "higher"
    assert found["MSI at threshold", "specification"].verdict == "agrees"
    assert found["ESR rate at threshold", "paper"].verdict == "lower"
    told = found["multi-attempt rate at threshold", "specification"].deviations
    assert "target first score 30.0, not 50" in told
    assert not any("target first score" in d for d in found["ESR rate at threshold", "paper"].deviations)


@pytest.mark.parametrize(
    ("target", "judge", "expected"),
    [
        ("organism", "claude-sonnet-4-5-20250929", "none (built-in model)"),
        ("organism-l", "offline", "none (built-in model)"),
        ("llama-3.3-70b", "offline", "none (judge offline)"),
    ],
)
def test_no_verdict_from_an_organism_or_the_offline_judge(
    tmp_path: Path, target: str, judge: str, expected: str
) -> None:
    config = specification("esr", (target,)).model_copy(update={"judge": judge})
    lines = compare_published([finished(tmp_path / "small", config, {target: SEVENTY})])
    shown = [x for x in lines if x.run == "small"]
    assert len(shown) == 4
    assert {x.verdict for x in shown} == {expected}
    assert all((x.target, x.measured) == ("llama-3.3-70b", target) for x in shown)


def test_every_published_row_is_there_even_when_nothing_was_run(tmp_path: Path) -> None:
    table = table_of_numbers()
    rows, settings = table.rows, table.settings
    lines = compare_published([])
    assert len(lines) == sum(len(row.target) * len(row.published) for row in rows)
    assert {x.verdict for x in lines} == {"not measured"}
    known = {"finetune", "cross-judge", *REGISTRY}  # the two have their places, and come with their own work
    assert {row.experiment for row in rows} <= known
    config = specification("esr", ("x",)).model_dump(mode="json")
    for setting in settings:
        place: Any = config
        for part in setting.key.split("."):
            place = place[part]
    shown, _ = comparison(lines)
    assert "not measured" in shown.text(10_000)
    records = list(csv.DictReader(io.StringIO(shown.csv())))
    assert len(records) == len(lines)
    assert shown.markdown().splitlines()[1].startswith("| --- |")


def test_what_facts_say_is_what_the_table_holds() -> None:
    """Each number of the specification's and the paper's list, by hand."""
    rows = table_of_numbers().rows
    held = {(r.quantity, t, s): v for r in rows for t in r.target for s, v in r.published.items()}
    big = "llama-3.3-70b"
    assert held["multi-attempt rate at threshold", big, "specification"] == 0.017
    assert held["multi-attempt rate at threshold", big, "paper"] == 0.074
    assert held["MSI at threshold", big, "specification"] == 0.55
    assert held["ESR rate at threshold", big, "paper"] == 0.038
    assert held["multi-attempt rate, meta-prompt self-monitor", big, "specification"] == 0.098
    assert held["multi-attempt rate, meta-prompt self-monitor", big, "paper"] == 0.317
    assert held["MSI, meta-prompt self-monitor", big, "specification"] == 2.94
    assert held["MSI, detectors ablated", big, "specification"] == 0.24
    assert held["multi-attempt rate, detectors ablated", big, "specification"] == 0.0078
    assert held["multi-attempt rate, random latents ablated", big, "paper"] == 0.079
    assert held["detector activity, off topic / steered on-topic texts re-read unsteered", big, "specification"] == 7.7
    assert held["first score without steering", "all", "paper"] == (87.8, 91.8)
    assert held["restarts after a steered prefix, continued unsteered", big, "reader"] == (0.07, 0.135)


@pytest.mark.parametrize(
    ("ours", "published", "at_most", "expected"),
    [
        ((0.05, 0.04, 0.06), (0.07, 0.08), False, "lower"),
        ((0.05, 0.04, 0.06), (0.02, 0.03), False, "higher"),
        ((0.05, 0.04, 0.06), (0.06, 0.08), False, "agrees"),
        ((0.0, 0.0, 0.009), (0.011, 0.011), True, "agrees"),
        ((0.0, 0.0, 0.02), (0.011, 0.011), True, "open"),
        ((0.05, 0.03, 0.07), (0.011, 0.011), True, "higher"),
        ((0.05, None, None), (0.05, 0.05), False, "no interval"),
    ],
)
def test_verdicts(ours: Any, published: tuple[float, float], at_most: bool, expected: str) -> None:
    assert verdict(Ours(*ours, None), published, at_most) == expected


def test_published_rates_have_the_interval_of_their_trials() -> None:
    low, high = interval_of(0.074, True, 4877)
    for end in (low, high):  # Wilson's ends solve this equation
        assert abs(361 / 4877 - end) == pytest.approx(1.959964 * (end * (1 - end) / 4877) ** 0.5)
    assert interval_of(0.55, False, None) == (0.55, 0.55)
    assert interval_of(0.0, True, 13118)[1] > 0


def test_numbers_are_found_by_their_path() -> None:
    summary = {
        "conditions": {
            name: {"headline": {"msi": {"value": v, "low": v - 1, "high": v + 1, "n": 100}}}
            for name, v in (("random 1", 1.0), ("random 2", 2.0), ("baseline", 9.0))
        },
        "detectors": [{"latent": 1}, {"latent": 2}],
        "peaks": {"msi": {"at": -0.3, "low": -1.0, "high": 0.2}, "esr_rate": None},
    }

    def row(path: str, **more: Any) -> Published:
        return Published(quantity="q", experiment="e", target=("t",), path=path, **more)

    assert our_number(summary, row("conditions.random *.headline.msi")) == Ours(1.5, 0.5, 2.5, 200)
    assert our_number(summary, row("detectors", field="count")) == Ours(2, None, None, None)
    assert our_number(summary, row("peaks.msi", field="at")) == Ours(-0.3, -1.0, 0.2, None)
    assert our_number(summary, row("peaks.msi", field="at", interval=False)) == Ours(-0.3, None, None, None)
    assert our_number(summary, row("peaks.esr_rate")) is None
    assert our_number(summary, row("nothing.here")) is None


def test_deviations_name_what_differs() -> None:
    settings = table_of_numbers().settings
    config = quick("esr", ("organism",)).model_copy(update={"judge": "offline"})
    told = deviations(config, "specification", settings)
    assert "judge offline, not claude-sonnet-4-5-20250929" in told
    assert "latents 12, not 50 to 150" in told
    assert not any("temperature" in d for d in told)
    named = config.model_copy(update={"judge": "anthropic/claude-sonnet-4-5-20250929"})
    assert not any(d.startswith("judge") for d in deviations(named, "specification", settings))


@pytest.mark.parametrize("model", ["llama-3.3-70b", "llama-3.1-8b", "gemma-2-2b", "gemma-2-9b", "gemma-2-27b"])
def test_a_preset_deviates_from_its_source_in_nothing_but_what_is_ours(model: str) -> None:
    settings = table_of_numbers().settings
    for preset, column, judge in (
        (authors, "authors", "claude-haiku-4-5-20251001"),
        (specification, "specification", "claude-sonnet-4-5-20250929"),
    ):
        config = preset("esr", (model,))
        chosen = {"judge": judge, "selection": config.selection.model_copy(update={"rater": judge})}
        found = deviations(config.model_copy(update=chosen).of(config.targets[0]), column, settings)  # type: ignore[arg-type]
        assert [x for x in found if not x.startswith("our 38 prompts")] == []


def test_a_run_without_summary_is_refused(tmp_path: Path) -> None:
    folder = finished(tmp_path / "r", specification("esr", ("x",)), {})
    (folder / "summary.json").unlink()
    with pytest.raises(SteerbackError, match="not finished; resume it: steerback resume r"):
        compare_published([folder])
    (folder / "summary.json").write_text("{")
    with pytest.raises(SteerbackError, match="damaged"):
        compare_published([folder])
