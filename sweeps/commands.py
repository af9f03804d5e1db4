"""The verbs `dlcm sweep ...` and `dlcm flops table`. Only typer is imported here, so that `dlcm --help` answers at once."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Plan, submit and watch sweeps.", no_args_is_help=True, rich_markup_mode=None)
# `flops` stands below `sweeps` and cannot read a sweep file; the verb joins its group from here.
flops_app = typer.Typer(rich_markup_mode=None)

SweepFile = Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="the sweep file")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
CsvFile = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="also write the table as CSV")]


@app.command("plan")
def plan_verb(file: SweepFile, json: AsJson = False, csv: CsvFile = None) -> None:
    """Show the runs of a sweep, their shapes and their cost; nothing is trained."""
    import sys

    from sweeps.plan import plan
    from sweeps.plan_table import format_csv, format_plan, plan_json, rich_table, summary
    from sweeps.spec import Sweep

    planned = plan(Sweep.from_yaml(file))
    if csv is not None:
        from dlcm.record import write_atomic

        write_atomic(csv, format_csv(planned))
    if json:
        import json as json_module

        print(json_module.dumps(plan_json(planned), indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(rich_table(planned))
        print(summary(planned))
    else:
        print(format_plan(planned))


@flops_app.command("table")
def flops_table_verb(file: SweepFile, json: AsJson = False, csv: CsvFile = None) -> None:
    """Forward FLOPs per token of every run of a sweep, by component."""
    from flops.table import format_table, table_csv, table_rows
    from sweeps.plan import plan
    from sweeps.spec import Sweep

    planned = plan(Sweep.from_yaml(file))
    # Runs that differ in seed, rate or length cost the same per token: each shape once.
    counted = {(run.config.model, run.config.data.seq_len): (run.run_id, run.params, run.flops) for run in planned.runs}
    rows = table_rows(counted.values())
    if csv is not None:
        from dlcm.record import write_atomic

        write_atomic(csv, table_csv(rows))
    if json:
        import json as json_module

        print(json_module.dumps({"sweep": planned.sweep.name, "rows": rows}, indent=2))
    else:
        print(format_table(rows))
