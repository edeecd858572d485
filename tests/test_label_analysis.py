"""Human labels in the analysis: judge errors and corrected rates in summary, tables and comparisons."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from labelled import FIRST, RESTART, make_run, verdict
from steerback.cli import main
from steerback.jobs import campaign
from steerback.jobs.labelling import draw_sample, import_labels
from steerback.store.facts import LABEL_SAMPLES
from steerback.store.run import Run

PLACE = len(FIRST) + 1
LATENTS, EACH = 10, 20


def arms(seed: int, rates: dict[str, float], recall: float, floor: float) -> tuple[Any, Any]:
    """By condition and latent: the judge's verdicts and the truth of each trial."""
    rng = random.Random(seed)
    truth = {c: [[rng.random() < rate for _ in range(EACH)] for _ in range(LATENTS)] for c, rate in rates.items()}
    seen = {c: [[rng.random() < (recall if t else floor) for t in row] for row in rows] for c, rows in truth.items()}
    return seen, truth


def label_all(folder: Path, tmp: Path, size: int, name: str, mistakes: int = 0) -> str:
    """Draw a sample and label it as the text says, but for the first `mistakes` responses."""
    sample = draw_sample(folder, size, seed=5)
    with Run.read(folder) as run:
        items = (run.ledger.get("model", LABEL_SAMPLES) or {})[sample.identifier].items
        texts = {r.trial.key: r.judged_text for r in run.ledger.rows()}
    labels = {}
    for nth, (number, key) in enumerate(items.items()):
        restarts = (RESTART in texts[key]) != (nth < mistakes)
        labels[number] = {"restarts": [PLACE], "scores": [30, 80]} if restarts else {"scores": [30]}
        if restarts and RESTART not in texts[key]:
            labels[number]["restarts"] = [texts[key].index("They")]
    body = {"format": "steerback-labels-1", "sample": sample.identifier, "rubric": "human-1", "labels": labels}
    file = tmp / f"{name}.json"
    file.write_text(json.dumps(body))
    import_labels(folder, file, name)
    return sample.identifier


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    seen, truth = arms(1, {"baseline": 0.2, "ablated": 0.1}, recall=0.7, floor=0.05)
    return make_run(tmp_path / "run", seen, truth)


def test_without_labels_nothing_is_added(folder: Path) -> None:
    analysis = campaign.reanalyse(folder, draws=100)
    assert "labels" not in analysis.summary["targets"]["model"]  # type: ignore[index]
    assert list(analysis.shown.tables) == ["table", "comparisons"]
    draw_sample(folder, 20, seed=1)  # a sample that nobody has labelled yet
    assert list(campaign.reanalyse(folder, draws=100).shown.tables) == ["table", "comparisons"]


def test_labels_on_all_responses_give_the_true_rates_and_errors(folder: Path, tmp_path: Path) -> None:
    label_all(folder, tmp_path, 400, "ann")
    found = campaign.reanalyse(folder, draws=100).summary["targets"]["model"]["labels"]  # type: ignore[index]
    seen, truth = arms(1, {"baseline": 0.2, "ablated": 0.1}, recall=0.7, floor=0.05)
    rates = {}
    for condition in truth:
        flat = [t for row in truth[condition] for t in row]
        rates[condition] = sum(flat) / len(flat)
        assert found["rates"][condition]["multi_attempt_rate"]["corrected"]["value"] == pytest.approx(rates[condition])
        assert found["rates"][condition]["multi_attempt_rate"]["judged"] != pytest.approx(rates[condition])
        assert found["rates"][condition]["multi_attempt_rate"]["labels"] == 200
    difference = found["differences"]["ablated"]["esr_rate"]
    assert difference["value"] == pytest.approx(rates["ablated"] - rates["baseline"])
    pairs = [(s, t) for c in truth for a, b in zip(seen[c], truth[c], strict=True) for s, t in zip(a, b, strict=True)]
    quality = found["judges"]["machine"]
    assert quality["precision"]["value"] == pytest.approx(sum(s and t for s, t in pairs) / sum(s for s, _ in pairs))
    assert quality["recall"]["value"] == pytest.approx(sum(s and t for s, t in pairs) / sum(t for _, t in pairs))


def test_a_sample_weighs_its_labels_back_and_the_tables_show_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label_all(folder, tmp_path, 120, "ann")
    with pytest.raises(SystemExit) as ended:
        main(["figures", "run", "--draws", "100", "--runs", str(folder.parent)])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "corrected multi-attempt %" in said
    assert "false positives %" in said
    assert "corrected multi-attempt %" in (folder / "table.txt").read_text()
    assert "model: ablated − baseline" in (folder / "corrected.txt").read_text()
    assert "corrected_multi_attempt_rate_value" in (folder / "table.csv").read_text()
    rates = json.loads((folder / "summary.json").read_text())["targets"]["model"]["labels"]["rates"]
    _, truth = arms(1, {"baseline": 0.2, "ablated": 0.1}, recall=0.7, floor=0.05)
    for condition, rows in truth.items():
        real = sum(t for row in rows for t in row) / (LATENTS * EACH)
        corrected = rates[condition]["multi_attempt_rate"]["corrected"]
        assert corrected["low"] <= real <= corrected["high"]
    assert sum(r["multi_attempt_rate"]["labels"] for r in rates.values()) == 120


