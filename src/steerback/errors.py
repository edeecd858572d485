"""The user-visible exception, helpers for error messages, and the version of the package."""

from __future__ import annotations

from collections.abc import Iterable

VERSION = "0.1.0"
"""Version of the package, equal to that in pyproject.toml."""

DOCS = "https://steerback.github.io/steerback/"
"""Address of the documentation, equal to that in pyproject.toml and mkdocs.yml."""


LONGEST = 1_200
"""Most characters of an error message."""


class SteerbackError(Exception):
    """An error that the user can correct. Its message is one line: the problem, its place, valid choices and the fix.

    The command line prints the message without a traceback and exits with code 2. A message that repeats a long text of
    a file is shortened in the middle.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) < LONGEST else f"{message[:800]} ... {message[-300:]}")


def unknown(what: str, value: object, choices: Iterable[object]) -> SteerbackError:
    """Return the error for an unknown name, with a similar name if there is one, and all valid names."""
    names = [str(choice) for choice in choices]
    shown = short(value) if isinstance(value, str) else repr(value)
    return SteerbackError(f"unknown {what} {shown};{did_you_mean(value, names)} choose one of: {', '.join(names)}")


def did_you_mean(value: object, names: Iterable[str]) -> str:
    """Return ` did you mean NAME?` with the most similar name, or "" if none is similar."""
    import difflib

    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(str(value)[:200].lower(), by_lower, 1)
    return f" did you mean {by_lower[close[0]]}?" if close else ""


def docs_page(name: str, section: str = "") -> str:
    """Return the address of a documentation page, for messages that are too short for a full explanation."""
    return f"{DOCS}{name}/" + (f"#{section}" if section else "")


def one_line(text: object) -> str:
    """Return text of a library or file as one line with escaped control characters."""
    return visible(" ".join(str(text).split()))


def short(text: object, most: int = 80) -> str:
    """Return the first `most` characters of a text in quotes, with escaped control characters."""
    whole = str(text)
    return repr(whole[:most]) + ("..." if len(whole) > most else "")


def clipped(text: str, length: int = 60) -> str:
    """Return the first `length` characters of a text as one line."""
    line = one_line(text[: 2 * length])
    return line if len(line) <= length else line[: length - 3] + "..."


def visible(text: object) -> str:
    """Return untrusted text with escaped control characters, except line breaks, so that it is safe to print."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in str(text))
