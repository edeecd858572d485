"""The metrics of one condition with their intervals: the contents of `summary.json`.

Definitions, over N valid trials:
    multi-attempt rate    #(>= 2 attempts) / N
    ESR rate              #(>= 2 attempts and last > first) / N
    improvement rate      #(last > first) / #(>= 2 attempts)
    MSI                   mean(last - first), 0 for a single attempt; also reported over multi-attempt trials
    mean attempts, mean first score, degraded share
The headline variant is gated. The outcomes say whether it counts degraded trials; all other variants are reported too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from pydantic import JsonValue

from steerback.metrics import intervals as iv
from steerback.metrics.intervals import Codes, Flags, Floats
from steerback.metrics.outcomes import STATES, UNSCORED, VALID, Outcomes


@dataclass(frozen=True, eq=False)
class View:
    """The valid trials of one variant; arrays of shape (n_valid,), scores 0-100.

    `cluster` numbers the latents from 0; `latents` (clusters,) holds the code of each cluster's latent.
    """

    cluster: Codes
    latents: Codes
    attempts: Codes
    first: Floats
    last: Floats
    degraded: Flags

    @cached_property
    def multi(self) -> Flags:
        return self.attempts >= 2

    @cached_property
    def gain(self) -> Floats:
        """Last minus first score in points; 0 for single attempts."""
        return np.where(self.multi, self.last - self.first, 0.0)

    @property
    def clusters(self) -> int:
        return int(self.cluster.max()) + 1 if len(self.cluster) else 0


def view(outcomes: Outcomes, gated: bool = True, include_degraded: bool | None = None) -> View:
    """Return the valid trials of a variant: gated or ungated, with degraded responses or without.

    `include_degraded` None takes the setting of `outcomes`.
    """
    keep = outcomes.state == VALID
    if not _counted(outcomes, include_degraded):
        keep = keep & ~outcomes.degraded
    g = "" if gated else "ungated_"
    attempts, first, last = (getattr(outcomes, g + name)[keep] for name in ("attempts", "first", "last"))
    latents, codes = np.unique(outcomes.cluster[keep], return_inverse=True)
    return View(codes.astype(np.int64), latents, attempts, first, last, outcomes.degraded[keep])


def _counted(outcomes: Outcomes, include_degraded: bool | None) -> bool:
    return outcomes.include_degraded if include_degraded is None else include_degraded


@dataclass(frozen=True)
class Metric:
    """A ratio sum(numerator) / sum(denominator) over trials.

    `limits` is the range of a single trial's value. `rest` is the value of a trial without an event.
    """

    name: str
    label: str
    rate: bool
    limits: tuple[float, float]
    rest: float | None
    parts: Callable[[View], tuple[Floats, Floats]]
    unit: str = ""


def _ones(v: View) -> Floats:
    return np.ones(len(v.cluster))


def _f(values: Flags | Codes) -> Floats:
    return values.astype(np.float64)


MSI_MULTI = "MSI over multi-attempt trials"
METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("multi_attempt_rate", "multi-attempt rate", True, (0, 1), 0, lambda v: (_f(v.multi), _ones(v))),
        Metric("esr_rate", "ESR rate", True, (0, 1), 0, lambda v: (_f(v.gain > 0), _ones(v))),
        Metric("improvement_rate", "improvement rate", True, (0, 1), 0, lambda v: (_f(v.gain > 0), _f(v.multi))),
        Metric("msi", "MSI", False, (-100, 100), 0, lambda v: (v.gain, _ones(v)), "points"),
        Metric("msi_multi", MSI_MULTI, False, (-100, 100), None, lambda v: (v.gain, _f(v.multi)), "points"),
        Metric("mean_attempts", "mean attempts", False, (1, np.inf), 1, lambda v: (_f(v.attempts), _ones(v))),
        Metric("mean_first", "mean first score", False, (0, 100), None, lambda v: (v.first, _ones(v)), "points"),
        Metric("degraded_share", "degraded share", True, (0, 1), 0, lambda v: (_f(v.degraded), _ones(v))),
    )
}


@dataclass(frozen=True)
class Estimate:
    """A metric's value with its interval; None if undefined.

    `n` is the denominator (valid trials, or multi-attempt trials), `events` the number of trials away from rest,
    `clusters` the number of latents with a trial in the denominator. `beside` holds further intervals for comparison:
    `bootstrap` (percentile, over latents); for rates also `wilson` and `clopper_pearson`, which treat trials as
    independent; without events `latents_as_trials`, a bound that is valid for any correlation.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    method: str
    events: int = 0
    clusters: int = 0
    beside: dict[str, tuple[float, float]] | None = None


