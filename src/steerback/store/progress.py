"""Progress display: a rich bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import sys
import time
from typing import IO, TYPE_CHECKING, Protocol

from steerback.errors import visible

if TYPE_CHECKING:
    from rich.progress import TaskID


class Progress(Protocol):
    """Receiver of progress reports from the pipeline."""

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """Start a stage of `total` responses, `done` of which exist already."""
        ...

    def update(self, generated: int = 0, judged: int = 0, unscored: int = 0, invalid: int = 0) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Progress receiver that prints nothing (tests, Python interface)."""

    def stage(self, name: str, total: int, done: int = 0) -> None: ...

    def update(self, generated: int = 0, judged: int = 0, unscored: int = 0, invalid: int = 0) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class Plain:
    """One line every `every` seconds during a stage, and one at its end."""

    def __init__(self, stream: IO[str] | None = None, every: float = 10.0) -> None:
        self._stream, self._every = stream or sys.stderr, every
        self._name, self._total, self._done, self._before = "", 0, 0, 0
        self._unscored = self._invalid = 0
        self._began = self._last_line = time.monotonic()

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self._name, self._total, self._done, self._before = name, total, done, done
        self._began = self._last_line = time.monotonic()

    def update(self, generated: int = 0, judged: int = 0, unscored: int = 0, invalid: int = 0) -> None:
        self._done += generated
        self._unscored += unscored
        self._invalid += invalid
        now = time.monotonic()
        finished = generated and self._done >= self._total
        if finished or (generated and now - self._last_line >= self._every):
            self._last_line = now
            self._say(f"{self._name}: {self.counts()}")

    def counts(self) -> str:
        """Return the progress of the stage as text: done, rate, time left, and the run's unscored and invalid
        responses.
        """
        elapsed = max(time.monotonic() - self._began, 1e-9)
        rate = (self._done - self._before) / elapsed
        left = (self._total - self._done) / rate if rate > 0 else 0.0
        eta = f", {_duration(left)} left" if self._done < self._total else f" in {_duration(elapsed)}"
        trouble = f", {self._unscored} unscored, {self._invalid} invalid"
        return f"{self._done}/{self._total}, {rate:.1f}/s{eta}{trouble}"

    def note(self, text: str) -> None:
        self._say(text)

    def close(self) -> None: ...

    def _say(self, text: str) -> None:
        try:
            print(visible(text), file=self._stream, flush=True)
        except OSError:  # a full disk or a closed pipe behind stderr must not stop the run
            self._stream = io.StringIO()


class Live(Plain):
    """The counts of `Plain` as a progress bar."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        super().__init__()
        self._bar = Bar(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TextColumn("{task.fields[counts]}"),
            console=Console(stderr=True),
            transient=False,
        )
        self._task: TaskID | None = None
        self._bar.start()

    def stage(self, name: str, total: int, done: int = 0) -> None:
        super().stage(name, total, done)
        if done < total:
            self._task = self._bar.add_task(visible(name), total=total, completed=done, counts=self.counts())

    def update(self, generated: int = 0, judged: int = 0, unscored: int = 0, invalid: int = 0) -> None:
        self._done += generated
        self._unscored += unscored
        self._invalid += invalid
        if self._task is not None:
            self._bar.update(self._task, completed=self._done, counts=self.counts())

    def note(self, text: str) -> None:
        self._bar.console.print(visible(text), markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()

    def _say(self, text: str) -> None: ...


def make_progress() -> Progress:
    """Return a progress bar on a terminal, and plain lines elsewhere."""
    return Live() if sys.stderr.isatty() else Plain()


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    if whole < 5400:
        return f"{whole // 60} min"
    return f"{whole / 3600:.1f} h"
