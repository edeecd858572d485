"""Command `plan`: the size and cost of a study, by simulation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from steerback.cli.options import RUNS, Budget, RunsFolder, Setup, option, say, say_lines

if TYPE_CHECKING:
    from steerback.figures.tables import Table
    from steerback.jobs.plan import Need, StudyPlan


def plan(
    setup: Setup,
    budget: Budget,
    target: str | None = option(
        "Model to steer. Default: the model of --from.", None, "--target", "-t", metavar="TARGET"
    ),
    from_run: str | None = option(
        "Take rate and variance between latents from this run.", None, "--from", metavar="RUN"
    ),
    rate: float | None = option("Multi-attempt rate to detect, in percent. Default: of --from, else 2."),
    drop: float = option("Drop of that rate to detect in a paired comparison, in percent.", 50),
    power: float = option("Probability of detecting the effect.", 0.8),
    icc: float | None = option("Correlation of trials within a latent. Default: of --from, else 0.1."),
    floor: float | None = option("Floor of the judge in percent. Default: of --from, else 0.25."),
    floor_responses: int | None = option(
        "Unsteered responses to judge. Default: as many as measured ones, at least 150.", min=1
    ),
    simulations: int = option("Simulated studies per design.", 1000, min=10),
    out: Path | None = option("Folder for plan.json, tables and the power figure."),
    runs: RunsFolder = RUNS,
) -> None:
    """Plan a study: latents, trials, GPU hours, judge calls and cost. Needs no key."""
    from steerback import organism
    from steerback.errors import SteerbackError
    from steerback.figures.tables import terminal_width
    from steerback.jobs import plan as planning
    from steerback.judging.llm import lacking
    from steerback.store.run import find_run, stored_config
    from steerback.targets import resolve

    folder = None if from_run is None else find_run(from_run, runs)
    before = None if folder is None else stored_config(folder)
    name = target or (before.targets[0] if before else None)
    if name is None:
        raise SteerbackError("say what to steer with --target (see steerback targets), or start from a run with --from")
    chosen = resolve(name, before.definitions if before else None)
    config = setup.build("esr", (name,))
    asked = "offline" if config.judge == "auto" and organism.is_builtin(name) else config.judge
    judge = None if asked == "auto" else budget.makers(True, config.rubrics).judge(asked)
    planning.prepare_out(out)
    seen = None if folder is None else planning.observe(folder, target)
    assumed = planning.assume(_share(rate), drop / 100, power, icc, _share(floor), seen)
    made = planning.make_plan(config, chosen, judge, assumed, floor_responses, out is not None, simulations)
    table = _table(made)
    needed = lacking(judge) if judge else ()
    say_lines([*_assumptions(made), "", table.text(terminal_width()), *_fixed(made), *needed])
    if out is not None:
        _write(made, table, out)


def _write(made: StudyPlan, table: Table, out: Path) -> None:
    from steerback.figures import power
    from steerback.figures.style import save
    from steerback.store.files import write_atomic, write_json

    effect = made.assumed.effect
    write_json(out / "plan.json", made.to_json())
    write_atomic(out / "plan.csv", table.csv().encode())
    write_atomic(out / "power.csv", power.curve_table(made.curves, effect).csv().encode())
    save(power.draw(made.curves, effect, made.assumed.power, made.target), out, "power")
    say(f"  {out}/plan.json, plan.csv, power.csv, power.png, power.pdf")


def _share(per_cent: float | None) -> float | None:
    return None if per_cent is None else per_cent / 100


def _assumptions(made: StudyPlan) -> list[str]:
    effect, sources = made.assumed.effect, made.assumed.sources
    return [
        f"plan for {made.target}, judge {made.judge or 'not named (--judge)'}, power {made.assumed.power:g}",
        f"  multi-attempt rate {effect.rate:.2%} ({sources['rate']})",
        f"  drop of it in a paired comparison {effect.drop:.0%}, judge's floor {effect.floor:.2%} ({sources['floor']})",
        f"  correlation within latents (ICC) {effect.icc:.3f} ({sources['icc']})",
        f"  {made.hardware}",
    ]


def _table(made: StudyPlan) -> Table:
    from steerback.figures.tables import Table

    columns = ("to detect", "trials", "latents", "power", "floor", "responses", "hours", "judge calls", "USD")
    caption = (
        "trials: per latent; floor: unsteered responses that are judged (--set floor_responses=); "
        "responses: with references, calibration and "
        "verification, at most. A drop measures two conditions."
    )
    records = [
        {"to detect": need.question, "trials": need.trials, "target": made.target, "judge": made.judge}
        | ({} if need.design is None else {"latents": need.design.latents, "floor": need.design.floor_responses})
        | {"power": need.power, "responses": need.responses, "hours": need.hours}
        | ({} if need.judging is None else {"judge calls": need.judging.calls, "USD": need.judging.cost})
        for need in made.needs
    ]
    return Table(columns, [_cells(need) for need in made.needs], caption, records)


def _cells(need: Need) -> tuple[str, ...]:
    from steerback.metrics.power import LATENTS

    if need.design is None or need.power is None:
        return (need.question, str(need.trials), f"> {LATENTS[-1]:,}", *["-"] * 6)
    spend = need.judging
    return (
        *(need.question, str(need.trials), f"{need.design.latents:,}", f"{need.power:.2f}"),
        *(f"{need.design.floor_responses:,}", f"{need.responses:,}"),
        "?" if need.hours is None else f"{need.hours:,.1f}",
        "-" if spend is None else f"{spend.calls:,}",
        "-" if spend is None else "?" if spend.cost is None else f"{spend.cost:,.2f}",
    )


def _fixed(made: StudyPlan) -> list[str]:
    fixed, wanted = made.fixed, made.assumed.power
    size = f"{fixed.design.latents:,} latents x {fixed.design.trials} trials (--set n_latents=, trials_per_latent=)"
    smallest = "none up to 50 %" if fixed.smallest_rate is None else f"{fixed.smallest_rate:.1%}"
    drop = "none" if fixed.smallest_drop is None else f"{fixed.smallest_drop:.0%}"
    return [
        f"{size}: power {fixed.rate_power:.2f} for the rate, {fixed.drop_power:.2f} for the drop; "
        f"with power {wanted:g} the smallest rate above the floor is {smallest}, the smallest drop {drop}"
    ]