@dataclass(frozen=True)
class MetricResult:
    """Base of the results that go into JSON files; unknown values are None, never nan."""

    def to_json(self) -> dict[str, JsonValue]:
        """Return the JSON-able form."""
        return asdict(self)


@dataclass(frozen=True)
class Summary(MetricResult):
    """All metrics of one condition, in the variants `headline` (gated), `with_degraded`, `without_degraded`, `ungated`.

    `include_degraded`: whether `headline` and `ungated` count degraded responses. `worst_case`: by variant and metric,
    the range of the value over all possible verdicts on the unscored trials (None: no limit).
    """

    counts: dict[str, int]
    headline: dict[str, Estimate]
    with_degraded: dict[str, Estimate]
    without_degraded: dict[str, Estimate]
    ungated: dict[str, Estimate]
    worst_case: dict[str, dict[str, tuple[float | None, float | None]]]
    draws: int
    seed: int
    icc: float
    include_degraded: bool

    @property
    def other(self) -> dict[str, Estimate]:
        """The gated metrics with the opposite treatment of degraded responses."""
        return self.without_degraded if self.include_degraded else self.with_degraded

    def __getitem__(self, metric: str) -> Estimate:
        return self.headline[metric]


VARIANTS: dict[str, tuple[bool, bool | None]] = {
    "headline": (True, None),
    "with_degraded": (True, True),
    "without_degraded": (True, False),
    "ungated": (False, None),
}
"""By variant: whether attempts are gated, and whether degraded responses count (None: the outcomes' setting)."""


def summarize(outcomes: Outcomes, draws: int = 2000) -> Summary:
    """Return every metric of a condition with intervals clustered by latent.

    `draws` is the number of resamples for the additional bootstrap interval. In every variant, the degraded share is
    over all valid trials.
    """
    seed, icc = 0, iv.ICC
    by_variant: dict[str, dict[str, Estimate]] = {}
    worst: dict[str, dict[str, tuple[float | None, float | None]]] = {}
    done: dict[tuple[bool, bool], str] = {}
    for variant, (gated, included) in VARIANTS.items():
        same = done.setdefault((gated, _counted(outcomes, included)), variant)
        if same != variant:  # the headline equals one of the later variants
            by_variant[variant], worst[variant] = by_variant[same], worst[same]
            continue
        names = [m for m in METRICS if m != "degraded_share"]
        rng = np.random.default_rng(seed)
        by_variant[variant] = estimates(view(outcomes, gated, included), names, draws, rng, icc)
        everything = view(outcomes, gated, include_degraded=True)
        by_variant[variant] |= estimates(everything, ["degraded_share"], draws, rng, icc)
        worst[variant] = _worst_case(outcomes, gated, _counted(outcomes, included))
    return Summary(
        counts(outcomes),
        **by_variant,
        worst_case=worst,
        draws=draws,
        seed=seed,
        icc=icc,
        include_degraded=outcomes.include_degraded,
    )


