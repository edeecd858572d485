"""The offline judge needs linear time in the length of a response, for any response."""

from __future__ import annotations

import time

import pytest

from steerback.judging import JudgeItem, References, make_judge
from steerback.judging.offline import OfflineJudge, is_clarifying_question

PROMPT = "How do you unclog a sink?"
SINK = "Pour a kettle of boiling water down the drain. Pump the plunger firmly."
LAVA = "Lava pours from the crater. Ash darkened the sky."
FRENCH = (
    "« L'art d'aimer, c'est l'art d'écouter qu'on n'a pas d'autre 'idée qu'il n'y a d'amour d'où l'on s'en va, c'est l'"
)
SIZE = 40_000
LIMIT = 4.0
"""Seconds of processor time for 40 kB; most shapes take under half a second, with a backtracking pattern hours."""


@pytest.fixture(scope="module")
def judge() -> OfflineJudge:
    made = make_judge("offline")
    assert isinstance(made, OfflineJudge)
    made.prepare(References({PROMPT: [SINK], "What is lava?": [LAVA]}))
    return made


def test_both_judges_find_restarts_by_the_same_code() -> None:
    """So that one of them stands for both here."""
    other = make_judge("offline-bayes")
    assert isinstance(other, OfflineJudge)
    other.prepare(References({PROMPT: [SINK], "What is lava?": [LAVA]}))
    assert seconds(other, "'" + "we're " * (SIZE // 6)) < LIMIT


def seconds(judge: OfflineJudge, text: str) -> float:
    start = time.process_time()
    verdict = judge.judge_batch([JudgeItem("k", PROMPT, text)])[0]
    is_clarifying_question(text)
    assert verdict.status in ("scored", "empty")
    return time.process_time() - start


@pytest.mark.parametrize("text", [FRENCH, "'" + "we're " * 40, f"{LAVA} {FRENCH} {SINK}"])
def test_apostrophes_after_an_opening_quote_take_no_time(judge: OfflineJudge, text: str) -> None:
    """Both shapes hung the judge once: 34 s for 113 characters of French, twice as long for each further "we're"."""
    assert seconds(judge, text) < 2.0


@pytest.mark.parametrize(
    "unit",
    [
        *(
            "we're ",
            "'we're ",
            "'a",
            "‘a’a",
            '"',
            '"a',
            "“",
            "“a ",
            "«",
            "« a",
            "`",
            "`a ",
            "```",
            "```a\n",
            "'",
            "''a ",
        ),
        *(
            "wait ",
            "wait, ",
            "wait - ",
            "wait. ",
            "no no no ",
            "sorry ... ",
            "a ",
            "aaaa",
            "a'",
            "can you ",
            "can ",
            "if ",
        ),
        *(
            "(",
            "((((a ",
            "[",
            "{ ",
            "()",
            "[](",
            "<b>",
            "- ",
            "-",
            "- - ",
            "--",
            "—",
            "— a",
            ".",
            ". ",
            "..",
            "... ",
            "…",
        ),
        *(
            ",",
            ", ",
            ",a",
            ";",
            ":",
            ": ",
            "?",
            "? ",
            "!",
            ".a",
            "a.",
            "A.",
            ".A",
            "a:",
            "1. ",
            "1.",
            "I. ",
            "e.g. ",
            "# ",
        ),
        *(
            "*",
            "**",
            "* ",
            "_",
            "_ ",
            ">",
            "> ",
            "•",
            "\n",
            "\n\n",
            "\r\n",
            "\t",
            " ",
            "\u00a0",
            "\u2028",
            "\x00",
            "\u200b",
        ),
        *(
            "a\n",
            "- a\n",
            "1\n",
            "\\",
            "\\n",
            "é",
            "不",
            "不。",
            "😀",
            "e\u0301",
            "\u202e",
            "0",
            "0 ",
            "1,",
            "x=1;",
            "</",
            "%s",
        ),
        *("I am sorry ", "could you this ", "clarify ", "let me start over. ", "Wait, that's not right. Lava flows. "),
    ],
)
def test_40_kb_of_any_shape_is_judged_in_time(judge: OfflineJudge, unit: str) -> None:
    text = (unit * (SIZE // len(unit) + 1))[:SIZE]
    assert seconds(judge, f"{LAVA} {text}") < LIMIT


def test_one_long_token_and_one_long_line(judge: OfflineJudge) -> None:
    for text in ("a" * SIZE, "a" * SIZE + "'" + "b" * SIZE, "word " * (SIZE // 5), "(" * SIZE + ")" * SIZE):
        assert seconds(judge, text) < LIMIT


def test_time_grows_in_proportion_to_the_length(judge: OfflineJudge) -> None:
    """Ten times the text takes at most about ten times as long."""
    unit = f"{LAVA} 'twas \"the “best — wait, no... sorry: {SINK}\n- item (a [b\n"
    seconds(judge, unit * 10)
    short, long = (min(seconds(judge, unit * n) for _ in range(2)) for n in (60, 600))
    assert long < 25 * max(short, 0.02)
