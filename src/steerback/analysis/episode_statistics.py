"""Appendix A.7: activity of detectors and backtracking latents before, during and after corrections (Figs. A5, A6).

Compares episodes of exactly two attempts that improve with controls: unsteered responses, steered responses that drift
without a restart, and steered on-topic responses, read again without steering (the authors' baseline). The value of a
region is the mean over its tokens of the group's summed activation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from steerback.analysis.base import Results, planted
from steerback.analysis.episodes import Recorded, Trace, controls_of, recorded_targets
from steerback.metrics import Estimate
from steerback.metrics.intervals import Codes, Floats
from steerback.metrics.regions import (
    RegionTest,
    correct_regions,
    mean_of,
    paired_regions,
    ratio_of,
    separate_regions,
)
from steerback.store.facts import BACKTRACKING, DETECTORS, DRIFTS, EPISODES, REREAD, UNSTEERED
from steerback.store.ledger import Ledger

REGIONS = ("off-topic", "correction", "on-topic")
DRAWS = 2000
"""Draws of the tests of single latents."""
PAIRED = (("off-topic", "correction"), ("off-topic", "on-topic"), ("correction", "on-topic"))
SEPARATE = (
    (UNSTEERED, "off-topic"),
    (UNSTEERED, "correction"),
    (UNSTEERED, "on-topic"),
    (UNSTEERED, DRIFTS),
    (DRIFTS, "off-topic"),
)
AGAINST_REREAD = tuple((REREAD, region) for region in REGIONS)


class ActivityOptions(Protocol):
    """Options that the analysis uses."""

    @property
    def drift_below(self) -> float: ...
    @property
    def reach(self) -> int: ...
    @property
    def baseline_from(self) -> float: ...


@dataclass(frozen=True, eq=False)
class RegionActivity:
    """Activity of one target's recorded episodes; mappings are by group, then by region or by pair (a, b) of a test.

    `ratios` divide each region by the unsteered responses and by the responses that were read again; they also contain
    off-topic divided by steered without restart. `latents` has the regions of every single latent.
    """

    recorded: Recorded
    groups: Sequence[str]
    means: Mapping[str, Mapping[str, Estimate]]
    ratios: Mapping[str, Mapping[str, Estimate]]
    tests: Mapping[tuple[str, str, str], RegionTest]
    latents: Sequence[LatentRegions]

    def to_json(self) -> dict[str, object]:
        """Return the part of summary.json for one target."""
        return {
            "counts": self.recorded.counts,
            "latents": {group: list(latents) for group, latents in self.recorded.groups.items()},
            "means": {g: {r: asdict(e) for r, e in regions.items()} for g, regions in self.means.items()},
            "ratios": {g: {r: asdict(e) for r, e in regions.items()} for g, regions in self.ratios.items()},
            "tests": [{"group": g, "a": a, "b": b, **asdict(t)} for (g, a, b), t in self.tests.items()],
            "by latent": [asdict(x) for x in self.latents],
        }


@dataclass(frozen=True, eq=False)
class AlignedCurve:
    """Mean activation at each offset (tokens) from the correction's first token, each (2 reach + 1,); nan: no data.

    `clusters` counts the latents with a response at an offset, `n` is the number of responses in the curve.
    """

    offsets: NDArray[np.int64]
    mean: Floats
    low: Floats
    high: Floats
    clusters: Codes
    n: int


@dataclass(frozen=True, eq=False)
class EpisodeStatisticsResults(Results):
    """Activity of each target by region, and its aligned curves by group and type of response."""

    judge: str
    activity: Mapping[str, RegionActivity]
    curves: Mapping[str, Mapping[str, Mapping[str, AlignedCurve]]]
    planted: Sequence[str]

    def to_json(self) -> dict[str, object]:
        """Return the content of summary.json."""
        return {
            "experiment": "episode-statistics",
            "judge": self.judge,
            "targets": {target: a.to_json() for target, a in self.activity.items()},
        }


def analyse(ledger: Ledger, judge: str, draws: int, options: ActivityOptions) -> EpisodeStatisticsResults:
    """Return means, ratios to the unsteered responses and tests by region, and curves aligned at the correction."""
    recorded = recorded_targets(ledger, judge, options.drift_below, options.baseline_from)
    activity = {target: activity_of(r, draws) for target, r in recorded.items()}
    curves = {target: {g: aligned(a.recorded, g, options.reach) for g in a.groups} for target, a in activity.items()}
    return EpisodeStatisticsResults(judge, activity, curves, planted(ledger, activity))


def activity_of(recorded: Recorded, draws: int) -> RegionActivity:
    """Return region means, ratios and Holm-corrected tests of every group with latents."""
    groups = [g for g in (DETECTORS, BACKTRACKING) if recorded.groups[g]]
    means: dict[str, dict[str, Estimate]] = {}
    ratios: dict[str, dict[str, Estimate]] = {}
    tests: dict[tuple[str, str, str], RegionTest] = {}
    for group in groups:
        values = region_values(recorded, group)
        means[group] = {name: mean_of(*v, (0.0, np.inf)) for name, v in values.items()}
        pairs = [(r, UNSTEERED) for r in (*REGIONS, DRIFTS)] + [("off-topic", DRIFTS)]
        if REREAD in values:
            pairs += [(REREAD, UNSTEERED), *((r, REREAD) for r in REGIONS)]
        ratios[group] = {f"{a} / {b}": ratio_of(*values[a], *values[b], draws) for a, b in pairs}
        for a, b in PAIRED:
            tests[group, a, b] = paired_regions(values[a][0], values[b][0], values[a][1])
        for a, b in (*SEPARATE, *(AGAINST_REREAD if REREAD in values else ())):
            tests[group, a, b] = separate_regions(*values[a], *values[b])
    corrected = correct_regions({"\n".join(key): test for key, test in tests.items()})
    tests = {key: corrected["\n".join(key)] for key in tests}
    return RegionActivity(recorded, groups, means, ratios, tests, latent_regions(recorded))


def region_values(recorded: Recorded, group: str) -> dict[str, tuple[Floats, Codes]]:
    """Return per region (values, codes of latents); a value is a response's mean activation per token, or nan."""

    def mean(values: Floats) -> float:
        return float(values.mean()) if len(values) else float("nan")

    def collect(traces: Sequence[Trace], value: Callable[[Trace], float]) -> tuple[Floats, Codes]:
        return np.array([value(t) for t in traces]), np.array([t.cluster for t in traces], dtype=np.int64)

    def of_region(name: str) -> Callable[[Trace], float]:
        return lambda t: mean(t.sums[group][t.regions()[name]])

    regions = {name: collect(recorded.twice, of_region(name)) for name in REGIONS}
    return {
        UNSTEERED: collect(recorded.unsteered, lambda t: mean(t.sums[group])),
        DRIFTS: collect(recorded.drifts, lambda t: mean(t.sums[group])),
        **({REREAD: recorded.reread[group]} if group in recorded.reread else {}),
        **regions,
    }


