"""Off-topic detectors: latents that are more active when a response does not belong to its prompt.

Each response is read twice, after its own prompt (matched) and after another one (mismatched), so that both arms hold
the same texts and nothing but the mismatch can tell them apart. Works on arrays of pooled activations.

    pairs = make_pairs([t.prompt for t in texts], seed=42)
    matched = engine.activations(prompts, responses)                                   # (n, latents)
    mismatched = engine.activations([prompts[j] for j in pairs.partner], responses)    # the same responses
    found = search_detectors(matched, mismatched, pairs)            # AUC 1 on one half of the prompts, ranked
    found.latents, found.null.expected, found.held_out.auc          # and how they do on the other half
    json.dump(list(found.latents), file)                            # the authors' format

Perfect separability (AUC 1) means that the least active mismatched text is above the most active matched one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from steerback.errors import SteerbackError, unknown
from steerback.latents.separation import Separation, auc_of, null_counts, ranks_of, separation
from steerback.store.facts import NullCount, Search, SearchHalf

Rule = Literal["perfect", "authors", "auc", "top"]
Array = NDArray[np.floating]
HIGH_AUC = 0.9


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """The prompt that each text is mismatched with. Prompts are numbered in order of first appearance."""

    partner: NDArray[np.int64]  # (n,): text i is mismatched with the prompt of text partner[i]
    prompt: NDArray[np.int64]  # (n,): number of the own prompt
    search: NDArray[np.bool_]  # (n,): in the half of the prompts that is searched


@dataclass(frozen=True, slots=True, eq=False)
class Half:
    """One half of the prompts: separation per detector, and counts against the null."""

    n_prompts: int
    n_texts: int
    separation: Separation
    """Of the detectors, in their order."""
    perfect: NullCount
    """Of latents at AUC 1."""
    high_auc: NullCount
    """Of latents at AUC >= `HIGH_AUC`."""
    max_auc: float
    """95th percentile over draws of the largest AUC of any latent counted; an AUC above it is no accident of many."""

    def record(self) -> SearchHalf:
        """Return the record that the ledger keeps."""
        return SearchHalf(
            n_prompts=self.n_prompts,
            n_texts=self.n_texts,
            perfect=self.perfect,
            high_auc=self.high_auc,
            max_auc_null=self.max_auc,
            separation=self.separation.to_json(),
        )


@dataclass(frozen=True, slots=True, eq=False)
class DetectorSearch:
    """Detectors, most separating first, with the null of the search half (over all latents) and the held-out half
    (over the detectors alone)."""

    latents: tuple[int, ...]
    rule: Rule
    search: Half
    held_out: Half | None
    n_passed: int
    """Number of latents that met the rule, before `limit`."""
    overall: Separation
    """Of every latent, on the search half, for tables."""

    def record(self) -> Search:
        """Return the record that the ledger keeps; its `latents` is the authors' format."""
        return Search(
            latents=list(self.latents),
            rule=self.rule,
            n_passed=self.n_passed,
            search=self.search.record(),
            held_out=None if self.held_out is None else self.held_out.record(),
        )


