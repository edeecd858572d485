"""Label latents by the texts that activate them: offline by top words, or by a language model from snippets.

Only a latent that is active in several texts gets a label. Top words do not claim to explain a latent, so each label is
stored with its source.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from steerback.errors import SteerbackError
from steerback.latents.contexts import CHUNK_TOKENS, Contexts

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.sparse import csr_array

    from steerback.engines.transformers import TransformersEngine

WORDS = 3
LEAST_TEXTS = 2
SOURCE = "top words"


def top_words(
    engine: TransformersEngine, texts: Sequence[str], latents: Collection[int] | None = None
) -> dict[int, str]:
    """Return the words at which each latent is most active, e.g. "lava, magma, crater".

    Latents active in fewer than LEAST_TEXTS texts are left out. The weight of a word is the latent's summed activation
    at it times log((1 + texts) / texts with that word), because words that occur everywhere are uninformative.
    """
    activity, words, occurs, active_in = _activity(engine, texts)
    rarity = np.array([math.log((1 + len(texts)) / n) for n in occurs])
    labels = {}
    for k in sorted(latents) if latents is not None else range(activity.shape[0]):
        row = slice(activity.indptr[k], activity.indptr[k + 1])
        columns = activity.indices[row]
        weights = activity.data[row] * rarity[columns]
        order = np.argsort(-weights, kind="stable")[:WORDS]
        # words far below the best one are noise
        best = [words[columns[i]] for i in order if weights[i] > 0.1 * weights[order[0]] > 0]
        if best and active_in[k] >= LEAST_TEXTS:
            labels[int(k)] = ", ".join(best)
    return labels


def _activity(
    engine: TransformersEngine, texts: Sequence[str]
) -> tuple[csr_array, list[str], list[int], NDArray[np.int64]]:
    """Return the summed activation (latents, words) as a sparse array, the words, texts per word, texts per latent."""
    from scipy.sparse import coo_array

    sae = engine.sae
    if sae is None:
        raise SteerbackError("labels of latents need an SAE, but this target has none")
    decode, index, occurs = engine.runner.prompter.with_ends, dict[str, int](), list[int]()
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
    active_in = np.zeros(sae.n_latents, dtype=np.int64)
    for _, ids, states in engine.residuals([""] * len(texts), texts, (sae.layer,)):
        said = [index.setdefault(word, len(index)) for word in token_words(*decode(ids))]
        occurs.extend([0] * (len(index) - len(occurs)))
        for word in set(said):
            occurs[word] += 1
        seen = np.zeros(sae.n_latents, dtype=bool)
        for first in range(0, len(ids), CHUNK_TOKENS):
            z = engine.encoder.encode(states[sae.layer][first : first + CHUNK_TOKENS])
            token, latent = (x.cpu().numpy() for x in z.nonzero(as_tuple=True))
            height = z[token, latent].float().cpu().numpy()
            parts.append((latent, np.array(said)[first + token], height))
            seen[latent] = True
        active_in += seen
    rows, columns, values = (np.concatenate(column) for column in zip(*parts, strict=True))
    activity = coo_array((values, (rows, columns)), shape=(sae.n_latents, len(index))).tocsr()  # adds up duplicates
    return activity, list(index), occurs, active_in


def token_words(text: str, ends: Sequence[int]) -> list[str]:
    """Return for each token its word in lower case, or its punctuation mark, or ""; `ends` are token ends in `text`."""
    spans = [m.span() for m in re.finditer(r"\w(?:[\w'’-]*\w)?|[^\w\s]+", text)]
    words, start, at = [], 0, 0
    for end in ends:
        begin = start + len(text[start:end]) - len(text[start:end].lstrip())
        while at < len(spans) and spans[at][1] <= begin:
            at += 1
        words.append(
            text[slice(*spans[at])].casefold() if at < len(spans) and spans[at][0] < max(end, begin + 1) else ""
        )
        start = end
    return words


def snippets(contexts: Contexts, latents: Collection[int] | None = None) -> dict[int, tuple[str, ...]]:
    """Return the marked top contexts of each latent that is active in enough texts."""
    wanted = [int(k) for k in contexts.active() if latents is None or k in latents]
    marked = {k: tuple(c.marked for c in contexts.of(k)) for k in wanted}
    return {k: texts for k, texts in marked.items() if len(texts) >= LEAST_TEXTS}
