"""Check a target's hook point, layer, SAE and steering with activations of the model.

The doctor reconstructs residuals at the SAE's layer and at neighbouring layers, because an SAE explains the layer that
it was trained on best. It then compares the receipts of one steered and one unsteered response. It uses the
transformers engine, changes nothing and does not measure ESR.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from steerback.data.prompts import load_prompts
from steerback.errors import SteerbackError, clipped
from steerback.latents.contexts import Contexts, top_contexts
from steerback.latents.texts import usual_texts
from steerback.records import Completion, Intervention, LatentKey, Request, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from steerback.engines.transformers import TransformersEngine
    from steerback.jobs.loaded import LoadedTarget
    from steerback.targets import Target
    from steerback.targets.sae import Sae

Verdict = Literal["ok", "warning", "failed"]
TEXTS, CHUNK_TOKENS = 24, 1024
STEPS = (1, 2, 4, 8, 16)
"""Distances of the neighbouring layers. In a model with at most twelve layers, all layers are compared."""
BETTER, OFTEN = 0.02, 0.9
"""Another layer is better if its explained variance is higher by `BETTER`, and in the share `OFTEN` of the texts."""
LOW, NONE = 0.5, 0.2
"""Explained variance below `LOW` gives a warning. Below `NONE` at all layers the check fails."""
OUTLIER = 10.0
"""Tokens with a norm above this multiple of the median are left out, because they would dominate the variance."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check: verdict, result in one line, details, and numbers."""

    name: str
    verdict: Verdict
    line: str
    details: tuple[str, ...] = ()
    data: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Examination:
    """All checks of a target, in the order in which they were made."""

    target: str
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> Verdict:
        """Worst verdict of all checks."""
        verdicts = {check.verdict for check in self.checks}
        return "failed" if "failed" in verdicts else "warning" if "warning" in verdicts else "ok"

    def lines(self) -> list[str]:
        """Return the lines to print: one for each check with its details, then the verdict."""
        said = []
        for check in self.checks:
            said.append(f"{check.verdict:<8}{check.name}: {check.line}")
            said.extend(f"          {detail}" for detail in check.details)
        counts = {v: sum(c.verdict == v for c in self.checks) for v in ("ok", "warning", "failed")}
        return [*said, f"{self.target}: {self.verdict} ({', '.join(f'{n} {v}' for v, n in counts.items())})"]

    def to_json(self) -> dict[str, object]:
        """Return a dictionary that can be written as JSON."""
        return {"target": self.target, "verdict": self.verdict, "checks": [asdict(c) for c in self.checks]}


