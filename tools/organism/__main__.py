"""``python -m tools.organism build``: regenerate the shipped organisms from fixed seeds."""

from __future__ import annotations

import argparse
from pathlib import Path

from steerback.organism import NAMES, weights_dir


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(prog="python -m tools.organism", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build_parser = commands.add_parser("build", help="train models, SAEs and labels")
    build_parser.add_argument("--only", choices=NAMES, help="build this organism alone")
    build_parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    build_parser.add_argument("--seed", type=int, default=0)
    build_parser.add_argument("--out", type=Path, help="folder for the results (default: the package's own weights)")
    options = parser.parse_args()

    import torch

    from tools.organism.build import build
    from tools.organism.spec import ORGANISMS

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in [options.only] if options.only else NAMES:
        folder = options.out / name if options.out else weights_dir(name)
        build(ORGANISMS[name], folder, seed=options.seed, device=device)


if __name__ == "__main__":
    main()
