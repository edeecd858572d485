"""Detect restarts: places where a response withdraws its previous text, such as "Wait, that's not right."

Logistic regression (`offline`) or naive Bayes (`offline-bayes`) classifies each sentence and each clause after a pause.
The features are n-grams of the first words and of their classes (vocabulary.txt). Words of the prompt and recently used
words have their own marks; all other content words share one placeholder. `python -m tools.judge train` trains the
weights. This module knows English, but no scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import resources

from steerback.judging.text import Span, clause_starts, hide, sentences, words

LONGEST = 18
"""Number of tokens of a clause that the classifier reads."""
RECENT = 400
"""Number of characters before a clause whose words count as recently used."""
MIN_WORDS = 2
"""Minimum number of words before and after a restart."""
MAX_RESIDUE = 8
"""More words than this after a restart phrase, in its sentence, count as content between two restarts."""
MAX_LEAD = 3
"""More words than this before a phrase, in its sentence, count as content between two restarts."""
AHEAD, LOOP_WORDS, FEW_WORDS = 400, 40, 12
"""Characters and words after a restart that are checked for a loop; with fewer words, the last ones of the text are."""
VARIED, MOST_SIGNS = 0.4, 0.5
"""Smallest share of distinct words, and largest share of signs among the characters, of text that is language."""

_TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|[.…]+|[^\w\s]")
_CONTRACTIONS = {"n't": "not", "'m": "am", "'re": "are", "'ve": "have", "'ll": "will", "'d": "would", "'s": "is"}
_LIST_MARK = re.compile(r"\s*(?:[-*•>#]+|\d{1,3}[.)])[ \t*_\"]*")


@dataclass(frozen=True, slots=True)
class Restart:
    """A restart: its phrase is text[start:end], and its attempt begins at `start`."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Clause:
    """A clause to classify: its text, the kind of its start, the words of the prompt, the recently used words.

    `voice` is "tale" if the prompt asks for a story, a letter or the like, "self" if the writer recently used "I", and
    else "".
    """

    text: str
    kind: str
    asked: frozenset[str]
    recent: frozenset[str]
    voice: str


@dataclass(frozen=True, slots=True)
class Classifier:
    """A linear classifier of clauses: log-odds = sum of feature weights + constant."""

    weights: dict[str, float]
    constant: float

    def log_odds(self, clause: Clause) -> float:
        """Return the log-odds that the clause is a restart."""
        return sum(self.weights.get(f, 0.0) for f in features(clause)) + self.constant


@cache
def classifier(judge: str = "offline") -> Classifier:
    """Load the trained classifier of an offline judge."""
    file = resources.files("steerback.judging") / f"restarts-{judge}.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    return Classifier(stored["weights"], stored["constant"])


def find_restarts(text: str, prompt: str = "", judge: str = "offline") -> list[Restart]:
    """Return the restarts of a response in order; phrases without content between them are one restart."""
    decide, shown, asked = classifier(judge), hide(text), prompt_words(prompt)
    restarts: list[Restart] = []
    content_end = -1  # end of the last sentence with content
    lead: int | None = None  # start of a "Hmm." or "Okay." directly before this sentence, which joins a restart
    for sentence in sentences(shown):
        restart = _in_sentence(decide, shown, sentence, asked)
        if restart is None or not _is_fluent(text, restart.start):
            if _is_interjection(shown[sentence.start : sentence.end]):
                lead = sentence.start if lead is None else lead
            else:
                lead, content_end = None, sentence.end
            continue
        if lead is not None and restart.start == sentence.start:
            restart = Restart(lead, restart.end)
        lead = None
        if _has_words(shown[sentence.start : restart.start], MAX_LEAD + 1):
            content_end = restart.start
        if restarts and restarts[-1].end > content_end:
            restarts[-1] = Restart(restarts[-1].start, restart.end)
        else:
            restarts.append(restart)
        if _has_words(shown[restart.end : sentence.end], MAX_RESIDUE + 1):
            content_end = sentence.end
    return [r for r in restarts if _has_words(text[: r.start], MIN_WORDS) and _has_words(text[r.end :], MIN_WORDS)]


def _is_fluent(text: str, start: int) -> bool:
    """Return whether the text from a restart on is language, and no loop of a few words or signs.

    Steering with latents of function words makes loops such as "That. to. that. if. to." Their short sentences look
    like the openings of restarts (LOG.md, "Judging").
    """
    part = text[start : start + AHEAD]
    tokens = words(part)[:LOOP_WORDS]
    if len(tokens) < FEW_WORDS:  # the response ends here
        part = text[-AHEAD:]
        tokens = words(part)[-LOOP_WORDS:]
    shown = [character for character in part if not character.isspace()]
    signs = sum(not character.isalnum() for character in shown)
    return len(set(tokens)) >= VARIED * len(tokens) and signs <= MOST_SIGNS * len(shown)


def clauses(shown: str, sentence: Span, asked: frozenset[str]) -> Iterator[tuple[int, Clause]]:
    """Yield the clauses of a sentence that may be restarts, with their offsets; `shown` is the text after `hide`.

    After a comma, only an interjection or similar word can open a restart: ", no, wait, ..." but not ", that is wrong".
    """
    starts = [(at, kind) for at, kind in clause_starts(shown, sentence) if _may_open(shown[at : at + 60], kind)]
    if not starts:
        return
    recent = frozenset(words(shown[max(sentence.start - RECENT, 0) : sentence.start]))
    voice = "tale" if asked & _listed("tale") else "self" if recent & {"i", "my", "me"} else ""
    for number, (start, kind) in enumerate(starts):
        later = (at for at, _ in starts[number + 1 :] if _has_words(shown[start:at], MAX_LEAD + 1))
        text = shown[start : min(next(later, sentence.end), start + 300)]
        kind = _kind(shown[max(start - 40, 0) : start]) if kind == "^" else kind
        yield start, Clause(text, kind, asked, recent, voice)


