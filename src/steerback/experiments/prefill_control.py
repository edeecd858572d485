"""Prefill control (paper's second version): is drift noticed when somebody else wrote it?

The first n, 2n, 3n, 4n characters of steered responses are handed to the model as its own beginning, and it goes on
without steering, and with it. Prefix and continuation are judged together; only restarts after the cut count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from steerback.config import RunConfig, Settings
from steerback.experiments.base import Analysis, Experiment, measured, planted, settings
from steerback.records import Judgement, Trial, is_degraded
from steerback.store.ledger import Ledger, Row
from steerback.study.study import Cell, Study

if TYPE_CHECKING:
    from steerback.engines.base import Engine

ARMS = ("unsteered", "steered")


class Options(Settings):
    """Lengths of the prefixes."""

    characters: int | None = Field(None, ge=1)
    """The shortest prefix; default: to the mean first restart."""
    multiples: list[Annotated[int, Field(ge=1)]] = Field([1, 2, 3, 4], min_length=1)


class PrefillControl(Experiment):
    """Restarts from prefixes of steered responses, with steering off and on."""

    name = "prefill-control"
    title = "Prefill control: continuing drifted prefixes unsteered and steered"
    options = Options

    def conditions(self, config: RunConfig) -> int:
        return 1 + len(ARMS) * len(self.multiples(config))

    def multiples(self, config: RunConfig) -> list[int]:
        return sorted(set(settings(self, config)["multiples"]))

    async def run(self, study: Study) -> None:
        """The baseline's responses, cut; each prefix goes on in both arms with the cell's seed."""
        rows = await study.baseline()
        cells = {cell.index: cell for cell in await study.cells()}
        characters = self.characters(study.config, rows)
        counts: dict[str, dict[str, int]] = {}
        trials: list[Trial] = []
        for k in self.multiples(study.config):
            tally: Counter[str] = Counter()
            for row in rows:
                prefix, why = cut(row, k * characters, study.engine)
                tally[why] += 1
                if prefix:
                    trials += arms(study, cells[row.trial.index], prefix, k)
            counts[f"{k}n"] = dict(tally)
        study.run.ledger.set_fact(study.name, "prefill", {"characters": characters, "prefixes": counts})
        await study.measure("prefill control", trials)

    def characters(self, config: RunConfig, rows: Sequence[Row]) -> int:
        """n: the mean position of the first restart, or a quarter of the mean response where nothing restarts."""
        given: int | None = settings(self, config)["characters"]
        if given is not None:
            return given
        starts = [s for row in rows if (s := first_restart(row)) is not None]
        if starts:
            return max(round(sum(starts) / len(starts)), 1)
        texts = [len(row.judged_text) for row in rows if row.completion is not None]
        return max(round(sum(texts) / max(len(texts), 1) / 4), 1)

    def analyse(self, ledger: Ledger, judge: str, draws: int) -> Analysis:
        """Restart and improvement rates by length of the prefix; unsteered against steered, paired."""
        from steerback.figures import prefill as figure

        found = measured(ledger, judge, draws, against=other_arm, prepare=after_cut)
        facts = {target: ledger.fact(target, "prefill") for target in found.targets}
        return Analysis(
            summary=found.to_json(self.name, {target: {"prefill": fact} for target, fact in facts.items()}),
            tables=found.tables(),
            figures={"prefill_control": partial(figure.draw, found, facts, note=planted(found.targets))},
            lines=[_line(target, fact) for target, fact in facts.items()],
        )


def arms(study: Study, cell: Cell, prefix: str, k: int) -> list[Trial]:
    """The same prefix with steering off and on."""
    return [
        study.at(cell, f"{ARMS[0]} {k}n", prefill=prefix, boost=0.0, interventions=()),
        study.at(cell, f"{ARMS[1]} {k}n", prefill=prefix),
    ]


def other_arm(condition: str) -> str | None:
    """Unsteered continuations are compared with steered ones of the same prefixes."""
    arm, _, length = condition.partition(" ")
    return f"{ARMS[1]} {length}" if arm == ARMS[0] else None


def first_restart(row: Row) -> int | None:
    """Character at which the second attempt begins (gated or not), or None."""
    scored = row.valid_receipt and row.judgement is not None and row.judgement.status == "scored"
    return row.judgement.attempts[1].start if scored and row.judgement and len(row.judgement.attempts) > 1 else None


def cut(row: Row, characters: int, engine: Engine) -> tuple[str, str]:
    """(prefix of at most `characters`, "used"), or ("", why there is none).

    The cut is where a token ends, and before a space where there is one: there the tokens of the prefix alone are
    those of the response.
    """
    done = row.completion
    if done is None or not row.valid_receipt or row.judgement is None or row.judgement.status != "scored":
        return "", "not scored"
    text = done.text
    if len(text) <= characters:
        return "", "too short"
    ends = [end for end in engine.token_ends(done) if 0 < end <= characters]
    whole = [end for end in ends if text[end].isspace()] or ends
    prefix = text[: whole[-1]] if whole else ""
    restart = first_restart(row)
    if not prefix.strip():
        return "", "too short"
    if restart is not None and restart < len(prefix):
        return "", "restarted before the cut"
    return ("", "degraded") if is_degraded(prefix) else (prefix, "used")


def after_cut(rows: Sequence[Row]) -> list[Row]:
    """Rows whose judgements count no attempt that begins before the cut; it is merged into the one before."""
    return [replace(row, judgement=_merged(row.judgement, len(row.trial.prefill))) for row in rows]


def _merged(judgement: Judgement | None, cut_at: int) -> Judgement | None:
    if judgement is None or judgement.status != "scored" or not cut_at:
        return judgement
    late = [replace(a, gated=n == 0 or a.start >= cut_at) for n, a in enumerate(judgement.attempts)]
    merged = replace(judgement, attempts=tuple(late)).gated_attempts()
    opened = {a.start: a.gated for a in judgement.attempts}
    return replace(judgement, attempts=tuple(replace(a, gated=opened[a.start]) for a in merged))


def _line(target: str, fact: Mapping[str, Any]) -> str:
    used = "; ".join(
        f"{k}: " + ", ".join(f"{n} {why}" for why, n in sorted(tally.items(), key=lambda item: item[0] != "used"))
        for k, tally in fact["prefixes"].items()
    )
    return f"{target}: n = {fact['characters']} characters; prefixes {used}"
