"""Label latents from the texts they are active in: offline by their top words, or from snippets by a language model.

Only a latent that is active in several texts gets a label. Top words are words, no statement about the meaning of a
latent; their source is kept with them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from steerback.errors import SteerbackError
from steerback.latents.contexts import CHUNK_TOKENS, Contexts, TextOf

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
    """Return the words each latent is most active at, e.g. "lava, magma, crater"; latents with too few are left out.

    A word's weight is the latent's summed activation at it times log(texts / texts with that word), because a word
    that occurs everywhere says nothing.
    """
    activity, words, occurs, active_in = _activity(engine, texts)
    rarity = np.array([math.log((1 + len(texts)) / n) for n in occurs])
    found = {}
    for k in sorted(latents) if latents is not None else range(activity.shape[0]):
        own = slice(activity.indptr[k], activity.indptr[k + 1])
        columns = activity.indices[own]
        weights = activity.data[own] * rarity[columns]
        order = np.argsort(-weights, kind="stable")[:WORDS]
        best = [words[columns[i]] for i in order if weights[i] > 0.1 * weights[order[0]] > 0]
        if best and active_in[k] >= LEAST_TEXTS:
            found[int(k)] = ", ".join(best)
    return found


def _activity(
    engine: TransformersEngine, texts: Sequence[str]
) -> tuple[csr_array, list[str], list[int], NDArray[np.int64]]:
    """Return the summed activation (latents x words, sparse), the words, texts per word, and texts per latent."""
    from scipy.sparse import coo_array

    sae = engine.sae
    if sae is None:
        raise SteerbackError("labels of latents need an SAE and this target has none")
    decode, index, occurs = TextOf(engine), dict[str, int](), list[int]()
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
    rows, columns, values = (np.concatenate(found) for found in zip(*parts, strict=True))
    activity = coo_array((values, (rows, columns)), shape=(sae.n_latents, len(index))).tocsr()  # sums what repeats
    return activity, list(index), occurs, active_in


def token_words(text: str, ends: Sequence[int]) -> list[str]:
    """Return the word in lower case that each token belongs to, or the punctuation mark if it belongs to none."""
    spans = [m.span() for m in re.finditer(r"\w(?:[\w'’-]*\w)?|[^\w\s]+", text)]
    found, start, at = [], 0, 0
    for end in ends:
        begin = start + len(text[start:end]) - len(text[start:end].lstrip())
        while at < len(spans) and spans[at][1] <= begin:
            at += 1
        found.append(
            text[slice(*spans[at])].casefold() if at < len(spans) and spans[at][0] < max(end, begin + 1) else ""
        )
        start = end
    return found


def snippets(contexts: Contexts, latents: Collection[int] | None = None) -> dict[int, tuple[str, ...]]:
    """Return the marked top contexts of each latent that is active in enough texts."""
    wanted = [int(k) for k in contexts.active() if latents is None or k in latents]
    marked = {k: tuple(c.marked for c in contexts.of(k)) for k in wanted}
    return {k: texts for k, texts in marked.items() if len(texts) >= LEAST_TEXTS}
