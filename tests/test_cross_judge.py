"""Experiment 7 end to end with the two offline judges, on runs with known truth."""

from __future__ import annotations

import asyncio
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fake_judges import FakeJudge
from steerback.analysis.base import planted
from steerback.analysis.cross_judge import analyse
from steerback.config import RunConfig
from steerback.errors import SteerbackError
from steerback.experiments.cross_judge import gather
from steerback.figures.cross_judge import agreement_table
from steerback.jobs import execute, judging
from steerback.jobs.check import Makers
from steerback.judging import Limits, References, make_judge
from steerback.judging.base import JudgeItem
from steerback.organism import corpus
from steerback.records import Completion, Intervention, Receipt, Sampling, Trial
from steerback.store.facts import PROVENANCE, SAMPLE, Provenance
from steerback.store.progress import Silent
from steerback.store.run import Run
from steerback.study.pipeline import Workbench, judge_rows
from tools.organism.documents import make_document

LATENTS = 8


def source(root: Path, name: str, target: str, share: float, n: int, seed: int) -> Path:
    """A finished run: unsteered references, and n responses of which `share` drift (and may restart)."""
    rng = random.Random(seed)
    prompts = [t.key for t in corpus.howtos()][:6]
    subjects = [t.key for t in corpus.subjects()][:LATENTS]
    config = RunConfig(experiment="esr", targets=(target,), judge="offline", engine="scripted")
    texts: list[tuple[Trial, str]] = []
    for i in range(24):
        prompt = prompts[i % 6]
        text = make_document(rng, "answer", prompt, metaprompt=None).response
        texts.append((Trial(f"{target}/reference/unsteered/{i}", target, "reference", "unsteered", i, prompt, i), text))
    for i in range(n):
        prompt, latent = prompts[i % 6], i % LATENTS
        kind: Any = "drift" if rng.random() < share else "answer"
        text = make_document(rng, kind, prompt, other=subjects[latent], metaprompt=None).response
        trial = Trial(
            f"{target}/measure/steered/{i}",
            target,
            "measure",
            "steered",
            i,
            prompt,
            seed=i,
            latent=latent,
            label=subjects[latent],
            interventions=(Intervention("add", latent, 1.0),),
        )
        texts.append((trial, text))
    judge = make_judge("offline")
    with Run.start(root / name, config) as run:
        run.ledger.add_trials([t for t, _ in texts])
        run.ledger.add_completions(
            (t.key, Completion(text, (1, 2), 3, "stop", Receipt(3, 1, 1.0) if t.interventions else Receipt()), "engine")
            for t, text in texts
        )
        known: dict[str, list[str]] = {}
        for t, text in texts[:24]:
            known.setdefault(t.prompt, []).append(text)
        judge.prepare(References(known))
        measured = texts[24:]
        verdicts = judge.judge_batch([JudgeItem(t.key, t.prompt, x, t.label, t.latent) for t, x in measured])  # type: ignore[attr-defined]
        run.ledger.add_judgements((t.key, v) for (t, _), v in zip(measured, verdicts, strict=True))
    return root / name


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    sources = [
        source(root, "a", "organism", 0.7, 240, seed=1),
        source(root, "b", "organism-s", 0.2, 240, seed=2),
    ]
    config = RunConfig(experiment="cross-judge", targets=("organism", "organism-s"), judge="offline", engine="scripted")
    with Run.start(root / "cross", config) as opened:
        count = gather(opened, sources, sample=240, minimum=60)
        assert gather(opened, sources, sample=240, minimum=60) == count  # again: nothing is added
        assert len(opened.ledger.rows(stage="measure")) == count
    for judge in ("offline", "offline-bayes"):
        judging.judge_run(root / "cross", judge)
    return root / "cross"


