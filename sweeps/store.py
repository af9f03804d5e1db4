"""The directory of a sweep: what is stored. What its files say about each run is in `sweeps.states`.

```text
runs/<sweep>/sweep.yaml      the sweep file, resolved
             plan.parquet    one row a run, its whole config included: later verbs need nothing else
             evaluate.json   tasks that were asked for beside those of the sweep file
             jobs.jsonl      one line a submitted job
             jobs/<n>/       the scheduler's files of submission n
             <run_id>/       the run (written by `train`), and beside it, written by the worker that holds it:
                             status.json (heartbeat), failure.json, cancelled.json, eval/, logs/
```
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlcm.config import SCHEMA_VERSION, RunConfig
from dlcm.errors import UserError, nearest, parse
from dlcm.record import read_json, write_atomic, write_json
from dlcm.yaml_io import load_yaml

if TYPE_CHECKING:
    import pyarrow as pa

    from sweeps.plan import Plan
    from sweeps.spec import Sweep

_RECORD_KEYS = {
    "status.json": (
        "state", "phase", "pid", "host", "job_id", "submission", "deaths", "step", "tokens_per_s", "loss_nats",
    ),
    "memory.json": ("micro_batch_tokens", "note"),
    "env.json": ("git_commit", "git_dirty_hash"),
    "failure.json": ("stage", "message", "traceback", "submission"),
    "result.json": (
        "status", "step", "tokens", "loss_nats", "bits_per_byte", "tokens_per_concept", "tokens_per_concept_train",
        "epochs", "params", "wall_s", "device", "reason",
    ),
}  # fmt: skip

CLAIM = ".claim"  # the worker's lease; `train` takes its own lock inside it


@dataclass(frozen=True)
class StoredRun:
    """A planned run as the sweep directory holds it."""

    run_id: str
    path: Path
    row: Mapping[str, Any]
    in_plan: bool

    @functools.cached_property
    def config(self) -> RunConfig:
        """Its config, read when it is first asked for: a look at ten thousand runs needs none.

        Raises:
            UserError: not one that this version reads.
        """
        where = f"{self.path.parent / 'plan.parquet'}: {self.run_id}"
        return parse(RunConfig, json.loads(self.row["config"]), where)

    @property
    def n_steps(self) -> int:
        """Optimizer steps."""
        return int(self.row["n_steps"])

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return int(self.row["tokens"])

    @property
    def flops_planned(self) -> float:
        """Planned training FLOPs: the longest run is the one that costs most."""
        return float(self.row["flops_train_planned"])

    @property
    def hours(self) -> float:
        """Hours that its training is estimated to take; not a number where the device is not known."""
        found = self.row.get("hours_estimated")
        return math.nan if found is None else float(found)

    @property
    def family(self) -> str | None:
        """Run id of the longest of the runs that share its trunk; None for a run alone (`sweeps.trunks`)."""
        return self.row.get("trunk_run")

    @property
    def n_stable_steps(self) -> int:
        """Steps after which it leaves the trunk."""
        return int(self.row.get("n_stable_steps") or 0)

    @property
    def flops_marginal(self) -> float:
        """Planned training FLOPs without those of steps that it has from a longer run."""
        return self.flops_planned * (1 - int(self.row.get("tokens_shared") or 0) / self.tokens)


@dataclass(frozen=True)
class StoredSweep:
    """A sweep directory, read whole."""

    path: Path
    spec: "Sweep"
    runs: tuple[StoredRun, ...]
    asked: Mapping[str, int | None] = field(default_factory=dict)  # of evaluate.json

    @property
    def tasks(self) -> Mapping[str, int | None]:
        """What every finished run is evaluated on -> items of it, at most: tasks of the sweep file, and those asked for since."""
        return {**dict.fromkeys(self.spec.evaluate), **self.asked}

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
    rows["hours_estimated"], rows["memory_estimated"] = _estimates(plan)
    import pandas as pd

    old = _read_plan(sweep_dir).to_pandas() if (sweep_dir / "plan.parquet").exists() else None
    known = set(old["run_id"]) if old is not None else set()
    planned = set(rows["run_id"])
    if old is not None:
        kept = old[~old["run_id"].isin(list(planned))].assign(in_plan=False)
        if len(kept):
            rows = pd.concat([rows, kept], ignore_index=True)
    write_atomic(sweep_dir / "sweep.yaml", plan.sweep.to_yaml())
    write_atomic(sweep_dir / "plan.parquet", rows.to_parquet(index=False))
    return Saved(added=tuple(sorted(planned - known)), removed=tuple(sorted(known - planned)))


def _estimates(plan: "Plan") -> tuple[list[float], list[float]]:
    """Hours and bytes of each run on the sweep's device; not a number where the device is not known."""
    from sweeps.costs import costed

    found = costed(plan).runs
    if not found:
        return [math.nan] * len(plan), [math.nan] * len(plan)
    return [run.hours for run in found], [run.memory.total for run in found]


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
    columns = _read_plan(sweep_dir).to_pydict()
    # Not `from_yaml`, which wants every corpus file present: this directory must be readable where only it is seen.
    spec = parse(Sweep, load_yaml(sweep_dir / "sweep.yaml"), str(sweep_dir / "sweep.yaml"))
    runs = []
    for values in zip(*columns.values()):
        row = dict(zip(columns, values))
        runs.append(StoredRun(row["run_id"], sweep_dir / row["run_id"], row, bool(row["in_plan"])))
    return StoredSweep(sweep_dir, spec, tuple(runs), _read_asked(sweep_dir))


