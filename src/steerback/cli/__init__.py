"""Command line: commands, options and messages. All work is done by calls into the package.

Exit codes: 2 for a mistake of the user (one line on stderr), 130 after Ctrl-C, 1 for an unforeseen error (one line with
the path of the saved traceback).
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import gc
import itertools
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Annotated, Any, TextIO

import typer

from steerback.cli import finetuning, judging, labels, plan, results, running, targets
from steerback.cli.help import HELP, HelpGroup, RunCommand
from steerback.cli.options import USER_FILE, TargetsFile, add, new_group
from steerback.errors import VERSION, SteerbackError, visible

app = typer.Typer(
    name="steerback",
    help="Measure, explain and change how language models resist activation steering.",
    cls=HelpGroup,
    context_settings={"help_option_names": HELP},
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, an exceeded quota or file size."""

# some releases of typer contain their own copy of click, so its base error is taken from what typer exports
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]


def main(arguments: list[str] | None = None) -> None:
    """Run a command and turn every expected failure into one line and an exit code."""
    sys.excepthook = report_unforeseen
    atexit.register(gc.freeze)  # at its end the interpreter searches everything for cycles: a quarter of a second
    words = sys.argv[1:] if arguments is None else arguments
    before = os.environ.get(USER_FILE)
    try:
        # not app(): it would replace our hook for unforeseen errors by its own
        code = command().main(args=words, prog_name="steerback", standalone_mode=False)
        sys.stdout.flush()
        try:
            sys.stderr.flush()
        except OSError:  # a message that cannot be written is no reason to fail
            _discard(sys.stderr)
    except SteerbackError as error:
        fail(str(error))
    except USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a command is missing, and the message is its help page
            print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
            sys.exit(2)
        fail(_usage(error.format_message(), words))  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        print("steerback: stopped; what was done is kept", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (head, less) has left
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        fail_full(error)
    finally:
        os.environ.pop(USER_FILE, None)
        if before is not None:
            os.environ[USER_FILE] = before
    sys.exit(code if isinstance(code, int) else 0)


@functools.cache  # building the tree of commands takes as long as a short command
def command() -> Any:
    """Return the command line as click's command."""
    return typer.main.get_command(app)


def _usage(message: str, words: list[str]) -> str:
    """Return the parser's message with a hint. `run cross-judge` was a command of earlier releases."""
    if ("run", "cross-judge") in itertools.pairwise(words):
        return running.CROSS_JUDGE
    if message.startswith("Got unexpected extra argument"):
        return f"{message}; repeat an option that takes several values: --target A --target B"
    return f"{message} (see steerback --help)"


def fail(message: str) -> None:
    print("steerback: error: " + visible(" ".join(message.split("\n"))), file=sys.stderr)
    sys.exit(2)


def _discard(stream: TextIO) -> None:
    """Let the buffered rest of an output go nowhere at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def fail_full(error: OSError) -> None:
    """Exit with one line about a full disk; it may be the disk of our own output."""
    place = error.filename
    if place is None:  # most often our own output
        with contextlib.suppress(OSError):
            _discard(sys.stdout)
    fail(
        f"{place or 'a file or the output'} cannot be written: {error.strerror}; free some space and repeat the command"
    )


def report_unforeseen(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print one line about an uncaught exception and save its traceback; Python exits with code 1."""
    from steerback.judging.models import redact
    from steerback.store.files import make_folder, user_folder, write_atomic

    text = redact("".join(traceback.format_exception(kind, error, trace)))
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    try:
        path = write_atomic(make_folder(user_folder("errors")) / name, text.encode("utf-8", "backslashreplace"))
        saved = f"is in {path}"
    except SteerbackError as problem:
        saved = f"could not be saved ({problem})"
    shown = "".join(c if c.isprintable() else " " for c in redact(str(error)[:1000]))[:200]
    message = f"unforeseen {kind.__name__}: {' '.join(shown.split())}; its traceback {saved}; please report it"
    print(f"steerback: error: {message}", file=sys.stderr)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"steerback {VERSION}")
        raise typer.Exit()


@app.callback()
def _root(
    targets_file: TargetsFile = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


COMMANDS: Mapping[str, Callable[..., object]] = {
    "cross-judge": running.cross_judge,
    "paper": running.paper,
    "resume": running.resume,
    "try": running.try_command,
    "fork": running.fork,
    "settings": running.settings_command,
    "plan": plan.plan,
    "runs": results.list_runs,
    "figures": results.figures,
    "show": results.show,
    "compare": results.compare,
    "export": results.export,
    "import": results.import_command,
    "merge": results.merge_command,
    "view": results.view,
    "judge": judging.judge_command,
    "judges": judging.list_judges,
    "doctor": targets.doctor,
    "fetch-paper-data": labels.fetch_paper_data,
}
GROUPS: Mapping[str, tuple[typer.Typer, Mapping[str, Callable[..., object]]]] = {
    "label": (judging.LABEL, {"draw": judging.draw, "import": judging.import_labels_command}),
    "targets": (new_group("List the models that can be steered.", targets.targets), {"show": targets.show}),
    "sae": (
        new_group("Sparse autoencoders: train one for a model that has none."),
        {"train": targets.train_sae_command},
    ),
    "labels": (
        new_group("Show, download, import or make labels of latents."),
        {"show": labels.show, "fetch": labels.fetch, "import": labels.import_command, "auto": labels.auto},
    ),
    "directions": (
        new_group("Make and list named directions, to steer without an SAE."),
        {"make": labels.make_direction, "show": labels.show_directions},
    ),
    "finetune": (
        new_group("Train adapters on synthetic self-corrections."),
        {"data": finetuning.data, "mixes": finetuning.mixes, "train": finetuning.train},
    ),
}
add(app, "run", running.run_command, RunCommand)
for name, verb in COMMANDS.items():
    add(app, name, verb)
for name, (group, verbs) in GROUPS.items():
    for inner, verb in verbs.items():
        add(group, inner, verb)
    app.add_typer(group, name=name)
