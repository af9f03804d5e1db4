"""The directory of a sweep: what is stored, and what its files say about each run.

    runs/<sweep>/sweep.yaml      the sweep file, resolved
                 plan.parquet    one row a run, its whole config included: later verbs need nothing else
                 jobs.jsonl      one line a submitted job
                 jobs/<n>/       the scheduler's files of submission n
                 <run_id>/       the run (written by `train`), and beside it, written by the worker that holds it:
                                 status.json (heartbeat), failure.json, cancelled.json, eval/, logs/

The status of a run is derived from these files, the kernel's lock on the run, and the scheduler's word on the jobs;
never from anything that was printed.
"""

import json
import math
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from dlcm.config import SCHEMA_VERSION, RunConfig
from dlcm.errors import UserError, nearest, parse
from dlcm.record import is_locked, read_json, write_atomic
from dlcm.yaml_io import load_yaml
from sweeps.jobs import JobState, job_states

if TYPE_CHECKING:
    from sweeps.plan import Plan
    from sweeps.spec import Sweep

Status = Literal["planned", "queued", "running", "finished", "failed", "diverged", "cancelled", "lost"]
STATUSES: tuple[Status, ...] = ("planned", "queued", "running", "finished", "failed", "diverged", "cancelled", "lost")

_RECORD_KEYS = {
    "status.json": ("state", "phase", "pid", "host", "submission", "deaths", "step", "tokens_per_s", "loss_nats", "time"),
    "env.json": ("git_commit", "git_dirty_hash"),
    "failure.json": ("stage", "message", "traceback", "submission"),
    "result.json": (
        "status", "step", "tokens", "loss_nats", "bits_per_byte", "tokens_per_concept", "tokens_per_concept_train",
        "epochs", "params", "wall_s", "device", "reason",
    ),
}  # fmt: skip

CLAIM = ".claim"  # the worker's lock; `train` takes its own inside it
STALE_S = 60.0  # a heartbeat comes every 2 s: after this long its writer is gone, or frozen


@dataclass(frozen=True)
class StoredRun:
    """A planned run as the sweep directory holds it."""

    run_id: str
    config: RunConfig
    path: Path
    row: Mapping[str, Any]
    in_plan: bool

    @property
    def flops_planned(self) -> float:
        """Planned training FLOPs: the longest run is the one that costs most."""
        return float(self.row["flops_train_planned"])


@dataclass(frozen=True)
class StoredSweep:
    """A sweep directory, read whole."""

    path: Path
    spec: "Sweep"
    runs: tuple[StoredRun, ...]

    @property
    def name(self) -> str:
        """Name of the sweep, which is the name of its directory."""
        return self.path.name

    def run(self, run_id: str) -> StoredRun:
        """The run of this id, or of the only id that begins or ends so.

        Raises:
            UserError: no run, or more than one, answers to `run_id`; names the nearest.
        """
        ids = [run.run_id for run in self.runs]
        found = [i for i in ids if i == run_id] or [i for i in ids if i.startswith(run_id) or i.endswith(run_id)]
        if len(found) == 1:
            return self.runs[ids.index(found[0])]
        if found:
            raise UserError(f"{self.path}: {run_id!r} is the name of {len(found)} runs: {', '.join(sorted(found)[:4])}")
        raise UserError(f"{self.path}: no run {run_id!r}{nearest(run_id, ids)}")


