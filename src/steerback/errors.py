"""The one exception a user is meant to see, and the version of the package, which every module may import."""

from __future__ import annotations

from collections.abc import Iterable

VERSION = "0.1.0"
"""Of the package; pyproject.toml has the same."""

DOCS = "https://steerback.github.io/steerback/"
"""Address of the documentation; pyproject.toml and mkdocs.yml have the same."""


class SteerbackError(Exception):
    """A mistake or a limit the user can act on: one line that says what, where, the valid choices and the fix.

    The command line prints the message without a traceback and exits with code 2.
    """


def unknown(what: str, value: object, choices: Iterable[object]) -> SteerbackError:
    """Return the error for a name that does not exist: a similar name if there is one, and all valid names."""
    names = [str(choice) for choice in choices]
    return SteerbackError(f"unknown {what} {value!r};{did_you_mean(value, names)} choose one of: {', '.join(names)}")


def did_you_mean(value: object, names: Iterable[str]) -> str:
    """Return ` did you mean NAME?` with the most similar name, or "" if none is similar."""
    import difflib

    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(str(value).lower(), by_lower, 1)
    return f" did you mean {by_lower[close[0]]}?" if close else ""


def docs_page(name: str, section: str = "") -> str:
    """Return the address of a page of the documentation, for messages that cannot explain everything in one line."""
    return f"{DOCS}{name}/" + (f"#{section}" if section else "")


def one_line(text: object) -> str:
    """Return the text of a library or a file as one line in which control characters are visible, never obeyed."""
    return visible(" ".join(str(text).split()))


def short(text: object, most: int = 80) -> str:
    """Return a text of a user's file in quotes, its control characters written out, no longer than a message may be."""
    whole = str(text)
    return repr(whole[:most]) + ("..." if len(whole) > most else "")


def visible(text: object) -> str:
    """Return text from outside with its control characters written out, except line breaks: for all that is shown."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in str(text))
