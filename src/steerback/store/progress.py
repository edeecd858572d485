"""Progress display: one line a stage, an estimate for the whole run; bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re
import sys
import time
from typing import IO, TYPE_CHECKING, Protocol

from steerback.errors import visible

if TYPE_CHECKING:
    from rich.progress import TaskID

ROUND = re.compile(r" round (\d+/\d+)$")
"""End of the name of a calibration round. All rounds of a target are one stage of the display."""


class Progress(Protocol):
    """Receiver of progress reports from the pipeline."""

    def expect(self, responses: int) -> None:
        """Announce at most how many responses the whole run takes, for the overall estimate."""
        ...

    def status(self, text: str) -> None:
        """Announce work without responses, such as loading a model."""
        ...

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Start a stage of `total` responses, `done` of which exist already."""
        ...

    def update(self, generated: int = 0, judged: int = 0, unscored: int = 0, invalid: int = 0) -> None: ...

    def beside(self) -> Progress:
        """Return a receiver for a stage beside the one on display, which counts for the whole run only."""
        ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Progress receiver that prints nothing (tests, Python interface)."""

    def expect(self, responses: int) -> None: ...

    def status(self, text: str) -> None: ...

    def stage(self, name: str, total: int, done: int = 0) -> None: ...

    def update(self, generated: int = 0, judged: int = 0, unscored: int = 0, invalid: int = 0) -> None: ...

    def beside(self) -> Silent:
        return self

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class Count:
    """Responses done of an expected total, with the rate since `begin`. `before` existed already."""

    def __init__(self, total: int = 0, before: int = 0) -> None:
        self.total, self.done, self.before = total, before, before
        self._began = time.monotonic()

    def add(self, total: int, done: int) -> None:
        """Add a further round to a stage."""
        self.total, self.done, self.before = self.total + total, self.done + done, self.before + done

    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def rate(self) -> float:
        """Return new responses per second; 0 in the first second, when it would mean nothing."""
        elapsed = self.elapsed()
        return (self.done - self.before) / elapsed if elapsed >= 1 else 0.0

    def left(self) -> str:
        """Return the time left in words; "" as long as there is no rate."""
        rate = self.rate()
        return duration((self.total - self.done) / rate) if rate > 0 and self.done < self.total else ""


class Plain:
    """One line every `every` seconds during a stage, and one at its end; each line starts with `head`."""

    def __init__(self, stream: IO[str] | None = None, every: float = 10.0, head: str = "") -> None:
        self._stream, self._every, self._head = stream or sys.stderr, every, head
        self._name, self._round = "", ""
        self._stage, self._run = Count(), Count()
        self._known: set[str] = set()
        self._unscored = self._invalid = 0
        self._last_line = time.monotonic()

    def expect(self, responses: int) -> None:
        self._run, self._known = Count(responses), set()

    def status(self, text: str) -> None:
        self._say(text)

    def stage(self, name: str, total: int, done: int = 0) -> None:
        match = ROUND.search(name)
        stem = name[: match.start()] if match else name
        self._round = f"round {match[1]}, " if match else ""
        self.took_up(name, done)
        if match and stem == self._name:
            self._stage.add(total, done)
            return
        self._name, self._stage = stem, Count(total, done)
        self._last_line = time.monotonic()
        if done < total:
            self._say(f"{stem}: {self.counts()}")

    def took_up(self, name: str, done: int) -> None:
        """Count what a stage has from before; one that comes again has what this run itself has generated."""
        if name not in self._known:
            self._known.add(name)
            self._run.done += done
            self._run.before += done

    def beside(self) -> Progress:
        return Beside(self)

    def update(self, generated: int = 0, judged: int = 0, unscored: int = 0, invalid: int = 0) -> None:
        self._stage.done += generated
        self.count(generated, unscored, invalid)
        now = time.monotonic()
        finished = generated and self._stage.done >= self._stage.total and not self._round
        if finished or (generated and now - self._last_line >= self._every):
            self._last_line = now
            self._say(f"{self._name}: {', '.join(filter(None, (self.counts(), self.overall())))}")

    def count(self, generated: int, unscored: int, invalid: int) -> None:
        """Count responses of the run, of whichever stage."""
        self._run.done += generated
        self._unscored += unscored
        self._invalid += invalid

    def counts(self) -> str:
        """Return the progress of the stage: round, responses, rate, time left; unscored and invalid ones of the run."""
        stage, rate = self._stage, self._stage.rate()
        parts = [f"{self._round}{stage.done}" if self._round else f"{stage.done}/{stage.total}"]
        parts += [f"{rate:.1f}/s"] if rate else []
        if not self._round and (left := stage.left()):
            parts.append(f"{left} left")
        elif stage.done >= stage.total and not self._round and stage.elapsed() >= 1:
            parts[-1] += f" in {duration(stage.elapsed())}"
        parts += [f"{n} {word}" for n, word in ((self._unscored, "unscored"), (self._invalid, "invalid")) if n]
        return ", ".join(parts)

    def overall(self) -> str:
        """Return the estimate for the whole run; "" where nothing is expected or no rate is known yet."""
        left = self._run.left()
        return f"whole run: at most {left} left" if left and self._stage.done > self._stage.before else ""

    def note(self, text: str) -> None:
        self._say(text)

    def close(self) -> None: ...

    def _say(self, text: str) -> None:
        try:
            print(visible(self._head + text), file=self._stream, flush=True)
        except OSError:  # a full disk or a closed pipe behind stderr is no reason to stop the run
            self._stream = io.StringIO()


class Beside(Silent):
    """Receiver for a stage beside the one on display: its responses count for the whole run of `shown`."""

    def __init__(self, shown: Plain) -> None:
        self._shown = shown

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self._shown.took_up(name, done)
        if done < total:
            self._shown.status(f"{name}: {total - done} responses, beside the next stage")

    def update(self, generated: int = 0, judged: int = 0, unscored: int = 0, invalid: int = 0) -> None:
        self._shown.count(generated, unscored, invalid)


class Live(Plain):
    """One bar a stage that redraws itself, and below them one line for what happens now and for the whole run."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as Bar

        super().__init__()
        self._bar = Bar(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[counts]}"),
            console=Console(stderr=True),
            transient=False,
        )
        self._task: TaskID | None = None
        self._whole: TaskID | None = None
        self._bar.start()

    def expect(self, responses: int) -> None:
        super().expect(responses)
        self._forget_whole()
        if responses:
            self._whole = self._bar.add_task("whole run", total=responses, counts="")

    def status(self, text: str) -> None:
        if self._whole is None:
            self._whole = self._bar.add_task("", total=None, counts="")
        self._bar.update(self._whole, description=visible(text))

    def stage(self, name: str, total: int, done: int = 0) -> None:
        before = self._name
        super().stage(name, total, done)
        if self._name == before and self._task is not None:
            self._bar.update(self._task, total=self._stage.total)
        elif done < total:
            self._task = self._bar.add_task(visible(self._name), total=total, completed=done, counts=self.counts())
        else:
            self._task = None
        if self._whole is not None:
            self._bar.update(self._whole, description="whole run", completed=self._run.done)

    def update(self, generated: int = 0, judged: int = 0, unscored: int = 0, invalid: int = 0) -> None:
        self._stage.done += generated
        self.count(generated, unscored, invalid)
        if self._task is not None:
            self._bar.update(self._task, completed=self._stage.done, counts=self.counts())

    def count(self, generated: int, unscored: int, invalid: int) -> None:
        super().count(generated, unscored, invalid)
        if self._whole is not None:
            left = self._run.left()
            self._bar.update(self._whole, completed=self._run.done, counts=f"at most {left} left" if left else "")

    def note(self, text: str) -> None:
        self._bar.console.print(visible(text), markup=False, highlight=False)

    def close(self) -> None:
        self._forget_whole()
        self._bar.stop()

    def _forget_whole(self) -> None:
        if self._whole is not None:
            self._bar.remove_task(self._whole)
        self._whole = None

    def _say(self, text: str) -> None: ...


def make_progress() -> Progress:
    """Return bars on a terminal and plain lines elsewhere."""
    return Live() if sys.stderr.isatty() else Plain()


def duration(seconds: float) -> str:
    """Return seconds as `45 s`, `12 min` or `3.5 h`."""
    whole = max(round(seconds), 1)
    if whole < 90:
        return f"{whole} s"
    if whole < 5400:
        return f"{whole // 60} min"
    return f"{whole / 3600:.1f} h"
