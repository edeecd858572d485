"""Help pages: options by purpose, commands by task, settings of each experiment.

Plain text that fits 80 columns. Rich's boxes would leave half of that width to the text, and copying from them brings
the frames along.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from typer.core import TyperArgument, TyperCommand, TyperGroup

if TYPE_CHECKING:
    from typer._click import Context  # typer holds a copy of click, which it exports under no public name

    from steerback.experiments.settings import SettingRow

HELP = ["-h", "--help"]
FIRST, OTHERWISE = "What to run", "Options"
"""Titles of the first panel: of a command that generates, and of any other."""
PANELS: Mapping[str, tuple[str, ...]] = {
    "Settings": ("preset", "config", "set"),
    "Engine": ("engine", "ray-address", "replicas"),
    "Judge and budget": (
        *("judge", "judges", "sample", "rubric", "retry-unscored", "probe"),
        *("max-judge-calls", "max-judge-cost", "judge-price", "judge-batch"),
    ),
    "Where it is kept": ("name", "runs", "out", "no-cache", "overwrite"),
    "General": ("dry-run", "targets", "help"),
}
"""Long names of options, by purpose. All other options are in the first panel of a page."""
MANY = 8
"""Pages with fewer options have one list."""
TASKS: Mapping[str, tuple[str, ...]] = {
    "Steer and measure": ("try", "run", "paper", "resume", "plan", "fork"),
    "Look at results": ("runs", "show", "view", "figures", "compare"),
    "Judge": ("judge", "cross-judge", "judges", "label"),
    "Models, latents and settings": (
        *("targets", "doctor", "sae", "labels", "directions", "finetune", "settings"),
        "fetch-paper-data",
    ),
    "Files": ("export", "import", "merge"),
}
"""Commands by task, in the order of the main help page."""


class HelpCommand(TyperCommand):
    """Command whose help page groups its options."""

    def collect_usage_pieces(self, ctx: Context) -> list[str]:
        arguments = [p for p in self.get_params(ctx) if isinstance(p, TyperArgument)]
        return ["[OPTIONS]", *(label if p.required else f"[{label}]" for p in arguments for label in [_label(p)])]

    def format_options(self, ctx: Context, formatter: Any) -> None:
        _write_options(self, ctx, formatter)


class RunCommand(HelpCommand):
    """Command `run`. Its help page lists the experiments, or the settings of the experiment named before --help."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        ctx.meta["words"] = list(args)  # --help ends the parsing before the experiment has been read
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Context, formatter: Any) -> None:
        from steerback.experiments import REGISTRY

        chosen = next((word for word in ctx.meta.get("words", ()) if word in REGISTRY), None)
        if chosen is None:
            super().format_help(ctx, formatter)
        else:
            from steerback.figures.tables import terminal_width

            formatter.write("\n".join(experiment_lines(chosen, terminal_width())) + "\n")

    def format_options(self, ctx: Context, formatter: Any) -> None:
        from steerback.experiments import REGISTRY, experiment_type

        super().format_options(ctx, formatter)
        with formatter.section("Experiments (settings of one: steerback run EXPERIMENT --help)"):
            formatter.write_dl([(name, experiment_type(name).title) for name in REGISTRY])


class HelpGroup(TyperGroup):
    """Group of commands. The main help page lists them by task."""

    def format_options(self, ctx: Context, formatter: Any) -> None:
        tasks = TASKS if "run" in self.commands else {"Commands": tuple(self.commands)}
        for title, names in tasks.items():
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(200)) for name in names])
        _write_options(self, ctx, formatter)


def _label(argument: TyperArgument) -> str:
    name = argument.metavar or (argument.name or "").upper()
    return name if argument.nargs == 1 or name.endswith("...") else f"{name}..."


def _write_options(command: Any, ctx: Context, formatter: Any) -> None:
    """Write the arguments, then the options in panels, or in one list if they are few."""
    arguments: list[tuple[str, str]] = []
    panels: dict[str, list[tuple[str, str]]] = {name: [] for name in (FIRST, *PANELS)}
    for parameter in command.get_params(ctx):
        if (record := parameter.get_help_record(ctx)) is None:
            continue
        if isinstance(parameter, TyperArgument):
            arguments.append((_label(parameter), record[1].replace("  [required]", "")))
        else:
            longest = max(parameter.opts, key=len).lstrip("-")
            panels[next((name for name, known in PANELS.items() if longest in known), FIRST)].append(record)
    if sum(map(len, panels.values())) < MANY or not panels[FIRST]:
        panels = {"Options": [record for records in panels.values() for record in records]}
    generates = any(parameter.name in ("target", "from_run") for parameter in command.params)
    for title, records in {"Arguments": arguments, **panels}.items():
        if records:
            with formatter.section(OTHERWISE if title == FIRST and not generates else title):
                formatter.write_dl(records)


def experiment_lines(name: str, width: int, preset: str = "specification") -> list[str]:
    """Return title, purpose and every setting of an experiment with default and meaning, on lines of `width`."""
    from steerback.experiments import experiment_type

    kind = experiment_type(name)
    purpose = textwrap.wrap(" ".join((kind.__doc__ or "").split("\n\n")[0].split()), width)
    return [
        *(f"{name}: {kind.title}", *purpose),
        *("", f"Defaults of preset {preset}. To change one: --set sampling.temperature=0.8"),
        *("", *_own_settings(name, width, preset), "", *_settings_of_runs(name, width, preset)),
        *("", "Options of the command: steerback run --help"),
    ]


def setting_lines(width: int, preset: str = "specification") -> list[str]:
    """Return the settings of every run, then those of each experiment, on lines of `width`."""
    from steerback.experiments import REGISTRY

    own = [line for name in REGISTRY for line in ("", *_own_settings(name, width, preset))]
    return [f"Defaults of preset {preset}.", "", *_settings_of_runs("esr", width, preset), *own]


def _own_settings(name: str, width: int, preset: str) -> list[str]:
    from steerback.config import build_config
    from steerback.experiments import experiment_type
    from steerback.experiments.base import parse_options
    from steerback.experiments.settings import experiment_rows

    config = build_config(name, ("organism",), preset)
    values = {"options": parse_options(experiment_type(name), config).model_dump(mode="json")}
    lines = _rows(experiment_rows(name), values, width)
    return [f"Settings of experiment {name}:", *lines] if lines else [f"Settings of experiment {name}: none."]


def _settings_of_runs(name: str, width: int, preset: str) -> list[str]:
    from steerback.config import RunConfig, build_config
    from steerback.experiments.settings import setting_rows

    values = build_config(name, ("organism",), preset).model_dump(mode="json")
    return [
        "Settings of every run:",
        *_rows((r for r in setting_rows(RunConfig) if r.key not in HIDDEN), values, width),
    ]


HIDDEN = ("experiment", "targets", "options", "definitions", "by_target", "from_run", "rubrics")
"""Settings that come from options of the command or from files of targets."""


def _rows(rows: Iterable[SettingRow], values: Any, width: int) -> list[str]:
    """Return `key = default` and the indented meaning of each setting."""
    lines = []
    for row in rows:
        value = values
        for part in row.key.split("."):
            value = value[part]
        lines.append(f"  {row.key} = {json.dumps(value, ensure_ascii=False)}")
        lines += textwrap.wrap(row.meaning, width, initial_indent="      ", subsequent_indent="      ")
    return lines
