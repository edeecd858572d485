"""Responses for people: attempts with scores and spans. Model text is untrusted and printed as text."""

from __future__ import annotations

import random
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Literal

from steerback.errors import SteerbackError, clipped, visible
from steerback.figures.tables import terminal_width
from steerback.judging.text import Span
from steerback.records import LatentKey
from steerback.store.ledger import Ledger, Row
from steerback.store.rows import Outline

BOLD, DIM, RESET = "\x1b[1m", "\x1b[2m", "\x1b[0m"
Mark = Literal["drift", "restart"]
COLOURS: dict[Mark, str] = {"drift": "yellow", "restart": "bold green"}
STYLES: dict[Mark, str] = {"drift": "background:#fde7c4", "restart": "background:#bfe8cf;font-weight:bold"}


@dataclass(frozen=True, slots=True)
class Choice:
    """Selection of measured trials: the trial of a `key`, or up to `count` of those that match.

    `latent` is an index, a label or a direction; `attempts` is "2" (exactly) or "2+" (at least). `order` `random` draws
    with `seed`; `best` and `worst` take the largest and smallest gains, one trial per latent before a second one.
    """

    key: str | None = None
    condition: str | None = None
    latent: str | None = None
    attempts: str | None = None
    order: Literal["random", "best", "worst"] = "random"
    count: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.attempts is not None and not re.fullmatch(r"\d+\+?", self.attempts):
            raise SteerbackError(
                f"attempts {self.attempts!r} must be a number (2), or a number with + for at least that many (2+)"
            )

    def fits(self, row: Outline) -> bool:
        """Return whether a trial has the latent and the number of attempts."""
        if self.attempts is not None:
            wanted, n = int(self.attempts.rstrip("+")), len(row.attempts)
            if n < wanted or (n > wanted and not self.attempts.endswith("+")):
                return False
        names = {str(row.trial.latent), (row.trial.label or "").casefold()}
        return self.latent is None or self.latent in names or self.latent.casefold() in names


def choose(ledger: Ledger, judge: str, choice: Choice, measured: Sequence[Outline] | None = None) -> list[Row]:
    """Return the selected trials. Raises SteerbackError, with the existing values, if there are none.

    `measured`: the `measured_rows` of the choice's condition, if they have been read already.
    """
    if choice.key is not None:
        rows_of_key = ledger.rows(keys=[choice.key], judge=judge)
        if not rows_of_key:
            raise SteerbackError(f"no trial {choice.key!r} in {ledger.path}; keys look like {_example(ledger)!r}")
        return rows_of_key
    measured = measured_rows(ledger, judge, choice.condition) if measured is None else measured
    rows = [row for row in measured if choice.fits(row)]
    if not rows:
        asked = {"latent": choice.latent, "attempts": choice.attempts}
        what = " and ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
        raise SteerbackError(f"none of {len(measured)} measured responses has {what}: {_there_are(measured)}")
    if choice.order == "random":
        drawn = random.Random(choice.seed).sample(rows, min(choice.count, len(rows)))
        return list(ledger.stream([row.trial.key for row in drawn], judge))
    sign = -1 if choice.order == "best" else 1
    rows.sort(key=lambda r: (not r.attempts, sign * r.gain, sign * len(r.attempts), r.trial.key))
    seen: Counter[LatentKey | None] = Counter()
    turns: list[tuple[int, int, str]] = []
    for row in rows:
        turns.append((seen[row.trial.latent], len(turns), row.trial.key))
        seen[row.trial.latent] += 1
    keys = [key for _, _, key in sorted(turns)[: choice.count]]
    return list(ledger.stream(keys, judge))


def measured_rows(ledger: Ledger, judge: str, condition: str | None = None) -> list[Outline]:
    """Return the measured trials with a response, without their texts."""
    rows = [r for r in ledger.outlines(stage="measure", condition=condition, judge=judge) if r.finish is not None]
    if not rows:
        known = ", ".join(sorted({c for _, c in ledger.conditions()})) or "none yet"
        raise SteerbackError(f"no measured responses in {ledger.path} (conditions: {known})")
    return rows


def _there_are(rows: Sequence[Outline]) -> str:
    latents = sorted({r.trial.label or str(r.trial.latent) for r in rows if r.trial.latent is not None})
    counts = sorted({len(r.attempts) for r in rows})
    return f"latents: {', '.join(latents[:20])}; attempts: {', '.join(map(str, counts))}"


def how_often(rows: Sequence[Outline]) -> list[str]:
    """Return one line per target: how often its responses restart, and how often the score rises or falls."""
    lines = []
    for target in dict.fromkeys(r.trial.target for r in rows):
        scored = [r for r in rows if r.trial.target == target and r.attempts]
        restarted = [r for r in scored if len(r.attempts) >= 2]
        better, worse = (sum(sign * r.gain > 0 for r in restarted) for sign in (1, -1))
        line = f"{target}: {len(restarted)} of {len(scored)} scored responses restart"
        if restarted:
            same = len(restarted) - better - worse
            line += f"; the last attempt scores higher than the first in {better}, lower in {worse}, the same in {same}"
        lines.append(line)
    return lines