def save_asked(sweep_dir: Path, tasks: Mapping[str, int | None]) -> None:
    """Write which tasks every finished run is evaluated on beside those of the sweep file; an empty mapping takes them back."""
    write_json(sweep_dir / "evaluate.json", {"schema": SCHEMA_VERSION, "tasks": dict(tasks)})


def _read_asked(sweep_dir: Path) -> dict[str, int | None]:
    path = sweep_dir / "evaluate.json"
    if not path.exists():
        return {}
    tasks = read_json(path).get("tasks")
    if not isinstance(tasks, dict) or not all(limit is None or type(limit) is int for limit in tasks.values()):
        raise UserError(f"{path}: no tasks with their numbers of items; delete it and evaluate the sweep again")
    return tasks


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


def _read_plan(sweep_dir: Path) -> "pa.Table":
    # Not through pandas, whose import alone takes as long as looking at thousands of runs.
    import pyarrow.parquet as pq

    path = sweep_dir / "plan.parquet"
    try:
        table = pq.ParquetFile(path).read()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as parquet ({error}); delete it and submit the sweep again") from None
    if absent := {"run_id", "config", "design", "in_plan", "budget", "flops_train_planned"} - set(table.column_names):
        raise UserError(f"{path}: no column {', '.join(sorted(absent))}; delete it and submit the sweep again")
    return table


def read_record(path: Path | str) -> dict[str, Any] | None:
    """`status.json`, `result.json`, `failure.json` or `env.json` of a run; None where the file is not there.

    Raises:
        UserError: not readable, of another version, or without a key that its readers need.
    """
    # Read at once: thousands of runs are looked at, and a file may go between two looks (a run that starts again).
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            record = json.loads(file.read())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        if str(path).endswith("/status.json"):
            return None  # a heartbeat that a failing disk has torn: the run's next holder writes it anew
        record = read_json(Path(path))  # tells what is wrong with it
    if not isinstance(record, dict):
        record = read_json(Path(path))
    if record.get("schema") != SCHEMA_VERSION:
        raise UserError(f"{path}: schema {record.get('schema')!r}, this version reads {SCHEMA_VERSION}")
    if absent := [key for key in _RECORD_KEYS[str(path).rpartition("/")[2]] if key not in record]:
        raise UserError(f"{path}: no key {', '.join(absent)}; delete it and submit the sweep again")
    return record
