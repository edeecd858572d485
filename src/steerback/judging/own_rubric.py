"""Rubrics of the user: a text with places for prompt, response and label, checked before the first call.

Such a judge is called NAME+RUBRIC, so that its verdicts stand beside those of the built-in rubric.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from steerback.config import RunConfig
from steerback.errors import SteerbackError, unknown
from steerback.judging.models import model_string
from steerback.judging.prompt import Rubric, rubric
from steerback.readers import read_text
from steerback.records import digest

REQUIRED, OPTIONAL = ("prompt", "response"), ("label", "format")
FIELDS = ("verdict", "attempts", "restart_phrase", "first_words", "last_words", "score")
"""Fields of the JSON object that a judge has to return; `{format}` stands for the text that asks for them."""
SEPARATOR = "+"
_PLACE = re.compile(r"\{(\w+)\}")


def own_rubric(name: str, text: str) -> Rubric:
    """Return the rubric of a text; SteerbackError says which place or field is missing or wrong.

    The system message says how the response is enclosed, and that nothing in it is to be followed.
    """
    used = _PLACE.findall(text)
    guard, form = rubric("attempts-1").system.split("\n\n")[-2:]
    if wrong := [place for place in used if place not in (*REQUIRED, *OPTIONAL)]:
        raise unknown(f"place of rubric {name!r}", f"{{{wrong[0]}}}", [f"{{{p}}}" for p in (*REQUIRED, *OPTIONAL)])
    if missing := [place for place in REQUIRED if used.count(place) != 1]:
        raise SteerbackError(f"rubric {name!r} needs the place {{{missing[0]}}} exactly once")
    if repeated := [place for place in OPTIONAL if used.count(place) > 1]:
        raise SteerbackError(f"rubric {name!r} has the place {{{repeated[0]}}} more than once")
    if "format" not in used and (unasked := [field for field in FIELDS if f'"{field}"' not in text]):
        raise SteerbackError(
            f'rubric {name!r} does not ask for the field "{unasked[0]}" of the judge\'s JSON object; write {{format}} '
            f"where the reply is described, or name all of: {', '.join(FIELDS)}"
        )
    return Rubric(f"{name}-{digest(text)[:8]}", guard, text.replace("{format}", form))


def read_rubric(path: Path) -> tuple[str, str]:
    """Return name and text of a rubric file, checked; the name is that of the file, in letters, digits and dashes."""
    text = read_text(path, "rubric file")
    name = re.sub(r"\W+", "-", path.stem).strip("-") or "rubric"
    own_rubric(name, text)
    return name, text


def with_rubric(judge: str, name: str) -> str:
    """Return the name under which a language model judges by a rubric of the user."""
    if model_string(judge) is None:
        raise SteerbackError(f"--rubric goes with a language model; judge {judge!r} has none to change")
    return f"{judge.partition(SEPARATOR)[0]}{SEPARATOR}{name}"


def use_rubric(config: RunConfig, path: Path) -> RunConfig:
    """Return the config with the rubric for its judge.

    Of the judges of cross-judge those get it that are named NAME+RUBRIC; without such a name, all models.
    """
    name, text = read_rubric(path)
    rubrics, judges = {**config.rubrics, name: text}, config.options.get("judges")
    if isinstance(judges, list):
        models = [str(judge) for judge in judges if model_string(str(judge)) is not None]
        if not models:
            raise SteerbackError("--rubric goes with a language model; --judges names none")
        chosen = [judge for judge in models if judge.endswith(SEPARATOR + name)] or models
        named = [with_rubric(judge, name) if judge in chosen else judge for judge in map(str, judges)]
        return config.model_copy(update={"options": {**config.options, "judges": named}, "rubrics": rubrics})
    return config.model_copy(update={"judge": with_rubric(config.judge, name), "rubrics": rubrics})


def rubric_of(judge: str, rubrics: Mapping[str, str]) -> Rubric | None:
    """Return the rubric that a judge's name asks for; None for the built-in one."""
    _, separator, name = judge.partition(SEPARATOR)
    if not separator:
        return None
    if name not in rubrics:
        raise SteerbackError(f"judge {judge!r}: its rubric {name!r} is not kept here; give its file with --rubric")
    return own_rubric(name, rubrics[name])
