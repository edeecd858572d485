"""Page about a trained SAE: quality by layer, the verdict of `doctor`, and labels with their example passages.

The page is one file without network access or scripts. Model text is escaped.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from steerback.errors import visible
from steerback.report import pages
from steerback.store.files import write_atomic

SHOWN = 60
"""Number of labels on the page."""
BAR = 160
"""Width of a full bar in pixels."""


@dataclass(frozen=True, slots=True)
class LayerRow:
    """Quality of one layer: explained variance, L0 and recovered loss, each on (unrelated texts, the model's
    responses).
    """

    layer: int
    best: bool
    explained: tuple[float, float]
    l0: tuple[float, float]
    dead: float
    recovered: tuple[float, float]
    nats: tuple[float, float, float]
    """Loss on unrelated texts: of the unchanged model, with the SAE's output, and with zeros."""


@dataclass(frozen=True, slots=True)
class SaePage:
    """Content of the page."""

    name: str
    summary: str
    layers: Sequence[LayerRow]
    n_latents: int
    dead_after: int
    measured: int
    labels: Mapping[int, str]
    contexts: Mapping[int, tuple[str, ...]]
    """Passages by latent, with the word at the peak between « and »."""
    verdict: str
    doctor: Sequence[str]
    facts: Sequence[tuple[str, str]]
    table: str


def write_sae_page(path: Path, page: SaePage) -> Path:
    """Write the page to `path`."""
    drawn = sorted(random.Random(0).sample(sorted(page.labels), min(SHOWN, len(page.labels))))
    labels = [
        {
            "latent": k,
            "label": visible(page.labels[k]),
            "contexts": [_context(text) for text in page.contexts.get(k, ())[:3]],
        }
        for k in drawn
    ]
    values: dict[str, object] = {
        "page": page,
        "layers": [_layer(row) for row in page.layers],
        "doctor": [visible(line) for line in page.doctor],
        "labels": labels,
    }
    html = pages.render("sae.html", ["sae.css"], [], values, images="'none'")
    return write_atomic(path, html.encode("utf-8"))


def _layer(row: LayerRow) -> dict[str, object]:
    foreign, own = (f"{share:.3f}" for share in row.explained)
    plain, replaced, zero = row.nats
    return {
        "layer": row.layer,
        "best": row.best,
        "foreign": foreign,
        "own": own,
        "bar": round(BAR * min(max(row.explained[0], 0), 1)),
        "l0_foreign": f"{row.l0[0]:.1f}",
        "l0_own": f"{row.l0[1]:.1f}",
        "dead": f"{row.dead:.2%}",
        "loss_foreign": f"{row.recovered[0]:.3f}",
        "loss_own": f"{row.recovered[1]:.3f}",
        "nats": f"{plain:.3f} unchanged, {replaced:.3f} with the SAE, {zero:.3f} with zeros",
    }


def _context(marked: str) -> dict[str, str]:
    before, _, rest = marked.partition("«")
    word, _, after = rest.partition("»")
    return {"before": visible(before), "word": visible(word), "after": visible(after)}