def test_the_sample_takes_multi_attempt_trials_first_and_enough_single_ones(run: Path) -> None:
    with Run.read(run) as opened:
        for target, folder in (("organism", "a"), ("organism-s", "b")):
            rows = opened.ledger.rows(target, "measure", judge="offline")
            fact = opened.ledger.get(target, SAMPLE)
            with Run.read(run.parent / folder) as other:
                all_rows = other.ledger.rows(target, "measure", judge="offline")
            all_several = sum(len(r.judgement.gated_attempts()) > 1 for r in all_rows if r.judgement)
            several = sum(len(r.judgement.gated_attempts()) > 1 for r in rows if r.judgement)
            assert len(rows) == 120  # 240 in all, over two targets
            assert several == fact.several == min(all_several, 120 - 30)  # half of the minimum stays for single ones
            assert fact.single == 120 - several
            assert fact.weights.several == pytest.approx(all_several / several)
            assert fact.weights.single == pytest.approx((240 - all_several) / fact.single)


def test_a_planted_target_of_the_users_own_is_still_said_to_be_planted(tmp_path: Path) -> None:
    folder = source(tmp_path, "own", "my-model", 0.7, 120, seed=3)
    with Run.reopen(folder) as opened:
        opened.ledger.put("my-model", PROVENANCE, Provenance(planted=True))
    config = RunConfig(experiment="cross-judge", targets=("my-model",), judge="offline", engine="scripted")
    with Run.start(tmp_path / "cross", config) as opened:
        gather(opened, [folder], sample=60, minimum=30)
        assert planted(opened.ledger, ["my-model", "another"]) == ["my-model"]


def test_agreement_per_target_is_in_the_summary_where_compare_looks_for_it(run: Path) -> None:
    with Run.read(run) as opened:
        found = analyse(opened.ledger, "offline", draws=100)
        rows = {j: opened.ledger.rows("organism-s", "measure", judge=j) for j in found.judges}
    seen = {j: [len(r.judgement.gated_attempts()) > 1 for r in own if r.judgement] for j, own in rows.items()}
    equal = [a == b for a, b in zip(*seen.values(), strict=True)]
    agreement = found.to_json()["targets"]["organism-s"]["agreement"]["offline / offline-bayes"]
    assert agreement["multi_attempt"]["value"] == pytest.approx(sum(equal) / len(equal))


def test_nothing_is_judged_twice(run: Path) -> None:
    assert judging.judge_run(run, "offline-bayes") == 0
    with Run.read(run) as opened:
        assert opened.ledger.judges() == ["offline", "offline-bayes"]


def test_other_work_goes_on_while_a_judge_judges(tmp_path: Path) -> None:
    """In a campaign other experiments wait for the same event loop."""
    folder, steps = source(tmp_path, "a", "organism", 0.5, 160, seed=3), 0

    async def both() -> int:
        async def other() -> None:
            nonlocal steps
            while True:
                await asyncio.sleep(0)
                steps += 1

        task = asyncio.create_task(other())
        with Run.reopen(folder) as opened:
            count = await judging.judge_all(opened, make_judge("offline-bayes"), Silent(), None, Makers())
        task.cancel()
        return count

    assert asyncio.run(both()) > 64
    assert steps > 2


def test_agreement_and_order_of_models(run: Path) -> None:
    with Run.read(run) as opened:
        found = analyse(opened.ledger, "offline", draws=200)
        plain = opened.ledger.rows("organism", "measure", judge="offline")
    pair = found.pairs["offline", "offline-bayes"]
    a = {r.trial.key: len(r.judgement.gated_attempts()) > 1 for r in plain if r.judgement}
    assert 0.9 < (pair.several.value or 0) <= 1
    assert 0.8 < (pair.several_kappa.value or 0) <= 1
    assert (pair.first.value or 0) > 0.6
    assert pair.several.low is not None
    assert pair.several.low < (pair.several.value or 0)
    assert (found.alpha_several.value or 0) > 0.8
    assert found.orders["multi_attempt_rate"]["offline"] == ["organism", "organism-s"]
    assert found.same_order("multi_attempt_rate")
    with Run.read(run.parent / "a") as other:
        rows = other.ledger.rows("organism", "measure", judge="offline")
        true = sum(len(r.judgement.gated_attempts()) > 1 for r in rows if r.judgement) / len(rows)
    assert found.weighted["offline", "organism"]["multi_attempt_rate"] == pytest.approx(true)
    assert sum(a.values()) / len(a) > true  # the sample itself is richer in restarts


