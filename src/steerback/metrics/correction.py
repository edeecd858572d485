"""Rates corrected for the judge's error with human labels of a stratified random sample. Knows arrays only.

Two sources of error are kept apart. *Labels*: the run's trials are fixed, the truth is known of the labelled alone,
and in each cell (stratum x verdict of the judge) the labelled trials are a random part of all. *Trials*: the run's
latents and trials are a sample themselves, clustered by latent, as for every rate. Deviations from both are added as
squares, separately below and above (MOVER, Zou and Donner 2008).

Neither `ppi-python` nor statsmodels serves here. The intervals of ppi-python are normal approximations for independent
trials without clusters or finite strata. They are far too narrow where no labelled response contradicts the judge, the
usual case at rates of a few per cent. statsmodels has no such estimator. docs/statistics.md compares the coverage.
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
"""Prior events and non-events of each cell."""


@dataclass(frozen=True, eq=False)
class LabelledTrials:
    """The trials of one condition, of which some are labelled; every array of shape (n,).

    `cluster` is a code of the latent, `stratum` that of the stratum the labels were drawn from, `verdict` the judge's
    yes or no. `truth` is the label, 0 to 1 (between: labellers differ), nan where there is none. `cell` divides the
    strata further, by anything that is known of all trials, such as another verdict of the judge.
    """

    cluster: Codes
    stratum: Codes
    verdict: Flags
    truth: Floats
    cell: Codes

    @staticmethod
    def of(
        cluster: ArrayLike, stratum: ArrayLike, verdict: ArrayLike, truth: ArrayLike, cell: ArrayLike | None = None
    ) -> LabelledTrials:
        """Labelled trials from any array-like columns; without `cell`, strata are divided by the verdict alone."""
        return LabelledTrials(
            np.asarray(cluster, dtype=np.int64),
            np.asarray(stratum, dtype=np.int64),
            np.asarray(verdict, dtype=np.bool_),
            np.asarray(truth, dtype=np.float64),
            np.asarray(verdict if cell is None else cell, dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.verdict)

    @cached_property
    def latents(self) -> Codes:
        """The cluster of each trial, counted from 0."""
        return np.unique(self.cluster, return_inverse=True)[1].astype(np.int64)

    @cached_property
    def labels(self) -> int:
        """Number of labelled trials."""
        return int(np.isfinite(self.truth).sum())

    @cached_property
    def unlabelled_strata(self) -> int:
        """Number of strata without a label."""
        known = np.isfinite(self.truth)
        return len(np.setdiff1d(self.stratum, self.stratum[known]))

    @cached_property
    def cells(self) -> Cells:
        """The trials counted by stratum, cell and verdict."""
        columns = np.stack([self.stratum, self.cell, self.verdict.astype(np.int64)], axis=1)
        kinds, code = np.unique(columns, axis=0, return_inverse=True)
        code = code.reshape(-1)
        known = np.isfinite(self.truth)
        k = len(kinds)
        return Cells(
            verdict=kinds[:, 2].astype(np.bool_),
            size=np.bincount(code, minlength=k).astype(np.float64),
            labelled=np.bincount(code[known], minlength=k).astype(np.float64),
            true=np.bincount(code[known], weights=self.truth[known], minlength=k).astype(np.float64),
            of_trial=code,
        )


@dataclass(frozen=True, eq=False)
class Cells:
    """Numbers of trials, labelled and true ones by stratum, cell and verdict, every array of shape (k,).

    `of_trial` is the cell of each trial.
    """

    verdict: Flags
    size: Floats
    labelled: Floats
    true: Floats
    of_trial: Codes

    @cached_property
    def share(self) -> Floats:
        """Share of true trials in each cell; a cell without labels is taken as the judge sees it."""
        known = self.labelled > 0
        return np.where(known, self.true / np.where(known, self.labelled, 1.0), self.verdict.astype(np.float64))

    def draw(self, draws: int, rng: np.random.Generator) -> Floats:
        """Draw the number of true trials of each cell, shape (draws, k): the labelled ones, and the others drawn.

        The others are binomial with a share drawn from Beta(true + 1/2, false + 1/2), Jeffreys' posterior.
        """
        share = rng.beta(self.true + JEFFREYS, self.labelled - self.true + JEFFREYS, size=(draws, len(self.size)))
        rest = (self.size - self.labelled).astype(np.int64)
        drawn: Floats = self.true + rng.binomial(rest, share)
        return drawn


@dataclass(frozen=True)
class JudgeQuality:
    """Errors of a judge over all trials of a run: `labels` of them are labelled, `restarts` of these true.

    `false_positives` is the share of false trials that the judge takes for true.
    """

    precision: Estimate
    recall: Estimate
    false_positives: Estimate
    labels: int
    restarts: float


def judge_quality(conditions: Sequence[LabelledTrials], draws: int = DRAWS, seed: int = 0) -> JudgeQuality:
    """Precision, recall and false-positive rate of a judge, weighted back to the strata, over all conditions.

    Intervals describe these trials: they come from the labels that are missing, and have no width where none is.
    """
    usable = [c for c in conditions if len(c) and not c.unlabelled_strata]
    labels, restarts = sum(c.labels for c in usable), float(sum(np.nansum(c.truth) for c in usable))
    confusion, drawn = _confusion(usable), _drawn_confusion(usable, draws, np.random.default_rng(seed))

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


def corrected_rate(
    trials: LabelledTrials, draws: int = DRAWS, seed: int = 0, icc: float = iv.ICC, alpha: float = iv.ALPHA
) -> Estimate:
    """Prediction-powered estimate of the true rate, clustered by latent.

    The mean of the judge's verdicts plus the mean error seen in the labels, within each stratum and verdict: stratified
    prediction-powered inference with the best prediction (Angelopoulos et al. 2023, Fisch et al. 2024).
    """
    if why := _uncorrectable(trials):
        return Estimate(None, None, None, len(trials), why)
    cells, n = trials.cells, len(trials)
    value = float(cells.size @ cells.share) / n
    counts = cells.draw(draws, np.random.default_rng(seed)).sum(axis=1) / n
    from_labels = _quantiles(counts, value, alpha)
    from_trials = _trials_interval(value, trials, icc, alpha)
    low, high = _added(value, from_labels, (from_trials.low, from_trials.high), (0.0, 1.0))
    clusters = len(np.unique(trials.cluster))
    beside = {"labels": from_labels, "normal": normal_interval(trials, alpha)}
    method = "prediction-powered, labels by Jeffreys' posterior, trials clustered by latent"
    return Estimate(value, low, high, n, method, round(float(np.nansum(trials.truth))), clusters, beside)


def rogan_gladen(
    trials: LabelledTrials,
    conditions: Sequence[LabelledTrials],
    draws: int = DRAWS,
    seed: int = 0,
    icc: float = iv.ICC,
    alpha: float = iv.ALPHA,
) -> Estimate:
    """Rogan and Gladen's (1978) estimate: (rate + Sp - 1) / (Se + Sp - 1), errors taken as equal in all `conditions`.

    `trials` need no labels. With a single condition whose strata are the judge's verdicts it equals `corrected_rate`.
    """
    usable = [c for c in conditions if len(c) and not c.unlabelled_strata]
    if not len(trials) or not usable:
        return Estimate(None, None, None, len(trials), "no labels" if len(trials) else "no trials")
    rate = float(np.mean(trials.verdict))
    exact, drawn = _confusion(usable), _drawn_confusion(usable, draws, np.random.default_rng(seed))
    with np.errstate(invalid="ignore", divide="ignore"):
        value = _solved(rate, exact).item()
        counts = np.clip(_solved(rate, drawn), 0, 1)
    if not np.isfinite(value):
        return Estimate(None, None, None, len(trials), "the judge is no better than chance on the labels")
    value = min(max(value, 0.0), 1.0)
    events = trials.verdict.astype(np.float64)
    bounds = _rate_bounds(rate, events, trials, float(events.sum()), icc, alpha)
    ends = (bounds.low or 0.0, 1.0 if bounds.high is None else bounds.high)
    solved = np.clip([_solved(end, exact).item() for end in ends], 0, 1)
    low, high = _added(value, _quantiles(counts, value, alpha), (float(solved[0]), float(solved[1])), (0.0, 1.0))
    method = "Rogan-Gladen, one sensitivity and specificity for all conditions"
    return Estimate(value, low, high, len(trials), method, int(events.sum()), len(np.unique(trials.cluster)))


def corrected_difference(
    a: LabelledTrials, b: LabelledTrials, draws: int = DRAWS, seed: int = 0, icc: float = iv.ICC
) -> Estimate:
    """Difference b - a of two prediction-powered rates, clustered by latent; cluster codes must agree in a and b."""
    if why := _uncorrectable(a) or _uncorrectable(b):
        return Estimate(None, None, None, len(a) + len(b), why)
    rng = np.random.default_rng(seed)
    rates, labels, influences, spread = [], [], [], 0.0
    for trials in (a, b):
        cells, n = trials.cells, len(trials)
        rate = float(cells.size @ cells.share) / n
        rates.append(rate)
        labels.append(cells.draw(draws, rng).sum(axis=1) / n)
        influences.append((cells.share[cells.of_trial] - rate) / n)
        spread += rate * (1 - rate) / n
    value = rates[1] - rates[0]
    cluster = np.unique(np.concatenate([a.cluster, b.cluster]), return_inverse=True)[1].astype(np.int64)
    predicted = iv.influence_variance(
        np.concatenate([-influences[0], influences[1]]), cluster, np.ones(len(cluster), dtype=np.bool_)
    )
    # predictions vary less than what they predict: scaled up to the variance of yes and no
    scale = max(spread / predicted.independent, 1.0) if predicted.independent > 0 else None
    variance = (
        iv.Influence(spread, float("nan"), predicted.clusters)
        if scale is None
        else iv.Influence(predicted.independent * scale, predicted.clustered * scale, predicted.clusters)
    )
    restarts = float(np.nansum(a.truth) + np.nansum(b.truth))
    informative = np.unique(cluster[np.concatenate([c.verdict | (np.nan_to_num(c.truth) > 0) for c in (a, b)])])
    sizes = np.bincount(cluster).astype(np.float64)
    bounds = iv.mean_interval(value, sizes, variance, restarts, len(informative), (-1.0, 1.0), icc)
    low, high = _added(value, _quantiles(labels[1] - labels[0], value), (bounds.low, bounds.high), (-1.0, 1.0))
    method = "difference of prediction-powered rates, trials clustered by latent"
    return Estimate(value, low, high, len(a) + len(b), method, round(restarts), int(np.count_nonzero(sizes)))


def normal_interval(trials: LabelledTrials, alpha: float = iv.ALPHA) -> tuple[float, float]:
    """The usual normal interval of prediction-powered inference, clustered by latent; for comparison.

    Each trial's influence is its prediction plus, where it is labelled, its weighted error.
    """
    cells, n = trials.cells, len(trials)
    predicted = cells.share[cells.of_trial]
    value = float(predicted.mean())
    weight = (cells.size / np.maximum(cells.labelled, 1.0))[cells.of_trial]
    error = np.where(np.isfinite(trials.truth), weight * (np.nan_to_num(trials.truth) - predicted), 0.0)
    variance = iv.influence_variance((predicted + error - value) / n, trials.latents, np.ones(n, dtype=np.bool_))
    half = iv.t_quantile(np.inf, alpha) * float(np.sqrt(np.nan_to_num(variance.clustered)))
    return value - half, value + half


def _uncorrectable(trials: LabelledTrials) -> str:
    """Return why there can be no corrected rate, or an empty text."""
    if not len(trials):
        return "no trials"
    if not trials.labels:
        return "no labels"
    return "a stratum has no labels" if trials.unlabelled_strata else ""


def _trials_interval(value: float, trials: LabelledTrials, icc: float, alpha: float) -> Bounds:
    """Interval of a rate of these trials if the truth of each were known; its events count as many as were labelled."""
    predicted = trials.cells.share[trials.cells.of_trial]
    return _rate_bounds(value, predicted, trials, float(np.nansum(trials.truth)), icc, alpha)


def _rate_bounds(rate: float, values: Floats, trials: LabelledTrials, seen: float, icc: float, alpha: float) -> Bounds:
    """Clustered interval of a rate; `values` show how far trials of one latent are alike, with `seen` events."""
    n = len(trials)
    sizes = np.bincount(trials.latents).astype(np.float64)
    variance = iv.influence_variance((values - values.mean()) / n, trials.latents, np.ones(n, dtype=np.bool_))
    events = rate * n
    if 0 < events < n:  # the design effect rests on the events that were seen, not on those that are estimated
        effect = iv.design_effect(variance, sizes[sizes > 0], min(seen, events, n - events), icc)
        variance = iv.Influence(1.0, effect, variance.clusters)
    return iv.rate_interval(events, sizes, variance, icc, alpha)


def _confusion(conditions: Sequence[LabelledTrials]) -> dict[str, Floats]:
    """True and false positives and negatives over all trials, estimated from the labels of each cell."""
    return _summed([(c.cells, c.cells.share * c.cells.size) for c in conditions])


def _drawn_confusion(conditions: Sequence[LabelledTrials], draws: int, rng: np.random.Generator) -> dict[str, Floats]:
    """Draws of the same, each of shape (draws,)."""
    return _summed([(c.cells, c.cells.draw(draws, rng)) for c in conditions])


def _summed(true_counts: Sequence[tuple[Cells, Floats]]) -> dict[str, Floats]:
    out: dict[str, Floats] = {name: np.zeros(1) for name in ("tp", "fp", "fn", "tn")}
    for cells, true in true_counts:
        yes = cells.verdict
        for name, values in (
            ("tp", true[..., yes]),
            ("fn", true[..., ~yes]),
            ("fp", (cells.size - true)[..., yes]),
            ("tn", (cells.size - true)[..., ~yes]),
        ):
            out[name] = out[name] + values.sum(axis=-1)
    return out


def _solved(rate: float, confusion: dict[str, Floats]) -> Floats:
    """(rate + Sp - 1) / (Se + Sp - 1), nan where the judge is no better than chance."""
    false = confusion["fp"] / (confusion["fp"] + confusion["tn"])
    # without a true trial the sensitivity is unknown, and the corrected rate is 0 whatever it is
    true = confusion["tp"] + confusion["fn"]
    sensitivity = np.where(true > 0, confusion["tp"] / np.where(true > 0, true, 1.0), 1.0)
    better = sensitivity - false
    solved: Floats = np.where(better > 0, (rate - false) / np.where(better > 0, better, 1.0), np.nan)
    return solved


def _quantiles(drawn: Floats, value: float, alpha: float = iv.ALPHA) -> tuple[float, float]:
    """Percentile interval of draws that holds the estimate itself."""
    low, high = iv.percentile(drawn, alpha) or (value, value)
    return min(low, value), max(high, value)


def _added(
    value: float,
    first: tuple[float, float],
    second: tuple[float | None, float | None],
    limits: tuple[float, float],
) -> tuple[float, float]:
    """Add the deviations of two independent intervals as squares, within `limits`; an open end is the limit."""
    low, high = (limit if end is None else end for end, limit in zip(second, limits, strict=True))
    below = float(np.hypot(value - first[0], max(value - low, 0.0)))
    above = float(np.hypot(first[1] - value, max(high - value, 0.0)))
    return max(value - below, limits[0]), min(value + above, limits[1])
