"""The verbs `sweep ...`, `eval` and `flops table`. Only typer is imported here: `dlcm --help` must answer at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sweeps.states import Status

app = typer.Typer(help="Plan, submit and watch sweeps.", no_args_is_help=True, rich_markup_mode=None)
# `flops` stands below `sweeps` and cannot read a sweep file; the verb joins its group from here.
flops_app = typer.Typer(rich_markup_mode=None)
# `dlcm` knows nothing of sweeps, so the verb that evaluates one run or all of a sweep joins its verbs from here.
model_app = typer.Typer(rich_markup_mode=None)

SweepFile = Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="the sweep file")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
CsvFile = Annotated[
    Path | None, typer.Option("--csv", metavar="FILE", help="also write the table as CSV; - prints it instead")
]

SweepName = Annotated[str, typer.Argument(metavar="SWEEP", help="its directory, its name under --dir, or its file")]
RunNames = Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="run ids, or their first or last part")]
RunsDir = Annotated[Path, typer.Option("--dir", metavar="DIR", help="where sweeps are stored")]
OnCluster = Annotated[
    str,
    typer.Option(
        "--cluster", metavar="local|slurm|debug|NAME", help="where the runs run; a name is one of your clusters file"
    ),
]
MaybeCluster = Annotated[
    str | None, typer.Option("--cluster", metavar="local|slurm|debug|NAME", help="where; as the last submit by default")
]
Concurrency = Annotated[int | None, typer.Option("--concurrency", help="runs at once; as in the sweep file by default")]
Threads = Annotated[
    int | None, typer.Option("--threads", help="CPU threads of one run; as in the sweep file by default")
]
RunsPerTask = Annotated[
    int | None, typer.Option("--runs-per-task", help="slurm: runs that one array task trains in turn")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="a setting of the cluster block, e.g. partition=gpu; repeatable"),
]
Detach = Annotated[bool | None, typer.Option("--detach/--wait", help="return at once (default with slurm)")]
_RUNS = Path("runs")


@flops_app.command("calibrate")
def calibrate_verb(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[SWEEP.yaml|CONFIG|RUN]", help="whose models to measure; three sizes by default"),
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="about how long to measure")] = 30.0,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads of a run; those of the sweep, else 1")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure how fast this device trains, for the estimates of `sweep plan`."""
    import dataclasses
    import json

    import torch

    from dlcm.console import Reporter
    from flops.calibrate import calibrate
    from flops.calibration import format_calibration, save_calibration
    from sweeps.costs import calibration_runs

    configs, wanted = calibration_runs(file, gpu=torch.cuda.is_available())
    torch.set_num_threads(threads or wanted or 1)
    with Reporter() as report:
        measured = calibrate(configs, seconds=seconds, progress=report)
    path = save_calibration(measured)
    if as_json:
        print(json.dumps({"path": str(path), **dataclasses.asdict(measured)}, indent=2))
    else:
        print(format_calibration(measured))
        print(f"written to {path}; `dlcm sweep plan` reads it")


@flops_app.command("table")
def flops_table_verb(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="SWEEP|RUN|CONFIG...", help="sweep files or directories, run folders, config files"),
    ],
    seq_len: Annotated[int | None, typer.Option(help="tokens of one sequence; each config's by default")] = None,
    tokens_per_concept: Annotated[
        float | None,
        typer.Option(
            "--tokens-per-concept", "-r", help="R of all; realised in training if known, else each one's target"
        ),
    ] = None,
    as_json: AsJson = False,
    csv: CsvFile = None,
) -> None:
    """FLOPs per token of every model of sweeps, runs or configs: training, prompt, answer, and by component."""
    from flops.table import counted, format_table, table_csv, table_rows
    from sweeps.subjects import load_subjects

    subjects = [subject for path in paths for subject in load_subjects(path)]
    rows = table_rows(counted(subject, seq_len, tokens_per_concept) for subject in subjects)
    if csv == Path("-"):
        print(table_csv(rows), end="")
        return
    if csv is not None:
        from dlcm.record import write_atomic

        write_atomic(csv, table_csv(rows))
    if as_json:
        import json

        print(json.dumps({"rows": rows}, indent=2))
    else:
        print(format_table(rows))


@app.command("submit")
def submit_verb(
    file: SweepFile,
    cluster: OnCluster = "local",
    runs_dir: RunsDir = _RUNS,
    concurrency: Concurrency = None,
    threads: Threads = None,
    runs_per_task: RunsPerTask = None,
    settings: Settings = None,
    detach: Detach = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the plan and what would be trained")] = False,
    as_json: AsJson = False,
) -> None:
    """Train the unfinished runs of a sweep: on this machine, SLURM, or in this process."""
    from sweeps.plan import plan
    from sweeps.session import check_options, launch_and_show, show_dry_run
    from sweeps.spec import Sweep

    options = check_options(cluster, settings or (), concurrency, threads, runs_per_task)
    planned = plan(Sweep.from_yaml(file))
    sweep_dir = runs_dir / planned.sweep.name
    if dry_run:
        show_dry_run(planned, sweep_dir, as_json=as_json)
        return
    raise typer.Exit(launch_and_show(planned, sweep_dir, options, detach=detach, as_json=as_json))


