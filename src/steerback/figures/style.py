"""Style and output of all figures. This module does not depend on experiments or metrics.

Figures use matplotlib's Figure with the Agg canvas and never pyplot, so no global state changes.
"""

from __future__ import annotations

import hashlib
import html
import io
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec
from urllib.parse import quote

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.layout_engine import ConstrainedLayoutEngine

from steerback.errors import visible
from steerback.store.files import make_folder, write_atomic
from steerback.store.processes import in_halves

WIDTH = 85 / 25.4
"""Width of every figure in inches: one column of a paper, so that no figure has to be scaled down."""
GREY, LIGHT, INK = "#6b6b6b", "#d9d9d9", "#222222"
CAPTION_SIZE, DPI = 6.5, 300
DASHED, DOTTED = (0, (3, 2)), (0, (1, 1.5))

# Okabe and Ito (2008): distinguishable with all common colour vision deficiencies. Yellow is left out (too pale).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A4B00")
_FIXED = {
    "organism": PALETTE[0],
    "organism-control": GREY,
    "organism-s": PALETTE[5],
    "organism-l": "#003E66",
    "llama-3.3-70b": PALETTE[1],
    "llama-3.1-8b": PALETTE[4],
    "gemma-2-2b": PALETTE[3],
    "gemma-2-9b": PALETTE[2],
    "gemma-2-27b": PALETTE[6],
}
FONT = "DejaVu Sans"
# Labels of latents may be Chinese, Japanese or Korean, which FONT lacks.
_ALSO = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "PingFang SC"),
    *("Hiragino Sans GB", "Microsoft YaHei", "Malgun Gothic", "Arial Unicode MS"),
)
_RC = {
    "font.family": [FONT, *(name for name in _ALSO if name in fontManager.get_font_names())],
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": INK,
    "axes.axisbelow": True,
    "grid.color": "#ebebeb",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "hatch.linewidth": 0.7,
    "pdf.fonttype": 42,  # text stays text in the PDF
    "savefig.dpi": "figure",
}

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run a drawing function with the style's settings, and restore matplotlib's settings afterwards."""

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with rc_context(_RC):
            return draw(*args, **kwargs)

    return inside


def new_figure(height: float, caption: str) -> Figure:
    """Return an empty figure, one column wide and `height` inches high, with its caption (see `caption_of`)."""
    fig = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(fig)
    fig.set_label(visible(caption))
    # Notebooks display a figure made without pyplot only through this method: the image, and its width in pixels.
    fig._repr_png_ = lambda: (_rendered(fig, "png", {"Software": None}), {"width": 420})  # type: ignore[attr-defined]
    return fig


def _rendered(fig: Figure, kind: str, metadata: dict[str, Any], dpi: float | Literal["figure"] = "figure") -> bytes:
    """Return the content of an image file."""
    out = io.BytesIO()
    with rc_context(_RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)  # it becomes an empty box
        fig.savefig(out, format=kind, metadata=metadata, dpi=dpi)
    return out.getvalue()


def caption_of(fig: Figure) -> str:
    """Return the caption, one paragraph per line."""
    return str(fig.get_label())


def burn_in(fig: Figure) -> None:
    """Write the caption into the figure, below the drawing, for places that show only the image."""
    lines = _wrap(caption_of(fig), WIDTH * 72 * 0.975)
    engine, (width, height) = fig.get_layout_engine(), fig.get_size_inches()
    below = (len(lines) + 1.0) * CAPTION_SIZE * 1.3 / 72
    share = below / (height + below)
    fig.set_size_inches(width, height + below)
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0, share, 1, 1 - share))
    words = plain("\n".join(lines))
    fig.text(0.012, share - 0.003, words, va="top", fontsize=CAPTION_SIZE, color=INK, linespacing=1.3)


def _wrap(text: str, points: float) -> list[str]:
    """Return lines no wider than `points` at the caption's font size, measured with the font."""
    font = FontProperties(family=[FONT], size=CAPTION_SIZE)
    ruler = RendererAgg(1, 1, 720)  # ten dots per point

    def wide(word: str) -> float:
        return float(ruler.get_text_width_height_descent(word, font, ismath=False)[0]) / 10

    space = wide("a a") - wide("aa")
    lines = []
    for part in text.splitlines():
        line, length = "", 0.0
        for word in part.split():
            more = wide(word)
            if line and length + space + more > points:
                lines.append(line)
                line, length = word, more
            else:
                line, length = f"{line} {word}".strip(), length + (space if line else 0.0) + more
        lines.append(line)
    return lines


