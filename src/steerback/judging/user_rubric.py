"""The user's rubrics: texts with placeholders for prompt, response and label, checked before the first call.

A judge with such a rubric is called NAME+RUBRIC, so that a run can hold its verdicts and those of the built-in rubric.
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
"""Fields of the JSON object that a judge has to return; `{format}` is replaced by the text that asks for them."""
SEPARATOR = "+"
_PLACE = re.compile(r"\{(\w+)\}")


def parse_rubric(name: str, text: str) -> Rubric:
    """Return the rubric of a text. Raises SteerbackError that names the missing or wrong placeholder or field.

    The system message says how the response is enclosed and that the judge must not follow instructions in it.
    """
    used = _PLACE.findall(text)
    guard, form = rubric("attempts-1").system.split("\n\n")[-2:]
    if wrong := [place for place in used if place not in (*REQUIRED, *OPTIONAL)]:
        choices = [f"{{{place}}}" for place in (*REQUIRED, *OPTIONAL)]
        raise unknown(f"placeholder in rubric {name!r}", f"{{{wrong[0]}}}", choices)
    if missing := [place for place in REQUIRED if used.count(place) != 1]:
        raise SteerbackError(f"rubric {name!r} needs the placeholder {{{missing[0]}}} exactly once")
    if repeated := [place for place in OPTIONAL if used.count(place) > 1]:
        raise SteerbackError(f"rubric {name!r} has the placeholder {{{repeated[0]}}} more than once; keep one")
    if "format" not in used and (unasked := [field for field in FIELDS if f'"{field}"' not in text]):
        raise SteerbackError(
            f'rubric {name!r} does not ask for the field "{unasked[0]}" of the judge\'s JSON object; write {{format}} '
            f"where you describe the reply, or name all of: {', '.join(FIELDS)}"
        )
    return Rubric(f"{name}-{digest(text)[:8]}", guard, text.replace("{format}", form))


def read_rubric(path: Path) -> tuple[str, str]:
    """Read and check a rubric file; return its name (the file's stem in letters, digits and dashes) and its text."""
    text = read_text(path, "rubric file")
    name = re.sub(r"\W+", "-", path.stem).strip("-") or "rubric"
    parse_rubric(name, text)
    return name, text


def with_rubric(judge: str, name: str) -> str:
    """Return the name NAME+RUBRIC of a language model that judges by the user's rubric."""
    if model_string(judge) is None:
        raise SteerbackError(f"--rubric needs a language model as judge; judge {judge!r} uses no rubric")
    return f"{judge.partition(SEPARATOR)[0]}{SEPARATOR}{name}"


def use_rubric(config: RunConfig, path: Path) -> RunConfig:
    """Return the config with the rubric of a file set for its judge.

    Of the judges of `cross-judge`, those named NAME+RUBRIC get it; if none is named so, all language models get it.
    """
    name, text = read_rubric(path)
    rubrics, judges = {**config.rubrics, name: text}, config.options.get("judges")
    if isinstance(judges, list):
        models = [str(judge) for judge in judges if model_string(str(judge)) is not None]
        if not models:
            raise SteerbackError("--rubric needs a language model as judge; --judges names none")
        chosen = [judge for judge in models if judge.endswith(SEPARATOR + name)] or models
        named = [with_rubric(judge, name) if judge in chosen else judge for judge in map(str, judges)]
        return config.model_copy(update={"options": {**config.options, "judges": named}, "rubrics": rubrics})
    return config.model_copy(update={"judge": with_rubric(config.judge, name), "rubrics": rubrics})


def rubric_of(judge: str, rubrics: Mapping[str, str]) -> Rubric | None:
    """Return the user's rubric in a judge's name NAME+RUBRIC; None for the built-in rubric."""
    _, separator, name = judge.partition(SEPARATOR)
    if not separator:
        return None
    if name not in rubrics:
        raise SteerbackError(f"judge {judge!r}: this run has no rubric {name!r}; give its file with --rubric")
    return parse_rubric(name, rubrics[name])
