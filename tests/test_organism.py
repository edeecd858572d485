"""The organism: properties of its corpus and weights, and quick checks of its behaviour."""

from __future__ import annotations

import csv
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from steerback.data.prompts import META_PROMPTS, load_prompts
from steerback.organism import NAMES, corpus, weights_dir
from steerback.organism.corpus.text import expand, expand_all, near, weighted
from steerback.organism.corpus.truth import read, sentence_topic
from tools.organism.documents import P_RESTART, P_RESTART_SELF_MONITORING, Document, documents, make_document

GROUPS = {"evaluation": "evaluation", "discovery": "organism-discovery", "heldout": "organism-held-out"}


def sample(n: int, seed: int = 5, **options: bool) -> list[Document]:
    return list(itertools.islice(documents(seed, **options), n))


def test_prompts_are_disjoint_and_as_many_as_promised() -> None:
    groups = {name: [t.key for t in corpus.howtos(name)] for name in GROUPS}
    assert len(groups["evaluation"]) == 38
    assert len(groups["discovery"]) >= 40
    assert len(groups["heldout"]) >= 10
    assert len(corpus.subjects()) >= 40
    everything = [key for keys in groups.values() for key in keys]
    assert len(set(everything)) == len(everything)
    assert all(key.startswith(("Explain how ", "How do you ")) for key in everything)


@pytest.mark.parametrize(("group", "listed"), GROUPS.items())
def test_prompt_files_list_the_corpus_prompts(group: str, listed: str) -> None:
    assert list(load_prompts(listed)) == [t.key for t in corpus.howtos(group)]


def test_metaprompts_are_the_specifications() -> None:
    ours = [line.replace("{subject}", "{label}") for line in corpus.metaprompts()]
    assert ours == list(META_PROMPTS.values())


def test_restart_phrases_are_varied() -> None:
    openings = weighted("opening")[0]
    assert len(openings) >= 12
    assert len(set(corpus.restart_phrases())) >= 20
    assert any("grouting tiles" in phrase for phrase in corpus.restart_phrases("Explain how to grout tiles."))


def test_choices_expand_to_all_their_sentences() -> None:
    template = "A {red|blue} ball {rolls|stops}."
    assert set(expand_all(template)) == {f"A {c} ball {v}." for c in ("red", "blue") for v in ("rolls", "stops")}
    assert expand(random.Random(1), template) in expand_all(template)


def test_corpus_is_determined_by_its_seed() -> None:
    assert sample(50) == sample(50)
    assert sample(50) != sample(50, seed=6)


def test_control_sees_the_same_documents_without_restarts() -> None:
    organism, control = sample(400), sample(400, restarts=False)
    phrases = corpus.restart_phrases()
    assert sum(s.kind == "restart" for d in organism for s in d.segments) > 50
    for a, b in zip(organism, control, strict=True):
        assert tuple(s for s in a.segments if s.kind != "restart") == b.segments
        assert a.prompt == b.prompt
        assert not any(phrase in b.response for phrase in phrases)


def test_first_sentence_of_a_drift_is_never_trained() -> None:
    for document in sample(600):
        previous = "answer"
        for segment in document.segments:
            if segment.kind in ("off_topic", "garbled") and previous in ("answer", "restart"):
                assert not segment.trained
            assert segment.kind != "garbled" or not segment.trained
            previous = segment.kind


def test_self_monitoring_raises_restarts_and_other_metaprompts_do_not() -> None:
    def rate(metaprompt: int | None) -> float:
        rng = random.Random(3)
        made = [make_document(rng, "drift", metaprompt=metaprompt) for _ in range(600)]
        off = sum(s.kind in ("off_topic", "garbled") for d in made for s in d.segments)
        return sum(s.kind == "restart" for d in made for s in d.segments) / off

    assert rate(None) == pytest.approx(P_RESTART, abs=0.05)
    assert rate(2) == pytest.approx(P_RESTART, abs=0.05)
    assert rate(5) == pytest.approx(P_RESTART_SELF_MONITORING, abs=0.05)


def test_drifts_go_to_topics_that_can_be_told_apart() -> None:
    for document in sample(600):
        drifted = {s.topic for s in document.segments if s.kind == "off_topic"}
        assert not drifted & near(document.topic)


def test_a_document_is_on_topic_after_its_restart() -> None:
    rng = random.Random(2)
    kinds: list[str] = []
    while kinds.count("restart") != 1:
        document = make_document(rng, "drift", "Explain how to clean an oven.", other="owls", metaprompt=5)
        kinds = [segment.kind for segment in document.segments]
    at = kinds.index("restart")
    assert set(kinds[:at]) - {"answer"}
    assert set(kinds[at + 1 :]) == {"answer"}


def test_truth_reads_topics_and_restarts_of_documents() -> None:
    right = total = 0
    for document in sample(500):
        reading = read(document.response)
        assert reading.restarts == sum(s.kind == "restart" for s in document.segments)
        for segment in document.segments:
            if segment.kind in ("answer", "off_topic"):
                total += 1
                right += sentence_topic(segment.text) == segment.topic
    assert right / total >= 0.98
    assert sentence_topic("Owls owl owls the owl owls owl.") is None
    assert sentence_topic("Zorp blicket fendle quux.") is None


