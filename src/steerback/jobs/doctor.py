"""Say whether a target's hook point, layer, SAE and steering are right, from what the model really computes.

Residuals of texts are encoded and decoded at the SAE's layer and at its neighbours: an SAE explains the layer that it
was trained on best. Then one steered and one unsteered response, and what the receipts say. It knows the reference
engine; it changes nothing and measures no ESR.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from steerback.data.prompts import load_prompts
from steerback.errors import SteerbackError
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
"""Distances of the neighbouring layers; a model of at most twelve layers is read at all of them."""
BETTER, OFTEN = 0.02, 0.9
"""Another layer is clearly better: explained variance higher by this much, and in this share of the texts."""
LOW, NONE = 0.5, 0.2
"""Explained variance that is low, and one at which an SAE explains nothing to speak of."""
OUTLIER = 10.0
"""Tokens whose norm is so many times the median are left out: a few of them would be all of the variance."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check: its result in a line, more lines to read, and the numbers."""

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
        """The worst of the checks."""
        found = {check.verdict for check in self.checks}
        return "failed" if "failed" in found else "warning" if "warning" in found else "ok"

    def lines(self) -> list[str]:
        """Return lines for people: one per check, its details below it, and the verdict."""
        said = []
        for check in self.checks:
            said.append(f"{check.verdict:<8}{check.name}: {check.line}")
            said.extend(f"          {detail}" for detail in check.details)
        counts = {v: sum(c.verdict == v for c in self.checks) for v in ("ok", "warning", "failed")}
        return [*said, f"{self.target}: {self.verdict} ({', '.join(f'{n} {v}' for v, n in counts.items())})"]

    def to_json(self) -> dict[str, object]:
        """Return the JSON-able form."""
        return {"target": self.target, "verdict": self.verdict, "checks": [asdict(c) for c in self.checks]}


def examine(loaded: LoadedTarget, layer: int | None = None, texts: Sequence[str] | None = None) -> Examination:
    """Make every check of a loaded target; `layer` asks about another layer than the SAE's own.

    Residuals are read from `texts`; default: the package's texts, for an organism passages of its corpus.
    """
    from steerback.engines.transformers import TransformersEngine

    engine, target = loaded.engine, loaded.target
    if not isinstance(engine, TransformersEngine):
        raise SteerbackError("doctor reads residuals, which only the transformers engine gives")
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
    """Report what is suspicious in the weights; shapes and finite values were checked when they were loaded."""
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
    """How well an SAE explains the residual of a layer: pooled over tokens, and text by text."""

    explained: float
    l0: float
    silent: float  # share of tokens at which no latent is active
    errors: Mapping[int, float]  # sum of squared errors per text
    outliers: int

    def beaten_in(self, other: Fit) -> float:
        """Share of the texts in which `other` has the smaller share of unexplained variance."""
        return float(np.mean([other.errors[n] < error for n, error in self.errors.items()]))


def neighbours(layer: int, n_layers: int) -> list[int]:
    """Return the layers that are compared."""
    if n_layers <= 12:
        return list(range(n_layers))
    near = {layer + sign * step for step in (0, *STEPS) for sign in (1, -1)}
    return sorted(n for n in near if 0 <= n < n_layers)


def fits(engine: TransformersEngine, texts: Sequence[str], layers: Sequence[int]) -> dict[int, Fit]:
    """Return the SAE's fit to each layer, on the words of the texts."""
    import torch

    sae = engine.sae
    assert sae is not None
    kept: dict[int, dict[int, Tensor]] = {layer: {} for layer in layers}
    for n, ids, states in engine.residuals([""] * len(texts), texts, layers):
        if ids:
            for layer, h in states.items():
                kept[layer][n] = h.cpu()
    found = {}
    for layer, by_text in kept.items():
        h = torch.cat(list(by_text.values()))
        text = torch.cat([torch.full((len(part),), n) for n, part in by_text.items()])
        norms = h.norm(dim=1)
        usual = norms <= OUTLIER * norms.median()
        h, text = h[usual], text[usual]
        error, fired = [], []
        for part in torch.split(h, CHUNK_TOKENS):  # all texts together: weights in host memory are copied per chunk
            z = engine.encoder.encode(part.to(engine.runner.device))
            error.append((sae.decode(z).cpu().double() - part.double()).square().sum(dim=1))
            fired.append((z > 0).sum(dim=1).cpu())
        errors, active = torch.cat(error), torch.cat(fired)
        spread = (h.double() - h.double().mean(0)).square().sum(dim=1)
        found[layer] = Fit(
            explained=1 - float(errors.sum() / spread.sum()),
            l0=float(active.double().mean()),
            silent=float((active == 0).double().mean()),
            errors={n: float(errors[text == n].sum() / spread[text == n].sum()) for n in set(text.tolist())},
            outliers=int((~usual).sum()),
        )
    return found