def transcript(row: Row, colour: bool = False) -> str:
    """Return a trial as text: header, then each attempt with score, restart phrase and character span."""
    bold, dim, reset = (BOLD, DIM, RESET) if colour else ("", "", "")
    trial, done = row.trial, row.completion
    lines = [f"{bold}{visible(trial.key)}{reset}", f"{dim}prompt  {reset} {visible(trial.prompt)}"]
    if trial.meta_prompt:
        lines.append(f"{dim}meta    {reset} {visible(trial.meta_prompt)}")
    if trial.latent is not None:
        label = f" ({clipped(trial.label, 200)})" if trial.label else ""
        boost = f", boost {trial.boost:.4g}" if trial.boost is not None else ""
        lines.append(f"{dim}latent  {reset} {visible(trial.latent)}{label}{boost}, seed {trial.seed}")
    if done is None:
        return "\n".join([*lines, "(not generated yet)", ""])
    receipt = done.receipt
    steered = f"{receipt.prompt_positions} prompt + {receipt.generated_positions} generated positions steered"
    right = "" if row.valid_receipt else ", which differs from the plan: the trial is INVALID"
    lines.append(f"{dim}receipt {reset} {steered}, mean norm added {receipt.added_norm:.4g}{right}; {done.finish}")
    text = row.judged_text
    judged = row.judgement
    if judged is None or judged.status != "scored":
        state = "not judged yet" if judged is None else f"{judged.status}: {visible(judged.reason)}"
        return "\n".join([*lines, f"{dim}{state}{reset}", _wrap(text), ""])
    for number, span in enumerate(judged.attempts, 1):
        phrase = f", restarts with {visible(span.phrase)!r}" if span.phrase else ""
        gated = "" if span.gated else " (not counted: it does not start with the phrase)"
        where = f"characters {span.start}-{span.end}"
        lines.append(f"{bold}attempt {number}: {span.score:.0f}/100{reset} {dim}[{where}{phrase}{gated}]{reset}")
        lines.append(_wrap(text[span.start : span.end]))
    return "\n".join([*lines, ""])


def _wrap(text: str) -> str:
    lines = visible(text).strip().splitlines() or ["(empty)"]
    width = min(terminal_width(), 100)
    return "\n".join(textwrap.fill(line, width, initial_indent="    ", subsequent_indent="    ") for line in lines)


def _example(ledger: Ledger) -> str:
    rows = ledger.conditions()
    return f"{rows[0][0]}/measure/{rows[0][1]}/0" if rows else "<target>/measure/<condition>/0"


@dataclass(frozen=True, slots=True)
class Marks:
    """Text with the spans of its drift (off-topic sentences) and its restart phrases."""

    text: str
    drift: Sequence[Span] = ()
    restarts: Sequence[Span] = ()

    def pieces(self) -> list[tuple[str, Mark | None]]:
        """Return the text in pieces, each with its mark; a restart within a drift counts as restart."""
        kinds: list[Mark | None] = [None] * len(self.text)
        for mark, spans in (("drift", self.drift), ("restart", self.restarts)):
            for span in spans:
                kinds[span.start : span.end] = [mark] * len(kinds[span.start : span.end])  # type: ignore[list-item]
        groups = groupby(zip(self.text, kinds, strict=True), key=lambda pair: pair[1])
        return [("".join(c for c, _ in group), mark) for mark, group in groups]


def print_marked(prompt: str, columns: Sequence[tuple[str, Marks]]) -> None:
    """Print responses to one prompt side by side, or one below the other on a narrow terminal.

    Colours appear only on a terminal without NO_COLOR.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, legacy_windows=False)
    console.print(Text.assemble(("prompt  ", "dim"), visible(prompt)))
    cells = []
    for title, marks in columns:
        cell = Text.assemble((visible(title), "bold"), "\n")
        for piece, mark in marks.pieces():
            cell.append(visible(piece), COLOURS[mark] if mark else "")
        cell.rstrip()
        cells.append(cell)
    side_by_side = console.is_terminal and console.width >= 40 * len(cells)
    grid = Table.grid(padding=(1, 3, 0, 0))
    for _ in cells if side_by_side else [0]:
        grid.add_column(ratio=1)
    for row in [cells] if side_by_side else [[cell] for cell in cells]:
        grid.add_row(*row)
    console.print(grid)


def marked_html(prompt: str, title: str, marks: Marks) -> str:
    """Return a response as escaped HTML for notebooks."""
    body = "".join(
        f'<mark style="{STYLES[mark]}">{escape(visible(piece))}</mark>' if mark else escape(visible(piece))
        for piece, mark in marks.pieces()
    )
    head = f"<b>{escape(visible(prompt))}</b><br><small>{escape(visible(title))}</small>"
    return f'<div>{head}<div style="white-space:pre-wrap;max-width:60em">{body}</div></div>'


def row_html(row: Row) -> str:
    """Return a trial as escaped HTML for notebooks: its attempts with their scores."""
    trial, text = row.trial, row.judged_text
    what = f"{trial.key}, latent {trial.latent} ({trial.label}), boost {trial.boost}, seed {trial.seed}"
    if not row.attempts:
        return marked_html(trial.prompt, f"{what}: not scored", Marks(text))
    attempts = "".join(
        f"<li><b>{a.score:.0f}/100</b> {escape(visible(text[a.start : a.end]))}</li>" for a in row.attempts
    )
    head = f"<b>{escape(visible(trial.prompt))}</b><br><small>{escape(visible(what))}</small>"
    return f"<div>{head}<ol>{attempts}</ol></div>"
