"""Build an organism: corpus, tokenizer, model, SAE, labels, all from fixed seeds.

A rebuild on other hardware or versions gives the same behaviour, not the same bytes.
"""

from __future__ import annotations

import csv
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from steerback.organism.corpus import subjects
from steerback.targets.sae import save_native
from steerback.targets.sae_training import sae_quality
from tools.organism import detect, labels, train_lm, train_sae
from tools.organism.spec import CORPUS_SEED, LmTraining, Organism, SaeConstants
from tools.organism.tokens import Encoder, save_tokenizer, train_tokenizer

# Seeds of text that no training saw: SAE training, labelling, checking.
SAE_SEED, LABEL_SEED, CHECK_SEED = 10_001, 10_002, 10_003
DETECTOR_AUC = 0.9


def build(
    organism: Organism,
    folder: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    lm: LmTraining | None = None,
    sae: SaeConstants | None = None,
    log: Any = print,
) -> None:
    """Train an organism and its SAE and write everything into ``folder``."""
    lm, sae = lm or LmTraining(), sae or SaeConstants()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(CORPUS_SEED)
    encoder = Encoder(tokenizer)
    model, report = train_lm.train(organism, lm, encoder, seed=seed, device=device, log=log)
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)
    write_json(
        folder / "training.json",
        {
            "organism": asdict(organism),
            "seed": seed,
            "corpus_seed": CORPUS_SEED + seed,
            "lm": asdict(lm),
            "report": asdict(report),
            **provenance(device),
        },
    )
    build_sae(organism, model, encoder, folder, config=sae, seed=seed, device=device, log=log)


def save_model(model: Any, folder: Path) -> None:
    """Write fp16 weights, and leave the model in float32 with exactly those values."""
    model.half().save_pretrained(folder)
    model.float()


def build_sae(
    organism: Organism,
    model: Any,
    encoder: Encoder,
    folder: Path,
    *,
    config: SaeConstants,
    seed: int,
    device: str,
    log: Any = print,
) -> None:
    """Train, label and save the SAE of a trained model."""
    started = time.monotonic()

    def text(corpus_seed: int, tokens: int) -> train_sae.Activations:
        return train_sae.collect(
            model, encoder, seed=corpus_seed, tokens=tokens, restarts=organism.restarts, device=device
        )

    trained = train_sae.train(text(SAE_SEED, config.tokens), config, seed=seed, log=log)
    # Everything that follows is measured on the values that are saved.
    half_sae = trained.to(device, torch.float16).to(device, torch.float32)
    held_out = text(CHECK_SEED, config.label_tokens)
    measured = labels.selectivity(half_sae, text(LABEL_SEED, config.label_tokens))
    named = labels.label_latents(measured)
    checked = labels.check_labels(named, labels.selectivity(half_sae, held_out))
    detectors = [
        d
        for d in detect.find(model, encoder, half_sae, seed=LABEL_SEED, device=device)
        if d.auc >= DETECTOR_AUC and d.latent not in named
    ]
    held = sae_quality(half_sae, [held_out.h])
    save_native(
        trained,
        folder,
        torch.float16,
        training=asdict(config),
        seed=seed,
        held_out={
            "explained_variance": held.explained,
            "l0": held.l0,
            "dead_latents": held.dead * config.latents,
            "tokens": held.positions,
        },
        labels_on_held_out_text=checked,
        detectors=[asdict(d) for d in detectors],
        seconds=round(time.monotonic() - started, 1),
        **provenance(device),
    )
    contexts = labels.top_contexts(half_sae, held_out, [*named, *(d.latent for d in detectors)], encoder.tokenizer)
    write_json(folder / "contexts.json", {str(k): v for k, v in sorted(contexts.items())})
    write_tables(folder, measured, named, [d.latent for d in detectors])


def write_tables(folder: Path, measured: labels.Selectivity, named: dict[int, int], detectors: list[int]) -> None:
    """Write ``latents.csv`` (all latents) and ``labels.csv`` (labelled latents)."""
    names = [s.key for s in subjects()]
    with (folder / "latents.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["index", "label", "density", "max_activation", "kind"])
        for k in range(len(measured.density)):
            density, top = float(measured.density[k]), float(measured.max_activation[k])
            kind = "subject" if k in named else "detector" if k in detectors else "other" if density > 0 else "dead"
            out.writerow([k, names[named[k]] if k in named else "", f"{density:.6f}", f"{top:.4f}", kind])
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["index", "label"])
        out.writerows([k, names[s]] for k, s in sorted(named.items()))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def provenance(device: str) -> dict[str, Any]:
    """Return versions, device, date and command."""
    import tokenizers
    import transformers

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m tools.organism", *sys.argv[1:]]),
    }