def aligned(recorded: Recorded, group: str, reach: int) -> dict[str, AlignedCurve]:
    """Return curves of the episodes with two attempts, and of their controls at the same positions.

    An episode ends with its second attempt. A control's row is the mean over the controls of one episode
    (`episodes.controls_of`), so that every episode counts once in each curve.
    """

    def window(trace: Trace, at: int, stop: int) -> Floats:
        row = np.full(2 * reach + 1, np.nan)
        values = trace.sums[group][:stop]
        first, last = max(at - reach, 0), min(at + reach + 1, len(values))
        if last > first:
            row[first - at + reach : last - at + reach] = values[first:last]
        return row

    def control(trace: Trace, controls: Sequence[Trace]) -> Floats:
        # A control has no correction, so it is aligned at the position of the episode's correction.
        rows = [window(c, trace.start or 0, len(c)) for c in controls_of(trace, controls)]
        return _nanmean(np.array(rows)) if rows else np.full(2 * reach + 1, np.nan)

    traces = recorded.twice
    clusters = np.array([t.cluster for t in traces], dtype=np.int64)
    rows = {
        EPISODES: [window(t, t.start or 0, t.stop or len(t)) for t in traces],
        DRIFTS: [control(t, recorded.drifts) for t in traces],
        UNSTEERED: [control(t, recorded.unsteered) for t in traces],
    }
    return {name: _curve(np.array(r).reshape(-1, 2 * reach + 1), clusters, reach) for name, r in rows.items()}


