"""Appendix A.7: activity of detectors and backtracking latents before, in and after corrections (Figs. A5, A6).

Episodes of exactly two attempts that improve, replayed with recording, against two controls: unsteered responses, and
steered ones that drift and never restart. A region's value is the mean over its tokens of the group's summed
activation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from steerback.experiments import episodes as ep
from steerback.experiments.base import Analysis, planted
from steerback.figures.tables import Table, number, p_value, show
from steerback.metrics import Estimate
from steerback.metrics.regions import (
    RegionTest,
    correct_regions,
    mean_of,
    paired_regions,
    ratio_of,
    separate_regions,
)
from steerback.store.ledger import Ledger

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

REGIONS = ("off-topic", "correction", "on-topic")
NO_RESTART, QUIET = "steered, no restart", "unsteered"
PAIRED = (("off-topic", "correction"), ("off-topic", "on-topic"), ("correction", "on-topic"))
SEPARATE = (
    (QUIET, "off-topic"),
    (QUIET, "correction"),
    (QUIET, "on-topic"),
    (QUIET, NO_RESTART),
    (NO_RESTART, "off-topic"),
)


class Options(ep.Options):
    """What the figures show."""

    reach: int = Field(40, ge=1)
    """Tokens before and after the correction in Fig. A5."""


class EpisodeStatistics(ep.EpisodeExperiment):
    """Region means, tests and aligned curves of all episodes with two attempts."""

    name = "episode-statistics"
    title = "Activity around corrections (appendix A.7, Figs. A5, A6)"
    options = Options

    def analyse(self, ledger: Ledger, judge: str, draws: int) -> Analysis:
        """Means, ratios to the unsteered responses, tests; Figures A5 and A6."""
        from steerback.figures import episode_statistics as figure

        options = ep.options_of(self, ledger)
        found = {
            target: activity(ep.recorded(ledger, target, judge, options["drift_below"]), draws)
            for target in ep.recorded_targets(ledger)
        }
        curves = {
            target: {g: aligned(a.recorded, g, options["reach"]) for g in a.groups} for target, a in found.items()
        }
        note = planted(found)
        return Analysis(
            summary={
                "experiment": self.name,
                "judge": judge,
                "targets": {target: a.to_json() for target, a in found.items()},
            },
            tables={"table": region_table(found, judge), "tests": test_table(found, judge)},
            figures={
                "figureA5": partial(figure.draw_aligned, found, curves, judge, note),
                "figureA6": partial(figure.draw_regions, found, judge, note),
            },
            lines=[_told(target, a) for target, a in found.items()],
        )


@dataclass(frozen=True, eq=False)
class Activity:
    """What one target's recorded episodes came to; all mappings by group, then by region or (a, b) of a test."""

    recorded: ep.Recorded
    groups: Sequence[str]
    means: Mapping[str, Mapping[str, Estimate]]
    ratios: Mapping[str, Mapping[str, Estimate]]  # region over unsteered, and off-topic over steered without restart
    tests: Mapping[tuple[str, str, str], RegionTest]

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": self.recorded.counts,
            "latents": {group: list(latents) for group, latents in self.recorded.groups.items()},
            "means": {g: {r: asdict(e) for r, e in own.items()} for g, own in self.means.items()},
            "ratios": {g: {r: asdict(e) for r, e in own.items()} for g, own in self.ratios.items()},
            "tests": [{"group": g, "a": a, "b": b, **asdict(t)} for (g, a, b), t in self.tests.items()],
        }


def activity(found: ep.Recorded, draws: int) -> Activity:
    """Region means, ratios and Holm-corrected tests of every group that has latents."""
    groups = [g for g in (ep.DETECTORS, ep.BACKTRACKING) if found.groups[g]]
    means: dict[str, dict[str, Estimate]] = {}
    ratios: dict[str, dict[str, Estimate]] = {}
    tests: dict[tuple[str, str, str], RegionTest] = {}
    for group in groups:
        values = region_values(found, group)
        means[group] = {name: mean_of(*v, (0.0, np.inf)) for name, v in values.items()}
        pairs = [(r, QUIET) for r in (*REGIONS, NO_RESTART)] + [("off-topic", NO_RESTART)]
        ratios[group] = {f"{a} / {b}": ratio_of(*values[a], *values[b], draws) for a, b in pairs}
        for a, b in PAIRED:
            tests[group, a, b] = paired_regions(values[a][0], values[b][0], values[a][1])
        for a, b in SEPARATE:
            tests[group, a, b] = separate_regions(*values[a], *values[b])
    named = correct_regions({"\n".join(key): test for key, test in tests.items()})
    return Activity(found, groups, means, ratios, {key: named["\n".join(key)] for key in tests})


def region_values(found: ep.Recorded, group: str) -> dict[str, tuple[Floats, NDArray[np.int64]]]:
    """Per region (values, latents' codes), one value a response: its mean activation per token, nan without tokens."""

    def mean(values: Floats) -> float:
        return float(values.mean()) if len(values) else float("nan")

    def collect(traces: Sequence[ep.Trace], value: Callable[[ep.Trace], float]) -> tuple[Floats, NDArray[np.int64]]:
        return np.array([value(t) for t in traces]), np.array([t.cluster for t in traces], dtype=np.int64)

    def of_region(name: str) -> Callable[[ep.Trace], float]:
        return lambda t: mean(t.sums[group][t.regions()[name]])

    own = {name: collect(found.twice, of_region(name)) for name in REGIONS}
    return {
        QUIET: collect(found.unsteered, lambda t: mean(t.sums[group])),
        NO_RESTART: collect(found.drifts, lambda t: mean(t.sums[group])),
        **own,
    }


