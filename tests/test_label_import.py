"""Label samples and import of labels: valid files are imported completely, invalid ones change nothing."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from labelled import FIRST, RESTART, SECOND, make_run, scattered, text_of
from steerback.cli import main
from steerback.errors import SteerbackError
from steerback.jobs.labelling import DrawnSample, draw_sample, import_labels
from steerback.judging.human import Label, LabelFile, LabelItem, judgements, sentences, words
from steerback.records import Completion, Receipt
from steerback.report.labelling import read_labels, spreadsheet
from steerback.store.facts import JUDGES, LABEL_SAMPLES, LabelSample
from steerback.store.run import Run

PLACE = len(FIRST) + 1  # where the restart begins


def steerback(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two conditions of 40 responses: 4 and 10 with several attempts."""
    few, more = [[i < 1 for i in range(10)] for _ in range(4)], [[k == 0] * 10 for k in range(4)]
    return make_run(tmp_path / "run", {"baseline": few, "ablated": more})


def stored(folder: Path, sample: DrawnSample) -> LabelSample:
    with Run.read(folder) as run:
        samples = run.ledger.get("model", LABEL_SAMPLES)
    assert samples is not None
    return samples[sample.identifier]


def label_file(tmp_path: Path, drawn: DrawnSample, labels: dict[str, Any], **changed: Any) -> Path:
    body = {"format": "steerback-labels-1", "run": "run", "sample": drawn.identifier, "rubric": "human-1"}
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({**body, "labels": labels, **changed}))
    return path


def texts_of(sample: DrawnSample) -> dict[str, str]:
    data = sample.page.read_text("utf-8").split('id="data">')[1].split("</script>")[0]
    return {i["number"]: i["response"] for i in json.loads(data)["items"]}


def right_labels(sample: DrawnSample) -> dict[str, Any]:
    return {
        number: {"restarts": [PLACE], "scores": [20, 75.5]} if RESTART in text else {"scores": [20]}
        for number, text in texts_of(sample).items()
    }


def test_the_sample_takes_equal_shares_of_each_condition_and_verdict(folder: Path) -> None:
    sample = stored(folder, draw_sample(folder, 32, seed=7))
    drawn = {(s.condition, s.several): (s.drawn, s.available) for s in sample.strata}
    assert drawn == {  # 8 each; the 4 that one stratum lacks are given to the others
        ("baseline", True): (4, 4),
        ("baseline", False): (9, 36),
        ("ablated", True): (10, 10),
        ("ablated", False): (9, 30),
    }
    assert len(set(sample.items.values())) == 32
    assert (sample.seed, sample.size, sample.judge) == (7, 32, "machine")


def test_the_same_command_gives_the_same_sample_and_another_seed_gives_new_responses(folder: Path) -> None:
    first = draw_sample(folder, 16, seed=7)
    content = first.page.read_bytes()
    assert draw_sample(folder, 16, seed=7) == first
    assert first.page.read_bytes() == content
    second = draw_sample(folder, 16, seed=8)
    assert not set(stored(folder, first).items.values()) & set(stored(folder, second).items.values())


