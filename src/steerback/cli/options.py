"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from steerback.judging import Maker

RUNS = Path("runs")
RunsDir = Annotated[Path, typer.Option("--runs", help="Folder that holds the run folders.")]
RunName = Annotated[str, typer.Argument(help="Name of a run under --runs, or path of its folder.")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Neither read nor write the shared cache.")]
MaxCalls = Annotated[
    int | None,
    typer.Option("--max-judge-calls", min=0, help="Ask the judge no more often; the rest stays unjudged."),
]
MaxCost = Annotated[float | None, typer.Option("--max-judge-cost", min=0, help="Spend at most so many USD on it.")]
Price = Annotated[
    tuple[float, float] | None,
    typer.Option("--judge-price", metavar="IN OUT", help="USD per million input and output tokens, where unknown."),
]
Batch = Annotated[bool, typer.Option("--judge-batch", help="Use the provider's batches: slower, half the price.")]


def given_limits(
    calls: int | None, cost: float | None, price: tuple[float, float] | None, batch: bool
) -> dict[str, Any]:
    """Fields of `judging.transport.Limits` that the user has set."""
    given = {"max_calls": calls, "max_cost": cost, "price": price, "batch": batch or None}
    return {key: value for key, value in given.items() if value is not None}


def judges_within(calls: int | None, cost: float | None, price: tuple[float, float] | None, batch: bool) -> Maker:
    """What makes the judges of one command; each has this budget for all that the command does."""
    from steerback.judging import judge_maker

    return judge_maker(**given_limits(calls, cost, price, batch))