def counts(outcomes: Outcomes) -> dict[str, int]:
    """Count the trials by state; `degraded` is counted over the valid trials, `cut` over those of the headline.

    `cut` is left out unless it is known of all these trials.
    """
    by_state = np.bincount(outcomes.state, minlength=len(STATES))
    out = {"planned": len(outcomes)} | {name: int(by_state[i]) for i, name in enumerate(STATES)}
    valid = outcomes.state == VALID
    out["degraded"] = int(np.sum(outcomes.degraded & valid))
    cut = outcomes.cut[valid if outcomes.include_degraded else valid & ~outcomes.degraded]
    return out if np.isnan(cut).any() else out | {"cut": int(cut.sum())}


def estimates(
    v: View, names: Sequence[str], draws: int, rng: np.random.Generator, icc: float = iv.ICC
) -> dict[str, Estimate]:
    """Return the named metrics of a view with their intervals; without a bootstrap interval if `draws` is 0."""
    parts = {name: METRICS[name].parts(v) for name in names}
    columns = [iv.cluster_sums(v.cluster, x, v.clusters) for pair in parts.values() for x in pair]
    totals = iv.resample_sums(np.stack(columns, axis=1), draws, rng) if v.clusters > 1 and draws else None
    out = {}
    for i, (name, (num, den)) in enumerate(parts.items()):
        sizes = columns[2 * i + 1]
        resampled = None
        if totals is not None:
            with np.errstate(invalid="ignore", divide="ignore"):
                resampled = iv.percentile(totals[:, 2 * i] / totals[:, 2 * i + 1])
        out[name] = _estimate(METRICS[name], v.cluster, num, den, sizes, resampled, icc)
    return out


def influence(num: Floats, den: Floats) -> Floats:
    """Return the first-order contribution of each trial to the ratio sum(num) / sum(den)."""
    total = float(den.sum())
    return (num - float(num.sum()) / total * den) / total


def _estimate(
    metric: Metric,
    cluster: Codes,
    num: Floats,
    den: Floats,
    sizes: Floats,
    resampled: tuple[float, float] | None,
    icc: float,
) -> Estimate:
    n = int(den.sum())
    if n == 0:
        return Estimate(None, None, None, 0, "no trials")
    member = den > 0
    event = member & (num != (metric.rest if metric.rest is not None else np.nan))
    events, clusters = int(event.sum()), int(np.count_nonzero(sizes))
    value = float(num.sum()) / n
    variance = iv.influence_variance(influence(num, den), cluster, member)
    # if all resamples are equal, the percentile bootstrap is a point and not an interval
    beside = {"bootstrap": resampled} if resampled and resampled[0] < resampled[1] else {}
    if metric.rate:
        bounds = iv.rate_interval(events, sizes, variance, icc)
        beside |= {"wilson": iv.wilson(events, n), "clopper_pearson": iv.clopper_pearson(events, n)}
        if events in (0, n):
            free = iv.no_event_bound(sizes, icc=1.0)
            beside["latents_as_trials"] = (0.0, free) if events == 0 else (1 - free, 1.0)
    else:
        informative = len(np.unique(cluster[event]))
        bounds = iv.mean_interval(value, sizes, variance, events, informative, metric.limits, icc)
    return Estimate(value, bounds.low, bounds.high, n, bounds.method, events, clusters, beside)


def _worst_case(
    outcomes: Outcomes, gated: bool, include_degraded: bool
) -> dict[str, tuple[float | None, float | None]]:
    """Return the range of each metric over the extreme verdicts on the unscored trials."""
    v = view(outcomes, gated, include_degraded)
    lost = outcomes.state == UNSCORED
    unscored = int(np.sum(lost if include_degraded else lost & ~outcomes.degraded))
    out: dict[str, tuple[float | None, float | None]] = {}
    for name, metric in METRICS.items():
        if name == "degraded_share":  # degradation follows from the text alone, so unscored trials cannot change it
            continue
        num, den = metric.parts(v)
        total, n = float(num.sum()), float(den.sum()) + unscored
        added = [limit * unscored if unscored else 0.0 for limit in metric.limits]
        ends = [(total + x) / n if n and np.isfinite(x) else None for x in added]
        out[name] = (ends[0], ends[1])
    return out
