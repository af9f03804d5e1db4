"""What is asked of a scheduler for each run: time and memory from the plan's estimates, with a margin; runs packed into tasks.

A task works on the runs of its group, the longest that is free first; runs of one trunk count as one. So what a group needs is
what its largest runs need, and runs that need about the same time make a group: an array of a scheduler has one time limit for
all its tasks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sweeps.spec import ClusterConfig
from sweeps.store import StoredRun

TIME_MARGIN, START_MINUTES = 1.5, 10.0  # estimates are good to a third; a start reads the corpus and compiles
MEMORY_MARGIN, PROCESS_BYTES = 1.3, 2 << 30  # of the host: the libraries, the corpus
UNKNOWN_MINUTES = 240  # where nothing is known of the device
# Limits that are asked for. Two neighbours differ by about two: fewer groups, and no task asks for more than twice its need.
_LADDER = (15, 30, 60, 120, 240, 480, 720, 1440, 2880, 4320, 7200, 10080, 20160, 43200)


@dataclass(frozen=True)
class Group:
    """Runs that are worked on by tasks of equal resources.

    Attributes:
        run_ids: longest first.
        n_tasks: tasks that work on them.
        minutes: time limit of a task.
        memory_bytes: memory of a task on each of its nodes; None leaves it to the cluster.
    """

    run_ids: tuple[str, ...]
    n_tasks: int
    minutes: int
    memory_bytes: int | None


def group_runs(runs: Sequence[StoredRun], config: ClusterConfig) -> list[Group]:
    """The runs in groups of equal time limits, longest first.

    Args:
        runs: runs to be trained.
        config: `time` and `memory` decide where they are given.
    """
    size = config.runs_per_task
    # Runs that share a trunk stay together: who trains the trunk trains what branches from it.
    together: dict[str, list[StoredRun]] = {}
    for run in sorted(runs, key=lambda run: (-run.hours, -run.flops_planned)):
        together.setdefault(run.family or run.run_id, []).append(run)
    units = sorted(together.values(), key=lambda unit: -sum(run.hours for run in unit))
    tasks = [[run for unit in units[i : i + size] for run in unit] for i in range(0, len(units), size)]
    by_limit: dict[int, list[Sequence[StoredRun]]] = {}
    for task in tasks:
        by_limit.setdefault(_minutes(task, config), []).append(task)
    return [
        Group(
            tuple(run.run_id for task in found for run in task),
            len(found),
            minutes,
            _memory([run for task in found for run in task], config),
        )
        for minutes, found in sorted(by_limit.items(), reverse=True)
    ]


def _minutes(task: Sequence[StoredRun], config: ClusterConfig) -> int:
    """Time limit of a task; a run that needs longer goes on after a requeue."""
    if config.time is not None:
        return config.time_minutes * len({run.family or run.run_id for run in task})
    hours = sum(run.hours for run in task)
    wanted = UNKNOWN_MINUTES * len(task) if math.isnan(hours) else 60 * hours * TIME_MARGIN + START_MINUTES
    limit = config.max_minutes or _LADDER[-1]
    return min(next((step for step in _LADDER if step >= wanted), _LADDER[-1]), limit)


def _memory(runs: Sequence[StoredRun], config: ClusterConfig) -> int | None:
    if config.memory != "auto":
        return config.memory_bytes
    found = [float(run.row.get("memory_estimated") or math.nan) for run in runs]
    if any(math.isnan(x) for x in found):
        return None
    # Runs on a GPU hold their tensors there; the host has the weights as they are built, and rank 0 what a checkpoint holds.
    # A scheduler's limit is that of a node: of all ranks there.
    return int((MEMORY_MARGIN * max(found) + PROCESS_BYTES) * config.runs_at_once * config.n_ranks_per_node)