def test_the_rate_by_the_labels_alone_is_weighted_back_too(folder: Path, tmp_path: Path) -> None:
    identifier = label_all(folder, tmp_path, 120, "ann")
    with Run.read(folder) as run:
        sample = (run.ledger.get("model", LABEL_SAMPLES) or {})[identifier]
        labelled = [r for r in run.ledger.rows(judge="human:ann") if r.attempts]
        flagged = {r.trial.key: len(r.attempts) > 1 for r in run.ledger.rows(judge="machine")}
    expected = 0.0
    for stratum in sample.strata:
        if stratum.condition == "baseline":
            mine = [r for r in labelled if r.trial.condition == "baseline" and flagged[r.trial.key] == stratum.several]
            assert len(mine) == stratum.drawn
            expected += stratum.available * sum(len(r.attempts) > 1 for r in mine) / len(mine) / (LATENTS * EACH)
    summary = campaign.reanalyse(folder, "human:ann", draws=100).summary
    found = summary["targets"]["model"]["labels"]["rates"]["baseline"]["multi_attempt_rate"]  # type: ignore[index]
    assert found["corrected"]["value"] == pytest.approx(expected)
    assert found["judged"] is None


def test_every_judge_is_measured_on_the_labels_also_one_that_did_not_draw_the_sample(
    folder: Path, tmp_path: Path
) -> None:
    label_all(folder, tmp_path, 400, "ann")
    with Run.reopen(folder) as run:
        rows = run.ledger.rows()
        run.ledger.add_judgements(
            (r.trial.key, verdict("perfect", RESTART in r.judged_text, text=r.judged_text)) for r in rows
        )
    judges = campaign.reanalyse(folder, draws=100).summary["targets"]["model"]["labels"]["judges"]  # type: ignore[index]
    assert set(judges) == {"machine", "perfect"}
    assert judges["perfect"]["precision"]["value"] == judges["perfect"]["recall"]["value"] == 1
    assert judges["machine"]["recall"]["value"] < 0.9


def test_two_labellers_show_their_agreement_and_count_as_their_mean(folder: Path, tmp_path: Path) -> None:
    label_all(folder, tmp_path, 400, "ann")
    label_all(folder, tmp_path, 400, "ben", mistakes=40)
    analysis = campaign.reanalyse(folder, draws=100)
    found = analysis.summary["targets"]["model"]["labels"]  # type: ignore[index]
    (pair,) = found["agreement of labellers"]
    assert (pair["a"], pair["b"]) == ("human:ann", "human:ben")
    assert pair["several"]["share"]["value"] == pytest.approx(360 / 400)
    assert 0 < found["alpha"]["several attempts"]["value"] < 1
    assert "labellers" in analysis.shown.tables
    with Run.read(folder) as run:
        people = [run.ledger.rows(condition="baseline", judge=f"human:{n}") for n in ("ann", "ben")]
    mean = sum(len(r.attempts) > 1 for rows in people for r in rows) / 2 / (LATENTS * EACH)
    assert found["rates"]["baseline"]["multi_attempt_rate"]["corrected"]["value"] == pytest.approx(mean)


def test_the_corrected_esr_rate_never_exceeds_the_corrected_multi_attempt_rate(tmp_path: Path) -> None:
    """A labeller who contradicts the judge often, and a judge whose attempts do not all improve."""
    for seed in range(5):
        seen, truth = arms(seed, {"baseline": 0.3}, recall=0.6, floor=0.1)
        run = make_run(tmp_path / f"run{seed}", seen, truth)
        with Run.reopen(run) as opened:
            rows = opened.ledger.rows()
            opened.ledger.add_judgements(
                (r.trial.key, verdict("other", i % 3 == 0, gain=40.0 if i % 2 else -20.0, text=r.judged_text))
                for i, r in enumerate(rows)
            )
        label_all(run, tmp_path, 40, "ann", mistakes=12)
        for judge in ("machine", "other", "human:ann"):
            summary = campaign.reanalyse(run, judge, draws=100).summary
            found = summary["targets"]["model"]["labels"]["rates"]["baseline"]  # type: ignore[index]
            several, improved = (found[m]["corrected"]["value"] for m in ("multi_attempt_rate", "esr_rate"))
            assert improved <= several + 1e-12
