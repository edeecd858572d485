"""Verbs about labels of latents: show, fetch, import, and make them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steerback.cli.options import Batch, MaxCalls, MaxCost, Price
from steerback.errors import SteerbackError, unknown

if TYPE_CHECKING:
    from steerback.judging.transport import Limits, Transport
    from steerback.targets import Target
    from steerback.targets.label_files import Stored

TargetName = Annotated[str, typer.Argument(help="A target, e.g. organism.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace labels that are there.")]


def register(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    group = typer.Typer(help="Labels of latents: show, fetch, import, make.", no_args_is_help=True)
    for name, command in (("show", show), ("fetch", fetch), ("import", import_command), ("auto", auto)):
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


def auto(
    target: TargetName,
    texts: Annotated[Path | None, typer.Option(help="Texts to look at, one a line; the more the better.")] = None,
    judge: Annotated[str | None, typer.Option(help="A judge model; default: offline, by top words.")] = None,
    latents: Annotated[str | None, typer.Option(help="Only these: a comma-separated list or a file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    overwrite: Overwrite = False,
    max_judge_calls: MaxCalls = None,
    max_judge_cost: MaxCost = None,
    judge_price: Price = None,
    judge_batch: Batch = False,
) -> None:
    """Label latents from the texts in which they are most active: by top words, or asked of a judge model."""
    import asyncio

    from steerback.api import load_target
    from steerback.engines.transformers import TransformersEngine
    from steerback.judging.labeller import LLMLabeller
    from steerback.judging.transport import Limits
    from steerback.latents import labelling
    from steerback.latents.contexts import top_contexts
    from steerback.latents.texts import read_texts, usual_texts
    from steerback.targets import resolve
    from steerback.targets.label_files import store_labels, user_labels_folder

    chosen = resolve(target).with_directions(())
    given = {"max_calls": max_judge_calls, "max_cost": max_judge_cost, "price": judge_price, "batch": judge_batch}
    limits = Limits(**{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    asked = None if judge in (None, "offline") else _transport(str(judge), limits)
    wanted = _wanted(chosen, latents, overwrite)
    own = read_texts(texts) if texts is not None else usual_texts(chosen.name)
    with load_target(chosen, "transformers") as loaded:
        assert isinstance(loaded.engine, TransformersEngine)
        if asked is None:
            labels = labelling.top_words(loaded.engine, own, wanted)
            snippets = {}
        else:
            snippets = labelling.snippets(top_contexts(loaded.engine, own), wanted)
    source = f"{labelling.SOURCE} of {len(own)} texts"
    if asked is not None:
        labeller = LLMLabeller(asked, user_labels_folder(chosen.user_key) / "asked.jsonl")
        print(f"{len(snippets)} latents to label: {labeller.estimate(snippets)}")
        if dry_run:
            return
        found = asyncio.run(labeller.label(snippets))
        labels, source = found.labels, f"{asked.model}, rubric {labeller.version}, {len(own)} texts"
        print(f"spent: {asked.spend()}; {found.nothing} latents whose texts have nothing in common")
        for reason, count in sorted(found.failed.items()):
            print(f"{count} without an answer: {reason}")
    print(f"{len(labels)} of {len(wanted)} latents that were asked about have a label now; the others stay without")
    if not dry_run:
        _told(store_labels(chosen.user_key, labels, source, chosen.own_labels(), overwrite), chosen)


def _transport(judge: str, limits: Limits) -> Transport:
    from steerback.judging.models import aliases, model_string
    from steerback.judging.transport import Transport

    model = model_string(judge)
    if model is None:
        raise unknown("judge", judge, ["offline", *(a.alias for a in aliases()), "any provider/model"])
    return Transport(model, limits)


def _wanted(target: Target, latents: str | None, overwrite: bool) -> set[int]:
    """Latents to be labelled: the user's list, or all, without those that keep their label."""
    from steerback.latents.sampling import check_latents, parse_latents

    if not target.n_latents:
        raise SteerbackError(f"target {target.name!r} has no SAE, so there are no latents to label")
    labels = target.labels()
    chosen: set[int] = set(range(target.n_latents))
    if latents is not None:
        parsed = parse_latents(latents if not latents.isdecimal() else f"{latents},", labels)
        assert not isinstance(parsed, int)
        chosen = {int(k) for k in check_latents(parsed, labels, target.n_latents)}
    return chosen if overwrite else chosen - set(labels)


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
