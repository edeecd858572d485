"""Figures: legible for any data, reproducible byte by byte, written completely or not at all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import BinaryIO

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection

from steerback.analysis.calibration import CalibratedLatent
from steerback.calibration import Calibrator
from steerback.figures import episode_statistics, esr, panels, style, traces
from steerback.figures.calibration import COLUMNS, draw_calibration
from steerback.metrics import Estimate, Outcomes, Summary, summarize
from steerback.records import BoostPrior


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


@pytest.mark.parametrize("burned", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_figure_2_is_drawn_legibly_from_any_data(name: str, burned: bool) -> None:
    fig = esr.draw(CASES[name], judge="offline", note="Planted.")
    if burned:
        style.burn_in(fig)
    fig.canvas.draw()
    assert fig.get_size_inches()[0] == pytest.approx(85 / 25.4)
    drawn, (width_in, height_in) = fig.get_tightbbox(fig.canvas.get_renderer()), fig.get_size_inches()
    assert drawn.x0 >= -0.01, "cut at the left"
    assert drawn.y0 >= -0.01, "cut at the bottom"
    assert drawn.x1 <= width_in + 0.01, "cut at the right"
    assert drawn.y1 <= height_in + 0.01, "cut at the top"
    import matplotlib.text

    assert all(t.get_fontsize() >= 6 for t in fig.findobj(matplotlib.text.Text) if t.get_text())
    caption, everything = style.caption_of(fig), " ".join(texts(fig)).replace("\n", " ")
    assert "Judge: offline" in caption
    assert ("Judge: offline" in everything) is burned
    assert "Planted." in caption
    for found in CASES[name].values():
        assert f"n = {len(found[0]):,}" in caption
        assert f"n = {len(found[0]):,}" in everything
    assert all(ax.get_ylim()[1] <= 100 for ax in fig.findobj(Axes) if "share" in ax.get_ylabel())


@pytest.mark.parametrize("latents", [panels.FEWEST - 1, panels.FEWEST])
def test_no_interval_is_drawn_from_too_few_latents(latents: int) -> None:
    fig = esr.draw({"organism": outcomes(60, latents)}, judge="offline")
    bars = next(ax for ax in fig.findobj(Axes) if "share" in ax.get_ylabel())
    assert (panels.TOO_FEW in texts(fig)) is (latents < panels.FEWEST)
    assert any(type(c).__name__ == "ErrorbarContainer" for c in bars.containers) is (latents >= panels.FEWEST)


@pytest.mark.parametrize("upright", [False, True])
def test_a_point_at_zero_is_drawn_whole(upright: bool) -> None:
    fig = style.new_figure(1, "")
    ax = fig.subplots()
    panels.whisker(ax, 0.0, (0.0, 0.0, 3.0), "red", upright=upright)
    panels.bounded(ax, "esr_rate", "y" if upright else "x")
    assert (ax.get_ylim() if upright else ax.get_xlim())[0] == 0
    assert not any(part.get_clip_on() for c in ax.containers for part in c.get_children())


@pytest.mark.parametrize(("metric", "top"), [("multi_attempt_rate", 100), ("mean_first", 100), ("esr_rate", 100)])
def test_axes_end_where_a_metric_does(metric: str, top: float) -> None:
    ax = style.new_figure(1, "").subplots()
    panels.curve(ax, metric, [(x, Estimate(0.99, 0.9, 1.0, 9, "", 9, 9)) for x in (0.0, 1.0)], "red")
    ax.set_ylim(-7, 123)
    panels.bounded(ax, metric)
    assert ax.get_ylim() == (0, top)
    ax.set_ylim(0, 1e-19)
    panels.bounded(ax, metric)
    assert metric == "mean_first" or ax.get_ylim() == (0, 1)


def test_figures_can_be_told_apart_by_colour_blind_readers_region_by_region() -> None:
    shades = [traces.SHADES[name] for name in ("off topic", "correction", "on topic")]
    assert min(luminance_and_distance(a, b) for i, a in enumerate(shades) for b in shades[i + 1 :]) > 12
    lines = [*traces.LINES.values()]
    assert min(luminance_and_distance(a, b) for i, a in enumerate(lines) for b in lines[i + 1 :]) > 12
    kinds = [colour for colour, *_ in episode_statistics.LOOKS.values()]
    assert min(luminance_and_distance(a, b) for i, a in enumerate(kinds) for b in kinds[i + 1 :]) > 12


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


@pytest.mark.rendered
def test_saved_files_are_whole_and_the_same_every_time(tmp_path: Path) -> None:
    first = style.save(esr.draw(CASES["usual"], judge="offline"), tmp_path / "a", "figure2")
    second = style.save(esr.draw(CASES["usual"], judge="offline"), tmp_path / "b", "figure2")
    assert [p.name for p in first] == ["figure2.png", "figure2.pdf", "figure2.caption.txt", "figure2.html"]
    for p, q in zip(first, second, strict=True):
        assert p.read_bytes() == q.read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(p.name for p in first)
    assert b"CreationDate" not in first[1].read_bytes()


@pytest.mark.rendered("png")
def test_a_label_in_a_script_that_the_font_lacks_prints_no_warning(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    fig = style.new_figure(1.0, "Caption.")
    fig.text(0.1, 0.5, "简单机器")  # a label that `sae train` made for Qwen2.5
    style.save(fig, tmp_path, "figure")
    assert not [str(w.message) for w in recwarn if "Glyph" in str(w.message)]


def test_the_caption_is_a_text_file_and_a_page_whatever_it_holds(tmp_path: Path) -> None:
    fig = style.new_figure(1, "A <b>name</b> & $x$\nsecond line")
    *_, text, page = style.save(fig, tmp_path, "a figure")
    assert text.read_text() == "A <b>name</b> & $x$\nsecond line\n"
    assert "<p>A &lt;b&gt;name&lt;/b&gt; &amp; $x$</p><p>second line</p>" in page.read_text()
    assert 'src="a%20figure.png"' in page.read_text()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fig = esr.draw(CASES["usual"], judge="offline")
    paths = style.save(fig, tmp_path, "x")
    before = paths[0].read_bytes()

    def broken(out: BinaryIO, **kwargs: object) -> None:
        out.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(fig, "savefig", broken)
    with pytest.raises(OSError, match="disk full"):
        style.save(fig, tmp_path, "x")
    assert paths[0].read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 4


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


def calibrated(number: int, middle: float) -> CalibratedLatent:
    calibrator = Calibrator(BoostPrior(middle, 5, 0, 2 * middle))
    tried = []
    while (boost := calibrator.next_boost()) is not None:
        score = min(max(50 - 6 * (boost - middle) + number, 0), 100)
        calibrator.update(boost, [score] * 3)
        tried += [(boost, score)] * 3
    return CalibratedLatent(number, "a label of some length", calibrator.finish(), tried)


@pytest.mark.parametrize("n", [0, 1, 2, 7])
@pytest.mark.parametrize("burned", [False, True])
def test_calibration_is_drawn_where_the_ticks_of_each_panel_say(n: int, burned: bool) -> None:
    latents = [
        calibrated(number, middle) for number, middle in zip(range(n), (10, 3, 1e-3, 400, 25, 7, 60), strict=False)
    ]
    fig = draw_calibration("organism", latents, "offline")
    if burned:
        style.burn_in(fig)
    fig.canvas.draw()
    box, (width, height) = fig.get_tightbbox(fig.canvas.get_renderer()), fig.get_size_inches()
    assert -0.01 <= box.x0 <= box.x1 <= width + 0.01
    assert -0.01 <= box.y0 <= box.y1 <= height + 0.01
    (ax,) = fig.axes
    clouds = [c for c in ax.collections if isinstance(c, PathCollection)]
    assert len(clouds) == n
    ticks = [(t.get_text(), t.get_position(), t.get_ha()) for t in ax.texts if re.fullmatch(r"[-\d.e]+", t.get_text())]
    for number, (cloud, latent) in enumerate(zip(clouds, latents, strict=True)):
        row, column = divmod(number, COLUMNS)
        at = (cloud.get_offset_transform() - ax.transData).transform(cloud.get_offsets())
        assert (at > (column, row)).all()
        assert (at < (column + 1, row + 1)).all()
        boosts = [(float(s), x) for s, (x, y), ha in ticks if ha == "center" and (int(x), int(y)) == (column, row)]
        scores = [(float(s), y) for s, (_, y), ha in ticks if ha == "right" and int(y) == row]
        shown = sorted(set(latent.tried))
        for known, where, wanted in ((boosts, at[:, 0], 0), (scores, at[:, 1], 1)):
            assert len(known) >= 2
            slope, start = np.polyfit([v for v, _ in known], [p for _, p in known], 1)
            np.testing.assert_allclose(where, [slope * point[wanted] + start for point in shown], atol=1e-6)
