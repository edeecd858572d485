"""The doctor passes the organisms, and detects wrong layers, wrong SAEs and missing steering."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from steerback.api import LoadedTarget, load_target
from steerback.cli import main
from steerback.engines.transformers import TransformersEngine
from steerback.errors import SteerbackError
from steerback.jobs.doctor import examine, fits, neighbours, receipt_fault
from steerback.latents.contexts import top_contexts
from steerback.latents.texts import usual_texts
from steerback.records import Completion, Intervention, Receipt
from steerback.targets import resolve
from steerback.targets.sae import Sae
from tiny import WORDS

TEXTS = [" ".join(WORDS[n : n + 6]) for n in range(10)]


@pytest.fixture(scope="module")
def organism() -> LoadedTarget:
    return load_target("organism-s", "transformers")


@contextlib.contextmanager
def holding(engine: Any, sae: Sae) -> Iterator[None]:
    """The engine with another SAE for a while."""
    right = engine.sae
    engine.sae = sae
    engine.__dict__.pop("encoder", None)
    try:
        yield
    finally:
        engine.sae = right
        engine.__dict__.pop("encoder", None)


def verdicts(loaded: LoadedTarget, layer: int | None = None) -> dict[str, str]:
    report = examine(loaded, layer, usual_texts(resolve("organism"))[::10][:8])
    assert json.dumps(report.to_json())
    return {check.name: check.verdict for check in report.checks}


def test_a_right_target_is_ok(organism: LoadedTarget) -> None:
    report = examine(organism)
    assert report.verdict == "ok", report.lines()
    said = "\n".join(report.lines())
    assert "layer 3: explained variance 0.8" in said
    assert "norm added 25" in said
    assert report.lines()[-1] == "organism-s: ok (6 ok, 0 warning, 0 failed)"


@pytest.mark.parametrize("layer", [0, 1, 2, 4, 5])
def test_a_wrong_layer_is_told(organism: LoadedTarget, layer: int) -> None:
    report = examine(organism, layer, usual_texts(resolve("organism"))[::7])
    told = next(check for check in report.checks if check.name == "layer")
    assert report.verdict == told.verdict == "failed"
    assert "the SAE does not belong to this layer: at layer 3 it explains 0.8" in told.line
    with pytest.raises(SteerbackError, match=r"--layer 6 is outside 0\.\.5"):
        examine(organism, 6)


@pytest.mark.parametrize("damage", ["scale", "permuted", "other model", "bias"])
def test_a_wrong_sae_is_told(organism: LoadedTarget, damage: str) -> None:
    engine: Any = organism.engine
    right = engine.sae
    g = torch.Generator().manual_seed(0)
    if damage == "scale":  # a normalisation of the inputs that was not folded in
        wrong = replace(right, W_enc=right.W_enc * 4, W_dec=right.W_dec * 4)
    elif damage == "permuted":  # the width fits, the residual's axes do not
        order = torch.randperm(right.d_model, generator=g)
        wrong = replace(right, W_enc=right.W_enc[order])
    elif damage == "other model":
        wrong = replace(right, W_enc=torch.randn(right.W_enc.shape, generator=g) / right.d_model**0.5)
    else:  # thresholds that nothing reaches
        wrong = replace(right, threshold=right.threshold + 1e4)
    with holding(engine, wrong):
        assert verdicts(organism)["layer"] == "failed"
    assert verdicts(organism)["layer"] == "ok"


def test_a_prior_of_another_scale_and_a_missing_direction_are_told(organism: LoadedTarget) -> None:
    loud = replace(organism.target, boost_prior=replace(organism.target.boost_prior, mean=1e4, high=1e5))
    assert verdicts(LoadedTarget(loud, organism.engine))["boost prior"] == "warning"
    engine: Any = organism.engine
    right = engine.sae
    with holding(engine, replace(right, W_dec=right.W_dec.clone().index_fill_(0, torch.tensor([5]), 0.0))):
        assert verdicts(organism)["SAE"] == "warning"


def test_receipts_that_do_not_fit_are_failures(organism: LoadedTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = (Intervention("add", 1, 4.0),)
    plain = Completion("a", (1, 2, 3), 5, "length", Receipt())
    steered = Completion("b", (1, 2, 3), 5, "length", Receipt(5, 2, 4.0))
    assert receipt_fault(plain, steered, edits, 4.0) == ""
    assert "unsteered response was steered" in receipt_fault(steered, steered, edits, 4.0)
    assert "not every position" in receipt_fault(plain, replace(steered, receipt=Receipt(5, 1, 4.0)), edits, 4.0)
    assert "expected 8" in receipt_fault(plain, steered, edits, 8.0)
    monkeypatch.setattr(LoadedTarget, "complete", lambda *_: [plain, replace(steered, receipt=Receipt())])
    assert verdicts(organism)["steering"] == "failed"
    good = Receipt(5, 2, organism.target.boost_prior.mean)
    monkeypatch.setattr(LoadedTarget, "complete", lambda *_: [plain, replace(plain, receipt=good)])
    assert verdicts(organism)["steering"] == "warning"  # steered, and the same text


def test_fit_equals_numpy() -> None:
    engine = tiny.engine(sae_kind="jumprelu")
    sae, plain, prompter = engine.sae, tiny.model(), engine.runner.prompter
    assert sae is not None
    found = fits(engine, TEXTS, [1, 2])
    for layer in (1, 2):
        states = []
        for text in TEXTS:
            ids, head = prompter.tokens("", text), prompter.tokens("")
            with torch.no_grad():
                hidden = plain(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0, len(head) :]
            states.append(hidden.double().numpy())
        h = np.concatenate(states)
        pre = h @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy()
        z = pre * (pre > sae.threshold.double().numpy())
        error = h - (z @ sae.W_dec.double().numpy() + sae.b_dec.double().numpy())
        wanted = 1 - (error**2).sum() / ((h - h.mean(axis=0)) ** 2).sum()
        assert found[layer].explained == pytest.approx(wanted, abs=2e-3)
        assert found[layer].l0 == pytest.approx((z > 0).sum(axis=1).mean(), abs=0.05)


def test_contexts_equal_brute_force() -> None:
    engine = tiny.engine(sae_kind="jumprelu")
    sae = engine.sae
    assert sae is not None
    found = top_contexts(engine, TEXTS, n=3)
    peaks: dict[int, list[tuple[float, int, int]]] = {k: [] for k in range(sae.n_latents)}
    for n, _, states in engine.residuals([""] * len(TEXTS), TEXTS, (sae.layer,)):
        z = sae.encode(states[sae.layer])
        for k in range(sae.n_latents):
            peaks[k].append((float(z[:, k].max()), n, int(z[:, k].argmax())))
    for k, own in peaks.items():
        best = sorted((p for p in own if p[0] > 0), reverse=True)[:3]
        contexts = found.of(k)
        assert [c.activation for c in contexts] == pytest.approx([p[0] for p in best], rel=1e-4)
        for context, (_, n, _) in zip(contexts, best, strict=True):
            assert context.text in TEXTS[n]
            assert context.word.strip() == "" or context.word in TEXTS[n].split()
    assert set(found.active()) == {k for k, own in peaks.items() if max(own)[0] > 0}


def test_neighbours_are_near_and_in_range() -> None:
    assert neighbours(3, 6) == list(range(6))
    assert neighbours(50, 80) == [34, 42, 46, 48, 49, 50, 51, 52, 54, 58, 66]
    assert neighbours(0, 42) == [0, 1, 2, 4, 8, 16]


def test_a_target_without_sae_is_examined_with_its_direction() -> None:
    direction = {"warmth": torch.nn.functional.normalize(torch.ones(32), dim=0)}
    parts = tiny.assemble(tiny.target(), tiny.model(), tiny.tokenizer(), None, directions=("warmth",))
    engine = TransformersEngine(parts, 4, direction)
    target = replace(tiny.target(direction_files=(("warmth", "x.npy"),)), n_latents=0, max_new_tokens=6)
    report = examine(LoadedTarget(target, engine), texts=TEXTS)
    assert [c.name for c in report.checks] == ["model", "boost prior", "steering"]
    assert report.checks[-1].verdict in ("ok", "warning")
    bare = LoadedTarget(replace(target, direction_files=()), engine)
    assert examine(bare, texts=TEXTS).checks[-1].verdict == "failed"


def test_the_verb_prints_writes_and_exits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def verb(*arguments: str) -> int:
        with pytest.raises(SystemExit) as left:
            main(["doctor", *arguments])
        return int(left.value.code or 0)

    assert verb("organism", "--json", str(tmp_path / "report.json")) == 0
    assert "organism: ok" in capsys.readouterr().out
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["verdict"] == "ok"
    assert stored["checks"][2]["data"]["3"]["explained_variance"] > 0.8
    assert verb("organism", "--layer", "2") == 1
    assert "the SAE does not belong to this layer: at layer 3" in capsys.readouterr().out
    assert verb("organism", "--layer", "77") == 2
    assert verb("organism", "--texts", str(tmp_path / "none.txt")) == 2
