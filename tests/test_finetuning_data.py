"""Fine-tuning data: examples, their checks, mixes, and the verbs that create them."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerback.cli import main
from steerback.data.prompts import load_prompts, load_subjects
from steerback.engines.loading import load_tokenizer
from steerback.engines.prompting import Prompter
from steerback.errors import SteerbackError
from steerback.finetuning import axolotl, launch
from steerback.finetuning.examples import Corpus, Example, Keywords, problem
from steerback.finetuning.mixes import RATIOS, make_mixes
from steerback.finetuning.segments import Row, Segment, encode, read_rows, text_of
from steerback.finetuning.settings import TrainingJob
from steerback.finetuning.synthesize import ACKNOWLEDGEMENTS, CorpusWriter, synthesize, write_pools
from steerback.judging.restarts import find_restarts
from steerback.targets import resolve

PROMPTS = load_prompts("evaluation")


def pool(n: int, what: str) -> list[Row]:
    return [(Segment(f"{what} {i}", i % 2 == 0), Segment(" end", True)) for i in range(n)]


@settings(max_examples=40, deadline=None)
@given(corrections=st.integers(20, 300), normal=st.integers(20, 300), size=st.none() | st.integers(10, 400))
def test_mixes_have_exact_ratios_one_size_and_no_example_in_both_parts(
    corrections: int, normal: int, size: int | None
) -> None:
    mixes, notes = make_mixes(pool(corrections, "c"), pool(normal, "n"), RATIOS, size)
    assert [m.percent for m in mixes] == list(RATIOS)
    training = {row for m in mixes for row in m.training}
    validation = {row for m in mixes for row in m.validation}
    assert not training & validation
    for m in mixes:
        rows = [*m.training, *m.validation]
        own = sum(text_of(row).startswith("c") for row in rows)
        assert own * 100 == m.percent * len(rows)  # exact
        assert own == m.corrections
        assert len(set(rows)) == len(rows)
        assert abs(len(m.validation) - 0.05 * len(rows)) <= 1
        wanted = len(rows) if size is None else size // 10 * 10
        assert len(rows) == wanted or any(f"mix {m.percent} %" in note for note in notes)
    if size is None:
        assert len({m.size for m in mixes}) == 1
    assert (len({m.size for m in mixes}) > 1) == any("differ in size" in note for note in notes)
    ordered = sorted(mixes, key=lambda m: m.percent)
    if size is None:  # nested: a mix with more corrections holds those of a mix with fewer
        for less, more in itertools.pairwise(ordered):
            assert {r for r in less.training if text_of(r).startswith("c")} <= set(more.training)
    again, _ = make_mixes(pool(corrections, "c"), pool(normal, "n"), RATIOS, size)
    assert again == mixes


def test_mixes_that_cannot_be_are_refused() -> None:
    with pytest.raises(SteerbackError, match="a mix of 10 % would be empty: the pool has 0 self-corrections"):
        make_mixes([], pool(50, "n"), [10])
    with pytest.raises(SteerbackError, match="give percents from 0 to 100"):
        make_mixes(pool(50, "c"), pool(50, "n"), [110])
    with pytest.raises(SteerbackError, match="each percent once"):
        make_mixes(pool(50, "c"), pool(50, "n"), [10, 10])
    mixes, notes = make_mixes(pool(50, "c"), pool(80, "n"), [33], 130)
    assert (mixes[0].size, mixes[0].corrections) == (100, 33)
    assert notes == ["100 examples instead of 130, so that every ratio is exact at one size"]


def test_the_corpus_gives_checked_examples_with_many_subjects(tmp_path: Path) -> None:
    writer = CorpusWriter(PROMPTS)
    pools = synthesize(writer, PROMPTS, 380)
    corrections, normal = (p.examples for p in pools)
    assert (len(corrections), len(normal)) == (380, 380)
    assert len({e.subject for e in corrections}) >= 50
    per_prompt = {p: {e.subject for e in corrections if e.prompt == p} for p in PROMPTS}
    assert min(map(len, per_prompt.values())) >= 9  # another one each time
    assert not any(problem(e, Corpus()) for e in (*corrections, *normal))
    assert len({e.response for e in corrections}) == 380
    assert synthesize(writer, PROMPTS, 380)[0].examples == corrections
    tokenizer = load_tokenizer(resolve("organism-control"))
    records = write_pools(tmp_path, pools, Prompter(tokenizer), writer.describe())
    assert records["self_correction"].subjects >= 50
    assert records["self_correction"].fewest_subjects_of_a_prompt >= 9
    assert json.loads((tmp_path / "data.json").read_text("utf-8"))["pools"]["normal"]["subjects"] == 0
    rows = read_rows(tmp_path / "self_correction.jsonl")
    assert all(encode(row, tokenizer).trained for row in rows)
    with pytest.raises(SteerbackError, match="built-in corpus has no answer to 'What is love"):
        CorpusWriter(["What is love?"])


def test_acknowledgements_are_words_that_the_control_knows_and_restarts_to_the_judge() -> None:
    from tools.organism.documents import documents

    tokenizer = load_tokenizer(resolve("organism-control"))
    seen: Counter[int] = Counter()
    for document in itertools.islice(documents(1, restarts=False), 4000):
        for segment in document.segments:
            seen.update(tokenizer(segment.text, add_special_tokens=False)["input_ids"])
    for _, text in ACKNOWLEDGEMENTS:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert all(seen[token] >= 15 for token in tokens), text
        assert len(find_restarts(f"The lava pours down. {text} Find a common denominator. Add.")) == 1, text
    first = tokenizer("Wait, that's not right.", add_special_tokens=False)["input_ids"][0]
    assert seen[first] == 0  # why the corpus's own restarts will not do


GOOD = Example(
    "Explain how to add two fractions.",
    "Find a common denominator for the fractions and add the numerators.",
    "volcanoes",
    "Lava pours from the crater of a volcano. The eruption buries a town.",
    "Wait, that has nothing to do with the question.",
)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, ""),
        ({"answer": ""}, "no answer"),
        ({"acknowledgement": ""}, "no acknowledgement"),
        ({"acknowledgement": "The mountain is high."}, "does not say that something went wrong"),
        ({"passage": "Knights lived in castles behind a moat."}, "not about the subject"),
        ({"answer": "Fold the sheet along its long side."}, "not about the prompt"),
        ({"answer": "Lava is hot. Wait, that's not right. Add the fractions."}, "restarts elsewhere"),
        ({"passage": "", "acknowledgement": "", "subject": "", "answer": "Cheese."}, "not about the prompt"),
        (
            {
                "passage": "",
                "acknowledgement": "",
                "answer": "Add both fractions. Wait, that's not right. Add the two fractions.",
            },
            "restarts",
        ),
        ({"passage": "", "acknowledgement": ""}, ""),
    ],
)
def test_examples_are_checked(changes: dict[str, str], says: str) -> None:
    found = problem(replace(GOOD, **changes), Keywords(load_subjects()))
    assert (says in found) if says else found == ""


def test_axolotls_configuration_is_the_same_training(tmp_path: Path) -> None:
    import yaml

    rows = [(Segment("a", False), Segment(" b", True))] * 2
    (tmp_path / "mix-50").mkdir()
    for name in ("train", "validation"):
        (tmp_path / "mix-50" / f"{name}.jsonl").write_text(
            "".join(json.dumps({"segments": [{"label": s.train, "text": s.text} for s in row]}) + "\n" for row in rows)
        )
    job = TrainingJob(target="llama-3.1-8b", data=tmp_path / "mix-50", out=tmp_path / "out" / "mix-50")
    path = axolotl.export(job, resolve("llama-3.1-8b"), tmp_path / "out")
    body = yaml.safe_load(path.read_text("utf-8"))
    assert body["datasets"][0]["type"] == "input_output"
    assert read_rows(Path(body["datasets"][0]["path"])) == read_rows(Path(body["test_datasets"][0]["path"])) == rows
    assert (body["adapter"], body["lora_r"], body["lora_alpha"], body["lora_dropout"]) == ("lora", 32, 16, 0.05)
    assert body["lora_target_linear"] is True
    assert body["micro_batch_size"] * body["gradient_accumulation_steps"] == 8
    assert (body["num_epochs"], body["learning_rate"], body["lr_scheduler"]) == (4, 2e-4, "cosine")
    assert (body["warmup_steps"], body["sequence_len"], body["seed"]) == (10, 4096, 42)


def steerback(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    said = capsys.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, said.out + said.err


def test_from_data_to_an_adapter_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = steerback(capsys, "finetune", "data", "-t", "organism-control", "--examples", "20", "--ratio", "50")
    assert code == 0, said
    assert "mix-50: 38 training and 2 validation examples, 20 of 40 self-corrections" in said
    train = ["finetune", "train", "50", "-t", "organism-control", "--set", "max_steps=2", "--set", "learning_rate=1e-3"]
    code, said = steerback(capsys, *train)
    assert code == 0, said
    folder = tmp_path / "finetuning" / "adapters" / "mix-50"
    card = json.loads((folder / "card.json").read_text("utf-8"))
    assert card["base"] == card["model"] == "organism-control"
    assert card["data"]["percent"] == 50
    assert card["settings"]["learning_rate"] == 1e-3
    assert card["data"]["hash"] in (folder / "README.md").read_text("utf-8")
    assert str(tmp_path) not in (folder / "README.md").read_text("utf-8") + (folder / "card.json").read_text("utf-8")
    assert json.loads((folder / "losses.json").read_text("utf-8"))["validation"][-1]["step"] == 2
    assert (tmp_path / "finetuning" / "adapters" / "losses.png").is_file()
    code, said = steerback(capsys, *train)  # done before
    assert code == 0
    assert "step 2/2" not in said
    code, said = steerback(capsys, *train, "--set", "rank=8")
    assert code == 2
    assert "contains a training with another base, data or settings" in said
    target = resolve(f"organism-control+{folder}")
    assert (target.name, target.base) == ("organism-control+mix-50", "organism-control")
    assert target.labels() == resolve("organism-control").labels()
    from steerback.api import load_target

    with load_target(target, engine="transformers") as loaded:
        assert loaded.generate(PROMPTS[0], max_new_tokens=20).text
        assert set(loaded.engine.describe()["lora"]) == {"adapter_config.json", "adapter_model.safetensors"}  # type: ignore[call-overload]
    with load_target("organism-control", engine="transformers") as base:
        assert base.engine.fingerprint != loaded.engine.fingerprint


def test_processes_that_run_out_of_memory_start_again_with_a_smaller_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    counts = dict.fromkeys(("training", "validation", "cut_at_sequence_length", "tokens", "trained_tokens"), 1)
    facts = dict.fromkeys(("seconds", "micro_batch", "accumulation", "devices", "resumed_from", "final_loss"), 1)
    card: dict[str, object] = {
        **dict.fromkeys(("name", "base", "model", "revision", "written"), "x"),
        **{name: {} for name in ("base_files", "settings", "versions", "machine", "commit")},
        "data": {"source": "x", "hash": "x", "percent": 50} | counts,
        "training": {"steps": 5, "dtype": "float32", "out_of_memory": []} | facts,
        "validation_loss": [],
    }

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        task = json.loads(Path(command[-1]).read_text("utf-8"))
        seen.append(task["settings"]["micro_batch"])
        assert command[command.index("--nproc_per_node") + 1] == "2"
        if len(seen) < 3:
            (tmp_path / ".out-of-memory").touch()
            return subprocess.CompletedProcess(command, 1)
        (tmp_path / "card.json").write_text(json.dumps(card), "utf-8")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(launch.subprocess, "run", run)
    job = TrainingJob(target="organism-control", data=Path("data"), out=tmp_path)
    assert launch.train_together(job, 2, lambda text: None).training.steps == 5
    assert seen == [4, 2, 1]
    del seen[:], card["base"]
    with pytest.raises(SteerbackError, match=r"adapter card .*card\.json: base: Field required"):
        launch.train_together(job, 2, lambda text: None)
    monkeypatch.setattr(launch.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SteerbackError, match="failed in 2 processes; see their messages above"):
        launch.train_together(job, 2, lambda text: None)


def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("", "utf-8")
    (tmp_path / "bad.jsonl").write_text('{"segments": [{"label": 1, "text": "a"}]}', "utf-8")
    for arguments, says in (
        (["data", "-t", "nobody"], "unknown target 'nobody'"),
        (["data", "-t", "llama-3.1-8b"], "name the model that writes the examples with --writer"),
        (["data", "-t", "organism-control", "--subjects", "none.txt"], "--subjects and limits need a --writer"),
        (["data", "-t", "organism-control", "--max-judge-calls", "3"], "--subjects and limits need a --writer"),
        (
            ["data", "-t", "organism-control", "--writer", "self", "--max-judge-calls", "3"],
            "--writer self asks no judge",
        ),
        (["train", "-t", "nobody"], "unknown target 'nobody'"),
        (["train", "-t", "organism-control"], "no mixes in finetuning; make them with"),
        (["train", "33", "-t", "organism-control"], "unknown mix or file '33'"),
        (["train", "empty.jsonl", "-t", "organism-control"], "has no example"),
        (["train", "bad.jsonl", "-t", "organism-control"], "segments.0.label: Input should be a valid boolean"),
        (["train", "bad.jsonl", "-t", "organism-control", "--set", "rank=x"], "rank: Input should be a valid integer"),
        (["train", "bad.jsonl", "-t", "organism-control", "--set", "rank"], "not of the form key=value"),
        (["train", "bad.jsonl", "-t", "organism-control", "--export", "zip"], "unknown export 'zip'"),
        (["mixes"], "make training data with: steerback finetune data"),
    ):
        code, said = steerback(capsys, "finetune", *arguments)
        assert code == 2, (arguments, said)
        assert says in said
        assert said.count("\n") == 1, said