@dataclass(frozen=True)
class RunState:
    """Status and progress of one run at one moment."""

    run_id: str
    status: Status
    reason: str | None = None
    phase: str | None = None  # prepare, train or evaluate, while it runs
    step: int = 0
    n_steps: int = 0
    tokens_per_s: float | None = None
    loss_nats: float | None = None
    seconds_left: float | None = None
    host: str | None = None
    pid: int | None = None
    missing_evaluations: tuple[str, ...] = ()
    in_plan: bool = True

    @property
    def share_done(self) -> float:
        """Share of the training steps that are done."""
        return 1.0 if self.status in ("finished", "diverged") else self.step / max(self.n_steps, 1)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do for this run: trained or diverged, and evaluated."""
        return self.status in ("finished", "diverged") and not self.missing_evaluations


@dataclass(frozen=True)
class Saved:
    """What `save_sweep` did to a directory."""

    added: tuple[str, ...]
    removed: tuple[str, ...]  # in the directory, no longer in the sweep file: kept


def save_sweep(plan: "Plan", sweep_dir: Path) -> Saved:
    """Write the sweep and its plan into `sweep_dir`, keeping runs that an earlier plan had.

    A run that is no longer planned stays in the directory, and in `results.parquet` if it has finished, but is not
    trained any further.

    Raises:
        UserError: `sweep_dir` holds something else than a sweep, or a plan that cannot be read.
    """
    check_sweep_dir(sweep_dir)
    rows = plan.to_frame()
    rows["config"] = [json.dumps(run.config.model_dump(mode="json"), sort_keys=True) for run in plan.runs]
    rows["design"] = [json.dumps(run.design, sort_keys=True, default=str) for run in plan.runs]
    rows["in_plan"] = True
    old = _read_plan(sweep_dir) if (sweep_dir / "plan.parquet").exists() else None
    known = set(old["run_id"]) if old is not None else set()
    planned = set(rows["run_id"])
    if old is not None:
        kept = old[~old["run_id"].isin(list(planned))].assign(in_plan=False)
        if len(kept):
            rows = pd.concat([rows, kept], ignore_index=True)
    write_atomic(sweep_dir / "sweep.yaml", plan.sweep.to_yaml())
    write_atomic(sweep_dir / "plan.parquet", rows.to_parquet(index=False))
    return Saved(added=tuple(sorted(planned - known)), removed=tuple(sorted(known - planned)))


def check_sweep_dir(sweep_dir: Path) -> None:
    """Refuse a directory that holds something else than a sweep.

    Raises:
        UserError: it is a file, or has other files in it.
    """
    if sweep_dir.exists() and not sweep_dir.is_dir():
        raise UserError(f"{sweep_dir}: is a file; choose another --dir or another sweep name")
    foreign = sweep_dir.exists() and any(not path.name.startswith(".") for path in sweep_dir.iterdir())
    if foreign and not (sweep_dir / "sweep.yaml").exists():
        raise UserError(f"{sweep_dir}: not empty and not a sweep; choose another --dir or another sweep name")


def load_sweep(sweep_dir: Path) -> StoredSweep:
    """Read a sweep directory.

    Raises:
        UserError: no such directory, or not one that `dlcm sweep submit` made.
    """
    from sweeps.spec import Sweep

    if not (sweep_dir / "plan.parquet").exists():
        raise UserError(f"{sweep_dir}: not a sweep directory (no plan.parquet); make it with `dlcm sweep submit`")
    frame = _read_plan(sweep_dir)
    # Not `from_yaml`, which wants every corpus file present: this directory must be readable where only it is seen.
    spec = parse(Sweep, load_yaml(sweep_dir / "sweep.yaml"), str(sweep_dir / "sweep.yaml"))
    runs = []
    for row in frame.to_dict("records"):
        config = parse(RunConfig, json.loads(row.pop("config")), f"{sweep_dir / 'plan.parquet'}: {row['run_id']}")
        runs.append(StoredRun(row["run_id"], config, sweep_dir / row["run_id"], row, bool(row["in_plan"])))
    return StoredSweep(sweep_dir, spec, tuple(runs))


def find_sweep(name: str, runs_dir: Path) -> Path:
    """The directory of a sweep that is given as a directory, as its name under `runs_dir`, or as its sweep file.

    Raises:
        UserError: there is none; names the nearest sweep of `runs_dir`.
    """
    path = Path(name)
    if (path / "plan.parquet").exists():
        return path
    if path.suffix in (".yaml", ".yml") and path.is_file():
        from sweeps.spec import Sweep

        name = Sweep.from_yaml(path).name
    if (runs_dir / name / "plan.parquet").exists():
        return runs_dir / name
    names = [p.parent.name for p in runs_dir.glob("*/plan.parquet")]
    if not names:
        raise UserError(f"{runs_dir / name}: no such sweep, nor any other here; start one with `dlcm sweep submit`")
    raise UserError(f"{runs_dir / name}: no such sweep{nearest(name, names)}")


def sweep_states(sweep: StoredSweep, jobs: Mapping[str, JobState] | None = None) -> list[RunState]:
    """Status and progress of every run, in plan order.

    Args:
        sweep: a loaded sweep.
        jobs: what `sweeps.jobs.job_states` said of the sweep's jobs; asked anew where absent.
    """
    jobs = job_states(sweep.path) if jobs is None else jobs
    alive = [job for job in jobs.values() if job.state != "gone"]
    latest = max((job.submission for job in alive), default=0)
    ever = bool(jobs)
    return [run_state(run, sweep.spec.evaluate, latest, ever) for run in sweep.runs]


def run_state(run: StoredRun, tasks: Sequence[str] = (), latest_alive: int = 0, submitted: bool = False) -> RunState:
    """Derive the state of one run.

    Args:
        run: the run.
        tasks: evaluation tasks of the sweep.
        latest_alive: number of the latest submission that still has a job; 0 for none.
        submitted: whether the sweep was ever submitted.

    Raises:
        UserError: a file of the run that cannot be read.
    """
    # The order matters: a run that ends between two reads must look running or ended, never lost.
    beat = read_record(run.path / "status.json")
    held = is_locked(run.path, CLAIM) or is_locked(run.path)
    result = read_record(run.path / "result.json")
    failure = read_record(run.path / "failure.json")
    cancelled = (run.path / "cancelled.json").exists()
    status, reason = _derive(beat, held, result, failure, cancelled, latest_alive, submitted)
    missing = ()
    if result and result["status"] == "finished":
        missing = _missing_evaluations(run, tasks)
        reason = reason if missing else result.get("reason")  # a failure that was mended is no news
    beat = beat or {}
    left = None
    if status == "running" and beat.get("tokens_per_s"):
        left = (run.config.n_steps - beat["step"]) * run.config.train.batch_tokens / beat["tokens_per_s"]
    return RunState(
        run_id=run.run_id,
        status=status,
        reason=reason,
        phase=beat.get("phase") if status == "running" else None,
        step=result["step"] if result else beat.get("step", 0),
        n_steps=run.config.n_steps,
        tokens_per_s=beat.get("tokens_per_s"),
        loss_nats=result["loss_nats"] if result else beat.get("loss_nats"),
        seconds_left=left,
        host=beat.get("host"),
        pid=beat.get("pid"),
        missing_evaluations=missing,
        in_plan=run.in_plan,
    )


def _derive(
    beat: dict | None, held: bool, result: dict | None, failure: dict | None, cancelled: bool, latest: int, ever: bool
) -> tuple[Status, str | None]:
    was_running = beat is not None and beat["state"] == "running"
    age = time.time() - beat["time"] if beat else math.inf
    # Locks may not reach across machines (local file systems, some mounts): there the heartbeat speaks.
    elsewhere = beat is not None and was_running and beat["host"] != socket.gethostname() and age < STALE_S
    if held or elsewhere:
        if cancelled:
            return "running", "cancelling: stops at its next step"
        silent = was_running and age > STALE_S
        return "running", f"no heartbeat for {age:.0f} s: stopped, or its machine is overloaded" if silent else None
    if result is not None:
        failed = failure is not None and failure["stage"] == "evaluate"
        reason = f"evaluation failed: {failure['message']}" if failed and failure else result.get("reason")
        return ("diverged" if result["status"] == "diverged" else "finished"), reason
    if cancelled:
        return "cancelled", None
    if failure is not None:
        return ("queued", None) if latest > failure["submission"] else ("failed", failure["message"])
    if beat is not None and was_running:
        next_step = "a live worker may take it up" if latest else "submit again to resume it"
        return "lost", f"process {beat['pid']} on {beat['host']} died at step {beat['step']}; {next_step}"
    if latest:
        return "queued", None
    if beat is not None:
        why = beat.get("reason") or "no reason given"
        return "lost", f"its worker stopped at step {beat['step']} ({why}); submit again to resume it"
    return "planned", "no worker is left; submit again" if ever else None


def _missing_evaluations(run: StoredRun, tasks: Sequence[str]) -> tuple[str, ...]:
    if not tasks:
        return ()
    from dlcm.tasks import task_name

    return tuple(task for task in tasks if not (run.path / "eval" / f"{task_name(task)}.json").exists())


def _read_plan(sweep_dir: Path) -> pd.DataFrame:
    path = sweep_dir / "plan.parquet"
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as parquet ({error}); delete it and submit the sweep again") from None
    if absent := {"run_id", "config", "design", "in_plan", "budget", "flops_train_planned"} - set(frame.columns):
        raise UserError(f"{path}: no column {', '.join(sorted(absent))}; delete it and submit the sweep again")
    return frame


def read_record(path: Path) -> dict[str, Any] | None:
    """`status.json`, `result.json`, `failure.json` or `env.json` of a run; None where the file is not there.

    Raises:
        UserError: not readable, of another version, or without a key that its readers need.
    """
    if not path.exists():
        return None
    try:
        record = read_json(path)
    except UserError:
        if not path.exists():  # taken away since we looked: a run that starts again clears its failure
            return None
        raise
    if record.get("schema") != SCHEMA_VERSION:
        raise UserError(f"{path}: schema {record.get('schema')!r}, this version reads {SCHEMA_VERSION}")
    if absent := [key for key in _RECORD_KEYS[path.name] if key not in record]:
        raise UserError(f"{path}: no key {', '.join(absent)}; delete it and submit the sweep again")
    return record
