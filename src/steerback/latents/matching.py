"""Random sets of latents, matched in activity to a set of interest, as a control for the ablation of that set.

Ablating active latents disturbs a model whatever they represent, so a control must disturb it equally. Activity is
measured on steered responses of the baseline condition, because the ablation acts on such responses.

    activity = LatentActivity.measure(means, frequencies, decoder_norms)   # over response tokens, (texts, latents)
    control = matched_sets(activity, detectors, n_sets=3, exclude=steered, seed=42)
    control.sets[0], control.quality[0].removed_ratio                  # norm removed, relative to the detectors
    control = uniform_sets(activity, detectors, n_sets=3, ...)         # the authors' control: any live latents
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steerback.errors import SteerbackError
from steerback.store.facts import ControlSets, SetQuality

Floats = NDArray[np.float64]
FEATURES = ("mean", "frequency", "removed")
DISJOINT_SETS, DISJOINT_SHARE = 4, 1 / 8


@dataclass(frozen=True, slots=True, eq=False)
class LatentActivity:
    """Activity of each latent and the norm that clamping it to 0 removes; all arrays (n latents,)."""

    mean: Floats  # activation per token
    frequency: Floats  # share of tokens with a non-zero activation, 0-1
    removed: Floats  # L2 norm removed from the residual stream per token: mean activation times decoder norm

    @classmethod
    def measure(
        cls,
        means: NDArray[np.floating],
        frequencies: NDArray[np.floating],
        decoder_norms: NDArray[np.floating],
    ) -> LatentActivity:
        """Average the texts' token means (texts, latents) with equal weight per text; decoder norms are (latents,)."""
        mean = np.asarray(means, dtype=np.float64).mean(axis=0)
        frequency = np.asarray(frequencies, dtype=np.float64).mean(axis=0)
        removed = mean * np.asarray(decoder_norms, dtype=np.float64)
        if not np.isfinite(removed).all():
            raise ValueError("activations or decoder norms are not all finite")
        return cls(mean, frequency, removed)

    @property
    def live(self) -> NDArray[np.bool_]:
        """Mask of the latents that were ever active."""
        return np.asarray(self.frequency > 0)

    def features(self) -> Floats:
        """Return the features (n latents, 3) as logarithms, because activity spans orders of magnitude.

        The unit is the standard deviation over live latents.
        """
        logs = np.log(np.maximum(np.stack([self.mean, self.frequency, self.removed], axis=1), 1e-12))
        spread = logs[self.live].std(axis=0) if self.live.any() else np.ones(3)
        scaled: Floats = logs / np.where(spread > 0, spread, 1.0)
        return scaled


