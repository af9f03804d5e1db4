"""One submission: submitit jobs, each a supervisor of workers on the sweep directory. The only importer of submitit.

Jobs get the frozen code of the sweep first on their path, and what they need of time and memory from the plan's estimates.
"""

import contextlib
import math
import os
import pickle
import shlex
import signal
import socket
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths
from submitit.helpers import DelayedSubmission

from dlcm.errors import UserError
from dlcm.record import read_json, write_json
from sweeps.clusters import Target
from sweeps.code import freeze_code
from sweeps.jobs import (
    Job,
    append_jobs,
    job_key,
    job_states,
    jobs_folder,
    max_array_size,
    process_created,
    read_jobs,
)
from sweeps.resources import Group, group_runs
from sweeps.store import StoredRun, StoredSweep
from sweeps.supervisor import supervise
from sweeps.worker import THREAD_VARIABLES, thread_environment

# submitit wants a limit for local jobs; ours end when no run is left.
_LOCAL_LIMIT_MIN = 60 * 24 * 365
# A long run goes through many time-outs: each requeue resumes from its checkpoint. This many without an end is a fault.
_MAX_TIMEOUTS = 50
_SIGNAL_LEAD_S = 120


@dataclass(frozen=True)
class Worker:
    """The job: pickled by submitit, and put back into the queue as it is after a time-out or a preemption.

    Attributes:
        sweep_dir: directory of the sweep.
        submission: number of the submission.
        threads: CPU threads of one run.
        root: folder of the frozen code.
        group: file with the ids of the runs that it may take; all of them where absent.
        max_runs: runs that it takes.
        at_once: how many of them at the same time.
        grace_s: how long a checkpoint may take once it is told to stop.
        n_ranks: processes of a run; with more than one, each task of the job calls this, and there is no supervisor.
    """

    sweep_dir: Path
    submission: int
    threads: int
    root: Path
    group: Path | None = None
    max_runs: int | None = None
    at_once: int = 1
    grace_s: float = 60.0
    n_ranks: int = 1

    def __call__(self) -> dict[str, list[str]]:
        """Work on the sweep directory until no run is left for this worker."""
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's: it asks for `checkpoint`, requeues the job and leaves
        if self.n_ranks > 1:
            return self._as_rank(requeue)
        payload = {
            "sweep_dir": str(self.sweep_dir),
            "submission": self.submission,
            "threads": self.threads,
            "root": str(self.root),
            "job_id": submitit.JobEnvironment().job_id,
            "only": None if self.group is None else str(self.group),
            "max_runs": None if self.max_runs is None else math.ceil(self.max_runs / self.at_once),
        }
        outcome = supervise(payload, self.at_once, grace_s=self.grace_s)
        if outcome.stopped == "SIGUSR2" and callable(requeue):
            requeue(signal.SIGUSR2, None)
        return outcome.report

    def _as_rank(self, requeue: Any) -> dict[str, list[str]]:
        from sweeps.ranks import work_as_rank

        report, stopped = work_as_rank(
            self.sweep_dir,
            submission=self.submission,
            threads=self.threads,
            root=self.root,
            job_id=submitit.JobEnvironment().job_id,
            only=None if self.group is None else read_json(self.group)["run_ids"],
            max_runs=self.max_runs,
        )
        if stopped == "SIGUSR2" and callable(requeue):
            requeue(signal.SIGUSR2, None)
        return report

    def checkpoint(self) -> DelayedSubmission:
        """What submitit requeues: the same worker; what is done and what is not stands in the run directories."""
        return DelayedSubmission(self)


