"""Figures: readable with any data, the same bytes every time, whole files or none."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest

from steerback.figures import esr, style
from steerback.metrics import Outcomes, Summary, summarize


def outcomes(n: int, latents: int = 4, rate: float = 0.3, seed: int = 0) -> tuple[Outcomes, Summary]:
    rng = np.random.default_rng(seed)
    first = rng.uniform(0, 100, n)
    multi = rng.random(n) < rate
    last, attempts = np.where(multi, rng.uniform(0, 100, n), first), np.where(multi, 2, 1)
    found = Outcomes(
        np.arange(n) % latents, np.arange(n), np.zeros(n), attempts, first, last, attempts, first, last, np.zeros(n)
    )
    return found, summarize(found, draws=20)


CASES = {
    "usual": {"organism": outcomes(400, 20), "organism-control": outcomes(400, 20, 0)},
    "five": {name: outcomes(100, seed=i) for i, name in enumerate(list(style._FIXED)[-5:])},
    "nothing": {},
    "no trial": {"organism": outcomes(0)},
    "one trial": {"my_model $x$ with quite a long name": outcomes(1, rate=1)},
    "always": {"organism": outcomes(6, 3, rate=1)},
}


def texts(fig) -> list[str]:
    import matplotlib.text

    return [t.get_text() for t in fig.findobj(matplotlib.text.Text) if t.get_text() and t.get_visible()]


@pytest.mark.parametrize("width", ["column", "full"])
@pytest.mark.parametrize("name", CASES)
def test_figure_2_is_drawn_legibly_from_any_data(name, width) -> None:
    fig = esr.draw(CASES[name], judge="offline", note="Planted.", width=width)
    fig.canvas.draw()
    assert fig.get_size_inches()[0] == style.INCHES[width]
    drawn, (width_in, height_in) = fig.get_tightbbox(fig.canvas.get_renderer()), fig.get_size_inches()
    assert drawn.x0 >= -0.01, "cut at the left"
    assert drawn.y0 >= -0.01, "cut at the bottom"
    assert drawn.x1 <= width_in + 0.01, "cut at the right"
    assert drawn.y1 <= height_in + 0.01, "cut at the top"
    import matplotlib.text

    assert all(t.get_fontsize() >= 6 for t in fig.findobj(matplotlib.text.Text) if t.get_text())
    everything = " ".join(texts(fig)).replace("\n", " ")
    assert "Judge: offline" in everything
    assert "Planted." in everything
    for found in CASES[name].values():
        assert f"n = {len(found[0]):,}" in everything


def test_figure_2_shows_the_numbers_of_the_summary() -> None:
    data = CASES["usual"]
    fig = esr.draw(data, judge="offline")
    rate = data["organism"][1]["multi_attempt_rate"]
    assert f"{100 * rate.value:.1f}" in texts(fig)
    high = 100 * data["organism-control"][1]["multi_attempt_rate"].high
    assert f"0\n(≤ {high:.{1 if high >= 1 else 2}f})" in texts(fig)
    assert "no second attempt in 400 responses" in texts(fig)
    bars = [p for ax in fig.axes for p in ax.patches]
    assert any(abs(p.get_height() - 100 * rate.value) < 1e-9 for p in bars)
    multi = int(np.sum(data["organism"][0].attempts > 1))
    histogram = fig.findobj(lambda a: hasattr(a, "patches") and hasattr(a, "get_xlim"))[0]
    assert sum(p.get_height() for p in histogram.patches) == multi


def test_saved_files_are_whole_and_the_same_every_time(tmp_path: Path) -> None:
    first = style.save(esr.draw(CASES["usual"], judge="offline"), tmp_path / "a", "figure2")
    second = style.save(esr.draw(CASES["usual"], judge="offline"), tmp_path / "b", "figure2")
    assert [p.name for p in first] == ["figure2.png", "figure2.pdf"]
    for p, q in zip(first, second, strict=True):
        assert p.read_bytes() == q.read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["figure2.pdf", "figure2.png"]
    assert b"CreationDate" not in first[1].read_bytes()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fig = esr.draw(CASES["usual"], judge="offline")
    paths = style.save(fig, tmp_path, "x")
    before = paths[0].read_bytes()

    def broken(path, **kwargs) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(fig, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        style.save(fig, tmp_path, "x")
    assert paths[0].read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_global_changes() -> None:
    import sys

    before = dict(matplotlib.rcParams)
    esr.draw(CASES["usual"], judge="offline")
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_a_target_has_one_colour_everywhere() -> None:
    alone = {name: style.colours([name])[name] for name in (*style._FIXED, "mine", "yours")}
    together = style.colours(list(alone))
    assert all(together[name] == alone[name] for name in style._FIXED)
    assert len(set(style._FIXED.values())) == len(style._FIXED)
    assert style.colours(["b", "a"]) == style.colours(["a", "b"])
    assert len(set(style.colours(f"own-{i}" for i in range(5)).values())) == 5


def luminance_and_distance(a: str, b: str) -> float:
    """Smallest CIELAB distance of two colours as seen with protanopia, deuteranopia and without (Vienot 1999)."""
    matrices = {
        "normal": np.eye(3),
        "protan": np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]]),
        "deutan": np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]]),
    }

    def lab(colour: str, m: np.ndarray) -> np.ndarray:
        srgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        linear = np.clip(m @ linear, 0, 1)
        xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
        f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    return min(float(np.linalg.norm(lab(a, m) - lab(b, m))) for m in matrices.values())


def test_targets_shown_together_differ_for_colour_blind_readers() -> None:
    for names in (["organism", "organism-control", "organism-s", "organism-l"], list(style._FIXED)[-5:]):
        colours = list(style.colours(names).values())
        worst = min(luminance_and_distance(a, b) for i, a in enumerate(colours) for b in colours[i + 1 :])
        assert worst > 12, names
