"""Options that several commands share, each declared once.

A command takes a group of options through a parameter of the group's type. `add` expands the group into one option for
each field.
"""

from __future__ import annotations

import gc
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer
from typer.models import OptionInfo

from steerback.cli.help import HELP, HelpCommand, HelpGroup
from steerback.errors import visible

if TYPE_CHECKING:
    from steerback.config import RunConfig
    from steerback.figures.tables import Table
    from steerback.jobs.check import Makers
    from steerback.judging import Limits

RUNS = Path("runs")


def option(help: str, default: Any = None, *names: str, **more: Any) -> Any:
    """Return an option as the default of its parameter: `n: int = option("Number of seeds.", 32, min=2)`.

    `default` is `...` for a required option. `names` replace the name derived from the parameter, `more` are arguments
    of `typer.Option`. A flag that is off by default has no `--no-` form.
    """
    return typer.Option(default, *names, help=help, **more)


def argument(help: str, default: Any = None, **more: Any) -> Any:
    """Return a positional argument as the default of its parameter; `default` is `...` for a required one."""
    return typer.Argument(default, help=help, **more)


def run_names(incomplete: str) -> list[str]:
    """Return the runs in the usual folder whose name starts with `incomplete`, for shell completion."""
    return sorted(p.parent.name for p in RUNS.glob("*/ledger.sqlite") if p.parent.name.startswith(incomplete))


def target_names(incomplete: str) -> list[str]:
    """Return the targets whose name starts with `incomplete`, for shell completion."""
    from steerback.targets import list_targets

    return [target.name for target in list_targets() if target.name.startswith(incomplete)]


def experiment_names(incomplete: str) -> list[str]:
    """Return the experiments whose name starts with `incomplete`, for shell completion."""
    from steerback.experiments import REGISTRY

    return [name for name in REGISTRY if name.startswith(incomplete)]


RunsFolder = Annotated[Path, typer.Option("--runs", help="Folder with the run folders.")]
RunName = Annotated[
    str,
    typer.Argument(
        metavar="RUN", autocompletion=run_names, help="Run: its name under --runs, or the path of its folder."
    ),
]
RunNames = Annotated[
    list[str] | None,
    typer.Argument(metavar="RUN...", autocompletion=run_names, help="Runs: names under --runs, or paths of folders."),
]
NewName = Annotated[
    str | None, typer.Option("--name", metavar="NAME", help="Name of the run. The same name again resumes it.")
]
TargetName = Annotated[
    str,
    typer.Argument(
        metavar="TARGET", autocompletion=target_names, help="Target, e.g. organism (list: steerback targets)."
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        metavar="TARGET",
        autocompletion=target_names,
        help="Model to steer. Repeat the option for several.",
    ),
]
PROMPTS = typer.Option("--prompts", help="Prompts: a built-in list, or a text file with one per line.")
Texts = Annotated[
    Path | None, typer.Option("--texts", help="Texts on which activations are read: a file, one per line.")
]
VerdictsOf = Annotated[
    str | None,
    typer.Option("--judge", metavar="JUDGE", help="Use the verdicts of this judge. Default: the run's judge."),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Do not use the cache of responses and verdicts.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and its cost, then stop.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing entries.")]

USER_FILE = "STEERBACK_TARGETS"


def _use_targets(file: str | None) -> None:
    if file:
        os.environ[USER_FILE] = file


TargetsFile = Annotated[
    str | None,
    typer.Option("--targets", metavar="FILE", callback=_use_targets, help="TOML file that defines further targets."),
]


@dataclass(frozen=True)
class Budget:
    """Limits for calls to a judge model: number, cost, price, batches."""

    max_judge_calls: Annotated[
        int | None, typer.Option(min=0, help="Most calls to the judge model. Further responses stay unjudged.")
    ] = None
    max_judge_cost: Annotated[float | None, typer.Option(min=0, help="Most USD to spend on the judge model.")] = None
    judge_price: Annotated[
        tuple[float, float] | None,
        typer.Option(metavar="IN OUT", help="USD per million input and output tokens, if the price is unknown."),
    ] = None
    judge_batch: Annotated[
        bool, typer.Option("--judge-batch", help="Use the provider's batch service: slower, half the price.")
    ] = False

    def limits(self, estimate_only: bool = False) -> Limits:
        from steerback.judging import Limits

        return Limits(
            self.max_judge_calls, self.max_judge_cost, self.judge_price, self.judge_batch, estimate_only=estimate_only
        )

    def makers(self, estimate_only: bool = False, rubrics: Mapping[str, str] | None = None) -> Makers:
        """Return the makers of this command's run. One budget covers all calls of a judge in the command.

        With `estimate_only`, judges need no key, because nothing is asked.
        """
        from steerback.jobs.check import Makers
        from steerback.judging import judge_maker

        return Makers(judge=judge_maker(self.limits(estimate_only), rubrics))


@dataclass(frozen=True)
class Setup:
    """Settings of a run. Later ones win: preset, config file, options, --set."""

    preset: Annotated[
        str | None, typer.Option(metavar="PRESET", help="Default values: specification (default), authors or quick.")
    ] = None
    config: Annotated[Path | None, typer.Option(help="YAML file with settings.")] = None
    engine: Annotated[
        str | None,
        typer.Option(metavar="ENGINE", help="transformers, vllm or ray. Default: vllm with a GPU, else transformers."),
    ] = None
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="For ray: auto, or HOST:PORT of a cluster. Default: this machine."),
    ] = None
    judge: Annotated[
        str | None, typer.Option(metavar="JUDGE", help="offline, or a judge model (list: steerback judges).")
    ] = None
    rubric: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with your own rubric for the judge model (docs/judging.md)."),
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a setting, e.g. sampling.temperature=0.8 (list: steerback settings).",
        ),
    ] = None

    def build(
        self,
        experiment: str,
        targets: tuple[str, ...],
        overrides: Mapping[str, object] | None = None,
        base: tuple[str, RunConfig] | None = None,
        settings: tuple[str, ...] | None = None,
    ) -> RunConfig:
        """Return the config of a run. `overrides`: values of other options; `settings`: used instead of --set."""
        from steerback.config import build_config

        chosen = {"engine": self.engine, "judge": self.judge, **(overrides or {})}
        if self.ray_address is not None:
            chosen["engine_options"] = {**_mapping(chosen.get("engine_options")), "address": self.ray_address}
        assignments = tuple(self.settings or ()) if settings is None else settings
        config = build_config(experiment, targets, self.preset, self.config, chosen, assignments, base)
        if self.rubric is None:
            return config
        from steerback.judging.user_rubric import use_rubric

        return use_rubric(config, self.rubric)


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def add(app: typer.Typer, name: str, verb: Callable[..., object], page: type[HelpCommand] = HelpCommand) -> None:
    """Add a command."""
    app.command(name, cls=page, context_settings={"help_option_names": HELP})(expanded(verb))


