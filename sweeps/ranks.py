"""One run over several processes: rank 0 is the worker, the others train what it says.

Every task of the job calls `work_as_rank`. Rank 0 claims runs and does all that a worker does; the others wait for the name of a
run, train it with rank 0, and wait again. What befalls all ranks alike (a wrong directory, a cancel, a signal) ends the run and
the job goes on. What befalls one alone ends the job, because nobody knows what the others are in the middle of: the run is then
lost, and goes on from its last checkpoint when it is sent out again.
"""

import signal
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dlcm.errors import UserError
from sweeps.code import check_code
from sweeps.store import load_sweep
from sweeps.worker import work


def work_as_rank(
    sweep_dir: Path,
    *,
    submission: int,
    threads: int,
    root: Path,
    job_id: str,
    only: Sequence[str] | None,
    max_runs: int | None,
) -> tuple[dict[str, list[str]], str | None]:
    """Be a rank of a job until no run is left; the arguments are those of `sweeps.worker.work`.

    Returns:
        Runs by what became of them (on rank 0), and the signal that told the job to stop, if one did.
    """
    import torch

    from dlcm.distributed import joined

    check_code(root)
    torch.set_num_threads(threads)
    stopping, told = threading.Event(), []

    def stop(number: int, *_: Any) -> None:
        told.append(signal.Signals(number).name)
        stopping.set()

    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, stop)
    with joined() as ranks:
        if not ranks.is_main:
            _follow(sweep_dir, ranks)
            return {}, None
        report = work(
            sweep_dir,
            submission=submission,
            max_runs=max_runs,
            only=only,
            job_id=job_id,
            stop=stopping.is_set,
            announce=ranks.tell,
        )
        ranks.tell(None)
    return asdict(report), told[0] if told else None


def _follow(sweep_dir: Path, ranks: Any) -> None:
    from dlcm.train import StopTraining, train

    while (message := ranks.tell()) is not None:
        run = load_sweep(sweep_dir).run(message.pop("run_id"))
        try:
            train(run.config, run.path, **message)
        except (UserError, StopTraining):
            continue  # rank 0 has the same, and records it
