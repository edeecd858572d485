"""Make trained SAEs a target: their files, labels, the doctor's checks, the table and the report page.

All files are in the user's folder `targets/NAME`. The same settings under the same name resume a training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from steerback.errors import SteerbackError
from steerback.jobs.doctor import Examination, examine, without_directions
from steerback.jobs.loaded import LoadedTarget
from steerback.jobs.sae_training import MEASURED, LayerResult, Learner, SaeJob, Say, load_model, write_corpus
from steerback.latents.corpus import TrainingText, readings
from steerback.readers import read_json_table
from steerback.readers.tables import csv_text
from steerback.report.sae import LayerRow, SaePage, write_sae_page
from steerback.store.files import make_folder, write_atomic, write_json
from steerback.targets import Target, resolve
from steerback.targets.directions import PRIOR
from steerback.targets.labels import COLUMNS
from steerback.targets.registry import trained_folder

if TYPE_CHECKING:
    from steerback.engines.base import Engine
    from steerback.targets.sae import Sae

LABELLING, CONTEXTS = 6_000, 1_500
"""Number of text pieces that are read for labels, and for contexts."""


@dataclass(frozen=True)
class TrainedTarget:
    """A finished training: folder, name and TOML table of the target, SAEs, labels and the doctor's checks."""

    folder: Path
    name: str
    table: str
    results: tuple[LayerResult, ...]
    best: LayerResult
    labels: dict[int, str]
    contexts: dict[int, tuple[str, ...]]
    doctor: Examination
    facts: dict[str, object]

    @property
    def page(self) -> Path:
        """Path of the report."""
        return self.folder / "report.html"


def train_sae(
    job: SaeJob,
    name: str,
    say: Say,
    engine: str = "transformers",
    memory: float | None = None,
    device: str | None = None,
    batch_size: int | None = None,
) -> TrainedTarget:
    """Train SAEs for some layers of a target and define the target `name` with the best SAE; see `SaeJob`.

    `memory`: limit for the activations in memory, in bytes; None: 40 % of the device's free memory, at most 32 GB.
    """
    base = replace(without_directions(resolve(job.target)), sae=None, n_latents=0)
    folder = _begin(job, name)
    clock = Clock(say)
    texts = [TrainingText("", text) for text in job.texts]
    if not texts and engine != "transformers":
        with load_model(base, engine, device, batch_size) as writer:
            texts = write_corpus(job, base, folder / "corpus.jsonl", writer)
        clock.mark("model and texts")
    loaded = load_model(base, "transformers", device, batch_size)
    try:
        clock.mark("model")
        texts = texts or write_corpus(job, base, folder / "corpus.jsonl", loaded)
        clock.mark("texts")
        learner = Learner(loaded.engine, job, texts, memory, say)
        clock.mark("tokens")
        trainers = learner.train(folder / "checkpoint.pt")
        clock.mark("activations and training")
        results = tuple(learner.measure(trainer) for trainer in trainers.values())
        best = max(results, key=lambda r: r.foreign.explained)
        clock.mark("quality")
        table = _save(folder, name, base, results, best, learner)
        target = resolve(name)
        steered = _with_sae(loaded, target, best.sae)
        labels, contexts = _labels(folder, steered.engine, texts, learner, best)
        clock.mark("labels")
        doctor = examine(steered)
        clock.mark("doctor")
    finally:
        loaded.close()
    facts: dict[str, object] = {
        "job": job.model_dump(mode="json", exclude={"texts"}),
        "model": base.model,
        "texts": len(texts),
        "positions": learner.stream.positions,
        "steps": learner.steps,
        "seconds": clock.seconds,
        "layers": [r.to_json() for r in results],
        "best": best.sae.layer,
        "labels": len(labels),
        "engine": loaded.engine.describe(),
        "doctor": doctor.to_json(),
    }
    write_json(folder / "training.json", facts)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    made = TrainedTarget(folder, name, table, results, best, labels, contexts, doctor, facts)
    write_sae_page(made.page, _page(made, job, learner))
    return made


class Clock:
    """Measures the seconds of each stage and prints them at its end."""

    def __init__(self, say: Say) -> None:
        self.seconds: dict[str, float] = {}
        self._say, self._last = say, time.monotonic()

    def mark(self, stage: str) -> None:
        """End a stage and print its seconds."""
        now = time.monotonic()
        self.seconds[stage] = round(now - self._last, 1)
        self._say(f"{stage}: {self.seconds[stage]:.0f} s")
        self._last = now


def _begin(job: SaeJob, name: str) -> Path:
    """Return the folder of a new or resumed training. Raises SteerbackError if it belongs to another training."""
    if "/" in name or name.startswith(".") or not name.isprintable() or not name.strip():
        raise SteerbackError(f"--name {name!r} names a folder and a target: it cannot contain / or start with a dot")
    folder = make_folder(trained_folder(name))
    settings, path = job.model_dump(mode="json"), folder / "job.json"
    if path.is_file() and (stored := read_json_table(path, "training")) != settings:
        changed = ", ".join(sorted(k for k in settings if settings[k] != stored.get(k)))
        raise SteerbackError(
            f"the training of {name!r} has other values of {changed}; choose another --name, or delete {folder}"
        )
    write_json(path, settings)
    return folder


def _with_sae(loaded: LoadedTarget, target: Target, sae: Sae) -> LoadedTarget:
    """Return the target with its SAE. The loaded model is used again."""
    from steerback.engines.loading import assemble
    from steerback.engines.transformers import TransformersEngine

    engine = loaded.engine
    assert isinstance(engine, TransformersEngine)
    runner = engine.runner
    runner.hooks.remove()
    made = assemble(target, runner.model, runner.prompter.tokenizer, sae.to(runner.device))
    again = TransformersEngine(made, 8)
    again.shape = replace(again.shape, prefill_rows=engine.shape.prefill_rows)  # larger on a GPU
    return LoadedTarget(target, again)


