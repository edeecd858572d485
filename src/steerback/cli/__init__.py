"""The command line: verbs, options and messages. Everything it does is a call into the package.

A mistake of the user's is one line on stderr and exit code 2; a stop by Ctrl-C is exit code 130 with how to go on.
"""

from __future__ import annotations

import itertools
import os
import sys
from typing import Annotated

import typer

from steerback import __version__
from steerback.cli import data, directions, doctor, finetuning, judging, labels, results, running, targets
from steerback.errors import SteerbackError

app = typer.Typer(
    name="steerback",
    help="Measure, explain and change how language models resist activation steering.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# typer brings its own copy of click in some releases, so its base error is found through what typer exports
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


def main(arguments: list[str] | None = None) -> None:
    """Entry point: runs a verb and turns every expected failure into one line and an exit code."""
    words = hoist(spread(sys.argv[1:] if arguments is None else arguments))
    before = os.environ.get(USER_FILE)
    try:
        code = app(args=words, prog_name="steerback", standalone_mode=False)
    except SteerbackError as error:
        fail(str(error))
    except USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a verb is missing: its message is the help, and has lines
            print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
            sys.exit(2)
        fail(f"{error.format_message()} (see steerback --help)")  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        print("steerback: stopped; what was done is kept", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (head, less) has left
        sys.stderr.close()
        sys.exit(141)
    finally:
        if before is None:
            os.environ.pop(USER_FILE, None)
        else:
            os.environ[USER_FILE] = before
    sys.exit(code if isinstance(code, int) else 0)


USER_FILE = "STEERBACK_TARGETS"


def hoist(arguments: list[str]) -> list[str]:
    """Moves `--targets FILE` to the front: it may stand anywhere, as it serves every verb that takes a target."""
    rest: list[str] = []
    found: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--targets":
            found += [word, *itertools.islice(words, 1)]
        else:
            (found if word.startswith("--targets=") else rest).append(word)
    return found + rest


SEVERAL = ("--from", "--judges", "--target", "-t")


def spread(arguments: list[str]) -> list[str]:
    """`run cross-judge --judges a b` as `--judges a --judges b`: options of `run` that may be given several times."""
    if arguments[:1] != ["run"] or arguments[1:2] == [] or arguments[1].startswith("-"):
        return arguments
    words, option = arguments[:2], ""
    for word in arguments[2:]:
        if word.startswith("-"):
            option = word if word in SEVERAL else ""
        elif option and words[-1] != option:
            words.append(option)
        words.append(word)
    return words


def fail(message: str) -> None:
    print("steerback: error: " + " ".join(message.split("\n")), file=sys.stderr)
    sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"steerback {__version__}")
        raise typer.Exit()


def _own_targets(file: str | None) -> None:
    if file:
        os.environ[USER_FILE] = file


@app.callback()
def _root(
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            envvar=USER_FILE,
            callback=_own_targets,
            help="TOML file with targets of your own; may stand anywhere in a command.",
        ),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


for group in (running, results, judging, targets, doctor, directions, labels, data, finetuning):
    group.register(app)