def colours(targets: Iterable[str]) -> dict[str, str]:
    """Return one colour per target, derived from the name, so that it is the same in every figure.

    Targets of the registry have fixed colours. Other names are hashed into the palette; a collision within one figure
    moves to the next free colour.
    """
    names = list(dict.fromkeys(targets))
    out = {name: _FIXED[name] for name in names if name in _FIXED}
    for name in sorted(set(names) - set(out)):
        start = int(hashlib.sha256(name.encode()).hexdigest(), 16)
        choices = [PALETTE[(start + i) % len(PALETTE)] for i in range(len(PALETTE))]
        out[name] = next((c for c in choices if c not in out.values()), choices[0])
    return {name: out[name] for name in names}


def plain(text: str) -> str:
    """Return text that is safe to draw: control characters are visible, and dollar signs start no formula."""
    return visible(text).replace("$", r"\$")


def shortened(text: str, places: int) -> str:
    """Return the beginning of a text that fills at most `places` Latin letters; a Chinese one is as wide as two."""
    for at, letter in enumerate(text):
        places -= 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if places < 0:
            return text[:at]
    return text


def message(ax: Axes, text: str) -> None:
    """Write a message into a panel that has nothing to show, and remove its meaningless y scale."""
    ax.set_yticks([])
    width = max(12, int(ax.get_window_extent().width / ax.figure.dpi * 15))
    words = plain(textwrap.fill(text, width))
    ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center", fontsize=7, color=GREY)


def save(fig: Figure, folder: Path, name: str, captions_inside: bool = False) -> list[Path]:
    """Write `name`.png and .pdf, the caption as `name`.caption.txt, and both together as `name`.html.

    Each file is written completely or not at all, and equal figures give equal bytes. `captions_inside` burns the
    caption into the image.
    """
    make_folder(folder)
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    }
    if captions_inside:
        burn_in(fig)
    images, engine = dict[str, bytes](), fig.get_layout_engine()
    try:
        for kind, fields in metadata.items():
            images[kind] = _rendered(fig, kind, fields)
            fig.set_layout_engine("none")  # the first rendering has laid the figure out, which takes as long as drawing
    finally:
        fig.set_layout_engine(engine)
    return _write_figure(folder, name, images, caption_of(fig), captions_inside)


def save_all(figures: Mapping[str, Callable[[], Figure]], folder: Path, captions_inside: bool = False) -> None:
    """Draw the figures, each under its name (`save`), and use two processes if possible."""

    def drawn(names: Sequence[str]) -> None:
        for name in names:
            save(figures[name](), folder, name, captions_inside)

    in_halves(drawn, [*figures])


def figure_names(folder: Path) -> list[str]:
    """Return the names of the figures that `save` has written into a folder."""
    return sorted(path.name.removesuffix(CAPTION) for path in folder.glob(f"*{CAPTION}"))


def copy_figure(folder: Path, name: str, out: Path, new_name: str) -> list[Path]:
    """Copy the files of a figure into another folder under a new name."""
    images = {kind: (folder / f"{name}.{kind}").read_bytes() for kind in ("png", "pdf")}
    caption = (folder / f"{name}{CAPTION}").read_text("utf-8").removesuffix("\n")
    inside = "<p>" not in (folder / f"{name}.html").read_text("utf-8")
    return _write_figure(make_folder(out), new_name, images, caption, inside)


def _write_figure(folder: Path, name: str, images: dict[str, bytes], caption: str, inside: bool) -> list[Path]:
    """Write images, caption and page of a figure. `inside`: the images contain the caption."""
    page = _PAGE.format(
        name=html.escape(name),
        image=quote(f"{name}.png"),
        caption="" if inside else "".join(f"<p>{html.escape(line)}</p>" for line in caption.splitlines()),
    )
    files = {f".{kind}": image for kind, image in images.items()}
    files |= {CAPTION: f"{caption}\n".encode(), ".html": page.encode()}
    return [write_atomic(folder / f"{name}{suffix}", content) for suffix, content in files.items()]


CAPTION = ".caption.txt"
"""Ending of the name of a figure's caption."""
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{name}</title>
<style>body {{ margin: 2rem auto; max-width: 40rem; padding: 0 1rem; font: 1rem/1.5 sans-serif; background: #fff;
color: #222 }} figure {{ margin: 0 }} img {{ width: 100% }} figcaption p {{ margin: .5rem 0 }}</style>
<figure><img src="{image}" alt="{name}"><figcaption>{caption}</figcaption></figure>
</html>
"""


def png(fig: Figure, dpi: int = 150) -> bytes:
    """Return the figure as a PNG image, for pages with embedded figures."""
    return _rendered(fig, "png", {"Software": None}, dpi)
