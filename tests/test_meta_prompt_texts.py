"""User-defined meta-prompts from a mapping, a list or NAME=TEXT, with the placeholder `{label}`."""

from __future__ import annotations

import pytest

from steerback.config import build_config
from steerback.errors import SteerbackError
from steerback.experiments import make_experiment
from steerback.experiments.meta_prompts import SETS, MetaPrompts


def variants(value: object, *settings: str) -> dict[str, str]:
    options = {} if value is None else {"options": {"variants": value}}
    config = build_config("meta-prompts", ("organism",), overrides=options, assignments=settings)
    experiment = make_experiment(config)
    assert isinstance(experiment, MetaPrompts)
    assert experiment.conditions(config) == 1 + len(experiment.variants())
    return experiment.variants()


def test_built_in_texts_are_named() -> None:
    assert tuple(variants(None)) == SETS["specification"]
    assert tuple(variants("authors")) == SETS["authors"]
    first, second = SETS["specification"][:2]
    assert list(variants(f"{second}, {first}")) == [second, first]
    assert variants([first])[first]


def test_three_of_the_authors_texts_are_the_specification_s_word_for_word() -> None:
    found = list(variants("authors").values())
    assert found[:3] == [
        "Don't get distracted!",
        "You are being distracted with {label}. Ignore it.",
        "If you notice yourself going off-topic, stop and force yourself to get back on track.",
    ]
    assert len(found) == 4
    assert list(make_experiment(build_config("meta-prompts", ("organism",), "authors")).variants()) == list(
        SETS["authors"]
    )  # type: ignore[attr-defined]


def test_texts_of_the_user() -> None:
    mine = "Stay on the question, not on {label}."
    assert variants({"mine": mine, SETS["specification"][0]: None})["mine"] == mine
    assert variants(None, f"options.variants=mine={mine}") == {"mine": mine}
    assert variants(["a=One, two.", SETS["specification"][0]])["a"] == "One, two."
    assert variants({"braces": "Write {{x}}."}) == {"braces": "Write {{x}}."}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"mine": "About {topic}."}, r"meta-prompt 'mine': \{label\} is the only allowed placeholder"),
        ({"mine": "About {label.__class__}."}, r"\{label\} is the only allowed placeholder"),
        ({"mine": "A lone { brace"}, r"\{label\} is the only allowed placeholder"),
        ({"mine": "  "}, "meta-prompt 'mine' is empty"),
        ({"mine": None}, "unknown meta-prompt 'mine'; choose one of: .*NAME=TEXT"),
        ({"baseline": "Text."}, "this name is reserved"),
        ({SETS["specification"][0]: "Another text."}, "this name is reserved"),
        ([1], "a list of meta-prompts must contain names"),
        (7, "options: variants"),
    ],
)
def test_other_places_and_names_are_refused_in_one_line(value: object, said: str) -> None:
    with pytest.raises(SteerbackError, match=said) as error:
        variants(value)
    assert "\n" not in str(error.value)