def test_every_response_of_a_stratum_is_drawn_equally_often(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    for seed in range(60):
        run = make_run(tmp_path / f"run{seed}", {"steered": [[i < 5 for i in range(20)]]})
        counts.update(stored(run, draw_sample(run, 10, seed=seed)).items.values())
    several, single = (sum(counts[f"model/measure/steered/{i}"] for i in r) for r in (range(5), range(5, 20)))
    assert (several, single) == (300, 300)
    assert all(8 <= counts[f"model/measure/steered/{i}"] <= 34 for i in range(5, 20))  # 20 expected, sd 3.7


def test_too_small_a_sample_and_a_strange_condition_are_refused(folder: Path) -> None:
    with pytest.raises(SteerbackError, match=r"--n 6 is too small: 4 strata .* need at least 8 responses"):
        draw_sample(folder, 6, seed=1)
    with pytest.raises(SteerbackError, match="no condition 'none' in this run; choose one of: ablated, baseline"):
        draw_sample(folder, 6, seed=1, conditions=["none"])
    assert stored(folder, draw_sample(folder, 6, seed=1, conditions=["ablated"])).conditions == ["ablated"]


def test_a_run_that_is_not_finished_cannot_be_sampled(folder: Path) -> None:
    with Run.reopen(folder) as run:
        extra = run.ledger.rows()[0].trial
        run.ledger.add_trials([type(extra)("model/measure/baseline/99", "model", "measure", "baseline", 99, "?", 1)])
    with pytest.raises(SteerbackError, match=r"1 of 81 responses are missing.*steerback resume run"):
        draw_sample(folder, 20, seed=1)
    with Run.reopen(folder) as run:
        run.ledger.add_completions(
            [("model/measure/baseline/99", Completion("Yes.", (1, 2), 3, "stop", Receipt()), "engine")]
        )
    with pytest.raises(SteerbackError, match="judge machine has not judged 1 of 81 responses"):
        draw_sample(folder, 20, seed=1)


def test_labels_become_a_judge_like_any_other(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ("--runs", str(folder.parent))
    assert steerback("label", "run", "--n", "20", "--seed", "3", *runs) == 0
    assert "20 responses in random order" in capsys.readouterr().out
    sample = draw_sample(folder, 20, seed=3)
    file = label_file(tmp_path, sample, right_labels(sample))
    assert steerback("label", "import", "run", str(file), "--by", "ann", *runs) == 0
    assert "20 labels imported; human:ann has labelled 20 of 20" in capsys.readouterr().out
    with Run.read(folder) as run:
        rows = run.ledger.rows(judge="human:ann")
        about = run.ledger.get("", JUDGES)
    judged = [r for r in rows if r.judgement is not None]
    assert {r.trial.key for r in judged} == set(stored(folder, sample).items.values())
    for row in judged:
        wanted = [(0, 20.0)] + [(PLACE, 75.5)] * (RESTART in row.judged_text)
        assert [(a.start, a.score) for a in row.attempts] == wanted
        assert row.judgement is not None
        assert row.judgement.rubric == "human-1"
    assert about is not None
    assert about["human:ann"]["sample"] == sample.identifier
    assert steerback("show", "run", "--judge", "human:ann", "--restarts", *runs) == 0
    assert "attempt 2: 76/100" in capsys.readouterr().out
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".json", ".txt", ".csv")}
    assert steerback("figures", "run", "--judge", "human:ann", "--draws", "100", *runs) == 0
    assert before == {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".json", ".txt", ".csv")}
    assert (folder / "judges" / "human%3Aann" / "summary.json").is_file()


def test_labels_that_arrive_in_parts_add_up_and_are_never_replaced(folder: Path, tmp_path: Path) -> None:
    sample = draw_sample(folder, 20, seed=3)
    labels = right_labels(sample)
    half = {n: labels[n] for n in list(labels)[:8]}
    assert import_labels(folder, label_file(tmp_path, sample, half), "ann").new == 8
    done = import_labels(folder, label_file(tmp_path, sample, labels), "ann")
    assert (done.new, done.labelled) == (12, 20)
    assert import_labels(folder, label_file(tmp_path, sample, labels), "ann").new == 0
    other = {**labels, "2": {"scores": [99]}}
    with pytest.raises(SteerbackError, match="human:ann has a different label for response 2"):
        import_labels(folder, label_file(tmp_path, sample, other), "ann")
    assert import_labels(folder, label_file(tmp_path, sample, other), "ben").new == 20


ONE = {"scores": [20]}
WRONG: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "another sample",
        {"1": ONE},
        {"sample": "0123456789abcdef"},
        "run 'run' has the samples",
    ),
    ("an unknown key", {"1": ONE}, {"weight": 1}, "weight: Extra inputs are not permitted"),
    ("an unknown key in a label", {"1": {"scores": [20], "score": 3}}, {}, "labels.1.score: Extra inputs"),
    ("an unknown response", {"1": ONE, "21": ONE}, {}, "labels response '21'; the sample has responses 1 to 20"),
    ("no label", {}, {}, "has no complete label"),
    ("another rubric", {"1": ONE}, {"rubric": "human-9"}, "uses rubric 'human-9'"),
    ("another format", {"1": ONE}, {"format": "x"}, "format: Input should be 'steerback-labels-1'"),
    ("a mark before the text", {"1": {"restarts": [0], "scores": [1, 2]}}, {}, "restart at character 0 is outside"),
    ("a negative mark", {"1": {"restarts": [-4], "scores": [1, 2]}}, {}, "restart at character -4 is outside"),
    (
        "a mark after the text",
        {"1": {"restarts": [9999], "scores": [1, 2]}},
        {},
        "restart at character 9999 is outside",
    ),
    ("a mark twice", {"1": {"restarts": [9, 9], "scores": [1, 2, 3]}}, {}, "restarts must increase strictly"),
    ("marks in disorder", {"1": {"restarts": [12, 9], "scores": [1, 2, 3]}}, {}, "restarts must increase strictly"),
    ("a fractional mark", {"1": {"restarts": [9.5], "scores": [1, 2]}}, {}, "labels.1.restarts.0: Input should be"),
    ("a missing score", {"1": {"restarts": [9], "scores": [1]}}, {}, "has 1 scores for 2 attempts"),
    ("a score over 100", {"1": {"scores": [100.5]}}, {}, "less than or equal to 100"),
    ("a negative score", {"1": {"scores": [-1]}}, {}, "greater than or equal to 0"),
    ("a score that is no number", {"1": {"scores": ["9"]}}, {}, "labels.1.scores.0: Input should be a valid number"),
    ("a score that is nan", {"1": {"scores": [float("nan")]}}, {}, "labels.1.scores.0"),
    (
        "an empty one with scores",
        {"1": {"status": "empty", "scores": [1]}},
        {},
        "is empty, so it must have no restarts",
    ),
    ("an unknown status", {"1": {"status": "bad"}}, {}, "labels.1.status: Input should be"),
]