def make_pairs(prompts: Sequence[str], seed: int = 42, held_out: bool = True) -> Pairs:
    """Mismatch every text with another text's prompt, at random, so that no pair keeps its prompt.

    `prompts`: the prompt of each text, shape (n,); several texts may share one. Each prompt is used as a mismatch
    exactly as often as it has texts. With `held_out` the prompts are first split in two halves at random and
    mismatched within their half, so that the halves share neither texts nor prompts. Raises SteerbackError if no
    derangement exists (one prompt has more than half of the texts).
    """
    numbers = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
    own = np.array([numbers[p] for p in prompts], dtype=np.int64)
    if len(numbers) < (4 if held_out else 2):
        need, why = (4, " (two halves)") if held_out else (2, "")
        raise SteerbackError(f"detector search needs at least {need} different prompts{why}, there are {len(numbers)}")
    generator = np.random.default_rng(seed)
    searched = np.ones(len(numbers), dtype=bool)
    if held_out:
        searched[generator.permutation(len(numbers))[: len(numbers) // 2]] = False
    search = searched[own]
    partner = np.zeros(len(own), dtype=np.int64)
    for half in (search, ~search):
        places = np.flatnonzero(half)
        if places.size:
            partner[places] = places[derange(own[places], generator)]
    return Pairs(partner, own, search)


def derange(groups: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """Return a random permutation p of 0..n-1 with groups[p[i]] != groups[i] for every i."""
    n = len(groups)
    largest = int(np.bincount(groups).max())
    if 2 * largest > n:
        raise SteerbackError(f"one prompt has {largest} of {n} texts; mismatching needs every prompt below half")
    order = generator.permutation(n)
    for _ in range(100):
        clashes = np.flatnonzero(groups[order] == groups)
        if not clashes.size:
            return order
        for i in clashes:
            fits = (groups[order] != groups[i]) & (groups != groups[order[i]])
            if fits.any():
                j = int(generator.choice(np.flatnonzero(fits)))
                order[i], order[j] = order[j], order[i]
    # Rare dead end with very unequal prompts: shifting the sorted texts by the largest group always works.
    by_group = np.argsort(groups, kind="stable")
    order = np.empty(n, dtype=np.int64)
    order[by_group] = np.roll(by_group, -largest)
    return order


def search_detectors(
    matched: Array,
    mismatched: Array,
    pairs: Pairs,
    rule: Rule = "perfect",
    *,
    auc: float = HIGH_AUC,
    limit: int | None = None,
    exclude: Collection[int] = (),
    draws: int = 200,
    seed: int = 0,
) -> DetectorSearch:
    """Search all latents for detectors on the search half, and check them on the other half.

    `matched`, `mismatched`: (n texts, n latents), the same responses after their own and after their partner's prompt.
    Rules: `perfect` AUC 1; `authors` exactly 0 on every matched and non-zero on at least 80 % of the mismatched texts;
    `auc` at least `auc`; `top` the `limit` best. Ranked by AUC, then effect size (Cohen's d), then index; `limit`
    cuts the ranking. `exclude` takes latents out (such as those that are steered). The null swaps the two labels of
    all texts of a prompt together and counts latents at AUC 1 and at AUC >= 0.9 in the same way.
    """
    if rule not in get_args(Rule):
        raise unknown("detector rule", rule, get_args(Rule))
    if rule == "top" and limit is None:
        raise SteerbackError("detector rule 'top' needs limit, the number of detectors")
    if matched.shape != mismatched.shape or matched.ndim != 2 or len(matched) != len(pairs.prompt):
        raise ValueError(f"arms of shape {matched.shape} and {mismatched.shape} for {len(pairs.prompt)} texts")
    half = pairs.search
    overall = separation(matched[half], mismatched[half])
    passed = _passing(overall, matched[half], mismatched[half], rule, auc)
    passed[[k for k in exclude if 0 <= k < len(passed)]] = False
    ranked = sorted(np.flatnonzero(passed).tolist(), key=lambda k: (-overall.auc[k], -overall.effect[k], k))
    latents = tuple(ranked[:limit])
    everything = np.setdiff1d(np.arange(matched.shape[1]), list(exclude))
    held_out = None
    if not half.all():
        held_out = _half(matched, mismatched, pairs, ~half, latents, np.array(latents, dtype=np.int64), draws, seed + 1)
    return DetectorSearch(
        latents=latents,
        rule=rule,
        search=_half(matched, mismatched, pairs, half, latents, everything, draws, seed),
        held_out=held_out,
        n_passed=len(ranked),
        overall=overall,
    )


def _passing(overall: Separation, matched: Array, mismatched: Array, rule: Rule, auc: float) -> NDArray[np.bool_]:
    if rule == "authors":
        silent = ~(matched != 0).any(axis=0)
        return np.asarray(silent & ((mismatched != 0).mean(axis=0) >= 0.8))
    if rule == "top":
        return np.asarray(overall.auc > 0.5)
    return np.asarray(overall.auc >= (1.0 if rule == "perfect" else auc))


def _half(
    matched: Array,
    mismatched: Array,
    pairs: Pairs,
    half: NDArray[np.bool_],
    latents: tuple[int, ...],
    counted: NDArray[np.int64],
    draws: int,
    seed: int,
) -> Half:
    """Return the separation of `latents` on one half, and counts of `counted` latents that pass, with their null."""
    a, b, prompt = matched[half], mismatched[half], pairs.prompt[half]
    ranks = ranks_of(a[:, counted], b[:, counted])
    drawn = null_counts(ranks, prompt, (1.0, HIGH_AUC), draws, seed)
    observed = auc_of(ranks, len(a))
    perfect, high = (_null(int((observed >= level).sum()), drawn.counts[i]) for i, level in enumerate((1.0, HIGH_AUC)))
    own = list(latents)
    return Half(
        n_prompts=len(np.unique(prompt)),
        n_texts=len(a),
        separation=separation(a[:, own], b[:, own]),
        perfect=perfect,
        high_auc=high,
        max_auc=float(np.quantile(drawn.largest, 0.95)),
    )


def _null(observed: int, counts: NDArray[np.int64]) -> NullCount:
    """Set a count of latents against its distribution with labels swapped prompt by prompt."""
    return NullCount(
        draws=len(counts),
        observed=observed,
        expected=float(counts.mean()),
        high=float(np.quantile(counts, 0.95)),
        p=float((1 + (counts >= observed).sum()) / (1 + len(counts))),
    )
