"""The verbs of the group `sweep` that look ahead: they need laws, which `sweeps` knows nothing of. Only typer is imported."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from analysis.prior import Prior
    from analysis.teach import Lesson
    from sweeps.plan import Plan
    from sweeps.spec import Sweep

app = typer.Typer(rich_markup_mode=None)

AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
PriorFile = Annotated[
    Path | None,
    typer.Option(
        "--prior", metavar="FIT.json", help="what is believed: a fit of `analyze fit --out`; shipped by default"
    ),
]
Noise = Annotated[
    float | None, typer.Option("--noise", help="standard deviation of log loss from run to run; the prior's by default")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="seeds the simulated noise")]

_PATIENCE_S = 3.0  # what is over sooner needs no progress


@app.command("plan")
def plan_verb(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="the sweep file")],
    target: Annotated[
        float | None,
        typer.Option(
            "--target", help="training FLOPs whose best N, R and P are asked for; the largest run's by default"
        ),
    ] = None,
    prior: PriorFile = None,
    noise: Noise = None,
    expect: Annotated[
        bool, typer.Option("--expect/--no-expect", help="simulate what the sweep will teach (takes seconds)")
    ] = True,
    seed: Seed = 0,
    accelerator: Annotated[
        str | None,
        typer.Option("--accelerator", metavar="NAME", help="device to cost: A100, H100, H200, B200, cpu, ..."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option("--gpus", min=0, help="devices of one run; cluster.gpus by default")
    ] = None,
    mfu: Annotated[
        float | None, typer.Option("--mfu", help="share of the peak reached; calibrated, else 0.35, by default")
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price", help="of one device for one hour; cluster.price_per_hour by default")
    ] = None,
    as_json: AsJson = False,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="also write the runs as CSV; - prints only that")
    ] = None,
) -> None:
    """Show the runs of a sweep, what they cost, and what they will teach; trains nothing."""
    import json

    from dlcm.record import write_atomic
    from sweeps.costs import Overrides, costed
    from sweeps.plan import plan
    from sweeps.plan_table import format_csv, plan_json, print_plan
    from sweeps.spec import Sweep

    planned = plan(Sweep.from_yaml(file))
    costs = costed(planned, Overrides(accelerator, gpus, mfu, price))
    if str(csv) == "-":
        print(format_csv(planned, costs), end="")
        return
    if csv is not None:
        write_atomic(csv, format_csv(planned, costs))
    if not as_json:
        print_plan(planned, costs)  # before the simulation: what is known at once is shown at once
    lesson = _lesson(planned, target, prior, noise, seed) if expect else None
    if as_json:
        told = lesson.to_dict() if lesson else None
        print(json.dumps({**plan_json(planned, costs), "expected": told}, indent=2))
    elif lesson:
        print(f"\n{lesson.report()}")


@app.command("design")
def design_verb(
    budget: Annotated[float, typer.Option("--budget", help="training FLOPs of all runs together")],
    target: Annotated[
        float, typer.Option("--target", help="training FLOPs at which the best N, R and P are to be known")
    ],
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[SWEEP.yaml]", help="template: model, data, ranges; the recipe allocation.yaml by default"
        ),
    ] = None,
    prior: PriorFile = None,
    noise: Noise = None,
    runs: Annotated[
        int | None, typer.Option("--runs", min=8, help="runs at most; as many as the full grid by default")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="how often one design may be run")] = 2,
    seed: Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="the sweep file to write; NAME-design.yaml by default"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Propose the runs under a budget that narrow the optimum most.

    Compares them with the full grid of equal cost, and writes the sweep file.
    """
    import json

    from analysis.proposal import propose
    from analysis.proposal_text import format_proposal, proposal_yaml
    from dlcm.console import Reporter
    from dlcm.errors import UserError
    from dlcm.record import write_atomic

    template = _template(file)
    path = out or Path(f"{template.name}-design.yaml")
    if path.exists():
        raise UserError(f"{path}: exists already; give another name with --out, or remove it")
    believed = _prior(prior, noise)
    with Reporter() as report:
        found = propose(
            template,
            believed,
            budget=budget,
            target=target,
            max_runs=runs,
            max_seeds=seeds,
            seed=seed,
            progress=lambda done, total: report("choosing runs", done, total),
        )
    write_atomic(path, proposal_yaml(found))
    if as_json:
        print(json.dumps({**found.to_dict(), "file": str(path)}, indent=2))
        return
    print(format_proposal(found))
    print(f"written: {path}; next: dlcm sweep plan {path}")


def _lesson(planned: "Plan", target: float | None, prior: Path | None, noise: float | None, seed: int) -> "Lesson":
    import time

    from analysis.prior import load_prior
    from analysis.teach import teach
    from dlcm.console import Reporter

    believed, began = None if prior is None else load_prior(prior, None), time.monotonic()
    with Reporter() as report:

        def progress(done: int, total: int) -> None:
            if done < total and time.monotonic() - began > _PATIENCE_S:
                report("simulating changes of the sweep", done, total)

        return teach(planned, target=target, prior=believed, noise=noise, seed=seed, progress=progress)


def _template(file: Path | None) -> "Sweep":
    import sweeps
    from sweeps.spec import Sweep

    return Sweep.from_yaml(file or Path(sweeps.__file__).parent / "recipes" / "allocation.yaml")


def _prior(path: Path | None, noise: float | None) -> "Prior":
    from analysis.prior import default_prior, load_prior

    return (default_prior() if path is None else load_prior(path)).with_noise(noise)
