"""Collect the results of finished runs: tables, manifests, and all trials in one parquet file.

    python collect.py OUT RESULTS [--without-calibration-texts] [--keep RUN ...]

OUT is the folder of run.sh. RESULTS gets a folder with tables, figures and manifest for each run, in which paths in OUT
are shortened, and trials.parquet. Texts of calibration take more than half of its size; they can be left out. --keep
names runs of an earlier OUT whose trials are already in trials.parquet and stay there.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import compute, parquet

from steerback.report.export import export_flat
from steerback.store.run import Run


def main() -> None:
    """Collect the runs named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--without-calibration-texts", action="store_true")
    parser.add_argument("--keep", nargs="*", default=[])
    options = parser.parse_args()
    to = options.results / "trials.parquet"
    runs = [path.parent for path in sorted(options.out.glob("runs/*/summary.json")) if "warm" not in path.parent.name]
    tables: list[pa.Table] = []
    for run in runs:
        own = options.results / run.name
        own.mkdir(parents=True, exist_ok=True)
        for file in (*run.glob("*.csv"), *run.glob("*.png")):
            if not file.name.startswith(("calibration", "time_course")) or file.suffix == ".csv":  # large, or in docs
                shutil.copy(file, own)
        manifest = (run / "manifest.json").read_text("utf-8")
        (own / "manifest.json").write_text(manifest.replace(str(options.out.resolve()), "OUT"), "utf-8")
        tables += [*trials(run, options.without_calibration_texts)]
    if options.keep:
        tables.append(kept(to, options.keep).cast(tables[0].schema))
    # one row group and one page per column: equal texts are then stored once
    table = pa.concat_tables(tables).combine_chunks()
    parquet.write_table(
        table, to, compression="zstd", compression_level=19, row_group_size=1 << 20, data_page_size=1 << 28
    )
    print(f"{len(runs)} runs, {len(table):,} trials, {to.stat().st_size / 1e6:.1f} MB")


def kept(file: Path, runs: list[str]) -> pa.Table:
    """Return the trials of the named runs in an earlier file of this program."""
    table = parquet.read_table(file)
    if missing := {*runs} - {*table["run"].unique().to_pylist()}:
        raise SystemExit(f"{file} has no trials of {', '.join(sorted(missing))}")
    return table.filter(compute.is_in(table["run"], pa.array(runs)))


def trials(run: Path, without_texts: bool) -> Iterator[pa.Table]:
    """Yield the trials of a run, if it generated any, with its name as the first column."""
    with Run.read(run) as opened, tempfile.TemporaryDirectory() as folder:
        if opened.config.experiment == "cross-judge":  # its trials are copies
            return
        table = parquet.read_table(
            export_flat(opened.ledger, Path(folder) / "t.parquet", opened.config.judge, "parquet")
        )
    if without_texts:
        kept = compute.if_else(compute.equal(table["stage"], "calibration"), None, table["response"])
        table = table.set_column(table.column_names.index("response"), "response", kept)
    yield table.add_column(0, "run", pa.array([run.name] * len(table)))


if __name__ == "__main__":
    main()
