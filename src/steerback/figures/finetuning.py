"""Figure 6: what fine-tuning on self-corrections does, against their share in the training data; loss curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steerback.figures import panels, style
from steerback.figures.conditions import caption, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from steerback.experiments.base import Measured

SHOWN = ("mean_attempts", "multi_attempt_rate", "improvement_rate", "esr_rate", "msi", "mean_first")
LINES = (
    ("", style.PALETTE[0], "steered"),
    (" held-out", style.PALETTE[1], "steered, held-out"),
    (" unsteered", style.GREY, "unsteered"),
    (" held-out unsteered", style.PALETTE[3], "unsteered, held-out"),
)
"""What each line is: suffix of the conditions' names, colour, words."""
FEWEST = 5
"""A base's value over fewer responses is not drawn: without an interval a line looks surer than one response is."""


@style.styled
def draw(found: Measured, facts: Mapping[str, Mapping[str, Any]], note: str = "") -> Figure:
    """Six metrics against the mix; dashed: the base, steered on the same prompts. One row of panels pair per base."""
    text = (
        "Dashed: the model without adapter, at its own thresholds; thresholds are calibrated anew for every adapter. "
        "Held-out: on prompts that no adapter met in training. "
    )
    fig, drawing = style.new_figure("full", 3.5, caption(found, text + note, [n for _, n in found.summaries]))
    axes = drawing.subplots(2, 3, sharex=True, squeeze=False)
    target = found.targets[0] if found.targets else ""
    for ax, metric in zip(axes.flat, SHOWN, strict=True):
        for suffix, colour, _ in LINES:
            points = _points(found, target, facts, suffix)
            if suffix.endswith("unsteered") and metric in ("improvement_rate", "esr_rate", "msi"):
                continue  # without restarts these say nothing, with a few they are noise
            panels.curve(ax, metric, [(x, found.summaries[target, n][metric]) for x, n in points], colour)
            if (target, f"base{suffix}") in found.summaries:
                _base(ax, metric, found, target, suffix, colour)
        ax.set_ylabel(panels.axis_label(metric))
        ax.grid(axis="y")
        if not found.summaries:
            style.message(ax, "nothing was measured")
    for ax in axes[1]:
        ax.set_xlabel("self-corrections in training (%)")
    _legend(drawing)
    return fig


def _points(
    found: Measured, target: str, facts: Mapping[str, Mapping[str, Any]], suffix: str
) -> Sequence[tuple[float, str]]:
    named = [
        (float(fact["percent"]), f"{fact['adapter']}{suffix}")
        for fact in facts.values()
        if fact["base"] == target and fact["percent"] is not None
    ]
    return sorted((x, name) for x, name in named if (target, name) in found.summaries)


def _base(ax: Axes, metric: str, found: Measured, target: str, suffix: str, colour: str) -> None:
    estimate = found.summaries[target, f"base{suffix}"][metric]
    span = panels.span(metric, estimate)
    if span is not None and estimate.n >= FEWEST:
        ax.axhline(span[0], color=colour, linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)


def _legend(drawing: Any) -> None:
    from matplotlib.lines import Line2D

    entries = [(Line2D([], [], color=colour, marker="o"), name) for _, colour, name in LINES]
    legend(drawing, {}, [*entries, (Line2D([], [], color=style.INK, linestyle=(0, (4, 2))), "without adapter")])


@style.styled
def draw_losses(curves: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Training and validation losses (trained and masked tokens) by step; one panel per adapter (losses.json)."""
    text = "Loss per token. Training: trained tokens. Validation: trained tokens, and the tokens that are masked."
    fig, drawing = style.new_figure("full", 1.9 * -(-len(curves) // 3), text)
    rows = -(-len(curves) // 3)
    axes = drawing.subplots(rows, min(3, len(curves)), squeeze=False, sharey=True)
    for ax in axes.flat[len(curves) :]:
        ax.set_visible(False)
    for ax, (name, losses) in zip(axes.flat, curves.items(), strict=False):
        training, validation = losses["training"], losses["validation"]
        ax.plot([p["step"] for p in training], [p["loss"] for p in training], color=style.LIGHT, label="training")
        for part, colour in (("trained", style.PALETTE[0]), ("masked", style.PALETTE[1])):
            known = [p for p in validation if p[part] is not None]
            ax.plot(
                [p["step"] for p in known], [p[part] for p in known], "o-", color=colour, label=f"validation, {part}"
            )
        ax.set_title(style.plain(name))
        ax.set_xlabel("step")
        ax.grid(axis="y")
    axes[0, 0].set_ylabel("loss")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside upper center", ncols=3)
    return fig