@dataclass(frozen=True, eq=False)
class Curve:
    """Mean activation at each offset (tokens) from the correction's first token, each (2 reach + 1,); nan: no data."""

    offsets: NDArray[np.int64]
    mean: Floats
    low: Floats
    high: Floats


def aligned(found: ep.Recorded, group: str, reach: int) -> dict[str, Curve]:
    """Curves of the episodes with two attempts, and of their controls at the same positions.

    An episode ends with its second attempt. A control's row is the mean over the controls that stand beside an episode
    (`episodes.beside`), so that every episode counts once in each curve.
    """

    def window(trace: ep.Trace, at: int, stop: int) -> Floats:
        row = np.full(2 * reach + 1, np.nan)
        values = trace.sums[group][:stop]
        first, last = max(at - reach, 0), min(at + reach + 1, len(values))
        if last > first:
            row[first - at + reach : last - at + reach] = values[first:last]
        return row

    def control(trace: ep.Trace, controls: Sequence[ep.Trace]) -> Floats:
        rows = [window(c, trace.start or 0, len(c)) for c in ep.beside(trace, controls)]
        return _nanmean(np.array(rows)) if rows else np.full(2 * reach + 1, np.nan)

    traces = found.twice
    clusters = np.array([t.cluster for t in traces], dtype=np.int64)
    rows = {
        "episodes": [window(t, t.start or 0, t.stop or len(t)) for t in traces],
        NO_RESTART: [control(t, found.drifts) for t in traces],
        QUIET: [control(t, found.unsteered) for t in traces],
    }
    return {name: _curve(np.array(r).reshape(-1, 2 * reach + 1), clusters, reach) for name, r in rows.items()}


def _nanmean(rows: Floats) -> Floats:
    there = np.isfinite(rows)
    count = there.sum(axis=0)
    mean: Floats = np.where(count > 0, np.where(there, rows, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)
    return mean


def _curve(rows: Floats, clusters: NDArray[np.int64], reach: int) -> Curve:
    offsets = np.arange(-reach, reach + 1)
    if not len(rows):
        empty = np.full(len(offsets), np.nan)
        return Curve(offsets, empty, empty, empty)
    points = [mean_of(rows[:, i], clusters, (0.0, np.inf)) for i in range(len(offsets))]
    mean, low, high = (
        np.array([np.nan if v is None else v for v in (getattr(p, name) for p in points)], dtype=np.float64)
        for name in ("value", "low", "high")
    )
    return Curve(offsets, mean, low, high)


def region_table(found: Mapping[str, Activity], judge: str) -> Table:
    """One row per target, group and region: mean activation, and its ratio to the unsteered responses."""
    cells, records = [], []
    for target, a in found.items():
        for group in a.groups:
            for region, e in a.means[group].items():
                ratio = a.ratios[group].get(f"{region} / {QUIET}")
                shown = "1" if ratio is None else show(ratio, False)
                cells.append((target, group, region, f"{e.n:,}", f"{e.clusters}", show(e, False), shown))
                ratios = {} if ratio is None else {f"ratio_{k}": getattr(ratio, k) for k in ("value", "low", "high")}
                records.append(
                    {"target": target, "group": group, "region": region, "judge": judge, **asdict(e), **ratios}
                )
    return Table(
        ("target", "group", "region", "n", "latents", "mean activation", "ratio to unsteered"),
        cells,
        "Mean over the region's tokens of the group's summed activation, episodes of two attempts that improve; 95 % "
        f"intervals clustered by latent. Judge: {judge}.",
        records,
        left=3,
    )


def test_table(found: Mapping[str, Activity], judge: str) -> Table:
    """One row per test."""
    cells, records = [], []
    for target, a in found.items():
        for (group, first, second), t in a.tests.items():
            gap = Estimate(t.difference, t.low, t.high, t.n_b, "")
            sizes = f"{t.n_b}" if t.paired else f"{t.n_b}, {t.n_a}"
            effects = ("-" if v is None else f"{v:+.2f}" for v in (t.cohens_d, t.cliffs_delta))
            ps = (p_value(v) for v in (t.p, t.holm, t.t_holm, t.rank_holm))
            cells.append((target, group, f"{second} − {first}", sizes, show(gap, False, sign=True), *ps, *effects))
            records.append({"target": target, "group": group, "a": first, "b": second, "judge": judge, **asdict(t)})
    return Table(
        ("target", "group", "test", "n", "difference", "p", "Holm", "t, Holm", "Wilcoxon, Holm", "d", "Cliff"),
        cells,
        "Within episodes paired, else of separate responses. p swaps the two within latents; t and Wilcoxon (signed "
        "rank or rank sum) take responses as independent; Holm over all tests of a target. d: Cohen's, pooled sd. "
        f"Judge: {judge}.",
        records,
        left=3,
    )


def _told(target: str, a: Activity) -> str:
    if ep.DETECTORS not in a.ratios:
        return f"{target}: {a.recorded.told}"
    quiet, drift = (a.ratios[ep.DETECTORS][f"off-topic / {b}"] for b in (QUIET, NO_RESTART))
    return (
        f"{target}: detectors off topic {number(quiet.value)} times as active as in unsteered responses, "
        f"{number(drift.value)} times as in steered ones without restart; {a.recorded.told}"
    )
