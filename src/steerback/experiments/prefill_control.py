"""Prefill control (paper's second version): tests whether a model notices drift that it did not generate itself.

The first n, 2n, 3n and 4n characters of steered responses are prefilled as the beginning of the response. The model
continues them without steering and with steering. Prefix and continuation are judged together; only restarts after the
cut count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from steerback.config import RunConfig, Settings
from steerback.experiments.base import Experiment
from steerback.records import Trial, is_degraded
from steerback.store.facts import PREFILL, PREFILL_ARMS, PrefixCounts
from steerback.store.ledger import Row
from steerback.study.study import Cell, Study

if TYPE_CHECKING:
    from steerback.engines.base import Engine


class PrefillOptions(Settings):
    """Lengths of the prefixes."""

    characters: int | None = Field(None, ge=1)
    """Length n of the shortest prefix in characters; default: the mean position of the first restart."""
    multiples: list[Annotated[int, Field(ge=1)]] = Field([1, 2, 3, 4], min_length=1)
    """Lengths of the prefixes as multiples of `characters`."""


class PrefillControl(Experiment[PrefillOptions]):
    """Measure restarts in continuations of drifted prefixes, with steering off and on."""

    name = "prefill-control"
    title = "Prefill control: continuing drifted prefixes unsteered and steered"
    options_type = PrefillOptions

    def conditions(self, config: RunConfig) -> int:
        return 1 + len(PREFILL_ARMS) * len(self.multiples())

    def multiples(self) -> list[int]:
        """Lengths of the prefixes in units of n, ascending."""
        return sorted(set(self.options.multiples))

    async def run(self, study: Study) -> None:
        """Cut the baseline's responses, and continue each prefix in both arms with the grid point's seed."""
        rows = await study.baseline_rows()
        cells = {cell.index: cell for cell in await study.cells()}
        characters = self.characters(rows)
        counts: dict[str, dict[str, int]] = {}
        trials: list[Trial] = []
        for k in self.multiples():
            tally: Counter[str] = Counter()
            for row in rows:
                prefix, why = cut(row, k * characters, study.engine)
                tally[why] += 1
                if prefix:
                    trials += arms(study, cells[row.trial.index], prefix, k)
            counts[f"{k}n"] = dict(tally)
        study.run.ledger.put(study.name, PREFILL, PrefixCounts(characters=characters, prefixes=counts))
        await study.measure("prefill control", trials)

    def characters(self, rows: Sequence[Row]) -> int:
        """Return n: the mean position of the first restart, or a quarter of the mean length if nothing restarts."""
        if self.options.characters is not None:
            return self.options.characters
        starts = [s for row in rows if (s := first_restart(row)) is not None]
        if starts:
            return max(round(sum(starts) / len(starts)), 1)
        texts = [len(row.judged_text) for row in rows if row.completion is not None]
        return max(round(sum(texts) / max(len(texts), 1) / 4), 1)


def arms(study: Study, cell: Cell, prefix: str, k: int) -> list[Trial]:
    """Return the trials of one prefix with steering off and on."""
    return [
        study.at(cell, f"{PREFILL_ARMS[0]} {k}n", prefill=prefix, boost=0.0),
        study.at(cell, f"{PREFILL_ARMS[1]} {k}n", prefill=prefix),
    ]


def first_restart(row: Row) -> int | None:
    """Return the character at which the second attempt begins (gated or not), or None."""
    if not row.attempts or row.judgement is None or len(row.judgement.attempts) < 2:
        return None
    return row.judgement.attempts[1].start


def cut(row: Row, characters: int, engine: Engine) -> tuple[str, str]:
    """Return (prefix of at most `characters`, "used"), or ("", reason).

    The cut is at the end of a token, and before a space if possible, so that the prefix is tokenised as in the
    response.
    """
    done = row.completion
    if done is None or not row.attempts:
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
