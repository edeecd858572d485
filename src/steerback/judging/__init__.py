"""Judges split responses into attempts and score them; `base` is the protocol, `make_judge` the way to get one."""

from __future__ import annotations

from steerback.errors import unknown
from steerback.judging.base import Judge, JudgeItem, References

__all__ = ["Judge", "JudgeItem", "References", "make_judge"]

LOCAL = ("offline", "scripted")


def make_judge(name: str, **options: object) -> Judge:
    """The judge a user asked for by name. Raises SteerbackError with the choices where there is none."""
    if name == "offline":
        from steerback.judging.offline import OfflineJudge

        return OfflineJudge(**options)
    if name == "scripted":
        from steerback.judging.scripted import ScriptedJudge

        return ScriptedJudge(**options)
    raise unknown("judge", name, LOCAL)
