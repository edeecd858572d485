"""Rates corrected for the judge's error with human labels of a stratified random sample.

The interval combines two sources of error. *Labels*: the truth is known only of the labelled trials, which are a random
part of each group (stratum x verdict of the judge). *Trials*: the run's latents and trials are a sample themselves,
clustered by latent, as for every rate. Deviations from both sources are added as squares, separately below and above
the estimate (MOVER, Zou and Donner 2008).

Why this is not `ppi-python` or statsmodels: ppi-python's intervals are normal approximations for independent trials,
without clusters or finite strata. They are far too narrow if no labelled response contradicts the judge, the usual case
at rates of a few per cent. statsmodels has no such estimator. docs/statistics.md compares the coverage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from steerback.metrics import intervals as iv
from steerback.metrics.intervals import Bounds, Codes, Flags, Floats
from steerback.metrics.rates import Estimate

DRAWS = 4000
JEFFREYS = 0.5
"""Prior number of events, and of non-events, in each group."""


@dataclass(frozen=True, eq=False)
class LabelledTrials:
    """The trials of one condition, some of them labelled; every array of shape (n,).

    `cluster` is a code of the latent, `stratum` a code of the stratum that the labels were drawn from, `verdict` the
    judge's yes or no. `truth` is the label from 0 to 1 (a fraction if labellers differ), nan for an unlabelled trial.
    `split` divides the strata further by any fact that is known of all trials, such as another verdict of the judge.
    """

    cluster: Codes
    stratum: Codes
    verdict: Flags
    truth: Floats
    split: Codes

    @staticmethod
    def of(
        cluster: ArrayLike, stratum: ArrayLike, verdict: ArrayLike, truth: ArrayLike, split: ArrayLike | None = None
    ) -> LabelledTrials:
        """Build labelled trials from array-like columns; `split` defaults to the verdict."""
        return LabelledTrials(
            np.asarray(cluster, dtype=np.int64),
            np.asarray(stratum, dtype=np.int64),
            np.asarray(verdict, dtype=np.bool_),
            np.asarray(truth, dtype=np.float64),
            np.asarray(verdict if split is None else split, dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.verdict)

    @cached_property
    def latents(self) -> Codes:
        """The cluster of each trial, numbered from 0."""
        return np.unique(self.cluster, return_inverse=True)[1].astype(np.int64)

    @cached_property
    def labels(self) -> int:
        """Number of labelled trials."""
        return int(np.isfinite(self.truth).sum())

    @cached_property
    def unlabelled_strata(self) -> int:
        """Number of strata without labels."""
        known = np.isfinite(self.truth)
        return len(np.setdiff1d(self.stratum, self.stratum[known]))

    @cached_property
    def groups(self) -> Groups:
        """Counts of the trials by group: stratum, split and verdict."""
        columns = np.stack([self.stratum, self.split, self.verdict.astype(np.int64)], axis=1)
        kinds, code = np.unique(columns, axis=0, return_inverse=True)
        code = code.reshape(-1)
        known = np.isfinite(self.truth)
        k = len(kinds)
        return Groups(
            verdict=kinds[:, 2].astype(np.bool_),
            size=np.bincount(code, minlength=k).astype(np.float64),
            labelled=np.bincount(code[known], minlength=k).astype(np.float64),
            true=np.bincount(code[known], weights=self.truth[known], minlength=k).astype(np.float64),
            of_trial=code,
        )


@dataclass(frozen=True, eq=False)
class Groups:
    """Counts of all, labelled and true trials in k groups (stratum, split and verdict); every array of shape (k,).

    `of_trial` (n,) is the group of each trial.
    """

    verdict: Flags
    size: Floats
    labelled: Floats
    true: Floats
    of_trial: Codes

    @cached_property
    def share(self) -> Floats:
        """Share of true trials in each group; a group without labels takes the judge's verdict."""
        known = self.labelled > 0
        return np.where(known, self.true / np.where(known, self.labelled, 1.0), self.verdict.astype(np.float64))

    def draw(self, draws: int, rng: np.random.Generator) -> Floats:
        """Draw the number of true trials of each group, shape (draws, k).

        Labelled trials keep their label. The number of true unlabelled trials is binomial; its share is drawn from
        Jeffreys' posterior Beta(true + 1/2, false + 1/2).
        """
        share = rng.beta(self.true + JEFFREYS, self.labelled - self.true + JEFFREYS, size=(draws, len(self.size)))
        rest = (self.size - self.labelled).astype(np.int64)
        drawn: Floats = self.true + rng.binomial(rest, share)
        return drawn


@dataclass(frozen=True)
class JudgeQuality:
    """Errors of a judge over all trials of a run.

    `labels` is the number of labelled trials, `restarts` the number of true ones among them. `false_positives` is the
    share of false trials that the judge calls true.
    """

    precision: Estimate
    recall: Estimate
    false_positives: Estimate
    labels: int
    restarts: float


