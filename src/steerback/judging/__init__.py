"""Judges split responses into attempts and score them; `base` is the protocol, `make_judge` the way to get one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from steerback.errors import unknown
from steerback.judging.base import Judge, JudgeItem, References
from steerback.judging.models import JudgeModel, Limits, aliases, model_string

__all__ = [
    "LOCAL",
    "Judge",
    "JudgeItem",
    "JudgeModel",
    "Limits",
    "Maker",
    "References",
    "aliases",
    "judge_maker",
    "make_judge",
    "model_string",
]

Maker = Callable[[str], Judge]

LOCAL = {
    "offline": "restart classifier and TF-IDF against unsteered responses; no key, not comparable with the paper",
    "offline-bayes": "another offline judge: naive Bayes for restarts and relevance, to compare the first with",
    "scripted": "reads the truth that the scripted engine writes into its responses; for tests",
}
"""Judges that need no key."""


def make_judge(
    name: str,
    limits: Limits | None = None,
    *,
    temperature: float | None = 0.0,
    base_url: str | None = None,
    rubrics: Mapping[str, str] | None = None,
) -> Judge:
    """Return the judge of that name: a local one, an alias, or any Inspect model string ("provider/model").

    NAME+RUBRIC is a model that judges by a rubric of the user, whose text is in `rubrics`. Local judges ignore all
    options. Raises SteerbackError for an unknown name (with the choices), a missing key (naming
    the variable) or a missing extra.
    """
    if name in ("offline", "offline-bayes"):
        from steerback.judging.offline import OfflineJudge

        return OfflineJudge(name)
    if name == "scripted":
        from steerback.judging.scripted import ScriptedJudge

        return ScriptedJudge()
    model = model_string(name)
    if model is None:
        raise unknown("judge", name, [*LOCAL, *(a.alias for a in aliases()), "any provider/model"])
    from steerback.judging.llm import LLMJudge
    from steerback.judging.own_rubric import rubric_of
    from steerback.judging.transport import Transport

    own = rubric_of(name, rubrics or {})
    return LLMJudge(name, Transport(model, limits or Limits(), temperature, base_url), own)


def judge_maker(limits: Limits, rubrics: Mapping[str, str] | None = None) -> Maker:
    """Return `make_judge` with these limits. A name always gives the same judge, so its budget holds for all uses."""
    return functools.cache(functools.partial(make_judge, limits=limits, rubrics=rubrics))