def _may_open(text: str, kind: str) -> bool:
    """Return whether a clause may be a restart: it has a word of several letters, and an opening word after a comma."""
    tokens = words(text)
    if kind == "," and not (tokens and (_class_of(tokens[0]) == "interjection" or tokens[0] in _listed("opening"))):
        return False
    return any(len(w) > 1 for w in tokens)


def features(clause: Clause) -> list[str]:
    """Return the distinct features: n-grams of 1 to 3 words and 1 to 4 word classes, and the share of content words."""
    tokens = [t for raw in _TOKEN.findall(clause.text[:200].lower().replace("’", "'")) for t in _expanded(raw)]
    seen, kinds = [clause.kind], [clause.kind]
    content = 0
    for token in tokens[:LONGEST]:
        known = _class_of(token)
        word = "P" if token in clause.asked and known != "interjection" else token if known else "_"
        if word == "_":
            content += 1
            word = "#" if token.isdigit() else "R" if token in clause.recent else "_"
        if word in "P_R" and seen[-1] == word:
            continue
        seen.append(word)
        kinds.append(token if known == "kept" else known if word == token and known else word)
    seen.append("$" if len(tokens) <= LONGEST else "...")
    kinds.append(seen[-1])
    share = f"content {round(5 * content / max(len(tokens[:LONGEST]), 1))} of 5"
    voice = f"voice {clause.voice}"
    context = [share, f"{clause.kind} {share}", voice, f"{voice} {clause.kind}", f"{voice} {seen[1:2]}"]
    return list(dict.fromkeys([*_grams("w", seen, 3), *_grams("c", kinds, 4), *context]))


def prompt_words(prompt: str) -> frozenset[str]:
    """Return the words of a prompt that express its topic."""
    return frozenset(w for w in words(prompt) if len(w) > 3 and w not in _listed("task"))


def _in_sentence(decide: Classifier, shown: str, sentence: Span, asked: frozenset[str]) -> Restart | None:
    """Return the first restart in a sentence, None if there is none."""
    for start, clause in clauses(shown, sentence, asked):
        best = decide.log_odds(clause)
        if best <= 0:
            continue
        end = start + len(clause.text) if len(clause.text) < 300 else sentence.end
        for cut, _ in clause_starts(shown, Span(start, end))[1:6]:  # the phrase ends where the log-odds are largest
            part = replace(clause, text=shown[start:cut].rstrip(" -–—"))
            if (odds := decide.log_odds(part)) > best:
                best, end = odds, start + len(part.text)
        return Restart(start, end)
    return None


def _kind(before: str) -> str:
    """Return "*" after a list mark or at the start of a line, ":" after a label in its line, else "^"."""
    line = before.rpartition("\n")[2]
    if _LIST_MARK.fullmatch(line):
        return "*"
    return ":" if line.rstrip(" *_").endswith(":") else "^"


def _expanded(token: str) -> Sequence[str]:
    """Split a contraction into its words; return other tokens unchanged."""
    if "'" not in token:
        return {"cannot": ("can", "not"), "cant": ("can", "not"), "gotta": ("got", "to")}.get(token, (token,))
    if token == "let's":
        return ("let", "us")
    for ending, word in _CONTRACTIONS.items():
        if token.endswith(ending):
            stem = token[: -len(ending)]
            return ({"ca": "can", "wo": "will", "sha": "shall"}.get(stem, stem) or word, word)
    return (token,)


def _grams(kind: str, tokens: Sequence[str], longest: int) -> Iterator[str]:
    for n in range(1, longest + 1):
        for i in range(len(tokens) - n + 1):
            yield f"{kind} {' '.join(tokens[i : i + n])}"


@cache
def _vocabulary() -> dict[str, list[str]]:
    """Return the sections of vocabulary.txt."""
    text = (resources.files("steerback.judging") / "vocabulary.txt").read_text(encoding="utf-8")
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    parts = re.split(r"^\[([a-z ]+)\]$", body, flags=re.M)
    return {name: words.split() for name, words in zip(parts[1::2], parts[2::2], strict=True)}


@cache
def _listed(name: str) -> frozenset[str]:
    return frozenset(_vocabulary()[f"list {name}"])


@cache
def _classes() -> dict[str, str]:
    """Return the class of each word and of each word prefix (an entry that ends in *)."""
    return {w: name for name, entries in _vocabulary().items() if not name.startswith("list ") for w in entries}


@lru_cache(maxsize=65536)
def _class_of(token: str) -> str:
    """Return the class of a token; "" for a content word, "kept" for punctuation."""
    if not token[0].isalnum():
        return "kept"
    beginnings = (f"{token[:n]}*" for n in range(min(len(token), 14), 2, -1))
    return next((_classes()[known] for known in (token, *beginnings) if known in _classes()), "")


def _is_interjection(sentence: str) -> bool:
    tokens = words(sentence[:60])
    return len(sentence) <= 40 and all(_class_of(w) == "interjection" for w in tokens)


def _has_words(text: str, count: int) -> bool:
    return len(words(text[:2000] if count <= 2 else text[:400])) >= count
