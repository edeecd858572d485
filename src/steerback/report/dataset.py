"""Export of a run as a dataset folder of the Hugging Face hub: a card and parquet files with one row per trial."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import yaml

from steerback.analysis.base import outcomes_of
from steerback.errors import VERSION, SteerbackError, one_line
from steerback.metrics import Estimate, summarize
from steerback.report.export import COLUMNS, REAL, TRUTH, WHOLE, write_parquet
from steerback.store.facts import PROVENANCE
from steerback.store.files import make_folder, write_atomic
from steerback.store.ledger import MANY
from steerback.store.processes import second_process
from steerback.store.run import Run

ROWS_PER_SHARD = 20_000
SHOWN = ("multi_attempt_rate", "esr_rate", "msi")
"""Metrics of the card's table."""
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
PLANTED = (
    "**The behaviour of these targets is planted**: {names} learned restarts from their training text. "
    "Their rates validate the instrument and are no evidence about other models.\n\n"
)
CARD = """# {name}

{trials:,} responses of language models to prompts, with verdicts of the judge `{judge}`, from the experiment
`{experiment}` of steerback {version}. It measures how models resist activation steering: whether a steered response
notices that it drifted off topic, restarts and improves.

{planted}- Targets: {targets}
- Judge: `{judge}`
- Stages: {stages}. Results come from the stage `measure`; the other stages prepare it.

## Rates of the stage `measure`

Headline rates with 95 % intervals clustered by latent, {degraded} degraded responses.

{rates}

## Columns

One row for each trial. `attempts`, `first` and `last` are gated scores (0-100), missing if the trial is unscored, empty
or invalid; a missing number is never 0. `spans` and `interventions` are JSON; spans count characters from the
start of `prefill` and `response` together. `response` is the unedited output of a language model.
"""


def export_dataset(run: Run, folder: Path, judge: str, license_name: str) -> list[Path]:
    """Write README.md and `data/trials-*.parquet`, which `datasets.load_dataset` reads. Older shards are removed.

    One shard contains at most ROWS_PER_SHARD trials of one condition.
    """

    def rates() -> str:
        with Run.read(run.folder) as own:
            return _rate_table(own, judge)

    data = make_folder(folder / "data", "choose another --out")
    shown = second_process(rates, run.ledger.progress()[0] >= MANY)
    for old in data.glob("trials-*.parquet"):
        old.unlink()
    paths: list[Path] = []
    trials = 0
    for target, stage in run.ledger.stages():
        for condition in [c for t, c in run.ledger.conditions(stage) if t == target]:
            outlines = run.ledger.outlines(target, stage, condition, judge)
            while shard := list(islice(outlines, ROWS_PER_SHARD)):
                trials += len(shard)
                path = data / f"trials-{len(paths):05d}.parquet"
                paths.append(write_parquet(path, run.ledger.responses(shard), judge))
    card = _header(run, trials, license_name) + _card(run, judge, trials, shown())
    return [write_atomic(folder / "README.md", card.encode("utf-8")), *paths]


def check_repository(name: str) -> None:
    """Raise SteerbackError if `name` is not OWNER/NAME of a hub."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        raise SteerbackError(f"--push {one_line(name)!r} must be OWNER/NAME, for example me/esr-organism")


def push(folder: Path, repository: str) -> str:
    """Upload a dataset folder to a hub and return its address. A new dataset is private."""
    import httpx2
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        created = api.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=["README.md", "data/*.parquet"],
            delete_patterns=["data/*.parquet"],
            commit_message="Upload trials with steerback",
        )
    except (
        errors.HFValidationError,
        errors.HfHubHTTPError,
        errors.LocalTokenNotFoundError,
        httpx2.HTTPError,
        OSError,
    ) as error:
        raise SteerbackError(
            f"--push {repository}: {one_line(error)}; the files are in {folder}. Log in with `hf auth login`, or set "
            "HF_TOKEN to a token that may write there"
        ) from None
    return str(created)


def _header(run: Run, trials: int, license_name: str) -> str:
    """Return the YAML header of the card."""
    kinds = dict.fromkeys(COLUMNS, "string") | dict.fromkeys(WHOLE, "int64")
    kinds |= dict.fromkeys(REAL, "float64") | dict.fromkeys(TRUTH, "bool")
    header = {
        "pretty_name": run.folder.name,
        "license": license_name,
        "tags": ["steerback", "activation-steering", "interpretability"],
        "size_categories": [next((size for limit, size in SIZES if trials < limit), "1M<n<10M")],
        "configs": [{"config_name": "trials", "data_files": [{"split": "train", "path": "data/trials-*.parquet"}]}],
        "dataset_info": [
            {"config_name": "trials", "features": [{"name": name, "dtype": kind} for name, kind in kinds.items()]}
        ],
    }
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n"


def _card(run: Run, judge: str, trials: int, rates: str) -> str:
    stages = run.ledger.stages()
    targets = list(dict.fromkeys(target for target, _ in stages))
    planted = [t for t in targets if (known := run.ledger.get(t, PROVENANCE)) is not None and known.planted]
    return CARD.format(
        name=run.folder.name,
        trials=trials,
        judge=judge,
        experiment=run.config.experiment,
        version=VERSION,
        degraded="with" if run.ledger.includes_degraded else "without",
        planted=PLANTED.format(names=_quoted(planted)) if planted else "",
        targets=_quoted(targets),
        stages=_quoted(list(dict.fromkeys(stage for _, stage in stages))),
        rates=rates,
    )


def _rate_table(run: Run, judge: str) -> str:
    lines = [
        "| target | condition | valid | multi-attempt rate | ESR rate | MSI (points) |",
        "|---|---|---|---|---|---|",
    ]
    for target, condition in run.ledger.conditions("measure"):
        rows = [*run.ledger.outlines(target, "measure", condition, judge)]
        summary = summarize(outcomes_of(rows, run.ledger.includes_degraded), draws=0)
        shown = [_interval(summary[name], 1 if name == "msi" else 100) for name in SHOWN]
        cells = [f"`{target}`", condition.replace("|", "\\|"), f"{summary.counts['valid']:,}", *shown]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(estimate: Estimate, scale: float) -> str:
    """Return value and interval as text; rates (`scale` 100) are in per cent."""
    if estimate.value is None:
        return "no trials"
    unit = " %" if scale == 100 else ""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value * scale:.1f}{unit}"
    return f"{estimate.value * scale:.1f}{unit} [{estimate.low * scale:.1f}, {estimate.high * scale:.1f}]"


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
