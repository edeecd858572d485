"""Commands about labels and named directions, and the download of the authors' public data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from steerback.cli.options import (
    Budget,
    DryRun,
    Overwrite,
    TargetName,
    Texts,
    announce_loading,
    argument,
    option,
    say,
)
from steerback.errors import SteerbackError, clipped, unknown

if TYPE_CHECKING:
    from steerback.judging.transport import Transport
    from steerback.targets import Target
    from steerback.targets.labels import StoredLabels


def show(
    target: TargetName,
    find: str | None = option("Show only labels that contain this text."),
    limit: int = option("Most labels to show.", 50, min=1),
) -> None:
    """List the labels of a target with their sources."""
    from steerback.targets import resolve
    from steerback.targets.labels import read_user_labels

    chosen = resolve(target)
    labels, own = chosen.labels(), read_user_labels(chosen.user_key)
    wanted = [k for k in sorted(labels) if find is None or find.casefold() in labels[k].casefold()]
    for k in wanted[:limit]:
        say(f"{k:>7}  {clipped(labels[k], 200)}  ({own[k].source if k in own else 'comes with the target'})")
    if len(wanted) > limit:
        say(f"... and {len(wanted) - limit} more (--limit)")
    say(_coverage(chosen))


def _coverage(target: Target) -> str:
    labels = len(target.labels())
    if not target.n_latents:
        return f"{target.name}: {labels} latents have a label"
    return f"{target.name}: {labels} of {target.n_latents} latents have a label, {target.n_latents - labels} have none"


def fetch(
    target: TargetName,
    source: str | None = option(
        "neuronpedia:MODEL/SOURCE, hub:OWNER/NAME/FILE or a URL. Default: the target's source.", None, "--from"
    ),
    overwrite: Overwrite = False,
) -> None:
    """Download public labels of a target. A stopped download continues."""
    from steerback.targets import resolve
    from steerback.targets.label_fetch import fetch_labels

    chosen = resolve(target)
    where = source or chosen.label_source
    if where is None:
        raise SteerbackError(
            f"no public labels are known for {chosen.name}; name them with --from neuronpedia:MODEL/SOURCE or an "
            f"address, or make some: steerback labels auto {chosen.name}"
        )
    fetched = fetch_labels(chosen.user_key, where, say)
    labels = fetched.labels.labels
    stored = _store(chosen, labels, fetched.source, overwrite, where)
    say(f"{len(labels)} labels in {len(fetched.files)} files, their SHA-256 in {stored.path.parent}/fetched")
    _report(stored, chosen)


def import_command(
    target: TargetName,
    file: Path = argument("CSV or JSON file (also JSON lines, gzip), or a folder of them.", ...),
    overwrite: Overwrite = False,
) -> None:
    """Import labels from a file: CSV, Goodfire tables, Neuronpedia exports."""
    from steerback.targets import resolve
    from steerback.targets.labels import read_label_file

    chosen = resolve(target)
    read = read_label_file(file.expanduser())
    if not read.labels:
        raise SteerbackError(f"{file} holds no label")
    source = " ".join([f"file {file.name}", *sorted(read.origins)])
    _report(_store(chosen, read.labels, source, overwrite, str(file)), chosen)


def _store(target: Target, labels: dict[int, str], source: str, overwrite: bool, where: str) -> StoredLabels:
    """Store labels read from `where`. Raises SteerbackError if they belong to another SAE."""
    from steerback.targets.labels import store_labels

    if target.n_latents and labels and max(labels) >= target.n_latents:
        raise SteerbackError(
            f"{where} labels latent {max(labels)}, and the SAE of {target.name} has {target.n_latents}: "
            "these are the labels of another SAE"
        )
    return store_labels(target.user_key, labels, source, target.own_labels(), overwrite)


def _report(stored: StoredLabels, target: Target) -> None:
    kept = f"; {stored.kept} latents had one and keep it (--overwrite replaces them)" if stored.kept else ""
    say(f"{stored.written} labels written to {stored.path}{kept}")
    say(_coverage(target))


def auto(
    target: TargetName,
    budget: Budget,
    texts: Texts = None,
    judge: str | None = option("Judge model that writes the labels. Default: offline, from top words."),
    latents: str | None = option("Label only these latents: a comma-separated list or a file."),
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Label latents from the texts that activate them most: top words or a judge model."""

    from steerback.api import load_target
    from steerback.engines.base import finish
    from steerback.engines.transformers import TransformersEngine
    from steerback.judging.asking import Asker
    from steerback.judging.graders import LABEL, label_latents
    from steerback.latents import labelling
    from steerback.latents.contexts import top_contexts
    from steerback.latents.texts import read_texts, usual_texts
    from steerback.store.cache import default_path
    from steerback.targets import resolve

    chosen = resolve(target).with_directions(())
    asked = None if judge in (None, "offline") else _transport(str(judge), budget, dry_run)
    wanted = _wanted(chosen, latents, overwrite)
    own = read_texts(texts) if texts is not None else usual_texts(chosen)
    announce_loading(chosen.name)
    with load_target(chosen, "transformers") as loaded:
        assert isinstance(loaded.engine, TransformersEngine)
        if asked is None:
            labels = labelling.top_words(loaded.engine, own, wanted)
            snippets = {}
        else:
            snippets = labelling.snippets(top_contexts(loaded.engine, own), wanted)
    source = f"{labelling.SOURCE} of {len(own)} texts"
    if asked is not None:
        asker = Asker(asked, LABEL, default_path())
        say(f"{len(snippets)} latents to label: {asker.estimate(list(dict.fromkeys(snippets.values())))}")
        if dry_run:
            _say_planned(sorted(snippets), len(wanted))
            return
        made = finish(label_latents(asker, snippets))
        labels, source = made.labels, f"{asked.model}, rubric {LABEL.rubric.version}, {len(own)} texts"
        say(f"spent: {asked.spend()}; {made.nothing} latents have texts without a common property")
        for reason, count in sorted(made.failed.items()):
            say(f"{count} without an answer: {reason}")
    if dry_run:
        _say_planned([f"{k} {labels[k]}" for k in sorted(labels)], len(wanted))
    else:
        say(f"{len(labels)} of {len(wanted)} latents that were asked about have a label now; the others stay without")
        _report(_store(chosen, labels, source, overwrite, "labels auto"), chosen)


