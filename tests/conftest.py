"""Settings that make the test suite quick: no rendering without the mark `rendered`, rare garbage collection.

Rendering takes about one second per figure, mostly for PDF fonts. In tests without the mark each figure is built,
captioned and written with a blank image.
"""

from __future__ import annotations

import functools
import gc
import io
import ssl
from collections.abc import Iterator
from typing import IO, Any

import pytest
from hypothesis import settings
from matplotlib.figure import Figure

settings.register_profile("the same examples every time", derandomize=True, database=None, deadline=None)
settings.load_profile("the same examples every time")
render = Figure.savefig
rendered: tuple[str, ...] = ()


@functools.cache
def blank(kind: str) -> bytes:
    """An empty image of 240 x 240 points."""
    out = io.BytesIO()
    render(Figure(figsize=(240 / 72, 240 / 72), dpi=72), out, format=kind)
    return out.getvalue()


def savefig(fig: Figure, out: IO[bytes], *, format: str, **options: Any) -> None:
    """`Figure.savefig` as this package calls it."""
    if format in rendered:
        render(fig, out, format=format, **options)
    else:
        out.write(blank(format))


def pytest_configure(config: pytest.Config) -> None:
    Figure.savefig = savefig  # type: ignore[method-assign]
    # each client of a judge or of the hub reads all certificates of the machine again
    ssl.create_default_context = functools.cache(ssl.create_default_context)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Render figures in a marked test and in its fixtures, as PNG and PDF or in the formats that the mark names."""
    global rendered
    mark = item.get_closest_marker("rendered")
    rendered = () if mark is None else mark.args or ("png", "pdf")
    return (yield)


@pytest.fixture(scope="module", autouse=True)
def _freeze_imports() -> None:
    """Keep what was imported out of garbage collections, which take 0.1 s each in a process with every library."""
    gc.collect()
    gc.freeze()
