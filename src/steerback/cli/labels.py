"""Verbs about labels of latents: show, fetch, import, and make them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steerback.errors import SteerbackError

if TYPE_CHECKING:
    from steerback.targets import Target
    from steerback.targets.label_files import Stored

TargetName = Annotated[str, typer.Argument(help="A target, e.g. organism.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace labels that are there.")]


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    group = typer.Typer(help="Labels of latents: show, fetch, import, make.", no_args_is_help=True)
    for name, command in (("show", show), ("fetch", fetch), ("import", import_command)):
        group.command(name)(command)
    app.add_typer(group, name="labels")


def show(
    target: TargetName,
    find: Annotated[str | None, typer.Option(help="Only labels with this text in them.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 50,
) -> None:
    """List a target's labels, where each is from, and how many latents have none."""
    from steerback.targets import resolve
    from steerback.targets.label_files import read_user_labels

    chosen = resolve(target)
    labels, own = chosen.labels(), read_user_labels(chosen.user_key)
    wanted = [k for k in sorted(labels) if find is None or find.casefold() in labels[k].casefold()]
    for k in wanted[:limit]:
        print(f"{k:>7}  {labels[k]}  ({own[k].source if k in own else 'comes with the target'})")
    if len(wanted) > limit:
        print(f"... and {len(wanted) - limit} more (--limit)")
    print(_coverage(chosen))


def _coverage(target: Target) -> str:
    labels = len(target.labels())
    if not target.n_latents:
        return f"{target.name}: {labels} latents have a label"
    return f"{target.name}: {labels} of {target.n_latents} latents have a label, {target.n_latents - labels} have none"


def fetch(
    target: TargetName,
    source: Annotated[
        str | None,
        typer.Option("--from", help="neuronpedia:MODEL/SOURCE, hub:OWNER/NAME/FILE or an address; default: known."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Download public labels of a target; a stopped download goes on where it was."""
    from steerback.targets import resolve
    from steerback.targets.label_fetch import fetch_labels
    from steerback.targets.label_files import store_labels

    chosen = resolve(target)
    where = source or chosen.label_source
    if where is None:
        raise SteerbackError(
            f"no public labels are known for {chosen.name}; name them with --from neuronpedia:MODEL/SOURCE or an "
            f"address, or make some: steerback labels auto {chosen.name}"
        )
    found = fetch_labels(chosen.user_key, where, print)
    _check_range(chosen, found.labels.labels, where)
    stored = store_labels(chosen.user_key, found.labels.labels, found.source, chosen.own_labels(), overwrite)
    print(
        f"{len(found.labels.labels)} labels in {len(found.files)} files, their SHA-256 in {stored.path.parent}/fetched"
    )
    _told(stored, chosen)


def import_command(
    target: TargetName,
    file: Annotated[Path, typer.Argument(help="CSV, JSON (lines, gzipped or not), or a folder of them.")],
    overwrite: Overwrite = False,
) -> None:
    """Take over labels from a file: CSV, Goodfire's tables, Neuronpedia's exports."""
    from steerback.targets import resolve
    from steerback.targets.label_files import read_label_file, store_labels

    chosen = resolve(target)
    found = read_label_file(file.expanduser())
    _check_range(chosen, found.labels, str(file))
    if not found.labels:
        raise SteerbackError(f"{file} holds no label")
    source = " ".join([f"file {file.name}", *sorted(found.origins)])
    _told(store_labels(chosen.user_key, found.labels, source, chosen.own_labels(), overwrite), chosen)


def _check_range(target: Target, labels: dict[int, str], where: str) -> None:
    if target.n_latents and labels and max(labels) >= target.n_latents:
        raise SteerbackError(
            f"{where} labels latent {max(labels)}, and the SAE of {target.name} has {target.n_latents}: "
            "these are the labels of another SAE"
        )


def _told(stored: Stored, target: Target) -> None:
    kept = f"; {stored.kept} latents had one and keep it (--overwrite replaces them)" if stored.kept else ""
    print(f"{stored.written} labels written to {stored.path}{kept}")
    print(_coverage(target))
