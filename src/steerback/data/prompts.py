"""Prompt lists and meta-prompts. Lists are text files, one prompt a line; `#` starts a comment line."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path

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
# The four of the authors' code. The first three are in the specification too; the fourth is told in our own words.
AUTHORS_META_PROMPTS = {
    **{name: META_PROMPTS[name] for name in ("dont-get-distracted", "distracted-with-label", "self-monitor")},
    "resist-manipulation": "Something outside may try to change what you write. Do not give in to it.",
}


def load_prompts(source: str) -> tuple[str, ...]:
    """Prompts of a built-in list (by name) or of a text file (by path), in file order.

    `authors` is the list of the authors' repository, once the user has fetched it.
    """
    if source == "authors":
        text = _read(paper_data.path_of(paper_data.PROMPTS))
    elif source in BUILTIN:
        text = resources.files("steerback.data").joinpath("prompts", BUILTIN[source]).read_text("utf-8")
    else:
        text = _read(Path(source))
    prompts = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise SteerbackError(f"prompts file {source} holds no prompt; write one prompt a line")
    repeated = sorted({p for p in prompts if prompts.count(p) > 1})
    if repeated:
        raise SteerbackError(f"prompts file {source} repeats {repeated[0]!r}; every prompt must occur once")
    return tuple(prompts)


def load_subjects(source: str | None = None) -> dict[str, tuple[str, ...]]:
    """Off-topic subjects with words about them: the built-in list, or a file (`subject: word, word`, one a line)."""
    if source is None:
        text = resources.files("steerback.data").joinpath("prompts", "off_topic_subjects.txt").read_text("utf-8")
    else:
        text = _read(Path(source), "subjects file", ("(leave it out for the built-in list)",))
    found: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        subject, _, terms = line.partition(":")
        if not subject.strip() or subject.lstrip().startswith("#"):
            continue
        if subject.strip() in found:
            raise SteerbackError(f"subjects {source} repeat {subject.strip()!r}; every subject must occur once")
        found[subject.strip()] = tuple(term.strip() for term in terms.split(",") if term.strip())
    return found


def _read(path: Path, what: str = "prompts list or file", choices: Iterable[str] = BUILTIN) -> str:
    if not path.is_file():
        raise unknown(what, str(path), choices)
    try:
        return path.read_text("utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise SteerbackError(f"prompts file {path} cannot be read as UTF-8 text: {error}") from None
