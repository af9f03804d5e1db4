"""The jobs that were submitted for a sweep, and whether each is still alive.

Jobs are workers: each takes runs from the sweep directory until none is left. A local job is a process, known by its
id and the time it was created (ids are used again); SLURM is asked with `squeue`, which answers without accounting.
"""

import contextlib
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from dlcm.errors import UserError
from dlcm.record import is_locked, read_metrics

Life = Literal["pending", "running", "gone", "unknown"]

_SQUEUE_TIMEOUT_S = 20.0
_SACCT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Job:
    """One line of jobs.jsonl."""

    submission: int
    cluster: str
    job_id: str
    host: str
    created: float | None  # of a local job's process, seconds since the epoch
    submitted_at: float
    options: Mapping[str, Any] = field(default_factory=dict)
    schema: int = 1


@dataclass(frozen=True)
class JobState:
    """Whether a job is alive."""

    job_id: str
    submission: int
    cluster: str
    state: Life


def check_submit(concurrency: int | None, threads: int | None, runs_per_task: int | None) -> None:
    """Refuse numbers that make no sense.

    Raises:
        UserError: a number below 1.
    """
    for name, value in (("concurrency", concurrency), ("threads", threads), ("runs-per-task", runs_per_task)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")


def job_key(job: Job | JobState) -> str:
    """Name of a job among all of a sweep; a job id alone may come back."""
    return f"{job.submission}:{job.job_id}"


def read_jobs(sweep_dir: Path) -> list[Job]:
    """Every job ever submitted for this sweep, oldest first.

    Raises:
        UserError: a line of jobs.jsonl that is not a job.
    """
    path = sweep_dir / "jobs.jsonl"
    jobs = []
    # A torn last line is a submit that was killed while writing: its job, if any, is known by its heartbeats.
    for number, row in enumerate(read_metrics(path, running=True), 1):
        try:
            jobs.append(Job(**row))
        except TypeError as error:
            raise UserError(f"{path}:{number}: not a job ({error}); delete the line") from None
    return jobs


def append_jobs(sweep_dir: Path, jobs: Iterable[Job]) -> None:
    """Add jobs to jobs.jsonl, all in one write."""
    text = "".join(json.dumps(asdict(job)) + "\n" for job in jobs)
    with (sweep_dir / "jobs.jsonl").open("ab") as file:
        file.write(text.encode())


def job_states(sweep_dir: Path) -> dict[str, JobState]:
    """Ask the kernel or the scheduler about each job; where it is silent a job is `unknown`, never `gone`."""
    jobs = read_jobs(sweep_dir)
    slurm = _squeue([job.job_id for job in jobs if job.cluster == "slurm"])
    states = {}
    for job in jobs:
        life = slurm[job.job_id] if job.cluster == "slurm" else _process_life(job, sweep_dir)
        states[job_key(job)] = JobState(job.job_id, job.submission, job.cluster, life)
    return states


def process_created(pid: int) -> float | None:
    """When a process was created, seconds since the epoch; none if it is gone or a zombie."""
    import psutil

    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return process.create_time()
    return None


def jobs_folder(sweep_dir: Path, submission: int) -> Path:
    """Where the scheduler's files of a submission lie: one folder each, because process ids come back."""
    return sweep_dir / "jobs" / f"{submission:04d}"


def _process_life(job: Job, sweep_dir: Path) -> Life:
    if job.host != socket.gethostname():
        return "unknown"
    if job.cluster == "debug":  # the process may be a notebook that goes on long after the work
        return "running" if is_locked(jobs_folder(sweep_dir, job.submission)) else "gone"
    created = process_created(int(job.job_id))
    alive = created is not None and job.created is not None and abs(created - job.created) < 1.0
    return "running" if alive else "gone"


def _squeue(ids: list[str]) -> dict[str, Life]:
    if not ids:
        return {}
    if shutil.which("squeue") is None:
        return dict.fromkeys(ids, "unknown")
    parents = sorted({i.split("_")[0] for i in ids})
    command = ["squeue", "--noheader", "--array", f"--jobs={','.join(parents)}", "--format=%i|%T"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SQUEUE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return dict.fromkeys(ids, "unknown")
    # A job that the controller has forgotten, asked for alone, is an error of squeue and an answer to us.
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return dict.fromkeys(ids, "unknown")
    known: dict[str, Life] = {}
    for line in answer.stdout.splitlines():
        job_id, _, state = line.strip().partition("|")
        known[job_id] = "pending" if state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "CONFIGURING") else "running"
    return {job_id: known.get(job_id, "gone") for job_id in ids}


def end_reasons(ids: Iterable[str]) -> dict[str, str]:
    """Why jobs ended, by `sacct`: job id -> its word (NODE_FAIL, TIMEOUT, OUT_OF_MEMORY, ...). Empty without accounting."""
    wanted = sorted(set(ids))
    if not wanted or shutil.which("sacct") is None:
        return {}
    command = [
        "sacct",
        "--noheader",
        "--parsable2",
        "--allocations",
        "--format=JobID,State",
        f"--jobs={','.join(wanted)}",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SACCT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = (line.strip().partition("|") for line in answer.stdout.splitlines())
    # An end that says no more than that the process failed, which we know, is no reason.
    return {i: state for i, _, state in pairs if i in wanted and state not in ("", "FAILED", "RUNNING", "PENDING")}


def cancel_jobs(jobs: Iterable[Job], states: Mapping[str, JobState]) -> list[str]:
    """End live jobs: SLURM's with scancel, local ones with SIGKILL to their processes. Returns the ids that were ended.

    Raises:
        UserError: scancel failed, or a local job lives on another machine.
    """
    live = [job for job in jobs if states[job_key(job)].state != "gone"]
    slurm = [job.job_id for job in live if job.cluster == "slurm"]
    if slurm:
        try:
            answer = subprocess.run(["scancel", *slurm], capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"scancel: {error}; cancel the jobs {', '.join(slurm)} where SLURM answers") from None
        if answer.returncode:
            raise UserError(f"scancel {' '.join(slurm)}: {answer.stderr.strip()}")
    for job in live:
        if job.cluster != "slurm":
            if job.host != socket.gethostname():
                raise UserError(f"job {job.job_id} runs on {job.host}: cancel it there")
            kill_tree(int(job.job_id))
    return [job.job_id for job in live]


def kill_tree(pid: int) -> None:
    """Kill a process and its descendants."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        # The parent first: submitit's controller would otherwise see its task end and tidy up half-way.
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def max_array_size() -> int:
    """Largest number of tasks in one job array of this cluster (SLURM: MaxArraySize; its default is 1001)."""
    try:
        answer = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return 1001
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", answer.stdout, re.MULTILINE)
    return int(match.group(1)) if match else 1001
