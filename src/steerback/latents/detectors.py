"""Off-topic detectors: latents that are more active when a response does not belong to its prompt.

Each response is read twice: after the prompt it answers (matched) and after another prompt (mismatched). Both arms
contain the same texts, so they differ in the mismatch alone. The functions take arrays of pooled activations.

    pairs = make_pairs([t.prompt for t in texts], seed=42)
    matched = engine.activations(prompts, responses)                                   # (n, latents)
    mismatched = engine.activations([prompts[j] for j in pairs.partner], responses)    # the same responses
    result = search_detectors(matched, mismatched, pairs)           # AUC 1 on one half of the prompts, ranked
    result.latents, result.search.perfect, result.held_out          # and their separation on the other half
    json.dump(list(result.latents), file)                           # the authors' format

Perfect separability (AUC 1): the least active mismatched text is more active than the most active matched text.
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
    """The mismatched prompt of each text. Prompts are numbered in order of first appearance."""

    partner: NDArray[np.int64]  # (n,): text i is mismatched with the prompt of text partner[i]
    prompt: NDArray[np.int64]  # (n,): number of the prompt that the text answers
    search: NDArray[np.bool_]  # (n,): whether the prompt is in the search half


@dataclass(frozen=True, slots=True, eq=False)
class Half:
    """One half of the prompts: separation of each detector, and counts compared with the null distribution."""

    n_prompts: int
    n_texts: int
    separation: Separation
    """Separation of the detectors, in their order."""
    perfect: NullCount
    """Number of latents with AUC 1."""
    high_auc: NullCount
    """Number of latents with AUC >= `HIGH_AUC`."""
    max_auc: float
    """95th percentile, over null draws, of the largest AUC of all counted latents."""

    def record(self) -> SearchHalf:
        """Return the record for the ledger."""
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
    """Detectors, best separation first; null counts are over all latents on the search half, and over the detectors
    alone on the held-out half."""

    latents: tuple[int, ...]
    rule: Rule
    search: Half
    held_out: Half | None
    n_passed: int
    """Number of latents that meet the rule, before `limit`."""
    overall: Separation
    """Separation of every latent on the search half, for tables."""

    def record(self) -> Search:
        """Return the record for the ledger; its `latents` has the authors' format."""
        return Search(
            latents=list(self.latents),
            rule=self.rule,
            n_passed=self.n_passed,
            search=self.search.record(),
            held_out=None if self.held_out is None else self.held_out.record(),
        )


def make_pairs(prompts: Sequence[str], seed: int = 42, held_out: bool = True) -> Pairs:
    """Mismatch every text with the prompt of another text, at random; no text keeps its prompt.

    `prompts` (n,): the prompt of each text; several texts may share one. Each prompt is the mismatch exactly as often
    as it has texts. With `held_out`, the prompts are first split in two random halves and mismatched within a half, so
    that the halves share neither texts nor prompts. Raises SteerbackError if no derangement exists: one prompt has
    more than half of the texts.
    """
    numbers = {p: i for i, p in enumerate(dict.fromkeys(prompts))}
    prompt = np.array([numbers[p] for p in prompts], dtype=np.int64)
    if len(numbers) < (4 if held_out else 2):
        need, why = (4, " (two halves)") if held_out else (2, "")
        raise SteerbackError(f"detector search needs at least {need} different prompts{why}; got {len(numbers)}")
    generator = np.random.default_rng(seed)
    searched = np.ones(len(numbers), dtype=bool)
    if held_out:
        searched[generator.permutation(len(numbers))[: len(numbers) // 2]] = False
    search = searched[prompt]
    partner = np.zeros(len(prompt), dtype=np.int64)
    for half in (search, ~search):
        places = np.flatnonzero(half)
        if places.size:
            partner[places] = places[derange(prompt[places], generator)]
    return Pairs(partner, prompt, search)


def derange(groups: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """Return a random permutation p of 0..n-1 with groups[p[i]] != groups[i] for every i."""
    n = len(groups)
    largest = int(np.bincount(groups).max())
    if 2 * largest > n:
        raise SteerbackError(f"one prompt has {largest} of {n} texts; to mismatch, each needs at most half of them")
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
    # Swapping can fail if prompts have very unequal numbers of texts. Shifting the sorted texts by the size of the
    # largest group always works.
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
    """Search all latents for detectors on the search half, and measure them on the held-out half.

    `matched`, `mismatched`: (n texts, n latents), the same responses after the matched and after the partner's prompt.
    Rules: `perfect` takes AUC 1; `authors` takes latents that are 0 on every matched text and non-zero on at least 80 %
    of the mismatched texts; `auc` takes AUC >= `auc`; `top` takes the `limit` best. Latents are ranked by AUC, then
    effect size (Cohen's d), then index; `limit` cuts the ranking. `exclude` leaves latents out, such as steered ones.
    The null distribution swaps the labels of all texts of a prompt together, and counts latents in the same way.
    """
    if rule not in get_args(Rule):
        raise unknown("detector rule", rule, get_args(Rule))
    if rule == "top" and limit is None:
        raise SteerbackError("detector rule 'top' needs limit: set the number of detectors")
    if matched.shape != mismatched.shape or matched.ndim != 2 or len(matched) != len(pairs.prompt):
        raise ValueError(
            f"both arms must have shape ({len(pairs.prompt)}, n latents), got {matched.shape} and {mismatched.shape}"
        )
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
    """Return the separation of `latents` on one half, and how many `counted` latents pass there and under the null."""
    a, b, prompt = matched[half], mismatched[half], pairs.prompt[half]
    ranks = ranks_of(a[:, counted], b[:, counted])
    drawn = null_counts(ranks, prompt, (1.0, HIGH_AUC), draws, seed)
    observed = auc_of(ranks, len(a))
    perfect, high = (_null(int((observed >= level).sum()), drawn.counts[i]) for i, level in enumerate((1.0, HIGH_AUC)))
    return Half(
        n_prompts=len(np.unique(prompt)),
        n_texts=len(a),
        separation=separation(a[:, list(latents)], b[:, list(latents)]),
        perfect=perfect,
        high_auc=high,
        max_auc=float(np.quantile(drawn.largest, 0.95)),
    )


def _null(observed: int, counts: NDArray[np.int64]) -> NullCount:
    """Compare a count of latents with its null distribution, in which labels are swapped prompt by prompt."""
    return NullCount(
        draws=len(counts),
        observed=observed,
        expected=float(counts.mean()),
        high=float(np.quantile(counts, 0.95)),
        p=float((1 + (counts >= observed).sum()) / (1 + len(counts))),
    )