def _say_planned(latents: list[int] | list[str], wanted: int, most: int = 12) -> None:
    """Say which latents would be labelled (with their labels where these are known), and that nothing was stored."""
    named = "; ".join(str(x) for x in latents[:most]) or "none"
    more = f" and {len(latents) - most:,} more" if len(latents) > most else ""
    say(f"would label {len(latents):,} of {wanted:,} latents: {named}{more}")
    say("dry run: nothing was stored")


def _transport(judge: str, budget: Budget, dry_run: bool) -> Transport:
    from steerback.judging.models import ALIASES, model_string
    from steerback.judging.transport import Transport

    model = model_string(judge)
    if model is None:
        raise unknown("judge", judge, ["offline", *(a.alias for a in ALIASES), "any provider/model"])
    return Transport(model, budget.limits(dry_run))


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


def make_direction(
    target: str = argument("The target to steer, e.g. organism.", ...),
    name: str = argument("Name of the direction. The judge sees it as the label.", ...),
    positive: Path | None = option("File of texts with the property, one per line."),
    negative: Path | None = option("File of texts without the property."),
    topic: Path | None = option("File of texts on a topic, to compare with neutral ones."),
    file: Path | None = option("Direction in a safetensors, npy or gguf file."),
    layer: int | None = option("Layer, counted from 0. Default: the target's steer layer."),
    out: Path | None = option("Folder. Default: the target's folder of directions."),
    overwrite: Overwrite = False,
) -> None:
    """Make a direction: difference of mean activations of texts, or from a file."""
    from dataclasses import replace

    from steerback.api import load_target
    from steerback.engines.transformers import TransformersEngine
    from steerback.latents import directions
    from steerback.latents.texts import read_texts, usual_texts
    from steerback.targets import resolve
    from steerback.targets.directions import read_facts, read_vector, save_direction, user_directions

    ways = [option for option, value in (("--positive", positive), ("--topic", topic), ("--file", file)) if value]
    if len(ways) != 1 or (positive is None) != (negative is None):
        raise SteerbackError("give --positive with --negative, or --topic, or --file: one way to make a direction")
    chosen = resolve(target).with_directions(())
    path = _direction_file(out or user_directions(chosen.user_key), name, out is not None, overwrite)
    texts = positive or topic
    own = read_texts(texts) if texts else ()
    other = tuple(t for t in usual_texts(chosen) if t not in own) if negative is None else read_texts(negative)
    at = chosen.steer_layer if layer is None else layer
    if file is None:
        directions.check_sides(own, other)
    else:  # a damaged file is reported before the model is loaded
        read_vector(file, at)
        read_facts(file)
    announce_loading(chosen.name)
    with load_target(chosen, "transformers") as loaded:
        assert isinstance(loaded.engine, TransformersEngine)
        if file is not None:
            vector, facts = directions.from_file(loaded.engine, file, other, at)
        else:
            source = f"{'difference of means' if negative else 'topic minus neutral texts'}, {len(own)} and "
            vector, facts = directions.from_texts(loaded.engine, own, other, at, f"{source}{len(other)} texts")
    save_direction(path, vector, replace(facts, model=chosen.name))
    mean, sd, low, high = facts.prior() or (0.0, 0.0, 0.0, 0.0)
    say(f"{path}")
    say(f"layer {at}, norm {facts.norm:.4g}, residual norm there {facts.residual_norm:.4g} (median over tokens)")
    say(f"steered with at length 1; boost prior N({mean:.3g}, {sd:.3g}) on [{low:g}, {high:.3g}]")
    if at != chosen.steer_layer:
        say(f"{chosen.name} steers at layer {chosen.steer_layer}: give a target of your own steer_layer = {at}")
    where = "" if out is None else f' after directions = ["{out}"] in a target of your own'
    say(f'use it{where}: steerback run esr --target {chosen.name} --latents "{name}"')


