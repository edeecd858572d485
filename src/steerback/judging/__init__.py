"""Judges: they split a response into attempts and score each attempt.

`base` defines the protocol. `make_judge` returns the judge of a name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from steerback.errors import unknown
from steerback.judging.base import Judge, JudgeItem, References
from steerback.judging.models import ALIASES, JudgeModel, Limits, model_string

__all__ = [
    "ALIASES",
    "LOCAL",
    "Judge",
    "JudgeItem",
    "JudgeModel",
    "Limits",
    "Maker",
    "References",
    "judge_maker",
    "make_judge",
    "model_string",
]

Maker = Callable[[str], Judge]

LOCAL = {
    "offline": "restart classifier and TF-IDF against unsteered responses; no key, not comparable with the paper",
    "offline-bayes": "second offline judge, for comparison: naive Bayes for restarts and relevance",
    "scripted": "reads the scores that the scripted engine writes into its responses; for tests",
}
"""Judges that need no API key, each with one line for listings."""


def make_judge(
    name: str,
    limits: Limits | None = None,
    *,
    temperature: float | None = 0.0,
    base_url: str | None = None,
    rubrics: Mapping[str, str] | None = None,
) -> Judge:
    """Return the judge of a name: a local judge, an alias, or any Inspect model string ("provider/model").

    NAME+RUBRIC is a model that judges by the user's rubric RUBRIC; `rubrics` maps rubric names to texts. Local judges
    ignore all options. Raises SteerbackError for an unknown name (lists the choices), a missing key (names the
    environment variable) or a missing extra.
    """
    if name in ("offline", "offline-bayes"):
        from steerback.judging.offline import OfflineJudge

        return OfflineJudge(name)
    if name == "scripted":
        from steerback.judging.scripted import ScriptedJudge

        return ScriptedJudge()
    model = model_string(name)
    if model is None:
        raise unknown("judge", name, [*LOCAL, *(a.alias for a in ALIASES), "any provider/model"])
    from steerback.judging.llm import LLMJudge
    from steerback.judging.transport import Transport
    from steerback.judging.user_rubric import rubric_of

    transport = Transport(model, limits or Limits(), temperature, base_url)
    return LLMJudge(name, transport, rubric_of(name, rubrics or {}))


def judge_maker(limits: Limits, rubrics: Mapping[str, str] | None = None) -> Maker:
    """Return `make_judge` with these limits and a cache: one judge per name, so all uses share one budget."""
    return functools.cache(functools.partial(make_judge, limits=limits, rubrics=rubrics))