def new_group(help: str, callback: Callable[..., object] | None = None) -> typer.Typer:
    """Return an empty group of commands. Without a callback, the group's name alone prints its help."""
    shared = expanded(callback) if callback else _targets_alone
    alone = callback is not None
    return typer.Typer(
        cls=HelpGroup,
        context_settings={"help_option_names": HELP},
        help=help,
        callback=shared,
        invoke_without_command=alone,
        no_args_is_help=not alone,
        rich_markup_mode=None,
    )


def _targets_alone(targets_file: TargetsFile = None) -> None: ...


def expanded(verb: Callable[..., object]) -> Callable[..., object]:
    """Return the function as typer reads it: an option for each field of a group, and --targets."""
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, type] = {n: h for n, h in hints.items() if isinstance(h, type) and is_dataclass(h)}
    parameters = [
        _parameter(p.name, p.default, hints[p.name])
        for p in inspect.signature(verb).parameters.values()
        if p.name not in groups
    ]
    for group in groups.values():
        annotated = get_type_hints(group, include_extras=True)
        parameters += [_parameter(f.name, f.default, annotated[f.name]) for f in fields(group)]
    parameters.append(_parameter("targets_file", None, TargetsFile))

    def call(**values: object) -> object:
        del values["targets_file"]  # its callback has used it
        made = {name: group(**{f.name: values.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        return verb(**values, **made)

    call.__doc__, call.__name__ = verb.__doc__, verb.__name__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


METAVARS = {str: "TEXT", int: "N", float: "X", Path: "PATH"}
"""Placeholders of option values on help pages, by the type of the value."""


def _parameter(name: str, default: Any, annotation: object) -> inspect.Parameter:
    """Return a parameter for typer; options without a placeholder get that of their type."""
    for info in (default, *getattr(annotation, "__metadata__", ())):
        if not isinstance(info, OptionInfo):
            continue
        if info.metavar is None:
            kinds = [annotation]
            for kind in kinds:  # the list grows: the types inside a type follow it
                kinds += get_args(kind)
            info.metavar = next((METAVARS[kind] for kind in kinds if kind in METAVARS), None)
        if annotation is bool and info.default is False and not info.param_decls:
            info.param_decls = (f"--{name.replace('_', '-')}",)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def say(text: object = "", end: str = "\n", flush: bool = False, file: IO[str] | None = None) -> None:
    """Print text with escaped control characters, because names, labels and prompts may come from untrusted files."""
    print(visible(text), end=end, flush=flush, file=file)


def say_lines(lines: Iterable[object]) -> None:
    """Print each line with `say`."""
    for line in lines:
        say(line)


def say_table(table: Table) -> None:
    """Print a table in the width of the terminal."""
    from steerback.figures.tables import terminal_width

    say(table.text(terminal_width()), end="")


def hold_many_records() -> None:
    """Look for cyclic garbage less often: records have no cycles, and a search through 200,000 takes long."""
    gc.set_threshold(100_000, 50, 100)


@contextmanager
def stoppable(how: str = "what was done is kept: the same command goes on") -> Iterator[None]:
    """Say after Ctrl-C how to continue, and exit with the code of an interrupted program."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"steerback: stopped; {how}", file=sys.stderr)
        sys.exit(130)


def announce_loading(target: str) -> None:
    """Say on a terminal that a model is loaded, which takes seconds to minutes."""
    if sys.stderr.isatty():
        say(f"loading {target}", flush=True, file=sys.stderr)


def in_colour() -> bool:
    """Return True on a terminal, unless NO_COLOR is set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