def judge_quality(conditions: Sequence[LabelledTrials], draws: int = DRAWS, seed: int = 0) -> JudgeQuality:
    """Return precision, recall and false-positive rate of a judge over all conditions, weighted back to the strata.

    The intervals describe these trials alone: they express missing labels, and have no width if none is missing.
    """
    usable = [c for c in conditions if len(c) and not c.unlabelled_strata]
    labels, restarts = sum(c.labels for c in usable), float(sum(np.nansum(c.truth) for c in usable))
    confusion, drawn = _confusion(usable), _confusion(usable, draws, seed)

    def ratio(top: str, other: str) -> Estimate:
        total = confusion[top] + confusion[other]
        if not total.item() > 0:
            return Estimate(None, None, None, 0, "nothing to divide by")
        value = (confusion[top] / total).item()
        with np.errstate(invalid="ignore", divide="ignore"):
            low, high = _quantiles(drawn[top] / (drawn[top] + drawn[other]), value)
        return Estimate(
            value, low, high, round(total.item()), "labels weighted back to their strata, Jeffreys' posterior"
        )

    return JudgeQuality(ratio("tp", "fp"), ratio("tp", "fn"), ratio("fp", "tn"), labels, restarts)


def corrected_rate(trials: LabelledTrials, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Return the prediction-powered estimate of the true rate, clustered by latent.

    Within each stratum and verdict, the estimate is the mean verdict plus the mean error in the labels: stratified
    prediction-powered inference with the best prediction (Angelopoulos et al. 2023, Fisch et al. 2024).
    """
    if why := _uncorrectable(trials):
        return Estimate(None, None, None, len(trials), why)
    groups, n = trials.groups, len(trials)
    value = float(groups.size @ groups.share) / n
    counts = groups.draw(draws, np.random.default_rng(seed)).sum(axis=1) / n
    from_labels = _quantiles(counts, value)
    restarts = float(np.nansum(trials.truth))
    # the interval as if the truth of each trial were known, with the events seen in the labels
    from_trials = _rate_bounds(value, groups.share[groups.of_trial], trials, restarts)
    low, high = _added(value, from_labels, (from_trials.low, from_trials.high), (0.0, 1.0))
    clusters = len(np.unique(trials.cluster))
    beside = {"labels": from_labels, "normal": normal_interval(trials)}
    method = "prediction-powered, labels by Jeffreys' posterior, trials clustered by latent"
    return Estimate(value, low, high, n, method, round(restarts), clusters, beside)


def rogan_gladen(
    trials: LabelledTrials, conditions: Sequence[LabelledTrials], draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """Return Rogan and Gladen's (1978) estimate (rate + Sp - 1) / (Se + Sp - 1).

    Assumes that sensitivity Se and specificity Sp are equal in all `conditions`; `trials` need no labels. For a single
    condition whose strata are the judge's verdicts, it equals `corrected_rate`.
    """
    usable = [c for c in conditions if len(c) and not c.unlabelled_strata]
    if not len(trials) or not usable:
        return Estimate(None, None, None, len(trials), "no labels" if len(trials) else "no trials")
    rate = float(np.mean(trials.verdict))
    exact, drawn = _confusion(usable), _confusion(usable, draws, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = _solved(rate, exact).item()
        counts = np.clip(_solved(rate, drawn), 0, 1)
    if not np.isfinite(value):
        return Estimate(None, None, None, len(trials), "the judge is no better than chance on the labels")
    value = min(max(value, 0.0), 1.0)
    events = trials.verdict.astype(np.float64)
    bounds = _rate_bounds(rate, events, trials, float(events.sum()))
    ends = (bounds.low or 0.0, 1.0 if bounds.high is None else bounds.high)
    solved = np.clip([_solved(end, exact).item() for end in ends], 0, 1)
    low, high = _added(value, _quantiles(counts, value), (float(solved[0]), float(solved[1])), (0.0, 1.0))
    method = "Rogan-Gladen, one sensitivity and specificity for all conditions"
    return Estimate(value, low, high, len(trials), method, int(events.sum()), len(np.unique(trials.cluster)))


def corrected_difference(a: LabelledTrials, b: LabelledTrials, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Return the difference b - a of two prediction-powered rates, clustered by latent; a and b share cluster codes."""
    if why := _uncorrectable(a) or _uncorrectable(b):
        return Estimate(None, None, None, len(a) + len(b), why)
    rng = np.random.default_rng(seed)
    rates, labels, influences, spread = [], [], [], 0.0
    for trials in (a, b):
        groups, n = trials.groups, len(trials)
        rate = float(groups.size @ groups.share) / n
        rates.append(rate)
        labels.append(groups.draw(draws, rng).sum(axis=1) / n)
        influences.append((groups.share[groups.of_trial] - rate) / n)
        spread += rate * (1 - rate) / n
    value = rates[1] - rates[0]
    cluster = np.unique(np.concatenate([a.cluster, b.cluster]), return_inverse=True)[1].astype(np.int64)
    predicted = iv.influence_variance(
        np.concatenate([-influences[0], influences[1]]), cluster, np.ones(len(cluster), dtype=np.bool_)
    )
    # predicted shares vary less than 0/1 truths, so scale the variance up to that of 0/1 values
    scale = max(spread / predicted.independent, 1.0) if predicted.independent > 0 else None
    variance = (
        iv.Influence(spread, float("nan"), predicted.clusters)
        if scale is None
        else iv.Influence(predicted.independent * scale, predicted.clustered * scale, predicted.clusters)
    )
    restarts = float(np.nansum(a.truth) + np.nansum(b.truth))
    informative = np.unique(cluster[np.concatenate([c.verdict | (np.nan_to_num(c.truth) > 0) for c in (a, b)])])
    sizes = np.bincount(cluster).astype(np.float64)
    bounds = iv.mean_interval(value, sizes, variance, restarts, len(informative), (-1.0, 1.0))
    low, high = _added(value, _quantiles(labels[1] - labels[0], value), (bounds.low, bounds.high), (-1.0, 1.0))
    method = "difference of prediction-powered rates, trials clustered by latent"
    return Estimate(value, low, high, len(a) + len(b), method, round(restarts), int(np.count_nonzero(sizes)))


def normal_interval(trials: LabelledTrials) -> tuple[float, float]:
    """Return the usual normal interval of prediction-powered inference, clustered by latent; for comparison.

    The influence of a trial is its prediction plus, if it is labelled, its weighted error.
    """
    groups, n = trials.groups, len(trials)
    predicted = groups.share[groups.of_trial]
    value = float(predicted.mean())
    weight = (groups.size / np.maximum(groups.labelled, 1.0))[groups.of_trial]
    error = np.where(np.isfinite(trials.truth), weight * (np.nan_to_num(trials.truth) - predicted), 0.0)
    variance = iv.influence_variance((predicted + error - value) / n, trials.latents, np.ones(n, dtype=np.bool_))
    half = iv.t_quantile(np.inf) * float(np.sqrt(np.nan_to_num(variance.clustered)))
    return value - half, value + half


def _uncorrectable(trials: LabelledTrials) -> str:
    """Return the reason why the rate cannot be corrected, "" if it can."""
    if not len(trials):
        return "no trials"
    if not trials.labels:
        return "no labels"
    return "a stratum has no labels" if trials.unlabelled_strata else ""


def _rate_bounds(rate: float, values: Floats, trials: LabelledTrials, seen: float) -> Bounds:
    """Return the clustered interval of a rate; `values` give the correlation within latents, `seen` the events seen."""
    n = len(trials)
    sizes = np.bincount(trials.latents).astype(np.float64)
    variance = iv.influence_variance((values - values.mean()) / n, trials.latents, np.ones(n, dtype=np.bool_))
    events = rate * n
    if 0 < events < n:  # the design effect depends on the observed events, not on the estimated ones
        effect = iv.design_effect(variance, sizes[sizes > 0], min(seen, events, n - events))
        variance = iv.Influence(1.0, effect, variance.clusters)
    return iv.rate_interval(events, sizes, variance)


def _confusion(conditions: Sequence[LabelledTrials], draws: int = 0, seed: int = 0) -> dict[str, Floats]:
    """Estimate true and false positives and negatives over all trials, or draw them, each of shape (draws,)."""
    rng = np.random.default_rng(seed)
    out: dict[str, Floats] = {name: np.zeros(1) for name in ("tp", "fp", "fn", "tn")}
    for groups in (c.groups for c in conditions):
        true, yes = groups.draw(draws, rng) if draws else groups.share * groups.size, groups.verdict
        for name, values in (
            ("tp", true[..., yes]),
            ("fn", true[..., ~yes]),
            ("fp", (groups.size - true)[..., yes]),
            ("tn", (groups.size - true)[..., ~yes]),
        ):
            out[name] = out[name] + values.sum(axis=-1)
    return out


def _solved(rate: float, confusion: dict[str, Floats]) -> Floats:
    """Return (rate + Sp - 1) / (Se + Sp - 1), nan if the judge is no better than chance."""
    false = confusion["fp"] / (confusion["fp"] + confusion["tn"])
    # without true trials the sensitivity is unknown, but the corrected rate is 0 for any sensitivity
    true = confusion["tp"] + confusion["fn"]
    sensitivity = np.where(true > 0, confusion["tp"] / np.where(true > 0, true, 1.0), 1.0)
    better = sensitivity - false
    solved: Floats = np.where(better > 0, (rate - false) / np.where(better > 0, better, 1.0), np.nan)
    return solved


def _quantiles(drawn: Floats, value: float) -> tuple[float, float]:
    """Return the percentile interval of draws, extended to include the estimate."""
    low, high = iv.percentile(drawn) or (value, value)
    return min(low, value), max(high, value)


def _added(
    value: float,
    first: tuple[float, float],
    second: tuple[float | None, float | None],
    limits: tuple[float, float],
) -> tuple[float, float]:
    """Add the deviations of two independent intervals as squares, cut to `limits`; None in `second` is the limit."""
    low, high = (limit if end is None else end for end, limit in zip(second, limits, strict=True))
    below = float(np.hypot(value - first[0], max(value - low, 0.0)))
    above = float(np.hypot(first[1] - value, max(high - value, 0.0)))
    return max(value - below, limits[0]), min(value + above, limits[1])
