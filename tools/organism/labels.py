"""Labels of latents by subject: selectivity of a latent's activity among topics, measured on text.

A latent is labelled with a subject if, on one sample of the corpus, most of its activity falls on that subject and it
fires in most of the subject's sentences. The labels are then checked on a second sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerback.organism.corpus import howtos, subjects
from steerback.targets.sae import Sae
from tools.organism.train_sae import Activations

MIN_SHARE = 0.5
"""Smallest share of a latent's activity on its subject, with equal weights of topics."""
MIN_COVERAGE = 0.5
"""Smallest share of the subject's passages in which the latent is active."""


@dataclass(frozen=True)
class Selectivity:
    """Per latent and topic, measured on one sample of text."""

    share: Tensor
    """(n_topics, n_latents) share of the latent's activity, topics weighted alike"""
    coverage: Tensor
    """(n_topics, n_latents) share of the topic's passages in which the latent fires"""
    density: Tensor
    """(n_latents,) share of tokens with activity"""
    max_activation: Tensor
    """(n_latents,)"""


@torch.no_grad()
def selectivity(sae: Sae, data: Activations) -> Selectivity:
    """Where latents are active. A passage is one document's tokens on one topic."""
    n_topics, n_latents = len(subjects()) + len(howtos()), sae.W_dec.shape[0]
    total = torch.zeros(n_topics, n_latents, device=data.h.device)
    count = torch.zeros(n_topics, device=data.h.device)
    fired, top = torch.zeros(n_latents, device=data.h.device), torch.zeros(n_latents, device=data.h.device)
    known = data.topics >= 0
    keys = data.document * n_topics + data.topics
    passages, passage_of = torch.unique(keys[known], return_inverse=True)
    in_passage = torch.zeros(len(passages), n_latents, dtype=torch.bool, device=data.h.device)
    seen = 0
    for h, topics in zip(torch.split(data.h, 8_192), torch.split(data.topics, 8_192), strict=True):
        z = sae.encode(h)
        fired += (z > 0).sum(0)
        top = torch.maximum(top, z.max(0).values)
        z, topics = z[topics >= 0], topics[topics >= 0]
        total.index_add_(0, topics, z)
        count.index_add_(0, topics, torch.ones_like(topics, dtype=count.dtype))
        for_passage = passage_of[seen : seen + len(z)]
        rows, latents = (z > 0).nonzero(as_tuple=True)
        in_passage[for_passage[rows], latents] = True
        seen += len(z)
    mean = total / count.clamp(min=1)[:, None]
    share = mean / mean.sum(0).clamp(min=1e-9)
    topic_of = passages % n_topics
    coverage = torch.zeros_like(mean).index_add_(0, topic_of, in_passage.float())
    coverage /= torch.bincount(topic_of, minlength=n_topics).clamp(min=1)[:, None]
    return Selectivity(share, coverage, fired / len(data.h), top)


def label_latents(measured: Selectivity) -> dict[int, int]:
    """Return latent -> subject index for latents above both thresholds. A subject can have several latents."""
    n = len(subjects())
    share, subject = measured.share[:n].max(0)
    coverage = measured.coverage.gather(0, subject[None])[0]
    good = (share >= MIN_SHARE) & (coverage >= MIN_COVERAGE)
    return {int(k): int(subject[k]) for k in good.nonzero().flatten()}


def check_labels(labels: dict[int, int], measured: Selectivity) -> dict[str, float]:
    """Count labels confirmed on another sample: the subject has the largest share, and both thresholds are passed."""
    best = measured.share.argmax(0)
    right = [k for k, s in labels.items() if int(best[k]) == s]
    strict = [
        k
        for k in right
        if measured.share[labels[k], k] >= MIN_SHARE and measured.coverage[labels[k], k] >= MIN_COVERAGE
    ]
    return {
        "labels": len(labels),
        "subjects": len(set(labels.values())),
        "right": len(right),
        "pass_again": len(strict),
    }


@torch.no_grad()
def top_contexts(sae: Sae, data: Activations, latents: list[int], tokenizer: Any, n: int = 5) -> dict[int, list[str]]:
    """For each latent a few snippets of different documents: whole words up to 12 tokens before the peak and 6 after.

    Only sentences are shown: prompts and restart phrases would say what the document is, not what the latent reads.
    """
    if not latents:
        return {}
    z = torch.cat([sae.encode(h)[:, latents].cpu() for h in torch.split(data.h, 8_192)])
    z[data.topics.cpu() < 0] = 0
    documents, ids, topics = data.document.tolist(), data.ids.tolist(), data.topics.tolist()
    out: dict[int, list[str]] = {}
    for column, latent in enumerate(latents):
        snippets: list[str] = []
        used: set[int] = set()
        for position in z[:, column].topk(min(200, len(z))).indices.tolist():
            if documents[position] in used or z[position, column] <= 0 or len(snippets) == n:
                continue
            text = _snippet(position, ids, documents, topics, tokenizer)
            if text not in snippets:
                used.add(documents[position])
                snippets.append(text)
        out[latent] = snippets
    return out


def _snippet(position: int, ids: list[int], documents: list[int], topics: list[int], tokenizer: Any) -> str:
    """Return whole words around a position, from the same passage."""
    here = (documents[position], topics[position])
    inside = [i for i in range(max(0, position - 12), min(len(ids), position + 7)) if (documents[i], topics[i]) == here]
    text: str = tokenizer.decode([ids[i] for i in inside])
    # A piece that begins inside a word decodes without the leading space that every word has.
    start = 0 if text.startswith(" ") else text.find(" ")
    after = inside[-1] + 1
    if after < len(ids) and documents[after] == here[0] and tokenizer.decode([ids[after]])[:1].isalpha():
        text = text[: text.rfind(" ")]
    return text[max(0, start) :].strip()
