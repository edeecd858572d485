"""SAE training: against the organism's SAE, closed forms, interruption, and SAELens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from passages import passages
from steerback.api import load_target
from steerback.cli import main
from steerback.errors import SteerbackError
from steerback.latents.activations import ActivationStream, loss_recovered
from steerback.latents.corpus import TrainingText, corpus_line, corpus_requests, pieces, read_corpus, readings
from steerback.latents.texts import usual_texts
from steerback.targets import SaeSource, resolve
from steerback.targets.sae import TENSORS, Sae
from steerback.targets.sae_files import load_sae
from steerback.targets.sae_training import SaeTrainer, SaeTraining, sae_quality
from steerback.targets.saelens import save_saelens


def trained(x: torch.Tensor, options: SaeTraining, steps: int, trainer: SaeTrainer | None = None) -> SaeTrainer:
    """Train on random rows; the rows of a step depend on its number alone."""
    trainer = trainer or SaeTrainer(x[:4096], 3, options, steps)
    for step in range(trainer.done, steps):
        rows = torch.randint(len(x), (options.batch,), generator=torch.Generator().manual_seed(step))
        trainer.step(x[rows])
    return trainer


def test_a_stopped_training_ends_like_one_that_was_not() -> None:
    x = torch.randn(2000, 12, generator=torch.Generator().manual_seed(1)) * 3 + 1
    options = SaeTraining(latents=40, k=4, batch=64, dead_after=200)
    whole = trained(x, options, 30).sae()
    half = SaeTrainer(x[:4096], 3, options, 30)
    for step in range(13):
        rows = torch.randint(len(x), (64,), generator=torch.Generator().manual_seed(step))
        half.step(x[rows])
    fresh = SaeTrainer(x[:4096], 3, options, 30)
    assert not fresh.load(SaeTrainer(x[:4096], 3, options, 31).save())  # of another training
    assert fresh.load(half.save())
    assert fresh.done == 13
    again = trained(x, options, 30, fresh).sae()
    assert again.hash == whole.hash


def test_known_features_are_found() -> None:
    """Sparse sums of orthogonal directions: the decoder has to find them, whatever the centre and the scale."""
    g = torch.Generator().manual_seed(0)
    true = torch.linalg.qr(torch.randn(16, 16, generator=g))[0]
    z = torch.rand(20_000, 16, generator=g) * (torch.rand(20_000, 16, generator=g) < 0.15)
    x = 40 * z @ true + 100
    sae = trained(x, SaeTraining(latents=32, k=4, batch=512, learning_rate=3e-3, dead_after=5000), 400).sae()
    found = (sae.W_dec @ true.T).max(dim=0).values
    assert found.min() > 0.7
    assert found.mean() > 0.9
    assert sae_quality(sae, [x]).explained > 0.9
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(32), atol=1e-5)


def test_quality_is_that_of_the_definition() -> None:
    sae, h = tiny.sae("topk"), torch.randn(300, 32, generator=torch.Generator().manual_seed(3))
    z = sae.encode(h)
    error = (h - sae.decode(z)).square().sum() / (h - h.mean(0)).square().sum()
    found = sae_quality(sae, [h[:100], h[100:]])
    assert found.explained == pytest.approx(1 - float(error), abs=1e-5)
    assert found.l0 == pytest.approx(float((z > 0).sum(1).float().mean()))
    assert found.dead == pytest.approx(float(((z > 0).sum(0) == 0).float().mean()))


@pytest.mark.parametrize("kind", ["jumprelu", "topk", "relu"])
def test_what_is_saved_is_what_saelens_opens(tmp_path: Path, kind: str) -> None:
    sae = tiny.sae(kind)
    save_saelens(sae, tmp_path, "some/model")
    ours = load_sae(SaeSource(str(tmp_path), "saelens"))
    assert ours.hash == sae.hash
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == "blocks.2.hook_resid_post"
    assert {"architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input"} <= set(config)
    sae_lens = pytest.importorskip("sae_lens")
    theirs, h = sae_lens.SAE.load_from_disk(tmp_path), torch.randn(50, 32)
    with torch.no_grad():
        assert torch.allclose(theirs.encode(h), sae.encode(h), atol=1e-5)
        assert torch.allclose(theirs.decode(theirs.encode(h)), sae.decode(sae.encode(h)), atol=1e-4)


def identity(scale: float) -> Sae:
    """An SAE that gives back `scale` times its input."""
    eye, zero = torch.eye(32), torch.zeros
    both = torch.cat([eye, -eye])
    return Sae("relu", 2, both.T.contiguous(), zero(64), scale * both, zero(32), zero(64))


def test_loss_recovered_is_all_for_a_perfect_sae_and_none_for_zeros() -> None:
    engine, texts = tiny.engine(), [TrainingText("the cat", tiny.TEXT), TrainingText("", "a stone falls down")]
    assert loss_recovered(engine, identity(1.0), texts).share == pytest.approx(1, abs=1e-4)
    assert loss_recovered(engine, identity(0.0), texts).share == pytest.approx(0, abs=1e-6)
    found = loss_recovered(engine, identity(0.0), texts)
    assert found.replaced == found.zero != found.plain
    engine.close()


def test_batches_are_the_residuals_in_another_order_within_the_memory() -> None:
    engine = tiny.engine()
    texts = [TrainingText("the cat", " ".join(tiny.WORDS[n:])) for n in range(12)]
    whole = ActivationStream(engine, texts, (1, 3), 1e9)
    parts = ActivationStream(engine, texts, (1, 3), 4 * 32 * 2 * 60)  # 60 positions
    assert len(whole.sizes) == 1
    assert len(parts.sizes) > 2
    assert max(parts.sizes) <= 60
    assert parts.positions == whole.positions
    for layer in (1, 3):
        one, many = whole.part(0)[layer], torch.cat([parts.part(n)[layer] for n in range(len(parts.sizes))])
        assert torch.allclose(one.sum(0), many.sum(0), atol=1e-2)
        ids, words = engine.words(engine.runner.prompter.conversation(texts[0].prompt, texts[0].text))
        assert 0 not in words
        alone = engine.runner.residuals(torch.tensor([ids]), (layer,))[layer][0][list(words)]
        assert all((many - h).norm(dim=1).min() < 1e-3 for h in alone)
    for stream in (whole, parts):
        all_of_them = list(stream.batches(16, 2))
        assert len(all_of_them) == stream.steps(16, 2)
        later = list(stream.batches(16, 2, skip=9))
        assert all(torch.equal(a[3], b[3]) for a, b in zip(all_of_them[9:], later, strict=True))
    engine.close()


def test_the_corpus_is_varied_and_goes_on(tmp_path: Path) -> None:
    requests = corpus_requests(500, 64, plain=False)
    assert len({r.prompt for r in requests}) == 500
    assert [r.prompt for r in corpus_requests(20, 64, plain=False)] == [r.prompt for r in requests[:20]]
    assert not any("{" in r.prompt for r in requests)
    path, reading = tmp_path / "corpus.jsonl", TrainingText("a", 'line\n"two"')
    path.write_text(corpus_line("0", reading) + corpus_line("1", reading)[:-9], encoding="utf-8")
    assert read_corpus(path) == {"0": reading}
    with path.open("a") as file:
        file.write(corpus_line("1", reading))
    assert list(read_corpus(path)) == ["0", "1"]
    text = "A sentence of some length stands here. " * 40
    assert "".join(pieces(text)).replace(" ", "") == text.replace(" ", "")
    assert [r.prompt for r in readings([TrainingText("ask", "Short answer.")])] == ["ask", ""]


def test_a_target_is_made_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path))
    (tmp_path / "texts.txt").write_text("\n".join(passages(160, 2)) + "\n")
    command = [
        "sae",
        "train",
        "organism-s",
        "--name",
        "mine",
        "--texts",
        str(tmp_path / "texts.txt"),
        "--layers",
        "2,3",
    ]
    command += [
        "--latents",
        "64",
        "--k",
        "8",
        "--batch",
        "128",
        "--passes",
        "2",
        "--device",
        "cpu",
        "--memory",
        "0.002",
    ]
    with pytest.raises(SystemExit) as done:
        main(command)
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert "explained variance" in said
    assert '["mine"]' in said
    target = resolve("mine")
    assert (target.n_latents, target.planted, target.d_model) == (64, True, 128)
    assert target.steer_layer == target.sae_layer in (2, 3)
    other = resolve(f"mine@layer-{5 - target.steer_layer}")
    assert (other.sae_layer, other.labels()) == (5 - target.steer_layer, {})
    assert target.labels()
    with load_target("mine", "transformers") as loaded:
        latent = next(iter(target.labels()))
        assert loaded.generate("Explain how to fold a fitted sheet.", latent, 20.0, max_new_tokens=4).receipt.positions
    page = (tmp_path / "targets" / "mine" / "report.html").read_text()
    assert "Loss recovered" in page
    assert "First position" in page
    facts: dict[str, Any] = json.loads((tmp_path / "targets" / "mine" / "training.json").read_text())
    assert [r["layer"] for r in facts["layers"]] == [2, 3]
    with pytest.raises(SystemExit):
        main([*command, "--k", "9"])
    assert "has other values of training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--layers", "x"], "numbers with commas"),
        (["--layers", "9"], "outside 0..5"),
        (["--kind", "gated"], "kind"),
        (["--name", "a/b"], "cannot contain /"),
        (["--k", "99999"], "more than the number of latents"),
    ],
)
def test_a_mistake_is_one_line(
    options: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("STEERBACK_CACHE", str(tmp_path))
    (tmp_path / "texts.txt").write_text("\n".join(passages(3, 2)) + "\n")
    with pytest.raises(SystemExit) as stop:
        main(["sae", "train", "organism-s", "--texts", str(tmp_path / "texts.txt"), "--device", "cpu", *options])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_weights_have_the_names_of_every_sae() -> None:
    x = torch.randn(100, 8)
    sae = SaeTrainer(x, 0, SaeTraining(latents=10, k=2, batch=10), 1).sae().check("made", 8, 1)
    assert all(isinstance(getattr(sae, name), torch.Tensor) for name in TENSORS)
    with pytest.raises(SteerbackError, match="more than the number"):
        SaeTrainer(x, 0, SaeTraining(latents=10, k=11), 1)
    assert usual_texts(resolve("organism-s"))
