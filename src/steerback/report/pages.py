"""Shared parts of all self-contained HTML pages: template, content security policy, embedded data.

A page is one file that needs no network. Untrusted text is embedded only as data: JSON without HTML's special
characters, or compressed bytes in base64. The page's scripts set it as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def render(template: str, styles: Sequence[str], scripts: Sequence[str], values: dict[str, object], images: str) -> str:
    """Return a page from a template and the files of its styles and scripts.

    `values` are escaped unless they are Markup. The policy allows only these styles and scripts, and images from
    `images` (a policy source such as "data:", or "'none'").
    """
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    style, script = ("".join((HERE / name).read_text("utf-8") for name in names) for names in (styles, scripts))
    script = f'(() => {{\n"use strict";\n{script}}})();\n'
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src {images}; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, keep_trailing_newline=True)
    shared = {"policy": policy, "style": Markup(style), "script": Markup(script)}
    return environment.get_template(template).render(**shared, **values)


def _hash(source: str) -> str:
    """Return the source expression of an inline script or style for a content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode('utf-8')).digest()).decode('ascii')}'"


def json_in_html(value: object) -> str:
    """Return JSON in ASCII without HTML's special characters."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def packed(value: object) -> str:
    """Return JSON as compressed bytes (zlib) in base64; the page's script unpacks it on demand."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode("ascii"), 6)).decode("ascii")