def _save(
    folder: Path, name: str, base: Target, results: Sequence[LayerResult], best: LayerResult, learner: Learner
) -> str:
    """Write the SAEs and the target's table. Return the table as TOML."""
    from steerback.targets.saelens import save_saelens

    for result in results:
        save_saelens(result.sae, folder / f"layer-{result.sae.layer}", base.model)
    norms = learner.norms()
    lines = [f"[{_quoted(name)}]", *_keys(base, folder, best, norms), "", f"[{_quoted(name)}.sae]"]
    lines += _source(folder, best.sae.layer)
    for result in results:
        if result is not best:
            layer, own = result.sae.layer, str(folder / f"layer-{result.sae.layer}")
            place = f"{_quoted(name)}.variants.layer-{layer}"
            lines += ["", f"[{place}]", f"sae_layer = {layer}", f"boost_prior = {_prior(norms[layer])}"]
            lines += [
                f"labels = {_quoted(own)}",
                "",
                f"[{place}.sae]",
                *_source(folder, layer),
            ]
    table = "\n".join(lines) + "\n"
    write_atomic(folder / "target.toml", table.encode("utf-8"))
    return table


def _keys(base: Target, folder: Path, best: LayerResult, norms: dict[int, float]) -> list[str]:
    layer = best.sae.layer
    made = (
        f"trained here: {time.strftime('%Y-%m-%d')}, explained variance {best.foreign.explained:.2f} on foreign texts"
    )
    keys: dict[str, str] = {
        "model": _quoted(base.model),
        "summary": _quoted(f"{base.name} with an SAE of layer {layer} made by steerback sae train"),
        **({"revision": _quoted(base.revision)} if base.revision else {}),
        "dtype": _quoted(base.dtype),
        "sae_layer": str(layer),
        "n_latents": str(best.sae.n_latents),
        "labels": _quoted(str(folder)),
        "boost_prior": _prior(norms[layer]),
        "prompt_format": _quoted(base.prompt_format),
        **({"max_new_tokens": str(base.max_new_tokens)} if base.max_new_tokens else {}),
        **({"planted": "true"} if base.planted else {}),
        "provenance": f'{{ sae = {_quoted(made)}, boost_prior = "derived: shares of the median residual norm" }}',
    }
    return [f"{key} = {value}" for key, value in keys.items()]


def _source(folder: Path, layer: int) -> list[str]:
    return ['format = "saelens"', f"location = {_quoted(str(folder / f'layer-{layer}'))}"]


def _prior(norm: float) -> str:
    mean, sd, high = (share * norm for share in PRIOR)
    return f"{{ mean = {mean:.4g}, sd = {sd:.4g}, low = 0, high = {high:.4g} }}"


def _quoted(text: str) -> str:
    """Return a text as a TOML string."""
    return json.dumps(text, ensure_ascii=False)


def _labels(
    folder: Path, engine: Engine, texts: Sequence[TrainingText], learner: Learner, best: LayerResult
) -> tuple[dict[int, str], dict[int, tuple[str, ...]]]:
    """Label latents by their top words; write labels, contexts and the table of latents into the folder of the SAE."""
    import random

    from steerback.engines.transformers import TransformersEngine
    from steerback.latents.contexts import top_contexts
    from steerback.latents.labelling import snippets, top_words

    assert isinstance(engine, TransformersEngine)
    read = [reading.text for reading in readings(texts) if not reading.prompt]
    random.Random(0).shuffle(read)
    labels = top_words(engine, read[:LABELLING])
    contexts = snippets(top_contexts(engine, read[:CONTEXTS], n=5), labels)
    density = learner.density(best.sae)
    labelled = [(k, label, "steerback sae train") for k, label in sorted(labels.items())]
    _write_csv(folder / "labels.csv", COLUMNS, labelled)
    rows = [(k, labels.get(k, ""), f"{share:.6g}") for k, share in enumerate(density)]
    _write_csv(folder / "latents.csv", ("index", "label", "density"), rows)
    write_json(folder / "contexts.json", {str(k): list(v) for k, v in sorted(contexts.items())})
    return labels, contexts


def _write_csv(path: Path, names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    write_atomic(path, csv_text(names, rows).encode("utf-8"))


def _page(made: TrainedTarget, job: SaeJob, learner: Learner) -> SaePage:
    rows = [
        LayerRow(
            r.sae.layer,
            r is made.best,
            (r.foreign.explained, r.own.explained),
            (r.foreign.l0, r.own.l0),
            r.dead,
            (r.loss_foreign.share, r.loss_own.share),
            (r.loss_foreign.plain, r.loss_foreign.replaced, r.loss_foreign.zero),
        )
        for r in made.results
    ]
    training = job.training
    summary = (
        f"An SAE of {training.latents:,} latents ({training.kind}, {training.k} active a position) of the residual "
        f"stream after layer {made.best.sae.layer} of {job.target}, made by steerback sae train."
    )
    kept = ("model", "texts", "positions", "steps", "seconds", "job")
    facts = [(key, json.dumps(made.facts[key], ensure_ascii=False).strip('"')) for key in kept]
    return SaePage(
        name=made.name,
        summary=summary,
        layers=rows,
        n_latents=made.best.sae.n_latents,
        dead_after=training.dead_after,
        measured=min(MEASURED, len(learner.foreign)),
        labels=made.labels,
        contexts=made.contexts,
        verdict=made.doctor.verdict,
        doctor=made.doctor.lines(),
        facts=facts,
        table=made.table,
    )