def _layer(engine: TransformersEngine, texts: Sequence[str], at: int) -> Check:
    """Check by the activations whether the SAE belongs to this layer."""
    found = fits(engine, texts, neighbours(at, engine.runner.site.n_layers))
    own = found[at]
    best = max(found, key=lambda layer: found[layer].explained)
    gain = found[best].explained - own.explained
    clearly = gain > BETTER and own.beaten_in(found[best]) >= OFTEN
    line = f"layer {at}: explained variance {own.explained:.2f}, L0 {own.l0:.1f}, over {len(texts)} texts"
    verdict: Verdict = "ok"
    if found[best].explained < NONE:
        verdict = "failed"
        line += "; it explains none of these layers: another model's SAE, another hook point or another input scale"
    elif clearly:
        verdict = "failed"
        line += f"; the SAE does not belong to this layer: at layer {best} it explains {found[best].explained:.2f}"
    elif own.explained < LOW or gain > BETTER / 2:
        verdict = "warning"
        line += f"; {'low' if own.explained < LOW else f'layer {best} is as good ({found[best].explained:.2f})'}"
    if own.silent > 0.5:
        verdict = "failed"
        line += f"; no latent is active at {own.silent:.0%} of the tokens"
    outliers = (
        (f"{own.outliers} tokens of a norm over {OUTLIER:g} times the median are left out",) if own.outliers else ()
    )
    shown = "   ".join(
        f"{layer}{'*' * (layer == at)}: {fit.explained:.2f} ({fit.l0:.0f})" for layer, fit in found.items()
    )
    data = {
        str(layer): {"explained_variance": fit.explained, "l0": fit.l0, "silent": fit.silent}
        for layer, fit in found.items()
    }
    return Check("layer", verdict, line, (f"explained variance (L0) by layer  {shown}", *outliers), data)


def _latents(engine: TransformersEngine, target: Target, contexts: Contexts) -> Check:
    """Show latents in words: labelled ones first, where they peak, and which tokens their direction promotes."""
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
    """Return the tokens whose logit the decoder direction raises most when it goes straight to the unembedding."""
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
    """Check whether boosts are of the residual's order of magnitude at the steer layer."""
    import torch

    layer = engine.runner.site.steer_layer
    norms = [states[layer].norm(dim=1).cpu() for _, _, states in engine.residuals([""] * len(texts), texts, (layer,))]
    norm, prior = float(torch.cat(norms).median()), target.boost_prior
    share = prior.mean / norm
    line = f"boosts N({prior.mean:g}, {prior.sd:g}) against a residual norm of {norm:.3g} at layer {layer}"
    data = {"residual_norm": norm, "mean": prior.mean, "share": share}
    if not 0.05 <= share <= 5:
        hint = f"{share:.2g} times it; thresholds are usually between 0.2 and 2 times, so see that the scale is right"
        return Check("boost prior", "warning", f"{line}: {hint}", data=data)
    return Check("boost prior", "ok", line, data=data)


def _steering(loaded: LoadedTarget, engine: TransformersEngine, contexts: Contexts | None, layer: int | None) -> Check:
    """Check the receipts of one unsteered and one steered response to the same prompt and seed."""
    target, site = loaded.target, engine.runner.site
    prompt = load_prompts("evaluation")[0]
    key = _key(target, contexts)
    if key is None:
        return Check("steering", "failed", "there is neither a latent nor a direction to steer with")
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
        verdict, wrong = "warning", "the steered response is the same: the boost is too weak to be seen"
    details = (f"prompt     {prompt}", f"unsteered  {_short(plain.text)}", f"steered    {_short(steered.text)}")
    data = {"latent": key, "boost": boost, "receipt": asdict(steered.receipt), "texts": [plain.text, steered.text]}
    return Check("steering", verdict, f"{line}{f'; {wrong}' if wrong else ''}", details, data)


def receipt_fault(plain: Completion, steered: Completion, edits: tuple[Intervention, ...], norm: float) -> str:
    """Return the fault that the receipts of an unsteered and a steered response show, or ""."""
    if plain.receipt.positions:
        return "the unsteered response was steered"
    if not steered.receipt_matches(edits):
        return "not every position was steered"
    if abs(steered.receipt.added_norm - norm) > 0.02 * norm:
        return f"what was added has norm {steered.receipt.added_norm:.4g}, expected {norm:.4g}"
    return ""


def _key(target: Target, contexts: Contexts | None) -> LatentKey | None:
    """Return what to steer with: an active latent with a label, else any active one, else a direction."""
    active = [] if contexts is None else contexts.active().tolist()
    labels = target.labels() if active else {}
    names: tuple[LatentKey, ...] = target.directions()
    return next((k for k in active if k in labels), next(iter(active), next(iter(names), None)))


def _short(text: str, most: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 3] + "..."


def without_directions(target: Target) -> Target:
    """Return the target without its directions; one without an SAE keeps the first."""
    return target.with_directions(()) if target.has_sae else replace(target, direction_files=target.direction_files[:1])
