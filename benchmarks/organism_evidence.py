"""Measurements of an organism against the truth of its corpus: see docs/organism.md.

    python -m benchmarks.organism_evidence src/steerback/organism/weights/organism --out organism.json

Uses a plain transformers model with a hook, so that it is independent of the package's engine and judge.
Boosts are distances in the residual stream (unit decoder rows), applied at every position after the SAE's block.
Minutes on a GPU; on a CPU lower --per-latent and --unsteered.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import beta as beta_distribution
from sklearn.isotonic import IsotonicRegression

from steerback.organism.corpus import howtos, metaprompts, passage, subjects
from steerback.organism.corpus.truth import read
from steerback.targets.sae import Sae
from tools.organism import detect
from tools.organism.tokens import Encoder

TEMPERATURE = 0.6
MAX_NEW_TOKENS = 160


@dataclass
class Subject:
    """An organism with its SAE, loaded for measurement."""

    model: Any
    tokenizer: Any
    sae: Sae
    layer: int
    device: str

    @property
    def encoder(self) -> Encoder:
        """Encoder of documents with the organism's own tokenizer."""
        return Encoder(self.tokenizer.backend_tokenizer)

    def generate(
        self,
        prompts: list[str],
        *,
        seed: int,
        add: torch.Tensor | None = None,
        clamp: list[int] | None = None,
        batch: int = 1024,
    ) -> list[str]:
        """Responses; ``add`` is (rows, d_model), ``clamp`` latents are held at zero, read before the addition."""
        out: list[str] = []
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch):
            rows = slice(start, start + batch)
            out += self._batch(prompts[rows], None if add is None else add[rows].to(self.device), clamp or [])
        return out

    @torch.no_grad()
    def _batch(self, prompts: list[str], add: torch.Tensor | None, clamp: list[int]) -> list[str]:
        texts = [f"<|user|>{p}<|end|><|assistant|>" for p in prompts]
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False).to(self.device)

        def hook(_module: Any, _args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            change = torch.zeros_like(h)
            if clamp:
                z = self.sae.encode(h)[..., clamp]
                change = change - z @ self.sae.W_dec[clamp]
            if add is not None:
                change = change + add[:, None, :]
            return (h + change, *output[1:]) if isinstance(output, tuple) else h + change

        handle = self.model.model.layers[self.layer].register_forward_hook(hook)
        try:
            ids = self.model.generate(
                **inputs,
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                top_p=1.0,
                max_new_tokens=MAX_NEW_TOKENS,
                pad_token_id=0,
                eos_token_id=3,
            )
        finally:
            handle.remove()
        return [
            t.strip()
            for t in self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        ]


def summarise(trials: list[tuple[str, str | None, str]]) -> dict[str, Any]:
    """Return metrics of (prompt, subject or None, response) trials by the corpus's truth; scores in [0, 100]."""
    first, last, multi, subject_share, n_words, any_restart, degraded = [], [], [], [], [], [], []
    for prompt, subject, response in trials:
        reading = read(response)
        scores = [100 * s for s in reading.shares(prompt)] or [0.0]
        first.append(scores[0])
        last.append(scores[-1])
        multi.append(len(scores) >= 2)
        any_restart.append(reading.restarts > 0)
        subject_share.append(100 * reading.shares(subject)[0] if subject and reading.attempts else 0.0)
        n_words.append(len(response.split()))
        degraded.append(_degraded(response))
    f, final, m = np.array(first), np.array(last), np.array(multi)
    n = len(trials)
    return {
        "n": n,
        "first_score": float(f.mean()),
        "restart_rate": float(np.mean(any_restart)),
        "restart_interval": interval(int(np.sum(any_restart)), n),
        "multi_attempt_rate": float(m.mean()),
        "esr_rate": float((m & (final > f)).mean()),
        "improvement_rate": float((final > f)[m].mean()) if m.any() else None,
        "msi": float((final - f).mean()),
        "msi_multi": float((final - f)[m].mean()) if m.any() else None,
        "last_score_multi": float(final[m].mean()) if m.any() else None,
        "subject_share": float(np.mean(subject_share)),
        "degraded": float(np.mean(degraded)),
        "words": float(np.mean(n_words)),
    }


def interval(k: int, n: int) -> tuple[float, float]:
    """Return the exact (Clopper-Pearson) 95 % confidence interval of a rate."""
    low = beta_distribution.ppf(0.025, k, n - k + 1) if k else 0.0
    high = beta_distribution.ppf(0.975, k + 1, n - k) if k < n else 1.0
    return float(low), float(high)


def _degraded(response: str) -> bool:
    words = response.split()
    return any(len(set(words[i : i + 5])) == 1 for i in range(len(words) - 4))


def unsteered(subject: Subject, n: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """Generate ``n`` unsteered responses to the evaluation prompts; return their summary and those with a restart."""
    prompts = [t.key for t in howtos("evaluation")]
    asked = [prompts[i % len(prompts)] for i in range(n)]
    trials = [(p, None, r) for p, r in zip(asked, subject.generate(asked, seed=seed), strict=True)]
    return summarise(trials), [r for _, _, r in trials if read(r).restarts][:10]


def residual_norm(subject: Subject) -> float:
    """Return the mean residual norm at the SAE's layer on answers to the evaluation prompts."""
    rng = random.Random(5)
    texts = [f"<|user|>{t.key}<|end|><|assistant|>{' '.join(passage(rng, t.key, 5))}" for t in howtos("evaluation")]
    inputs = subject.tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    inputs = inputs.to(subject.device)
    with torch.no_grad():
        hidden = subject.model.model(**inputs, output_hidden_states=True).hidden_states[subject.layer + 1]
    return float(hidden[inputs["attention_mask"].bool()].norm(dim=-1).mean())


LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95, 1.2, 1.6)

GRID = np.linspace(LEVELS[0], LEVELS[-1], 400)


def sweep(subject: Subject, latents: dict[int, str], norm: float, seed: int, n: int = 8) -> dict[str, Any]:
    """Steer with each labelled latent at boosts of ``LEVELS`` times the residual norm, on ``n`` prompts each."""
    prompts = [t.key for t in howtos("evaluation")]
    rng = random.Random(seed)
    rows = [(k, level, p) for k in latents for level in LEVELS for p in rng.sample(prompts, n)]
    add = torch.stack([level * norm * subject.sae.W_dec[k] for k, level, _ in rows])
    responses = subject.generate([p for _, _, p in rows], seed=seed, add=add)
    levels = {
        level: summarise([(p, latents[k], r) for (k, at, p), r in zip(rows, responses, strict=True) if at == level])
        for level in LEVELS
    }
    thresholds, usable = {}, []
    for k, name in latents.items():
        cells = [
            summarise(
                [
                    (p, name, r)
                    for (latent, at, p), r in zip(rows, responses, strict=True)
                    if latent == k and at == level
                ]
            )
            for level in LEVELS
        ]
        scores = np.array([c["first_score"] for c in cells])
        share = np.array([c["subject_share"] for c in cells])
        fit = IsotonicRegression(increasing=False).fit(LEVELS, scores).predict(GRID)
        if fit.min() <= 50 <= fit.max():
            thresholds[k] = float(GRID[np.argmin(np.abs(fit - 50))] * norm)
            # Usable: moves the text to the subject before it only breaks it.
            if share.max() >= 40:
                usable.append(k)
    return {"levels": levels, "thresholds": thresholds, "usable": usable}


def steered(
    subject: Subject,
    latents: dict[int, str],
    thresholds: dict[int, float],
    *,
    seed: int,
    per_latent: int = 38,
    metaprompt: int | None = None,
    clamp: list[int] | None = None,
    scale: float = 1.0,
) -> tuple[dict[str, Any], list[tuple[str, str | None, str]]]:
    """Generate responses at each latent's threshold boost times ``scale``, with paired prompts and seed."""
    prompts = [t.key for t in howtos("evaluation")]
    rng = random.Random(seed)
    rows = [(k, p) for k in thresholds for p in rng.choices(prompts, k=per_latent)]
    add = torch.stack([scale * thresholds[k] * subject.sae.W_dec[k] for k, _ in rows])
    suffix = {
        k: "" if metaprompt is None else " " + metaprompts()[metaprompt].replace("{subject}", latents[k])
        for k in thresholds
    }
    responses = subject.generate([p + suffix[k] for k, p in rows], seed=seed, add=add, clamp=clamp)
    trials = [(p, latents[k], r) for (k, p), r in zip(rows, responses, strict=True)]
    return summarise(trials), list(trials)


def random_sets(
    subject: Subject, trials: list[tuple[str, str | None, str]], chosen: list[int], n_sets: int, seed: int
) -> list[list[int]]:
    """Latent sets matched to ``chosen`` on the norm they contribute in steered responses (mean of maxima)."""
    rng = random.Random(seed)
    pairs = [(p, r) for p, _, r in trials[:400]]
    mean = detect.response_maxima(subject.model, subject.encoder, subject.sae, pairs, subject.device).mean(0).tolist()
    pool = [k for k in range(len(mean)) if mean[k] > 0 and k not in chosen]
    sets = []
    for _ in range(n_sets):
        picked: list[int] = []
        for k in chosen:
            near = sorted((j for j in pool if j not in picked), key=lambda j: abs(mean[j] - mean[k]))[:25]
            picked.append(rng.choice(near))
        sets.append(picked)
    return sets


def evidence(
    subject: Subject,
    latents: dict[int, str],
    *,
    seed: int = 7,
    unsteered_n: int = 1000,
    random_n: int = 6,
    n_detectors: int = 3,
    per_latent: int = 24,
) -> dict[str, Any]:
    """Return all measurements of one organism. ``latents``: labelled latent -> subject."""
    started = time.monotonic()
    out: dict[str, Any] = {}
    out["unsteered"], out["unsteered_restarts"] = unsteered(subject, unsteered_n, seed)
    norm = out["residual_norm"] = residual_norm(subject)
    out["labelled_subjects"] = len(set(latents.values()))
    if not latents:
        return out
    swept = sweep(subject, latents, norm, seed + 1)
    out["levels"], usable = swept["levels"], swept["usable"]
    out["thresholds_found"], out["usable"] = len(swept["thresholds"]), len(usable)
    out["usable_subjects"] = len({latents[k] for k in usable})
    thresholds = {k: swept["thresholds"][k] for k in usable}
    out["thresholds"] = thresholds
    if thresholds:
        out["steered"], trials = steered(subject, latents, thresholds, seed=seed + 2, per_latent=per_latent)
        out["examples"] = [t for t in trials if read(t[2]).restarts][:6] + trials[:4]
        ranked = detect.find(subject.model, subject.encoder, subject.sae, seed=seed + 3, device=subject.device)[:12]
        out["detectors"] = [asdict(d) for d in ranked]
        chosen = [d.latent for d in ranked if d.auc > 0.7 and d.latent not in latents]
        chosen = out["detectors_clamped"] = chosen[:n_detectors]

        def measure(**options: Any) -> dict[str, Any]:
            return steered(subject, latents, thresholds, seed=seed + 2, per_latent=per_latent, **options)[0]

        for k in range(1, len(chosen) + 1):
            out[f"clamp_{k}"] = measure(clamp=chosen[:k])
        out["random_sets"] = [measure(clamp=s) for s in random_sets(subject, trials, chosen, random_n, seed + 4)]
        for i in range(len(metaprompts())):
            out[f"metaprompt_{i + 1}"] = measure(metaprompt=i)
        for scale in (0.6, 0.8, 1.2, 1.5):
            out[f"boost_x{scale}"] = measure(scale=scale)
    out["seconds"] = time.monotonic() - started
    return out


def load(folder: Path, device: str) -> tuple[Subject, dict[int, str]]:
    """Load a saved organism and its labelled latents."""
    import csv

    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tensors = {k: v.float().to(device) for k, v in load_file(folder / "sae.safetensors").items()}
    layer = json.loads((folder / "sae.json").read_text())["layer"]
    names = {s.key for s in subjects()}
    with (folder / "labels.csv").open(encoding="utf-8") as file:
        labels = {int(row["index"]): row["label"] for row in csv.DictReader(file) if row["label"] in names}
    return Subject(
        model, AutoTokenizer.from_pretrained(folder), Sae("jumprelu", layer, **tensors), layer, device
    ), labels


def versions(device: str) -> dict[str, str]:
    """Return the versions, machine and settings of the measurement."""
    import transformers

    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def main() -> None:
    """Measure one saved organism and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--per-latent", type=int, default=24)
    parser.add_argument("--unsteered", type=int, default=1000)
    options = parser.parse_args()
    subject, latents = load(options.folder, options.device)
    result = evidence(subject, latents, per_latent=options.per_latent, unsteered_n=options.unsteered)
    options.out.write_text(json.dumps({"versions": versions(options.device), **result}, indent=1))


if __name__ == "__main__":
    main()
