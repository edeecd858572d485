"""Recovery without a restart phrase: its table, and mean relevance of sentences against position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from steerback.figures import style
from steerback.figures.tables import Table, show
from steerback.metrics.recovery import Recovery

if TYPE_CHECKING:
    from steerback.analysis.base import Measured

RATES = ("recovered", "silent", "shuffled", "above")


def recovery_table(measured: Measured) -> Table:
    """Return one row per condition: recovered, recovered without restart, and both false-positive floors."""
    recovery, rule = measured.recovery, measured.recovery.rule
    cells, records = [], []
    for (target, condition), r in recovery.conditions.items():
        floor = recovery.floors.get((target, condition))
        rates = [show(e, rate=True) for e in (r.recovered, r.silent, r.shuffled)]
        unsteered = ["-", "-"] if floor is None else [show(e, rate=True) for e in (floor.recovered, floor.shuffled)]
        above = show(r.above, rate=True, sign=True)
        cells.append((target, condition, f"{r.n:,}", *rates, above, *unsteered, f"{r.short:,}"))
        records.append(
            {"target": target, "condition": condition, "judge": measured.judge, "n": r.n, "short": r.short}
            | _numbers("", r)
            | ({} if floor is None else {"unsteered_n": floor.n} | _numbers("unsteered_", floor))
        )
    columns = ("recovered %", "without restart %", "shuffled %", "above shuffled", "floor %", "floor shuffled %")
    caption = (
        f"Recovery, whether or not there is a restart phrase: of the sentences that judge {measured.judge} scored, one "
        f"in the first {rule.early:.0%} scores at most {rule.low:g} and all later ones at least {rule.high:g}. Without "
        "restart: in a single attempt. Shuffled: the same sentences in all orders. Floor: unsteered responses, "
        "clustered by prompt. 95 % intervals clustered by latent; "
        f"short: fewer than {rule.least} sentences. No other rate uses it."
    )
    return Table(("target", "condition", "n", *columns, "short"), cells, caption, records, left=2)


def _numbers(prefix: str, recovery: Recovery) -> dict[str, object]:
    return {
        f"{prefix}{name}_{end}": getattr(getattr(recovery, name), end)
        for name in RATES
        for end in ("value", "low", "high")
    }


@style.styled
def draw_time_course(measured: Measured, note: str = "") -> Figure:
    """Draw mean relevance of the sentences by position with 95 % bands: a panel per target, a line per condition."""
    recovery = measured.recovery
    targets = list(dict.fromkeys(target for target, _ in recovery.conditions)) or [""]
    most = max((sum(t == target for t, _ in recovery.conditions) for target in targets), default=1)
    caption = (
        "Mean relevance of a response's sentences to the prompt, by position. Bands: 95 % intervals, clustered "
        f"by latent (unsteered: by prompt). Judge: {measured.judge}. {note}"
    )
    below = 0.14 * (most + 1)  # the legend of each panel
    fig = style.new_figure(len(targets) * (1.7 + below), caption.strip())
    axes = fig.subplots(len(targets), 1, squeeze=False)[:, 0]
    for ax, target in zip(axes, targets, strict=True):
        conditions = {c: r for (t, c), r in recovery.conditions.items() if t == target}
        floor = next((r for (t, _), r in recovery.floors.items() if t == target), None)
        _panel(ax, target, conditions, floor, several=len(targets) > 1)
    return fig


def _panel(ax: Axes, target: str, shown: Mapping[str, Recovery], floor: Recovery | None, several: bool) -> None:
    if several:
        ax.set_title(style.plain(target), loc="left", pad=2)
    if floor is not None:
        _line(ax, floor, style.GREY, f"unsteered (n = {floor.n:,})", dashed=True)
    alpha = 0.14 if len(shown) <= 3 else 0.06  # many overlapping bands must stay transparent
    colours: Sequence[str] = style.PALETTE[: len(shown)]
    if len(shown) > len(style.PALETTE):  # a scale in the order of the conditions has enough colours
        colours = [to_hex(colormaps["viridis"](x)) for x in np.linspace(0, 0.92, len(shown))]
    for (condition, r), colour in zip(shown.items(), colours, strict=True):
        _line(ax, r, colour, f"{style.plain(condition)} (n = {r.n:,})", alpha=alpha)
    if not any(r.n for r in shown.values()):
        style.message(ax, "no response with enough sentences")
        return
    ax.set_ylim(0, 100)
    ax.set_xlim(0, 100)
    ax.set_ylabel("relevance (points)")
    ax.grid(axis="y")
    ax.set_xlabel("position in the response (%)")
    long = max(len(label) for label in ax.get_legend_handles_labels()[1]) > 34
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=1 if long else 2, fontsize=6, columnspacing=1.0)


def _line(ax: Axes, recovery: Recovery, colour: str, label: str, dashed: bool = False, alpha: float = 0.14) -> None:
    if not recovery.n:
        return
    values = [(e.value, e.low, e.high) for e in recovery.course]
    mean, low, high = (np.array([np.nan if x is None else x for x in c]) for c in zip(*values, strict=True))
    x = 100 * (np.arange(len(mean)) + 0.5) / len(mean)
    ax.fill_between(x, low, high, color=colour, alpha=alpha, linewidth=0)
    ax.plot(x, mean, color=colour, label=label, linestyle="--" if dashed else "-")