@app.command("status")
def status_verb(
    sweep: SweepName,
    runs_dir: RunsDir = _RUNS,
    watch: Annotated[bool, typer.Option("--watch", help="keep showing until nothing runs any more")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how each run of a sweep stands, with progress and time left."""
    from sweeps.session import show_status
    from sweeps.store import find_sweep

    show_status(find_sweep(sweep, runs_dir), keep_watching=watch, as_json=as_json)


@app.command("logs")
def logs_verb(
    sweep: SweepName,
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="run id; the workers' logs where absent")] = None,
    runs_dir: RunsDir = _RUNS,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="last lines to show")] = 40,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on while the run runs")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run printed, and why it failed."""
    from sweeps.session import show_logs
    from sweeps.store import find_sweep

    show_logs(find_sweep(sweep, runs_dir), run, n_lines=lines, keep_following=follow, as_json=as_json)


@app.command("cancel")
def cancel_verb(sweep: SweepName, runs: RunNames = None, runs_dir: RunsDir = _RUNS, as_json: AsJson = False) -> None:
    """Cancel runs, or all that are unfinished; checkpoints stay, a submit resumes them."""
    from sweeps.control import cancel
    from sweeps.session import show_cancelled
    from sweeps.store import find_sweep

    show_cancelled(cancel(find_sweep(sweep, runs_dir), runs or ()), as_json=as_json)


@app.command("retry")
def retry_verb(
    sweep: SweepName,
    runs: RunNames = None,
    cluster: MaybeCluster = None,
    runs_dir: RunsDir = _RUNS,
    concurrency: Concurrency = None,
    threads: Threads = None,
    runs_per_task: RunsPerTask = None,
    settings: Settings = None,
    detach: Detach = None,
    failed: Annotated[bool, typer.Option("--failed", help="those that failed")] = False,
    lost: Annotated[bool, typer.Option("--lost", help="those that were lost")] = False,
    cancelled: Annotated[bool, typer.Option("--cancelled", help="those that were cancelled")] = False,
    diverged: Annotated[
        bool, typer.Option("--diverged", help="those that diverged, anew; what they left is set aside")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Send out again the runs that failed, were lost or cancelled, those of some of these kinds, or those named."""
    from sweeps.session import check_options, retry_and_show
    from sweeps.store import find_sweep

    asked: dict[Status, bool] = {"failed": failed, "lost": lost, "cancelled": cancelled, "diverged": diverged}
    kinds: list[Status] = [name for name, wanted in asked.items() if wanted]
    sweep_dir = find_sweep(sweep, runs_dir)
    options = check_options(cluster, settings or (), concurrency, threads, runs_per_task, sweep_dir=sweep_dir)
    raise typer.Exit(retry_and_show(sweep_dir, runs or (), kinds, options, detach=detach, as_json=as_json))


@app.command("collect")
def collect_verb(sweep: SweepName, runs_dir: RunsDir = _RUNS, as_json: AsJson = False) -> None:
    """Read all runs of a sweep into results.parquet, one row a run."""
    from sweeps.session import collect_and_show
    from sweeps.store import find_sweep

    collect_and_show(find_sweep(sweep, runs_dir), as_json=as_json)


@app.command("schema")
def schema_verb(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="write to this file instead of printing")
    ] = None,
) -> None:
    """Print the JSON schema of the sweep file, with which editors complete and check it."""
    from sweeps.schema import format_schema

    if out is None:
        print(format_schema(), end="")
        return
    from dlcm.errors import UserError
    from dlcm.record import write_atomic

    try:
        write_atomic(out, format_schema())
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from None
    print(f"{out}; put this line at the top of a sweep file beside it:\n# yaml-language-server: $schema={out.name}")


@model_app.command("eval")
def eval_verb(
    run_dir: Annotated[Path | None, typer.Argument(metavar="RUN_DIR", help="directory of one run")] = None,
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", metavar="SWEEP", help="all finished runs of a sweep: its directory, or its name"),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", "-t", help="`corpus`, FILE.jsonl, `paper` or lm-eval:NAME; with @K after K examples; repeatable"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="items of each task, at most")] = None,
    force: Annotated[bool, typer.Option("--force", help="measure again what was measured before")] = False,
    cluster: MaybeCluster = None,
    runs_dir: RunsDir = _RUNS,
    concurrency: Concurrency = None,
    threads: Threads = None,
    runs_per_task: RunsPerTask = None,
    settings: Settings = None,
    detach: Detach = None,
    as_json: AsJson = False,
) -> None:
    """Measure the accuracy of a trained run, or of all runs of a sweep, with lm-evaluation-harness."""
    from sweeps.evaluations import check_evaluation, evaluate_and_show, evaluate_run_and_show

    of_a_sweep = {"cluster": cluster, "concurrency": concurrency, "threads": threads, "runs-per-task": runs_per_task}
    check_evaluation(run_dir, sweep, {**of_a_sweep, "set": settings, "detach": detach})
    tasks = task or ["corpus"]
    if run_dir is not None:
        evaluate_run_and_show(run_dir, tasks, limit=limit, force=force, as_json=as_json)
        return
    from sweeps.session import check_options
    from sweeps.store import find_sweep

    sweep_dir = find_sweep(str(sweep), runs_dir)
    options = check_options(cluster, settings or (), concurrency, threads, runs_per_task, sweep_dir=sweep_dir)
    how = {"limit": limit, "force": force, "detach": detach, "as_json": as_json}
    raise typer.Exit(evaluate_and_show(sweep_dir, tasks, options, **how))