def _nanmean(rows: Floats) -> Floats:
    """Return the mean of each column's finite values, or nan; unlike `np.nanmean` without warnings."""
    finite = np.isfinite(rows)
    count = finite.sum(axis=0)
    mean: Floats = np.where(count > 0, np.where(finite, rows, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)
    return mean


def _curve(rows: Floats, clusters: Codes, reach: int) -> AlignedCurve:
    offsets = np.arange(-reach, reach + 1)
    if not len(rows):
        empty = np.full(len(offsets), np.nan)
        return AlignedCurve(offsets, empty, empty, empty, np.zeros(len(offsets), dtype=np.int64), 0)
    points = [mean_of(rows[:, i], clusters, (0.0, np.inf)) for i in range(len(offsets))]
    mean, low, high = (
        np.array([np.nan if v is None else v for v in values], dtype=np.float64)
        for values in ([p.value for p in points], [p.low for p in points], [p.high for p in points])
    )
    counts = np.array([p.clusters for p in points], dtype=np.int64)
    return AlignedCurve(offsets, mean, low, high, counts, int(np.isfinite(rows).any(axis=1).sum()))


@dataclass(frozen=True)
class RegionValues:
    """Mean and sd of a latent in one region over the episodes, and the share of episodes in which it is active."""

    mean: float | None
    sd: float | None
    active: float | None
    n: int


@dataclass(frozen=True)
class LatentRegions:
    """Regions of one latent, and the paired test of off-topic minus on-topic, Holm-corrected over latents."""

    group: str
    latent: int
    label: str | None
    regions: Mapping[str, RegionValues]
    test: RegionTest


def latent_regions(recorded: Recorded) -> list[LatentRegions]:
    """Return every latent of every group over the episodes with two attempts, largest effect first in each group."""
    if not recorded.twice:
        return []
    latents = list(dict.fromkeys(k for group in recorded.groups.values() for k in group))
    cluster = np.array([t.cluster for t in recorded.twice], dtype=np.int64)
    values = _values(recorded, latents)
    off, on = values["off-topic"], values["on-topic"]
    tests = {str(k): paired_regions(on[:, i], off[:, i], cluster, DRAWS) for i, k in enumerate(latents)}
    tests = correct_regions(tests)
    column = {k: i for i, k in enumerate(latents)}
    rows = [
        LatentRegions(
            group=group,
            latent=k,
            label=recorded.labels.get(k),
            regions={name: _summary(v[:, column[k]]) for name, v in values.items()},
            test=tests[str(k)],
        )
        for group, members in recorded.groups.items()
        for k in members
    ]
    order = {group: n for n, group in enumerate(recorded.groups)}
    return sorted(rows, key=lambda x: (order[x.group], -np.inf if x.test.cohens_d is None else -x.test.cohens_d))


def _values(recorded: Recorded, latents: list[int]) -> dict[str, Floats]:
    """Return by region (episodes, latents): mean activation over the region's tokens, nan without tokens."""
    values: dict[str, list[Floats]] = {name: [] for name in REGIONS}
    for trace in recorded.twice:
        done, record = trace.row.completion, trace.row.trial.record
        if done is None or done.activations is None or record is None:
            raise ValueError(f"{trace.row.trial.key} was not recorded")
        columns = [record.latents.index(k) for k in latents]
        z = np.asarray(done.activations[done.prompt_tokens :][:, columns], dtype=np.float64)
        for name, part in trace.regions().items():
            values[name].append(z[part].mean(axis=0) if len(z[part]) else np.full(len(latents), np.nan))
    return {name: np.array(rows) for name, rows in values.items()}


def _summary(values: Floats) -> RegionValues:
    values = values[np.isfinite(values)]
    if not len(values):
        return RegionValues(None, None, None, 0)
    sd = float(values.std(ddof=1)) if len(values) > 1 else None
    return RegionValues(float(values.mean()), sd, float((values > 0).mean()), len(values))