def test_the_analysis_writes_tables_and_figures(run: Path, tmp_path: Path) -> None:
    with Run.read(run) as opened:
        analysis = execute.analyse(opened, "offline", draws=100)
    for name in ("figureA2.png", "figureA3.pdf", "figureA4.png", "agreement.txt", "judges.csv", "summary.json"):
        assert (run / name).stat().st_size > 100
    assert "rank them alike" in analysis.shown.lines[0] or "differ" in analysis.shown.lines[0]
    assert analysis.summary["pairs"]["offline / offline-bayes"]["several"]["value"] > 0.9


def test_a_model_judges_the_run_too_and_its_key_is_nowhere(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("inspect_ai")
    key = "sk-planted-9876543210"
    folder = tmp_path / "copy"
    shutil.copytree(run, folder)
    monkeypatch.setenv("OPENROUTER_API_KEY", key)
    with FakeJudge(lambda response, before: "429" if "sock" in response else "") as server:
        monkeypatch.setenv("OPENROUTER_BASE_URL", server.url + "/v1")
        server.keep_requests = False
        with Run.reopen(folder) as opened:
            few = [r.trial.key for r in opened.ledger.rows(stage="measure")][:12]
            judge: Any = make_judge("qwen3-32b", Limits(first_wait=0.01, attempt_timeout=5, max_retries=1))
            bench = Workbench(opened.ledger, None, judge, Sampling(), Silent(), None)
            asyncio.run(judge_rows(bench, few))
        assert sum(server.asked.values()) >= len(few)
    with Run.read(folder) as opened:
        found = [r.judgement for r in opened.ledger.rows(keys=few, judge="qwen3-32b")]
        assert opened.ledger.judges() == ["offline", "offline-bayes", "qwen3-32b"]
    assert all(j is not None and (j.status == "scored" or j.reason) for j in found)
    assert sum(j is not None and j.status == "scored" for j in found) >= 8
    shown = capsys.readouterr()
    assert key not in shown.out + shown.err + str(judge.describe())
    for file in (f for f in folder.rglob("*") if f.is_file()):
        assert key.encode() not in file.read_bytes(), file


def test_one_judge_is_not_enough(run: Path) -> None:
    with Run.read(run.parent / "a") as opened, pytest.raises(SteerbackError, match="two judges"):
        analyse(opened.ledger, "offline", 100)
    config = RunConfig(experiment="cross-judge", targets=("organism",))
    with Run.start(run.parent / "void", config) as opened, pytest.raises(SteerbackError, match="no judged trial"):
        gather(opened, [])


def test_agreement_with_human_labels_comes_first_and_changes_no_other_number(run: Path, tmp_path: Path) -> None:
    """Labels of the source run come along for the trials that were chosen; labellers rank no models."""
    with Run.read(run) as opened:
        before = analyse(opened.ledger, "offline", draws=100)
    sources = [Path(shutil.copytree(run.parent / name, tmp_path / name)) for name in ("a", "b")]
    with Run.reopen(sources[0]) as labelled:
        rows = labelled.ledger.rows("organism", "measure", judge="offline")[:60]
        verdicts = [(r.trial.key, replace(r.judgement, judge="human:ann")) for r in rows if r.judgement]
        labelled.ledger.add_judgements(verdicts)
    config = RunConfig(experiment="cross-judge", targets=("organism", "organism-s"), judge="offline", engine="scripted")
    with Run.start(tmp_path / "cross", config) as opened:
        gather(opened, sources, sample=240, minimum=60)
        chosen = {r.trial.key.partition("@")[0] for r in opened.ledger.rows(stage="measure")}
    judging.judge_run(tmp_path / "cross", "offline-bayes")
    with Run.read(tmp_path / "cross") as opened:
        found = analyse(opened.ledger, "offline", draws=100)
    pair = found.with_labels["human:ann", "offline"]
    assert pair.several.n == len(chosen & {key for key, _ in verdicts}) > 10
    assert pair.several.value == 1.0  # the labels are the judge's own verdicts
    table = agreement_table(found).shown
    assert list(table["judges"]) == ["human:ann / offline", "human:ann / offline-bayes", "offline / offline-bayes"]
    assert (found.judges, found.orders, found.weighted) == (before.judges, before.orders, before.weighted)
    assert found.pairs == before.pairs
    assert "human:ann / offline" in found.to_json()["labels"]  # type: ignore[operator]
