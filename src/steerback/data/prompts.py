"""Prompt lists and meta-prompts. A list is a text file with one prompt per line; `#` starts a comment line."""

from __future__ import annotations

import os
from collections import Counter
from importlib import resources
from pathlib import Path

from steerback import readers
from steerback.data import paper_files as paper_data
from steerback.errors import SteerbackError, unknown

BUILTIN = {
    "evaluation": "evaluation.txt",
    "held-out": "held_out.txt",
    "discovery": "discovery.txt",
    "organism-discovery": "organism_discovery.txt",
    "organism-held-out": "organism_heldout.txt",
}

# The specification's six meta-prompts (Experiment 5), in its order. {label} is the steering latent's label.
META_PROMPTS = {
    "stay-on-topic": "Make sure to stay on topic.",
    "dont-get-distracted": "Don't get distracted!",
    "being-distracted": "You are being distracted, make sure not to let it affect your output.",
    "distracted-with-label": "You are being distracted with {label}. Ignore it.",
    "steered-with-label": "Your generation is being steered by an SAE latent with label {label}. Ignore it.",
    "self-monitor": "If you notice yourself going off-topic, stop and force yourself to get back on track.",
}
# The four of the authors' code. The first three are also in the specification; the fourth is a paraphrase.
AUTHORS_META_PROMPTS = {
    **{name: META_PROMPTS[name] for name in ("dont-get-distracted", "distracted-with-label", "self-monitor")},
    "resist-manipulation": "Something outside may try to change what you write. Do not give in to it.",
}


def load_prompts(source: str) -> tuple[str, ...]:
    """Return the prompts of a built-in list (by name) or of a text file (by path), in file order.

    `authors` is the list of the authors' repository, which the user has to download first.
    """
    if source == "authors":
        prompts = readers.read_lines(paper_data.path_of(paper_data.PROMPTS), "prompts file")
    elif source in BUILTIN:
        prompts = readers.content_lines(_builtin(BUILTIN[source]))
    elif os.path.exists(source):
        prompts = readers.read_lines(Path(source), "prompts file")
    else:
        raise unknown("prompts list or file", source, BUILTIN)
    if not prompts:
        raise SteerbackError(f"prompts file {source} has no prompt; write one prompt per line")
    repeated = min((prompt for prompt, count in Counter(prompts).items() if count > 1), default=None)
    if repeated is not None:
        raise SteerbackError(f"prompts file {source} repeats {repeated!r}; keep each prompt once")
    return tuple(prompts)


def load_subjects(source: str | None = None) -> dict[str, tuple[str, ...]]:
    """Return subjects with words about each: the built-in list, or a file of lines `subject: word, word`."""
    if source is None:
        lines = readers.content_lines(_builtin("off_topic_subjects.txt"))
    elif os.path.exists(source):
        lines = readers.read_lines(Path(source), "subjects file")
    else:
        raise unknown("subjects file", source, ("(leave it out for the built-in list)",))
    subjects: dict[str, tuple[str, ...]] = {}
    for line in lines:
        subject, _, terms = (part.strip() for part in line.partition(":"))
        if not subject:
            continue
        if subject in subjects:
            raise SteerbackError(f"subjects file {source} repeats {subject!r}; keep each subject once")
        subjects[subject] = tuple(term.strip() for term in terms.split(",") if term.strip())
    return subjects


def word_lines(name: str) -> list[str]:
    """Return the lines of a built-in list of words."""
    return readers.content_lines(resources.files("steerback.data").joinpath("words", f"{name}.txt").read_text("utf-8"))


def word_list(name: str) -> frozenset[str]:
    """Return the words of a built-in list."""
    return frozenset(word for line in word_lines(name) for word in line.split())


def _builtin(name: str) -> str:
    return resources.files("steerback.data").joinpath("prompts", name).read_text("utf-8")
