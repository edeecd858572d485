"""Detectors of each target: how well they separate on searched and on held-out prompts, beside what chance gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from steerback.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from steerback.experiments.detectors import Detectors

MOST = 30  # rows that stay legible
CHANCE = (0, (3, 2))


@style.styled
def draw(found: Mapping[str, Detectors], note: str = "") -> Figure:
    """Left: AUC of each detector on both halves. Right: how many latents separate, against swapped labels."""
    rows = [max(min(len(d.latents), MOST), 4) for d in found.values()] or [4]
    fig, drawing = style.new_figure("full", 0.145 * sum(rows) + 0.75 * len(rows) + 0.15, _caption(found, note))
    axes = drawing.subplots(len(rows), 2, width_ratios=[1.7, 1], height_ratios=rows, squeeze=False)
    colours = style.colours(found)
    for (left, right), (target, detectors) in zip(axes, found.items(), strict=False):
        _separation(left, detectors, colours[target])
        _counts(right, detectors.stored["search"], colours[target])
        left.set_title(style.plain(target), loc="left", color=colours[target], fontweight="bold", pad=3)
    _legend(drawing)
    if not found:
        for ax in axes.flat:
            style.message(ax, "no target was searched")
    return fig


def _separation(ax: Axes, detectors: Detectors, colour: str) -> None:
    entries = detectors.stored["detectors"][:MOST]
    if not entries:
        style.message(ax, "no latent separates matched from mismatched pairs")
        return
    searched = [e["auc"] for e in entries]
    held_out = [(e["held_out_auc"], y) for y, e in enumerate(entries) if e["held_out_auc"] is not None]
    if held_out:
        ax.plot(*zip(*held_out, strict=True), "o", color=colour)
        limit = detectors.stored["search"]["held_out"]["max_auc_null"]
        ax.axvline(limit, color=style.GREY, linewidth=0.8, linestyle=CHANCE)
    ax.plot(searched, range(len(entries)), "o", color=colour, markerfacecolor="none", markersize=6)
    names = [f"{e['latent']} {(e['label'] or '')[:34]}".strip() for e in entries]
    ax.set_yticks(range(len(entries)), [style.plain(n) for n in names], fontsize=6)
    ax.set_ylim(len(entries) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("AUC, mismatched over matched")
    ax.grid(axis="x")


def _counts(ax: Axes, search: Mapping[str, Any] | None, colour: str) -> None:
    """Observed counts as bars, chance as its mean with the reach to the 95th percentile."""
    if search is None:
        style.message(ax, "named by hand, not searched")
        return
    halves = [("searched,\nall latents", search["search"]), ("held out,\ndetectors", search["held_out"])]
    kinds = [("AUC 1", "perfect"), ("AUC ≥ 0.9", "high_auc")]
    cells = [(f"{kind}\n{name}", half[key]) for name, half in halves if half for kind, key in kinds]
    for x, (_, null) in enumerate(cells):
        ax.bar(x - 0.18, null["observed"], 0.34, color=colour)
        ax.bar(x + 0.18, null["expected"], 0.34, color=style.LIGHT)
        reach = max(null["high"] - null["expected"], 0.0)
        ax.errorbar(x + 0.18, null["expected"], [[0], [reach]], fmt="none", ecolor=style.INK, elinewidth=0.8, capsize=2)
        ax.annotate(
            f"{null['observed']:,}",
            (x - 0.18, null["observed"]),
            xytext=(0, 1.5),
            textcoords="offset points",
            ha="center",
            fontsize=6.5,
        )
    ax.set_xticks(range(len(cells)), [name for name, _ in cells], fontsize=6)
    ax.tick_params(axis="x", length=0)
    ax.set_ylabel("latents")
    ax.margins(y=0.15)
    ax.grid(axis="y")


def _legend(fig: SubFigure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    ink: dict[str, Any] = {"color": style.INK, "linestyle": "none", "marker": "o"}
    handles = [
        Line2D([], [], markerfacecolor="none", markersize=6, label="searched prompts", **ink),
        Line2D([], [], label="held-out prompts", **ink),
        Line2D([], [], color=style.GREY, linestyle=CHANCE, label="95 % of the largest by chance, held out"),
        Patch(color=style.INK, label="observed"),
        Patch(color=style.LIGHT, label="labels swapped"),
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=6.5, columnspacing=1.2)


def _caption(found: Mapping[str, Detectors], note: str) -> str:
    lines = [
        "Left: separation of responses after another prompt from the same responses after their own, pooled by "
        "maximum. Right: latents at each level beside their number when labels are swapped prompt by prompt (mean and "
        f"95th percentile). Not judged. {note}".strip()
    ]
    for target, detectors in found.items():
        search = detectors.stored["search"]
        said = (
            "named by hand"
            if search is None
            else f"{detectors.stored['source']}; "
            + ", ".join(
                f"{half['n_texts']} responses to {half['n_prompts']} prompts {name}"
                for name, half in (("searched", search["search"]), ("held out", search["held_out"]))
                if half
            )
        )
        plural = "s" * (len(detectors.latents) != 1)
        more = f", the best {MOST} shown" if len(detectors.latents) > MOST else ""
        lines.append(f"{target}: {len(detectors.latents)} detector{plural}{more} ({said}).")
    return "\n".join(lines)
