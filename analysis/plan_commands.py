"""The verbs of the group `sweep` that look ahead: they need laws, which `sweeps` knows nothing of. Only typer is imported."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from analysis.prior import Prior
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


def _template(file: Path | None) -> "Sweep":
    import sweeps
    from sweeps.spec import Sweep

    return Sweep.from_yaml(file or Path(sweeps.__file__).parent / "recipes" / "allocation.yaml")


def _prior(path: Path | None, noise: float | None) -> "Prior":
    from analysis.prior import default_prior, load_prior

    return (default_prior() if path is None else load_prior(path)).with_noise(noise)