def matched_sets(
    activity: LatentActivity, interest: Sequence[int], n_sets: int = 3, exclude: Collection[int] = (), seed: int = 42
) -> ControlSets:
    """Return `n_sets` sets of live latents, each as large as `interest` and matched member by member.

    Member i of a set is the match of member i of `interest`.

    Few sets (up to `DISJOINT_SETS`, or as many as need at most `DISJOINT_SHARE` of the candidates) share no latent. An
    optimal assignment gives every member of interest `n_sets` neighbours with the smallest total distance, and these
    are distributed to the sets at random, so that no set is systematically the better match. More disjoint sets would
    need ever worse matches. Each of them is therefore the optimal match within a random quarter of the candidates;
    sets may overlap (`overlap` reports how much), but no set occurs twice while others are available, because a rank
    among sets counts each set once. `exclude`: latents that are never drawn, such as steered ones.
    """
    from scipy.optimize import linear_sum_assignment

    members, candidates = _prepare(activity, interest, n_sets, exclude)
    features = activity.features()
    distance = np.linalg.norm(features[members][:, None] - features[candidates][None], axis=2)
    generator = np.random.default_rng(seed)
    needed = n_sets * len(members)
    few = n_sets <= DISJOINT_SETS or needed <= DISJOINT_SHARE * len(candidates)
    if few and len(candidates) >= needed:
        # an optimal assignment can use only the (members x sets) nearest columns of each member
        near = np.unique(np.argpartition(distance, needed - 1, axis=1)[:, :needed])
        copies = np.repeat(distance[:, near], n_sets, axis=0)  # (members x sets, candidates)
        chosen = candidates[near][linear_sum_assignment(copies)[1]].reshape(len(members), n_sets)
        dealt = generator.permuted(chosen, axis=1).T
    else:
        drawn: dict[frozenset[int], NDArray[np.int64]] = {}
        size, tries = max(len(members), len(candidates) // 4), 0
        while len(drawn) < n_sets and tries < 50 * n_sets:
            tries += 1
            part = generator.choice(len(candidates), size, replace=False)
            matches = candidates[part][linear_sum_assignment(distance[:, part])[1]]
            drawn.setdefault(frozenset(matches.tolist()), matches)
        different = list(drawn.values())
        dealt = np.stack([different[s % len(different)] for s in range(n_sets)])
    return _described(activity, features, members, dealt, "matched", len(candidates))


def uniform_sets(
    activity: LatentActivity, interest: Sequence[int], n_sets: int = 3, exclude: Collection[int] = (), seed: int = 42
) -> ControlSets:
    """Return the authors' control: `n_sets` uniform draws of as many live latents as `interest`."""
    members, candidates = _prepare(activity, interest, n_sets, exclude)
    generator = np.random.default_rng(seed)
    drawn = np.stack([generator.choice(candidates, len(members), replace=False) for _ in range(n_sets)])
    return _described(activity, activity.features(), members, drawn, "uniform", len(candidates))


def _prepare(
    activity: LatentActivity, interest: Sequence[int], n_sets: int, exclude: Collection[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the members of interest and the candidates for the sets."""
    members = np.array(interest, dtype=np.int64)
    size = len(activity.mean)
    if not len(members) or len(np.unique(members)) < len(members) or members.min() < 0 or members.max() >= size:
        raise SteerbackError(f"a set to match needs distinct latents from 0 to {size - 1}; got {list(interest)}")
    if n_sets < 1:
        raise SteerbackError(f"cannot draw {n_sets} random sets; ask for at least 1")
    open_to_draw = activity.live.copy()
    open_to_draw[members] = False
    open_to_draw[[k for k in exclude if 0 <= k < size]] = False
    candidates = np.flatnonzero(open_to_draw)
    if len(candidates) < len(members):
        raise SteerbackError(
            f"only {len(candidates)} live latents are left to match {len(members)}; "
            "measure activity on more responses, or ablate fewer latents"
        )
    return members, candidates


def _described(
    activity: LatentActivity,
    features: Floats,
    members: NDArray[np.int64],
    sets: NDArray[np.int64],
    method: str,
    n_candidates: int,
) -> ControlSets:
    """Record the sets with their quality: set minus interest, as logarithms in standard deviations of live latents."""
    base = float(activity.removed[members].sum())
    quality = []
    for drawn in sets:
        gap = features[drawn].mean(axis=0) - features[members].mean(axis=0)
        apart = float(np.linalg.norm(features[drawn] - features[members], axis=1).mean())
        quality.append(
            SetQuality(
                difference=dict(zip(FEATURES, gap.tolist(), strict=True)),
                distance=apart if method == "matched" else None,  # members of uniform draws have no counterpart
                removed_ratio=float(activity.removed[drawn].sum()) / base if base else None,
            )
        )
    times = np.unique(sets, return_counts=True)[1]  # number of sets that contain each latent
    pairs = len(sets) * (len(sets) - 1)
    return ControlSets(
        sets=sets.tolist(),
        method=method,
        quality=quality,
        n_candidates=n_candidates,
        overlap=float((times * (times - 1)).sum() / (pairs * len(members))) if pairs else 0.0,
    )
