"""Leave out latents with abstract labels: no judge can tell whether a text is off topic if the topic is "emphasis".

A `Rater` rates each label from 0 (abstract, conversational, grammatical) to 100 (visible or tangible). The
specification drops labels below the median rating; the authors' code keeps ratings of 65 and more. The offline rater
uses word lists and word endings and needs no model. Its ratings are a rough substitute and not comparable with those of
a language model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Protocol, runtime_checkable

from steerback.data.prompts import word_list
from steerback.errors import unknown
from steerback.judging import ALIASES, Maker, make_judge, model_string
from steerback.store.cache import default_path


@runtime_checkable
class Rater(Protocol):
    """Rates labels. `name` and `version` are recorded in caches and manifests."""

    name: str
    version: str

    def rate(self, labels: Sequence[str]) -> list[float | None]:
        """Return one rating (0-100) per label, None for a label that could not be rated."""
        ...


def abstract_labels(ratings: Mapping[int, float], threshold: float | None = None) -> frozenset[int]:
    """Return the latents rated below `threshold`; None takes the median of all ratings."""
    if not ratings:
        return frozenset()
    cut = median(ratings.values()) if threshold is None else threshold
    return frozenset(k for k, rating in ratings.items() if rating < cut)


class OfflineRater:
    """Rates labels by word lists and word endings.

    Each content word votes for concrete or abstract; unknown words vote by their ending. The rating is the logistic
    function of the mean vote. Words such as "descriptions" or "references" do not vote if the other words are concrete.
    """

    name = "offline"
    version = "2"

    def rate(self, labels: Sequence[str]) -> list[float | None]:
        return [self._one(label) for label in labels]

    def _one(self, label: str) -> float | None:
        words = [w for w in _WORD.findall(label) if w.casefold() not in _STOP]
        if not words:
            return None
        votes = [_vote(word, first=i == 0) for i, word in enumerate(words)]
        about = [vote for word, vote in zip(words, votes, strict=True) if not _stems(word) & _CARRIERS]
        if about and sum(about) >= len(about):  # the other words are clearly concrete
            votes = about
        framed = -1.5 if _FRAME.search(label) else 0.0
        return round(100.0 / (1.0 + math.exp(-1.6 * (sum(votes) / len(votes) + framed))), 1)


LOCAL_RATERS: dict[str, Callable[[], Rater]] = {"offline": OfflineRater}


def make_rater(name: str, judges: Maker = make_judge) -> Rater:
    """Return the rater of a name: `offline`, or a language model by alias or "provider/model" as for judges.

    A language model is asked through the judge of that name, so that both share the budget of `judges`.
    """
    if name in LOCAL_RATERS:
        return LOCAL_RATERS[name]()
    if model_string(name) is None:
        raise unknown(
            "concreteness rater", name, [*sorted(LOCAL_RATERS), *(a.alias for a in ALIASES), "any provider/model"]
        )
    from steerback.judging.graders import LLMRater
    from steerback.judging.llm import LLMJudge

    judge = judges(name)
    assert isinstance(judge, LLMJudge)  # `name` is a model string, so the judge is a language model
    return LLMRater(name, judge.transport, default_path())


def _vote(word: str, first: bool) -> float:
    """Return the vote of one word, -2 (abstract) to 2 (concrete); a capital letter marks a name unless `first`."""
    lower = word.casefold()
    stems = _stems(word)
    if stems & _ABSTRACT:
        return -2.0
    if stems & _CONCRETE or (word[0].isupper() and _places(lower) & _PLACES):
        return 2.0
    if not first and word[0].isupper():
        return 1.5
    singular = lower.removesuffix("s")
    if _THINGS.search(lower) and not _IDEAS.search(singular):
        return 1.5
    if _IDEAS.search(singular):
        return -1.2
    return 0.6 if len(lower) <= 7 else 0.3


def _stems(word: str) -> set[str]:
    """Return the word in lower case and its possible singular forms."""
    lower = word.casefold()
    stems = {lower, lower.removesuffix("s"), lower.removesuffix("es"), lower.removesuffix("'s")}
    return stems | ({lower[:-3] + "y"} if lower.endswith("ies") else set())


def _places(lower: str) -> set[str]:
    """Return the possible place names behind a word such as "brazilians", "japanese", "himalayan", "californian"."""
    word = lower.removesuffix("'s").removesuffix("s")
    cut = {word.removesuffix(ending) for ending in ("n", "an", "ian", "ese", "ish", "i", "ean")}
    return {lower, word} | cut | {stem + end for stem in cut for end in ("a", "o", "y", "e")}


_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
_STOP = word_list("function")
# Labels that describe the function of a text and not its subject.
_FRAME = re.compile(
    r"\b(?:the (?:assistant|user|model|speaker|author)|should|must|phrases? (?:that|for)|words? (?:that|indicating)"
    r"|(?:beginning|start|end) of|references? to|introduc\w+|explaining|descriptions? of (?:an?|the) )\b",
    re.IGNORECASE,
)
_IDEAS = re.compile(
    r"(?:tion|sion|ity|ness|\wment|ism|ance|ence|ancy|ency|ship|hood|acy|ology|ive|ical|ual|ful|ous|able|ible"
    r"|ish|tic|dom|tude|less|ized|ised)$"
)
_THINGS = re.compile(r"(?:fish|berry|berries|fruit|bird|house|boat|ship|stone|wood|wheel|horse|ball|ware|maker|er)s?$")
_ABSTRACT, _CARRIERS, _PLACES = word_list("abstract"), word_list("carriers"), word_list("places")
_CONCRETE = word_list("concrete") | word_list("fields")