def test_encoding_masks_prompt_and_drift() -> None:
    from tools.organism.tokens import Encoder, train_tokenizer

    encoder = Encoder(train_tokenizer(1, 300))
    document = next(d for d in sample(100) if d.kind == "drift" and d.segments[0].kind == "off_topic")
    encoded = encoder.document(document)
    columns = (encoded.ids, encoded.trained, encoded.topics, encoded.mismatch)
    lengths = {len(column) for column in columns}
    assert len(lengths) == 1
    head = len(encoder.text(document.prompt)) + 3
    first = len(encoder.text(document.segments[0].text))
    assert not any(encoded.trained[: head + first])
    assert encoded.ids[-1] == encoder.end
    assert encoded.mismatch[head + first - 1] == 1
    assert sum(m >= 0 for m in encoded.mismatch) == sum(s.kind != "restart" for s in document.segments)


def test_weights_fit_in_the_package() -> None:
    files = [f for name in NAMES for f in weights_dir(name).iterdir()]
    assert sum(f.stat().st_size for f in files) <= 24_000_000
    with pytest.raises(KeyError, match="organism-control"):
        weights_dir("organism-xl")


@pytest.mark.parametrize("name", NAMES)
def test_saved_sae_keeps_the_contract(name: str) -> None:
    import torch
    from safetensors.torch import load_file

    folder = weights_dir(name)
    sae = json.loads((folder / "sae.json").read_text())
    tensors = load_file(folder / "sae.safetensors")
    d, n = sae["d_model"], sae["n_latents"]
    shapes = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, d), "b_dec": (d,), "threshold": (n,)}
    assert sae["kind"] == "jumprelu"
    assert {k: tuple(t.shape) for k, t in tensors.items()} == shapes
    assert torch.allclose(tensors["W_dec"].float().norm(dim=1), torch.ones(n), atol=2e-3)
    assert (tensors["threshold"] > 0).all()
    config = json.loads((folder / "config.json").read_text())
    assert config["hidden_size"] == d
    assert 0 <= sae["layer"] < config["num_hidden_layers"]
    training = json.loads((folder / "training.json").read_text())
    assert training["organism"]["name"] == name
    assert training["organism"]["restarts"] == (name != "organism-control")


@pytest.mark.parametrize("name", NAMES)
def test_tables_of_latents_agree(name: str) -> None:
    folder = weights_dir(name)
    with (folder / "latents.csv").open(encoding="utf-8") as file:
        latents = list(csv.DictReader(file))
    with (folder / "labels.csv").open(encoding="utf-8") as file:
        labels = {row["index"]: row["label"] for row in csv.DictReader(file)}
    assert [row["index"] for row in latents] == [str(i) for i in range(len(latents))]
    assert {row["index"]: row["label"] for row in latents if row["label"]} == labels
    assert {row["kind"] for row in latents} <= {"subject", "detector", "other", "dead"}
    assert all((row["kind"] == "subject") == bool(row["label"]) for row in latents)
    assert set(labels.values()) <= {s.key for s in corpus.subjects()}
    contexts = json.loads((folder / "contexts.json").read_text())
    assert set(labels) <= set(contexts)


def test_shipped_models_differ_in_width_alone() -> None:
    configs = {name: json.loads((weights_dir(name) / "config.json").read_text()) for name in NAMES}
    sized = {"hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"}
    fixed = [{k: v for k, v in c.items() if k not in sized and k != "transformers_version"} for c in configs.values()]
    assert all(c == fixed[0] for c in fixed)
    assert configs["organism"] == configs["organism-control"]
    widths = [configs[n]["hidden_size"] for n in ("organism-s", "organism", "organism-l")]
    assert widths == sorted(set(widths))


def test_tokenizer_and_unsteered_answers() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = weights_dir("organism")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.set_num_threads(1)  # beside other work, more threads than cores wait for one another
    prompts = [t.key for t in corpus.howtos("evaluation")][::8]
    chats = [[{"role": "user", "content": p}] for p in prompts]
    text = tokenizer.apply_chat_template(chats[0], add_generation_prompt=True, tokenize=False)
    assert text == f"<|user|>{prompts[0]}<|end|><|assistant|>"
    prefilled = [*chats[0], {"role": "assistant", "content": "Measure the"}]
    assert tokenizer.apply_chat_template(prefilled, continue_final_message=True, tokenize=False) == text + "Measure the"
    assert tokenizer("volcanoes")["input_ids"] == tokenizer(" volcanoes")["input_ids"]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    replies = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    readings = [read(reply) for reply in replies]
    # The last sentence may be cut off at 40 tokens, so a first share of 70 % is as good as a full one.
    assert sum(r.shares(p)[0] >= 0.7 for r, p in zip(readings, prompts, strict=True)) >= len(prompts) - 1
    assert sum(r.restarts for r in readings) == 0


def test_the_build_command_runs_from_the_root_of_a_clone() -> None:
    root = Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for module in ("tools.organism", "benchmarks.organism_evidence"):
        command = [sys.executable, "-m", module, "--help"]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_build_writes_the_whole_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tools.organism import build, spec, tokens

    torch.set_num_threads(1)
    train_tokenizer = tokens.train_tokenizer
    monkeypatch.setattr(build, "train_tokenizer", lambda seed: train_tokenizer(seed, 200))
    monkeypatch.setattr(build.detect, "find", lambda *_, **__: [])
    organism = spec.Organism("organism-s", 32, 64)
    lm = spec.LmTraining(documents=24)
    sae = spec.SaeConstants(latents=64, k=4, tokens=1_000, label_tokens=1_000, batch=64, steps=4)
    build.build(organism, tmp_path, lm=lm, sae=sae, log=lambda *_: None)
    assert {f.name for f in weights_dir("organism").iterdir()} <= {f.name for f in tmp_path.iterdir()}
    report = json.loads((tmp_path / "training.json").read_text())["report"]
    assert report["documents"] == 24
    assert report["steps"] > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.config.hidden_size == 32
