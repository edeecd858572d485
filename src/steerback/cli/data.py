"""The verb that fetches the authors' public data."""

from __future__ import annotations

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Adds the verb to the command line."""
    app.command("fetch-paper-data")(fetch_paper_data)


def fetch_paper_data(
    labels: Annotated[bool, typer.Option(help="Labels of the Gemma SAEs as well (hundreds of MB).")] = True,
) -> None:
    """Download the authors' prompts, detectors and labels into your own folder, for the preset authors."""
    from steerback.cli.labels import fetch
    from steerback.data import paper_files as paper_data
    from steerback.targets.download import download

    found = paper_data.fetch(lambda url, path, sha256: download(url, path, sha256=sha256))
    for name, path in found.items():
        print(f"{path}: {paper_data.FILES[name].what}, SHA-256 {paper_data.FILES[name].sha256[:16]}...")
    print(
        f"of https://github.com/{paper_data.REPOSITORY} at {paper_data.COMMIT[:12]}; the preset authors uses them now"
    )
    for target in paper_data.LABELLED if labels else ():
        fetch(target)
    print("labels of the Llama models are not in that repository: steerback labels fetch llama-3.3-70b@authors")
