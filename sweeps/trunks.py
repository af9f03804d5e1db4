"""Which runs of a sweep share a trunk, and from whom a run can go on.

A family are the runs that differ in nothing but their length and decay (`RunConfig.trunk`). They are ordered by their number of
stable steps; the last is trained whole, and keeps its state where each of the others begins to decay. Those train their decay
alone, once that state is there. Where it will not come, because the longer run has failed, was cancelled or has passed that
step before they were planned, the next in order takes its place: a run never depends on another to be right, only to be cheap.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sweeps.store import StoredRun

if TYPE_CHECKING:
    from sweeps.plan import PlannedRun


@dataclass(frozen=True)
class Start:
    """How a run can begin.

    Attributes:
        ready: whether it can be taken now; else a longer run of its family is still on the way to where it branches.
        trunk: the run that it goes on from; None for a run that is trained alone, or goes on from its own checkpoint.
    """

    ready: bool
    trunk: StoredRun | None = None


def families(runs: Iterable[StoredRun]) -> Mapping[str, tuple[StoredRun, ...]]:
    """The planned runs that share a trunk, by the run id of the longest; in the order in which they leave the trunk."""
    found: dict[str, list[StoredRun]] = {}
    for run in runs:
        if run.in_plan and run.family is not None:
            found.setdefault(run.family, []).append(run)
    return {name: tuple(sorted(members, key=_order)) for name, members in found.items() if len(members) > 1}


def _order(run: StoredRun) -> tuple[int, int, str]:
    return run.n_stable_steps, run.n_steps, run.run_id


def steps_to_keep(run: StoredRun, family: Sequence[StoredRun]) -> tuple[int, ...]:
    """Steps at which other runs of the family, which have no result yet, leave the trunk before this one does."""
    before = [other for other in family if _order(other) < _order(run)]
    return tuple(sorted({o.n_stable_steps for o in before if not (o.path / "result.json").exists()}))


def start_of(run: StoredRun, family: Sequence[StoredRun], is_expected: Callable[[StoredRun], bool]) -> Start:
    """How a run can begin.

    Args:
        run: to be trained.
        family: of the run, itself included; empty for a run alone.
        is_expected: whether a run will be trained, or is being trained.
    """
    if not family or has_begun(run):
        return Start(ready=True)
    longer = [other for other in family if _order(other) > _order(run)]
    for other in reversed(longer):
        if kept_state(other, run).exists():
            return Start(ready=True, trunk=other)
    if any(is_expected(other) and not _is_past(other, run) for other in longer):
        return Start(ready=False)
    return Start(ready=True)


def _is_past(trunk: StoredRun, run: StoredRun) -> bool:
    """Whether a trunk stands where `run` would leave it or behind, so that it will not keep that state any more."""
    steps = [int(path.stem.removeprefix("step-")) for path in (trunk.path / "checkpoints").glob("step-*.pt")]
    return max(steps, default=0) >= run.n_stable_steps


def kept_state(trunk: StoredRun, run: StoredRun) -> Path:
    """The file that `trunk` keeps for `run`."""
    return trunk.path / "branches" / f"step-{run.n_stable_steps:08d}.pt"


def has_begun(run: StoredRun) -> bool:
    """Whether a run has a checkpoint of its own."""
    return any((run.path / "checkpoints").glob("step-*.pt"))


def tidy(family: Sequence[StoredRun]) -> None:
    """Delete the states that no run of the family needs any more."""
    needed = {run.n_stable_steps for run in family if not (run.path / "result.json").exists()}
    for run in family:
        for path in (run.path / "branches").glob("step-*.pt"):
            if int(path.stem.removeprefix("step-")) not in needed:
                path.unlink(missing_ok=True)


def shared_steps(runs: Sequence["PlannedRun"], keys: Sequence[Hashable | None]) -> list[tuple[str | None, int]]:
    """The family of each planned run, and the steps that it has from a longer run of it.

    Args:
        runs: planned runs.
        keys: what is equal for runs that differ in length and decay alone; None for a run that shares nothing.

    Returns:
        Run id of the longest run of its family, None where there is no other; and steps, 0 for that one.
    """
    members: dict[Hashable, list[PlannedRun]] = {}
    for run, key in zip(runs, keys):
        if key is not None:
            members.setdefault(key, []).append(run)
    found: dict[str, tuple[str | None, int]] = {}
    for family in members.values():
        head = max(family, key=lambda run: (run.config.n_stable_steps, run.config.n_steps, run.run_id))
        if len(family) > 1:
            found |= {run.run_id: (head.run_id, 0 if run is head else run.config.n_stable_steps) for run in family}
    return [found.get(run.run_id, (None, 0)) for run in runs]