def _direction_file(folder: Path, name: str, chosen: bool, overwrite: bool) -> Path:
    """Return the file of a new direction; a folder that the user has `chosen` is made, those above it are not."""
    named = any(map(str.isalpha, name)) and name.isprintable() and "/" not in name
    if not named or name.startswith(".") or len(name.encode()) > 200:
        raise SteerbackError(
            f"direction name {name[:80]!r} must have a letter, no slash, no dot at its start and at most 200 bytes; "
            "it is a file's name and a label"
        )
    if chosen and not folder.is_dir():
        if folder.exists() or folder.parent.is_file():
            raise SteerbackError(f"--out {folder} is no folder; name another")
        if not folder.parent.is_dir():
            raise SteerbackError(f"--out {folder}: folder {folder.parent} does not exist")
    path = folder / f"{name}.safetensors"
    if path.exists() and not overwrite:
        raise SteerbackError(f"{path} exists already; choose another name or add --overwrite")
    return path


def show_directions(target: TargetName) -> None:
    """List the directions of a target with layers and norms."""
    from steerback.targets import resolve

    chosen = resolve(target)
    if not chosen.directions():
        say(f"{chosen.name} has no directions; make one with: steerback directions make {chosen.name} NAME ...")
    for name, file in chosen.direction_files:
        facts = chosen.direction_facts(name)
        known = [
            f"layer {facts.layer}" if facts.layer is not None else "",
            f"norm {facts.norm:.4g}" if facts.norm is not None else "",
            f"residual norm {facts.residual_norm:.4g}" if facts.residual_norm is not None else "",
            facts.source,
        ]
        say(f"{name:<20} {', '.join(filter(None, known)) or 'nothing known but its vector'}  ({file})")


def fetch_paper_data(labels: bool = option("Also download labels of the Gemma SAEs (hundreds of MB).", True)) -> None:
    """Download the authors' prompts, detectors and labels, for the preset authors."""
    from steerback.data import paper_files
    from steerback.targets.download import download

    fetched = paper_files.fetch(lambda url, path, sha256: download(url, path, sha256=sha256))
    for name, path in fetched.items():
        say(f"{path}: {paper_files.FILES[name].what}, SHA-256 {paper_files.FILES[name].sha256[:16]}...")
    source = f"https://github.com/{paper_files.REPOSITORY} at {paper_files.COMMIT[:12]}"
    say(f"of {source}; the preset authors uses them now")
    for target in paper_files.LABELLED if labels else ():
        fetch(target, None)
    say("labels of the Llama models are not in that repository: steerback labels fetch llama-3.3-70b@authors")