@dataclass(frozen=True)
class Submitting:
    """One submission while it is made. The sweep's submit lock is held."""

    sweep: StoredSweep
    target: Target
    number: int
    todo: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    hours: Mapping[str, float] = field(default_factory=dict)  # estimates in place of the plan's

    def record(self, job_ids: Sequence[str]) -> None:
        """Add jobs to jobs.jsonl."""
        slurm = self.target.scheduler == "slurm"
        append_jobs(
            self.sweep.path,
            [
                Job(
                    submission=self.number,
                    cluster=self.target.scheduler,
                    job_id=job_id,
                    host=socket.gethostname(),
                    created=None if slurm else process_created(int(job_id)),
                    submitted_at=time.time(),
                    options={"name": self.target.name, "settings": dict(self.settings)},
                )
                for job_id in job_ids
            ],
        )

    def local(self) -> list[str]:
        """Workers on this machine, as many as run at once."""
        config = self.target.config
        if config.nodes > 1:
            raise UserError(
                f"cluster.nodes = {config.nodes}, but this machine is one node; use --cluster slurm, or lower it"
            )
        n_workers = min(config.concurrency, len(self.todo))
        gpus = _local_gpus(config.gpus, n_workers)
        worker = self._worker(self._group_file("all", self.todo), None, 60.0)
        executor = submitit.LocalExecutor(jobs_folder(self.sweep.path, self.number))
        job_ids = []
        for mine in gpus:
            executor.update_parameters(
                timeout_min=_LOCAL_LIMIT_MIN,
                gpus_per_node=len(mine),
                visible_gpus=mine,
                tasks_per_node=config.n_ranks_per_node,
            )
            with (
                thread_environment(worker.threads),
                _code_first(worker.root),
                _signals_ignored(signal.SIGINT, signal.SIGHUP),
            ):
                job_id = executor.submit(worker).job_id
            self.record([job_id])
            job_ids.append(job_id)
        return job_ids

    def slurm(self) -> list[str]:
        """Job arrays: one, or more where runs need different times or the cluster's arrays are short."""
        config, folder = self.target.config, jobs_folder(self.sweep.path, self.number)
        wanted = set(self.todo)
        runs = [run for run in self.sweep.runs if run.run_id in wanted]
        groups = group_runs([self._estimated(run) for run in runs], config)
        limit = max_array_size()
        n_arrays = sum(math.ceil(group.n_tasks / limit) for group in groups)
        parallel = max(1, config.array_parallelism // n_arrays)  # the cap holds for each array apart
        try:
            executor = submitit.SlurmExecutor(folder, max_num_timeout=_MAX_TIMEOUTS)
        except RuntimeError:
            raise UserError(
                "--cluster slurm: no srun on PATH, so this is no SLURM machine; use --cluster local"
            ) from None
        job_ids: list[str] = []
        for k, group in enumerate(groups):
            lead = min(_SIGNAL_LEAD_S, group.minutes * 60 // 4)
            worker = self._worker(self._group_file(f"group-{k}", group.run_ids), config.runs_per_task, lead * 0.75)
            executor.update_parameters(**_slurm_parameters(self.sweep, self.target, worker, group, parallel, lead))
            for start in range(0, group.n_tasks, limit):
                ids = _sbatch(executor, worker, min(limit, group.n_tasks - start))
                self.record(ids)
                job_ids += ids
        return job_ids

    def _estimated(self, run: StoredRun) -> StoredRun:
        """The run with its own estimate; it is then only evaluated, and does not go with the others of its trunk."""
        if run.run_id not in self.hours:
            return run
        return replace(run, row={**run.row, "hours_estimated": self.hours[run.run_id], "trunk_run": None})

    def _worker(self, group: Path, max_runs: int | None, grace_s: float) -> Worker:
        config = self.target.config
        root = freeze_code(self.sweep.path)
        return Worker(
            self.sweep.path,
            self.number,
            config.threads,
            root,
            group,
            max_runs,
            config.runs_at_once,
            grace_s,
            config.n_ranks,
        )

    def _group_file(self, name: str, run_ids: Sequence[str]) -> Path:
        # A file, not a part of the job: thousands of jobs would each carry thousands of names.
        path = jobs_folder(self.sweep.path, self.number) / f"{name}.json"
        write_json(path, {"run_ids": list(run_ids)})
        return path


@contextlib.contextmanager
def _code_first(root: Path) -> Generator[None]:
    """Processes started inside import the packages from `root`, whatever their working directory holds."""
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONSAFEPATH")}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [before["PYTHONPATH"]])])
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _local_gpus(per_run: int, n_workers: int) -> list[tuple[int, ...]]:
    """GPUs of each local worker, dealt round; submitit hides all others from it."""
    if per_run == 0:
        return [()] * n_workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if visible and all(part.strip().isdigit() for part in visible.split(",")):
        found = [int(part) for part in visible.split(",")]
    else:
        found = sorted(int(path.name.removeprefix("nvidia")) for path in Path("/dev").glob("nvidia[0-9]*"))
    if len(found) < per_run:
        raise UserError(
            f"cluster.gpus = {per_run}, but this machine shows {len(found)}; lower it or use --cluster slurm"
        )
    return [tuple(found[(i * per_run + j) % len(found)] for j in range(per_run)) for i in range(n_workers)]


@contextlib.contextmanager
def _signals_ignored(*signals: signal.Signals) -> Generator[None]:
    """Processes started inside ignore `signals`: Ctrl-C or a closed terminal ends the watching, not the work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _sbatch(executor: submitit.SlurmExecutor, worker: Worker, n_tasks: int) -> list[str]:
    try:
        with executor.batch():
            jobs = [executor.submit(worker) for _ in range(n_tasks)]
    except (FailedJobError, FailedSubmissionError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()] or [str(error)]
        raise UserError(
            f"sbatch refused the job: {lines[-1]} (partition, account, time and memory: `cluster` block, or --set)"
        ) from None
    return [job.job_id for job in jobs]


def _slurm_parameters(
    sweep: StoredSweep, target: Target, worker: Worker, group: Group, parallel: int, lead: int
) -> dict[str, Any]:
    config = target.config
    exports = [f"export {name}={worker.threads}" for name in THREAD_VARIABLES]
    exports += [f'export PYTHONPATH={shlex.quote(str(worker.root))}"${{PYTHONPATH:+:$PYTHONPATH}}"']
    exports += ["export PYTHONSAFEPATH=1"]  # the working directory may hold another checkout
    per_node = config.n_ranks_per_node
    cpus = max(math.ceil(config.cpus_per_run / per_node), worker.threads) * config.runs_at_once
    optional = {
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "gpus_per_node": config.gpus or None,
        "mem": f"{group.memory_bytes >> 20}M" if group.memory_bytes else None,
    }
    return {
        "job_name": f"dlcm-{sweep.name}",
        "time": group.minutes,
        "nodes": config.nodes,
        "ntasks_per_node": per_node,
        # Ranks that wait for one that has ended with an error would hold the nodes for nothing.
        "srun_args": ["--kill-on-bad-exit=1"],
        "cpus_per_task": cpus,
        "array_parallelism": parallel,
        "signal_delay_s": lead,
        "setup": [*exports, *config.setup],
        **{name: value for name, value in optional.items() if value is not None},
    }


def worker_faults(sweep_dir: Path, submission: int) -> dict[str, str]:
    """Why workers of a submission ended before the work did: job id -> the last line of what they said."""
    faults = {}
    states = job_states(sweep_dir)
    for job in read_jobs(sweep_dir):
        if job.submission != submission or job.cluster == "debug" or states[job_key(job)].state != "gone":
            continue
        paths = JobPaths(jobs_folder(sweep_dir, submission), job_id=job.job_id, task_id=0)
        if not paths.result_pickle.exists():
            faults[job.job_id] = f"ended without a word: killed, out of memory or out of time ({paths.stderr})"
            continue
        outcome, answer = pickle.loads(paths.result_pickle.read_bytes())
        if outcome == "error":
            lines = [line for line in answer.splitlines() if line.strip()]
            faults[job.job_id] = lines[-1].strip() if lines else "unknown error"
    return faults