@pytest.mark.parametrize(("labels", "changed", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_file_is_one_line_and_changes_nothing(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    labels: dict[str, Any],
    changed: dict[str, Any],
    message: str,
) -> None:
    sample = draw_sample(folder, 20, seed=3)
    good = {k: v for k, v in right_labels(sample).items() if k != "1"} if labels else {}
    file = label_file(tmp_path, sample, {**good, **labels}, **changed)
    with Run.read(folder) as run:
        before = run.ledger.dump()
    assert steerback("label", "import", "run", str(file), "--by", "ann", "--runs", str(folder.parent)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    with Run.read(folder) as run:
        assert run.ledger.dump() == before


@pytest.mark.parametrize("name", ["", "a b", "human:x", "a/b", "x" * 61])
def test_the_labeller_needs_a_plain_name(folder: Path, tmp_path: Path, name: str) -> None:
    sample = draw_sample(folder, 20, seed=3)
    with pytest.raises(SteerbackError, match="a name has 1 to 60 letters, digits"):
        import_labels(folder, label_file(tmp_path, sample, right_labels(sample)), name)


def filled(path: Path, entries: dict[tuple[str, str], tuple[str, str]], separator: str = ",") -> Path:
    """The spreadsheet with (restart, score) written into the rows of (response, position)."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    out = path.with_name("filled.csv")
    with out.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=separator, lineterminator="\r\n")
        table.writeheader()
        for row in rows:
            restart, score = entries.get((row["response"], row["position"]), ("", ""))
            table.writerow({**row, "restart": restart, "score": score})
    return out


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_spreadsheet_gives_the_same_verdicts_as_the_page(folder: Path, tmp_path: Path, separator: str) -> None:
    sample = draw_sample(folder, 20, seed=3)
    entries = {}
    for number, text in texts_of(sample).items():
        entries[number, "0"] = ("", "20")
        if RESTART in text:
            entries[number, str(PLACE)] = ("x", "75,5" if separator == ";" else "75.5")
    assert import_labels(folder, filled(sample.spreadsheet, entries, separator), "ben").new == 20
    import_labels(folder, label_file(tmp_path, sample, right_labels(sample)), "ann")
    with Run.read(folder) as run:
        a, b = (run.ledger.rows(judge=f"human:{name}") for name in ("ann", "ben"))
    assert [r.attempts for r in a] == [r.attempts for r in b]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({("1", "0"): ("x", "20")}, "this is the first sentence"),
        ({("1", "0"): ("", "")}, "has no complete label"),
        ({("1", "0"): ("", "high")}, "score 'high' is not a number from 0 to 100"),
        ({("1", "0"): ("", "101")}, "score '101' is not a number from 0 to 100"),
        ({("1", "0"): ("perhaps", "10")}, "restart is 'perhaps'; write x"),
        ({("1", "0"): ("", "20"), ("1", "30"): ("", "30")}, "has a score but starts no attempt"),
        ({("1", "0"): ("", "20"), ("1", "30"): ("x", "")}, "score '' is not a number from 0 to 100"),
        ({("1", "0"): ("", "empty"), ("1", "30"): ("x", "3")}, "has no restarts and no further scores"),
    ],
)
def test_a_spreadsheet_filled_in_wrongly_says_in_which_row(
    folder: Path, entries: dict[tuple[str, str], tuple[str, str]], message: str
) -> None:
    sample = draw_sample(folder, 20, seed=3)
    with pytest.raises(SteerbackError, match=r"label file .*filled\.csv") as error:
        import_labels(folder, filled(sample.spreadsheet, entries), "ann")
    assert message in str(error.value)


def test_other_files_are_refused(folder: Path, tmp_path: Path) -> None:
    sample = draw_sample(folder, 20, seed=3)
    file = tmp_path / "x.csv"
    for content, message in (
        ("a,b\n1,2\n", "its columns must be sample, response"),
        ("", "its columns must be"),
        ("[1]", "its columns must be"),
        ('{"a": 1, "a": 2}', "occurs twice"),
        (sample.spreadsheet.read_text("utf-8-sig") + f"{sample.identifier},1,0,,,,,\n", "'0' occurs twice"),
        (sample.spreadsheet.read_text("utf-8-sig") + "other,1,999,,,,,\n", "must contain the rows of one sample"),
        (sample.spreadsheet.read_text("utf-8-sig") + f"{sample.identifier},1,first,,,,x,1\n", "is not a number"),
    ):
        file.write_text(content)
        with pytest.raises(SteerbackError) as error:
            import_labels(folder, file, "ann")
        assert message in str(error.value)


TEXTS = st.text(
    st.sampled_from("ab.!? \n\t=+-@,;\"'\x07\x1c\u202e\u00e9\U0001f427") | st.characters(codec="utf-8"), max_size=80
)


def is_value(cell: str) -> bool:
    """Whether a spreadsheet shows a cell as it is: a number, or a dash alone."""
    return cell == "-" or re.fullmatch(r"[-+]?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?", cell) is not None


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), data=st.data())
def test_any_text_and_any_marks_come_back_from_both_files_as_they_were_made(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], data: st.DataObject
) -> None:
    texts = [text.replace("\0", "") for text in texts]
    items = [LabelItem(str(i), "prompt", None, text) for i, text in enumerate(texts, 1)]
    table = list(csv.reader(spreadsheet(items, "abc").splitlines(keepends=True)))
    for row in table[1:]:
        assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) and not is_value(cell) for cell in row)
    labels, entries = {}, {}
    for item in items:
        starts = sentences(item.response)
        assert set(starts) <= set(words(item.response))
        chosen = sorted(data.draw(st.sets(st.sampled_from(starts[1:])))) if starts[1:] else []
        scores = [data.draw(st.integers(0, 200)) / 2 for _ in range(len(chosen) + 1)]
        labels[item.number] = Label(restarts=chosen, scores=scores)
        first = str(starts[0] if starts else 0)
        entries[item.number, first] = ("", str(scores[0]))
        entries |= {(item.number, str(p)): ("x", str(s)) for p, s in zip(chosen, scores[1:], strict=True)}
    path = tmp_path_factory.mktemp("labels") / "sheet.csv"
    path.write_text(spreadsheet(items, "abc"), encoding="utf-8", newline="")
    made = LabelFile(format="steerback-labels-1", sample="abc", rubric="human-1", labels=labels)
    path.with_suffix(".json").write_text(made.model_dump_json())
    wanted = judgements(made, items, "human:x", "here")
    for file in (path.with_suffix(".json"), filled(path, entries)):
        found = judgements(read_labels(file), items, "human:x", "here")
        assert {n: j.attempts for n, j in found.items()} == {n: j.attempts for n, j in wanted.items()}
    for number, judgement in wanted.items():
        text = texts[int(number) - 1]
        assert judgement.attempts[0].start == 0
        assert [a.start for a in judgement.attempts[1:]] == labels[number].restarts
        assert all(a.start < a.end <= len(text) for a in judgement.attempts[1:])


@settings(max_examples=200, deadline=None)
@example(value={"\n": None}, key="labels")
@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=8,
    ),
    key=st.sampled_from(["labels", "sample", "format", "rubric", "other"]),
)
def test_any_json_is_labels_or_one_clear_error(tmp_path_factory: pytest.TempPathFactory, value: Any, key: str) -> None:
    body: dict[str, Any] = {"format": "steerback-labels-1", "sample": "abc", "rubric": "human-1", "labels": {}}
    path = tmp_path_factory.mktemp("any") / "labels.json"
    path.write_text(json.dumps({**body, key: value}))
    try:
        labels = read_labels(path)
        judgements(labels, [LabelItem("1", "?", None, text_of(True))], "human:x", "here")
    except SteerbackError as error:
        said = str(error)
    else:
        said = ""
    assert "\n" not in said


def test_sentences_begin_where_a_reader_sees_them() -> None:
    text = f'{FIRST} "{RESTART}" {SECOND}\n\n- a list\n- more… and on'
    parts = [text[a:b].strip() for a, b in zip(sentences(text), [*sentences(text)[1:], len(text)], strict=True)]
    assert parts == [
        "Penguins waddle over the ice.",
        "They huddle when it is cold.",
        f'"{RESTART}"',
        "Fold the sheet in half.",
        "Tuck one corner into the other.",
        "- a list",
        "- more…",
        "and on",
    ]


@pytest.mark.parametrize("shape", [" ", "\n", "\n ", '."', "a ", ". ", "\u202e", '".)'])
def test_long_hostile_texts_are_split_quickly(shape: str) -> None:
    text = "x" + shape * (100_000 // len(shape)) + "y"
    assert sentences(text)[0] == 0  # quadratic time would not end within the test's


def test_scattered_verdicts_reach_the_ledger(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", {"steered": scattered(5, 20, 0.3)})
    with Run.read(folder) as run:
        rows = run.ledger.rows(judge="machine")
    assert len(rows) == 100
    assert 15 < sum(len(r.attempts) > 1 for r in rows) < 45