def examine(loaded: LoadedTarget, layer: int | None = None, texts: Sequence[str] | None = None) -> Examination:
    """Run all checks on a loaded target.

    `layer`: layer (0-based) to check the SAE at; default: the SAE's layer. `texts`: texts to read residuals from;
    default: texts of the package, for an organism passages of its corpus. Raises SteerbackError for a layer outside
    the model, or for another engine than transformers.
    """
    from steerback.engines.transformers import TransformersEngine

    engine, target = loaded.engine, loaded.target
    if not isinstance(engine, TransformersEngine):
        raise SteerbackError("doctor reads residuals and needs the transformers engine: --engine transformers")
    site = engine.runner.site
    at = layer if layer is not None else site.sae_layer
    if not 0 <= at < site.n_layers:
        raise SteerbackError(f"--layer {at} is outside 0..{site.n_layers - 1}, the layers of this model")
    usual = usual_texts(target)
    chosen = list(texts or usual[:: max(len(usual) // TEXTS, 1)][:TEXTS])
    checks = [_loaded(engine)]
    contexts = None
    if engine.sae is not None:
        contexts = top_contexts(engine, chosen, n=3, layer=at)
        checks += [_weights(engine.sae), _layer(engine, chosen, at), _latents(engine, target, contexts)]
    checks.append(_prior(engine, target, chosen))
    checks.append(_steering(loaded, engine, contexts, layer))
    return Examination(target.name, tuple(checks))


def _loaded(engine: TransformersEngine) -> Check:
    runner, site = engine.runner, engine.runner.site
    line = (
        f"{runner.config.model_type}, {site.n_layers} layers of width {site.d_model}, {str(runner.dtype)[6:]} on "
        f"{runner.device}; steers at layer {site.steer_layer}, SAE at {site.sae_layer}, reads at {site.read_layer}"
    )
    return Check("model", "ok", line)


def _weights(sae: Sae) -> Check:
    """Check the decoder norms of the SAE. Its shapes and finite values were checked at loading."""
    norms = sae.decoder_norms.numpy()
    low, middle, high = (float(x) for x in np.quantile(norms, (0.0, 0.5, 1.0)))
    zero = int((norms < 1e-6).sum())
    line = (
        f"{sae.kind}, {sae.n_latents} latents of width {sae.d_model}, all finite; decoder norms "
        f"{low:.3g} to {high:.3g}, median {middle:.3g}"
    )
    if zero:
        line += f"; {zero} latents have no decoder direction and cannot be steered with"
    data = {"kind": sae.kind, "n_latents": sae.n_latents, "norms": [low, middle, high], "zero": zero}
    return Check("SAE", "warning" if zero else "ok", line, data=data)


@dataclass(frozen=True)
class Fit:
    """Fit of an SAE to the residuals of a layer, pooled over tokens and for each text."""

    explained: float
    l0: float
    silent: float  # share of tokens at which no latent is active
    errors: Mapping[int, float]  # sum of squared errors per text
    outliers: int

    def beaten_in(self, other: Fit) -> float:
        """Return the share of texts in which `other` leaves less variance unexplained."""
        return float(np.mean([other.errors[n] < error for n, error in self.errors.items()]))


def neighbours(layer: int, n_layers: int) -> list[int]:
    """Return the layers to compare, in ascending order."""
    if n_layers <= 12:
        return list(range(n_layers))
    near = {layer + sign * step for step in (0, *STEPS) for sign in (1, -1)}
    return sorted(n for n in near if 0 <= n < n_layers)


def fits(engine: TransformersEngine, texts: Sequence[str], layers: Sequence[int]) -> dict[int, Fit]:
    """Return the SAE's fit to each layer on the texts, without template tokens."""
    import torch

    sae = engine.sae
    assert sae is not None
    kept: dict[int, dict[int, Tensor]] = {layer: {} for layer in layers}
    for n, ids, states in engine.residuals([""] * len(texts), texts, layers):
        if ids:
            for layer, h in states.items():
                kept[layer][n] = h.cpu()
    by_layer = {}
    for layer, by_text in kept.items():
        h = torch.cat(list(by_text.values()))
        text = torch.cat([torch.full((len(part),), n) for n, part in by_text.items()])
        norms = h.norm(dim=1)
        usual = norms <= OUTLIER * norms.median()
        h, text = h[usual], text[usual]
        error, fired = [], []
        for part in torch.split(h, CHUNK_TOKENS):  # few large chunks: each copies weights from host memory
            z = engine.encoder.encode(part.to(engine.runner.device))
            error.append((sae.decode(z).cpu().double() - part.double()).square().sum(dim=1))
            fired.append((z > 0).sum(dim=1).cpu())
        errors, active = torch.cat(error), torch.cat(fired)
        spread = (h.double() - h.double().mean(0)).square().sum(dim=1)
        by_layer[layer] = Fit(
            explained=1 - float(errors.sum() / spread.sum()),
            l0=float(active.double().mean()),
            silent=float((active == 0).double().mean()),
            errors={n: float(errors[text == n].sum() / spread[text == n].sum()) for n in set(text.tolist())},
            outliers=int((~usual).sum()),
        )
    return by_layer


def _layer(engine: TransformersEngine, texts: Sequence[str], at: int) -> Check:
    """Check that the SAE explains this layer better than its neighbours."""
    by_layer = fits(engine, texts, neighbours(at, engine.runner.site.n_layers))
    own = by_layer[at]
    best = max(by_layer, key=lambda layer: by_layer[layer].explained)
    gain = by_layer[best].explained - own.explained
    clearly = gain > BETTER and own.beaten_in(by_layer[best]) >= OFTEN
    line = f"layer {at}: explained variance {own.explained:.2f}, L0 {own.l0:.1f}, over {len(texts)} texts"
    verdict: Verdict = "ok"
    if by_layer[best].explained < NONE:
        verdict = "failed"
        line += "; it explains none of these layers: another model's SAE, another hook point or another input scale"
    elif clearly:
        verdict = "failed"
        line += f"; the SAE does not belong to this layer: at layer {best} it explains {by_layer[best].explained:.2f}"
    elif own.explained < LOW or gain > BETTER / 2:
        verdict = "warning"
        line += f"; {'low' if own.explained < LOW else f'layer {best} is as good ({by_layer[best].explained:.2f})'}"
    if own.silent > 0.5:
        verdict = "failed"
        line += f"; no latent is active at {own.silent:.0%} of the tokens"
    outliers = (
        (f"{own.outliers} tokens with a norm above {OUTLIER:g} times the median are left out",) if own.outliers else ()
    )
    shown = "   ".join(
        f"{layer}{'*' * (layer == at)}: {fit.explained:.2f} ({fit.l0:.0f})" for layer, fit in by_layer.items()
    )
    data = {
        str(layer): {"explained_variance": fit.explained, "l0": fit.l0, "silent": fit.silent}
        for layer, fit in by_layer.items()
    }
    return Check("layer", verdict, line, (f"explained variance (L0) by layer  {shown}", *outliers), data)


def _latents(engine: TransformersEngine, target: Target, contexts: Contexts) -> Check:
    """Show some active latents, labelled ones first: the passages of their peaks and the tokens they promote."""
    active = contexts.active().tolist()
    labels = target.labels()
    shown = [k for k in active if k in labels][:4] or active[:4]
    details, data = [], {}
    for k in shown:
        peaks, promoted = contexts.of(k), _promoted(engine, k)
        details.append(f"{k} ({labels.get(k, 'no label')}): promotes {', '.join(promoted)}")
        details.extend(f"    {c.activation:6.2f}  {c.marked}" for c in peaks[:2])
        data[str(k)] = {"label": labels.get(k), "contexts": [c.marked for c in peaks], "promotes": promoted}
    n = len(contexts.values)
    line = f"{len(active)} of {n} are active in these texts, {len(labels)} have a label"
    if not active:
        return Check("latents", "failed", f"none of {n} is active in these texts")
    return Check("latents", "ok", line, tuple(details), data)


def _promoted(engine: TransformersEngine, latent: int, n: int = 6) -> list[str]:
    """Return the tokens whose logits rise most if the decoder direction is multiplied by the unembedding."""
    assert engine.sae is not None
    runner = engine.runner
    unembed = runner.model.get_output_embeddings().weight
    norm = getattr(runner.decoder.norm, "weight", None)
    direction = engine.sae.W_dec[latent].to(unembed)
    if norm is not None:
        direction = direction * (1 + norm if runner.config.model_type.startswith("gemma") else norm)
    top = (unembed @ direction).float().topk(n).indices.tolist()
    return [repr(runner.prompter.text([token]).strip()) for token in top]


def _prior(engine: TransformersEngine, target: Target, texts: Sequence[str]) -> Check:
    """Check that boosts have the order of magnitude of the residual norm at the steer layer."""
    import torch

    layer = engine.runner.site.steer_layer
    norms = [states[layer].norm(dim=1).cpu() for _, _, states in engine.residuals([""] * len(texts), texts, (layer,))]
    norm, prior = float(torch.cat(norms).median()), target.boost_prior
    share = prior.mean / norm
    line = f"boosts N({prior.mean:g}, {prior.sd:g}), residual norm {norm:.3g} at layer {layer}"
    data = {"residual_norm": norm, "mean": prior.mean, "share": share}
    if not 0.05 <= share <= 5:
        hint = f"ratio {share:.2g}; thresholds are usually 0.2 to 2 times the norm, so check boost_prior and the scale"
        return Check("boost prior", "warning", f"{line}: {hint}", data=data)
    return Check("boost prior", "ok", line, data=data)


def _steering(loaded: LoadedTarget, engine: TransformersEngine, contexts: Contexts | None, layer: int | None) -> Check:
    """Check the receipts of one unsteered and one steered response to the same prompt and seed."""
    target, site = loaded.target, engine.runner.site
    prompt = load_prompts("evaluation")[0]
    key = _key(target, contexts)
    if key is None:
        return Check("steering", "failed", "the target has neither an active latent nor a direction to steer with")
    boost = target.prior_of(key).mean
    edits = (Intervention("add", key, boost, layer=layer),)
    sampling = Sampling(temperature=0, max_new_tokens=min(target.max_new_tokens or 48, 48))
    plain, steered = loaded.complete(
        [Request("plain", prompt, 1, sampling), Request("steered", prompt, 1, sampling, edits)]
    )
    length = 1.0
    if isinstance(key, int):
        assert engine.sae is not None
        length = float(engine.sae.W_dec[key].float().norm())
    wrong = receipt_fault(plain, steered, edits, boost * length)
    name = target.labels().get(key, "no label") if isinstance(key, int) else "direction"
    where = site.steer_layer if layer is None else layer
    line = (
        f"latent {key} ({name}), boost {boost:g} at layer {where}: {steered.receipt.positions} of "
        f"{steered.prompt_tokens + len(steered.token_ids) - 1} positions, norm added {steered.receipt.added_norm:.4g}"
    )
    verdict: Verdict = "failed" if wrong else "ok"
    if not wrong and plain.text == steered.text:
        verdict, wrong = "warning", "the steered response equals the unsteered one: the boost is too small"
    details = (
        f"prompt     {prompt}",
        f"unsteered  {clipped(plain.text, 160)}",
        f"steered    {clipped(steered.text, 160)}",
    )
    data = {"latent": key, "boost": boost, "receipt": asdict(steered.receipt), "texts": [plain.text, steered.text]}
    return Check("steering", verdict, f"{line}{f'; {wrong}' if wrong else ''}", details, data)


def receipt_fault(plain: Completion, steered: Completion, edits: tuple[Intervention, ...], norm: float) -> str:
    """Return the error in the receipts of an unsteered and a steered response, or ""."""
    if plain.receipt.positions:
        return "the unsteered response was steered"
    if not steered.receipt_matches(edits):
        return "not every position was steered"
    if abs(steered.receipt.added_norm - norm) > 0.02 * norm:
        return f"the added vector has norm {steered.receipt.added_norm:.4g}, expected {norm:.4g}"
    return ""


def _key(target: Target, contexts: Contexts | None) -> LatentKey | None:
    """Return the latent to steer with: an active one with a label, else any active one, else a direction."""
    active = [] if contexts is None else contexts.active().tolist()
    labels = target.labels() if active else {}
    names: tuple[LatentKey, ...] = target.directions()
    return next((k for k in active if k in labels), next(iter(active), next(iter(names), None)))


def without_directions(target: Target) -> Target:
    """Return the target without its directions. A target without an SAE keeps its first direction."""
    return target.with_directions(()) if target.has_sae else replace(target, direction_files=target.direction_files[:1])
